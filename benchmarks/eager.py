"""What a call outside of jit costs, where the arrays are small."""

from collections.abc import Iterator

import jax.numpy as jnp
import optax

import gradnorm_jax as gn
from benchmarks import limits, trees
from benchmarks.comparing import timed
from benchmarks.options import Options
from benchmarks.rows import Row
from benchmarks.timing import Arm

LEAVES = 100


def rows(options: Options) -> Iterator[Row]:
    """Compares the global norm of small leaves with Optax's."""
    shapes = trees.small(leaves=LEAVES, entries=10)
    grads = trees.fill(shapes, jnp.float32)
    arms = {
        "ours": Arm(lambda: gn.global_norm(grads)),
        "optax": Arm(lambda: optax.tree.norm(grads)),
    }
    times = options.in_turn(arms)
    row = Row(
        "eager",
        "norm outside of jit",
        trees.label("small", shapes),
        "float32",
        "optax",
        limits=limits.eager(options.device),
    )
    yield timed(row, (times["ours"], times["optax"]))
