"""Differential privacy: sums of clipped gradients, noise, and what it is worth."""

from gradnorm_jax.privacy.accounting import epsilon, noise_multiplier_for
from gradnorm_jax.privacy.noise import (
    NoiseState,
    add_gaussian_noise,
    differentially_private_aggregate,
)
from gradnorm_jax.privacy.quantile import (
    PrivateQuantile,
    PrivateQuantileState,
    private_quantile,
)
from gradnorm_jax.privacy.sums import (
    per_example_global_norm_clip,
    per_example_layer_norm_clip,
)

__all__ = [
    "NoiseState",
    "PrivateQuantile",
    "PrivateQuantileState",
    "add_gaussian_noise",
    "differentially_private_aggregate",
    "epsilon",
    "noise_multiplier_for",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "private_quantile",
]
