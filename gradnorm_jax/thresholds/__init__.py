"""DECIDE: from the norms seen so far to how large each norm may be.

A threshold never sees a gradient. It is three functions over norms, which come as one
array with an entry for each part (or of shape `()` where there is one part).
"""

from gradnorm_jax.thresholds.levels import ema_band, ema_relative, max_ema, quantile
from gradnorm_jax.thresholds.memory import remembering
from gradnorm_jax.thresholds.memoryless import (
    constant,
    each,
    relative_to_params,
    schedule,
)
from gradnorm_jax.thresholds.moments import moment_ratio, second_moment, z_score
from gradnorm_jax.thresholds.rule import Bound, Context, Memory, Threshold
from gradnorm_jax.thresholds.windows import percentile, rolling_sigma

__all__ = [
    "Bound",
    "Context",
    "Memory",
    "Threshold",
    "constant",
    "each",
    "ema_band",
    "ema_relative",
    "max_ema",
    "moment_ratio",
    "percentile",
    "quantile",
    "relative_to_params",
    "remembering",
    "rolling_sigma",
    "schedule",
    "second_moment",
    "z_score",
]
