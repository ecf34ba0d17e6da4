"""A clip inside an optimizer step that donates parameters and state, of Optax's in it.

A step reads the gradients twice, and reads and writes the parameters and each of the
optimizer's moments: AdamW is charged with 8 times the bytes of the tree, SGD with
momentum with 6. Muon multiplies matrices and is not limited by memory.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import optax

import gradnorm_jax as gn
from benchmarks import limits, trees
from benchmarks.clips import clips
from benchmarks.comparing import compare
from benchmarks.options import DTYPES, Options
from benchmarks.rows import Row
from benchmarks.training import Step

OPTIMIZERS: dict[str, tuple[Callable[[], Any], int | None]] = {
    "AdamW": (lambda: optax.adamw(1e-3), 8),
    "SGD": (lambda: optax.sgd(1e-2, momentum=0.9), 6),
    "Muon": (lambda: optax.contrib.muon(1e-3), None),
}


def rows(options: Options) -> Iterator[Row]:
    """Compares steps of AdamW on every dtype, of SGD and Muon in float32."""
    muon_tree = "gpt2" if options.device != "cpu" else "dense"
    cases = [
        *(("AdamW", "gpt2", dtype) for dtype in DTYPES),
        ("AdamW", "small", jnp.float32),
        ("AdamW", "stacked", jnp.float32),
        ("SGD", "gpt2", jnp.float32),
        ("SGD", "gpt2", jnp.bfloat16),
        ("Muon", muon_tree, jnp.float32),
    ]
    quick = [
        ("AdamW", "gpt2", jnp.float32),
        ("SGD", "gpt2", jnp.float32),
        ("Muon", muon_tree, jnp.float32),
    ]
    for optimizer, tree, dtype in quick if options.quick else cases:
        yield from _clipped(options, optimizer, tree, dtype)
    yield from _watched(options, "gpt2")


def _clipped(options: Options, optimizer: str, tree: str, dtype: Any) -> Iterator[Row]:
    make, times = OPTIMIZERS[optimizer]
    grads = trees.fill(options.shapes(tree), dtype)
    arms = {
        peer: Step(optax.chain(clip, make()), grads).arm()
        for peer, clip in clips().items()
    }
    yield from compare(
        options,
        Row("step", f"clip in {optimizer}", tree, jnp.dtype(dtype).name, ""),
        arms,
        moved=times and times * trees.size(grads),
        limits=lambda peer: limits.step(options.device, optimizer),
    )


def _watched(options: Options, tree: str) -> Iterator[Row]:
    """A clip and a record of the step, of Optax's clip without one."""
    grads = trees.fill(options.shapes(tree), jnp.float32)
    chains = {
        peer: optax.chain(clip, optax.adamw(1e-3)) for peer, clip in clips().items()
    }
    arms = {
        "ours": Step(gn.watch(chains["ours"]), grads).arm(),
        "optax": Step(chains["optax"], grads).arm(),
    }
    yield from compare(
        options,
        Row("step", "watch, clip in AdamW", tree, "float32", ""),
        arms,
        limits=lambda peer: limits.step(options.device, "AdamW"),
    )
