"""Measure gradient norms in JAX, clip by them, and see what they did."""

from typing import TYPE_CHECKING, Any

from gradnorm_jax import norms, shrink, thresholds
from gradnorm_jax._sharding import DistributedNormError
from gradnorm_jax._trees import leaf_names
from gradnorm_jax._typing import AUTO
from gradnorm_jax.checkpoints import attach, detach
from gradnorm_jax.clipping import clip_by_norm
from gradnorm_jax.methods import (
    adaclip,
    adagc,
    adagn,
    adaptive_grad_clip,
    aggc,
    autoclip,
    clip,
    clip_by_block_rms,
    clip_by_ema_norm,
    clip_by_global_norm,
    clip_by_group_norm,
    clip_by_leaf_norm,
    clip_by_quantile,
    clip_by_rolling_sigma,
    clip_by_second_moment,
    clip_by_unit_norm,
    normalize_by_norm,
    smooth_clip,
    zclip,
)
from gradnorm_jax.norms import (
    Granularity,
    Norm,
    global_norm,
    group_norms,
    leaf_norms,
    per_group,
    per_leaf,
    per_unit,
    unit_norms,
    unitwise_norm,
    whole_tree,
)
from gradnorm_jax.privacy import (
    per_example_global_norm_clip,
    per_example_layer_norm_clip,
)
from gradnorm_jax.shrink import Shrink
from gradnorm_jax.skipping import skip_step
from gradnorm_jax.telemetry import (
    ClipMetrics,
    ClipState,
    SkipMetrics,
    SkipState,
    Stats,
    WatchState,
    find,
    scalars,
)
from gradnorm_jax.thresholds import Threshold
from gradnorm_jax.watching import measure, watch
from gradnorm_jax.wrapping import (
    ResetState,
    ResidualState,
    reset_state_every,
    with_residual,
)

if TYPE_CHECKING:
    from gradnorm_jax import monitoring

__version__ = "0.1.0"

__all__ = [
    "AUTO",
    "ClipMetrics",
    "ClipState",
    "DistributedNormError",
    "Granularity",
    "Norm",
    "ResetState",
    "ResidualState",
    "Shrink",
    "SkipMetrics",
    "SkipState",
    "Stats",
    "Threshold",
    "WatchState",
    "adaclip",
    "adagc",
    "adagn",
    "adaptive_grad_clip",
    "aggc",
    "attach",
    "autoclip",
    "clip",
    "clip_by_block_rms",
    "clip_by_ema_norm",
    "clip_by_global_norm",
    "clip_by_group_norm",
    "clip_by_leaf_norm",
    "clip_by_norm",
    "clip_by_quantile",
    "clip_by_rolling_sigma",
    "clip_by_second_moment",
    "clip_by_unit_norm",
    "detach",
    "find",
    "global_norm",
    "group_norms",
    "leaf_names",
    "leaf_norms",
    "measure",
    "monitoring",
    "normalize_by_norm",
    "norms",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "per_group",
    "per_leaf",
    "per_unit",
    "reset_state_every",
    "scalars",
    "shrink",
    "skip_step",
    "smooth_clip",
    "thresholds",
    "unit_norms",
    "unitwise_norm",
    "watch",
    "whole_tree",
    "with_residual",
    "zclip",
]


def __getattr__(name: str) -> Any:
    """Loads the host side when it is first asked for."""
    if name == "monitoring":
        import importlib

        return importlib.import_module("gradnorm_jax.monitoring")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
