"""Measure gradient norms in JAX, clip by them, and see what they did."""

from typing import TYPE_CHECKING, Any

from gradnorm_jax import norms, privacy, shrink, thresholds
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
    Explanation,
    GradientSNR,
    Granularity,
    LeafRule,
    NoiseScale,
    NoiseScaleState,
    Norm,
    RunningAverage,
    SNRState,
    explain_norms,
    global_norm,
    gradient_noise_scale,
    gradient_snr,
    group_norms,
    leaf_norms,
    per_example_norms,
    per_group,
    per_leaf,
    per_unit,
    running_noise_scale,
    running_snr,
    unit_norms,
    unitwise_norm,
    value_and_per_example_norms,
    whole_tree,
)
from gradnorm_jax.privacy import (
    NoiseState,
    PrivateQuantile,
    PrivateQuantileState,
    add_gaussian_noise,
    differentially_private_aggregate,
    per_example_global_norm_clip,
    per_example_layer_norm_clip,
    private_quantile,
)
from gradnorm_jax.shrink import Shrink
from gradnorm_jax.skipping import skip_step
from gradnorm_jax.summing import ClippedGrad, ClippedGrads, SumState, clipped_grad
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
    "ClippedGrad",
    "ClippedGrads",
    "DistributedNormError",
    "Explanation",
    "GradientSNR",
    "Granularity",
    "LeafRule",
    "NoiseScale",
    "NoiseScaleState",
    "NoiseState",
    "Norm",
    "PrivateQuantile",
    "PrivateQuantileState",
    "ResetState",
    "ResidualState",
    "RunningAverage",
    "SNRState",
    "Shrink",
    "SkipMetrics",
    "SkipState",
    "Stats",
    "SumState",
    "Threshold",
    "WatchState",
    "adaclip",
    "adagc",
    "adagn",
    "adaptive_grad_clip",
    "add_gaussian_noise",
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
    "clipped_grad",
    "detach",
    "differentially_private_aggregate",
    "explain_norms",
    "find",
    "global_norm",
    "gradient_noise_scale",
    "gradient_snr",
    "group_norms",
    "leaf_names",
    "leaf_norms",
    "measure",
    "monitoring",
    "normalize_by_norm",
    "norms",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "per_example_norms",
    "per_group",
    "per_leaf",
    "per_unit",
    "privacy",
    "private_quantile",
    "reset_state_every",
    "running_noise_scale",
    "running_snr",
    "scalars",
    "shrink",
    "skip_step",
    "smooth_clip",
    "thresholds",
    "unit_norms",
    "unitwise_norm",
    "value_and_per_example_norms",
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
