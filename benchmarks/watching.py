"""What a record costs: in a step of training, and in one of the optimizer alone."""

from collections.abc import Iterator

import jax.numpy as jnp
import optax

import gradnorm_jax as gn
from benchmarks import limits, trees
from benchmarks.comparing import compare
from benchmarks.options import Options
from benchmarks.rows import Row
from benchmarks.training import Step, Training


def rows(options: Options) -> Iterator[Row]:
    """Compares steps that are watched with the same that are not."""
    shapes = options.shapes("dense")
    tx = optax.chain(gn.clip_by_global_norm(1.0), optax.adamw(1e-3))
    grads = trees.fill(shapes, jnp.float32)
    yield from compare(
        options,
        Row("watch", "watch in training", "dense", "float32", ""),
        {
            "watched": Training(gn.watch(tx), shapes).arm(),
            "not watched": Training(tx, shapes).arm(),
        },
        limits=lambda peer: limits.TRAINING,
        seconds=3 * options.seconds,
    )
    if options.quick:
        return
    yield from compare(
        options,
        Row("watch", "watch in AdamW", "dense", "float32", ""),
        {
            "watched": Step(gn.watch(tx), grads).arm(),
            "not watched": Step(tx, grads).arm(),
        },
    )
