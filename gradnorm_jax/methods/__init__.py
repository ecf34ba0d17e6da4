"""The published clips, one call of the core each; no arithmetic."""

from gradnorm_jax.methods.fixed import (
    adaptive_grad_clip,
    clip,
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_group_norm,
    clip_by_leaf_norm,
    clip_by_unit_norm,
)
from gradnorm_jax.methods.levels import (
    adaclip,
    adagc,
    adagn,
    aggc,
    clip_by_ema_norm,
    clip_by_quantile,
)
from gradnorm_jax.methods.normalizations import normalize_by_norm, smooth_clip
from gradnorm_jax.methods.outliers import (
    autoclip,
    clip_by_rolling_sigma,
    clip_by_second_moment,
    zclip,
)

__all__ = [
    "adaclip",
    "adagc",
    "adagn",
    "adaptive_grad_clip",
    "aggc",
    "autoclip",
    "clip",
    "clip_by_block_rms",
    "clip_by_ema_norm",
    "clip_by_global_norm",
    "clip_by_group_norm",
    "clip_by_leaf_norm",
    "clip_by_quantile",
    "clip_by_rolling_sigma",
    "clip_by_second_moment",
    "clip_by_unit_norm",
    "normalize_by_norm",
    "smooth_clip",
    "zclip",
]
