"""What rows have to keep, by device: all limits in one place.

Limits of a norm and a clip are of trees larger than any cache, which all but `small`
are. Where nothing is asked of a row on a device there is no limit.
"""

from typing import Any

import jax.numpy as jnp

from benchmarks.rows import Limits

TRAINING = Limits(at_most=1.05)  # a watched training step, of one that is not
RULES = Limits(at_most=1.03)  # a rule with memory in a step, of a constant one
COMPILING = Limits(at_most=1.5)  # a clip of 400 leaves
IMPORTING = Limits(ms=60.0)  # once jax and optax are there


def norm(device: str, tree: str, dtype: Any, peer: str) -> Limits:
    """The global norm."""
    torch = peer.startswith("torch")
    if device == "gpu":
        if torch:
            return Limits(at_most=0.9)
        return Limits(
            at_most=0.5 if tree == "small" else 1.0,
            at_least=0.85 if tree == "llama" else None,
        )
    if device != "cpu" or torch:
        return Limits()
    if tree == "small":
        return Limits(at_most=0.8)
    if dtype == jnp.float32:
        return Limits(at_most=1.0, at_least=0.85)
    return Limits(at_least=0.7)


def clip(device: str, tree: str, dtype: Any, peer: str) -> Limits:
    """A clip alone."""
    if device == "gpu" and tree == "small" and peer == "optax":
        return Limits(at_most=0.5)
    if device != "cpu" or peer != "optax":
        return Limits()
    if tree == "small":
        return Limits(at_most=0.8)
    return Limits() if dtype == jnp.float32 else Limits(at_most=0.25)


def statistics(device: str) -> Limits:
    """All statistics at once, of one norm."""
    return Limits(at_most=1.3) if device == "cpu" else Limits()


def step(device: str, optimizer: str) -> Limits:
    """A clip, or a clip and a record, in a step, of Optax's clip in it."""
    at_most = {"cpu": 1.02, "gpu": 1.0}.get(device)
    return Limits(at_most=at_most) if optimizer == "AdamW" else Limits()


def examples(model: str, arm: str) -> Limits:
    """Per-example norms and clipped sums, of the plain gradient."""
    match arm:
        case "norms":
            at_most = 1.15 if model == "cnn" else 1.0
            return Limits(at_most=at_most, memory=1.1, build=3.0)
        case "clip":
            return Limits(at_most=1.25, memory=1.2, build=3.0)
    return Limits()


def eager(device: str) -> Limits:
    """A call outside of jit."""
    return Limits(at_most=1.0) if device == "cpu" else Limits()
