"""How long XLA compiles a clip of 400 leaves, tracing apart, against Optax's."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks import limits, trees
from benchmarks.clips import clips
from benchmarks.comparing import labeled, timed
from benchmarks.options import Options
from benchmarks.rows import Row
from benchmarks.timing import build_cold

ROUNDS = 3


def rows(options: Options) -> Iterator[Row]:
    """Compares what XLA takes, and what tracing takes before."""
    shapes = trees.abstract(options.shapes("many"), jnp.float32)
    xla: dict[str, list[float]] = {"ours": [], "optax": []}
    trace: dict[str, list[float]] = {"ours": [], "optax": []}
    programs = {}
    for _ in range(options.rounds or (1 if options.quick else ROUNDS)):
        for peer, tx in clips().items():
            state = jax.eval_shape(tx.init, shapes)
            program = programs[peer] = build_cold(tx.update, shapes, state)
            xla[peer].append(program.build_s - program.trace_s)
            trace[peer].append(program.trace_s)
    for what, seconds, limit in (
        ("compile a clip", xla, limits.COMPILING),
        ("trace a clip", trace, None),
    ):
        row = Row("compile", what, "many", "float32", "optax")
        row = labeled(options, row)
        if limit:
            row = row._replace(limits=limit)
        yield timed(row, (seconds["ours"], seconds["optax"]))
