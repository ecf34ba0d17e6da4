"""An AdamW step that may be skipped, against one that may not."""

from collections.abc import Iterator

import jax.numpy as jnp
import optax

import gradnorm_jax as gn
from benchmarks import trees
from benchmarks.comparing import compare
from benchmarks.options import Options
from benchmarks.rows import Row
from benchmarks.training import Step


def rows(options: Options) -> Iterator[Row]:
    """Compares `skip_step` around a chain with the bare chain."""
    tx = optax.chain(gn.clip_by_global_norm(1.0), optax.adamw(1e-3))
    skipping = gn.skip_step(tx, gn.thresholds.rolling_sigma(6.0))
    grads = trees.fill(options.shapes("dense"), jnp.float32)
    arms = {
        "skipping": Step(skipping, grads).arm(),
        "no skipping": Step(tx, grads).arm(),
    }
    row = Row("skip", "skip_step in AdamW", "dense", "float32", "")
    yield from compare(options, row, arms)
