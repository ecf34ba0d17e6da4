"""Norms: global, of each leaf, group and unit, and all statistics at once.

A norm has to read its tree once, and is charged with these bytes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradnorm_jax as gn
from benchmarks import limits, torch_peer, trees
from benchmarks.comparing import compare, same_norm
from benchmarks.options import DTYPES, Options
from benchmarks.rows import Row
from benchmarks.timing import Arm, arm

DETAILS = ("grad_max", "grad_zeros", "grad_nonfinite")
TREES = ("gpt2", "small", "huge", "stacked", "llama")
QUICK_TREES = ("gpt2", "small")


def rows(options: Options) -> Iterator[Row]:
    """Compares every kind of norm on every tree that it is made for."""
    for name, dtype in cases(options, QUICK_TREES if options.quick else TREES):
        grads = trees.fill(options.shapes(name), dtype)
        yield from _global(options, name, dtype, grads)
        single = dtype == jnp.float32
        also = options.whole and dtype == jnp.bfloat16
        if name == "gpt2" and (also or (single and not options.quick)):
            yield from _parts(options, name, dtype, grads)
        if single and (name == "gpt2" or (name == "stacked" and not options.quick)):
            yield from _statistics(options, name, grads)


def cases(options: Options, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Returns the trees and dtypes that suffice: the largest tree not in float16.

    It takes long to fill, and a thousand leaves in bfloat16 take Optax most of a minute
    to compile.
    """
    for name in names:
        last = 3 if name not in ("llama", "small") else 2 if options.whole else 1
        if options.quick:
            last = 2 if name == "gpt2" else 1
        for dtype in DTYPES[:last]:
            yield name, dtype


def _global(options: Options, name: str, dtype: Any, grads: Any) -> Iterator[Row]:
    arms = {
        "ours": arm(gn.global_norm, grads),
        "optax": arm(optax.tree.norm, grads),
    }
    if options.torch:
        arms[torch_peer.NORM] = torch_peer.norms(grads)
    yield from compare(
        options,
        Row("norm", "norm", name, jnp.dtype(dtype).name, ""),
        arms,
        moved=trees.size(grads),
        limits=lambda peer: limits.norm(options.device, name, dtype, peer),
        notes=same_norm(arms, trees.true_norm(grads)),
    )


def _parts(options: Options, name: str, dtype: Any, grads: Any) -> Iterator[Row]:
    """Norms of leaves, groups and units, against the formula for each of them."""

    def block(path: str) -> str:
        return path.split("/")[0]

    groups: dict[str, dict[str, jax.Array]] = {}
    for path, leaf in grads.items():
        groups.setdefault(block(path), {})[path] = leaf

    def each_group(grads: Any) -> Any:
        return {
            label: optax.tree.norm({path: grads[path] for path in members})
            for label, members in groups.items()
        }

    pairs: dict[str, tuple[Callable, str, Callable]] = {
        "norm of each leaf": (
            gn.leaf_norms,
            "optax each leaf",
            lambda grads: jax.tree.map(optax.tree.norm, grads),
        ),
        "norm of each block": (
            lambda grads: gn.group_norms(grads, block),
            "optax each block",
            each_group,
        ),
        "norm of each unit": (
            gn.unit_norms,
            "jnp each unit",
            lambda grads: jax.tree.map(_unit_norms, grads),
        ),
    }
    for what, (ours, peer, theirs) in pairs.items():
        arms = {"ours": arm(ours, grads), peer: arm(theirs, grads)}
        if options.torch and ours is gn.leaf_norms:
            arms[torch_peer.NORM] = torch_peer.leaf_norms(grads)
        row = Row("norm", what, name, jnp.dtype(dtype).name, "")
        yield from compare(options, row, arms, moved=trees.size(grads))


def _statistics(options: Options, name: str, grads: Any) -> Iterator[Row]:
    """Norm, largest entry, zeros and non-finite entries of each leaf, of one norm."""

    def everything(grads: Any) -> jax.Array:
        return gn.measure(grads, details=DETAILS).values

    arms: dict[str, Arm] = {
        "ours": arm(everything, grads),
        "our global norm": arm(gn.global_norm, grads),
    }
    yield from compare(
        options,
        Row("norm", "all statistics", name, "float32", ""),
        arms,
        moved=trees.size(grads),
        limits=lambda peer: limits.statistics(options.device),
    )


def _unit_norms(x: jax.Array) -> jax.Array:
    """The norm over the inputs of a kernel, or of a vector, as AGC takes it."""
    axis = 0 if x.ndim > 1 else None
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis))
