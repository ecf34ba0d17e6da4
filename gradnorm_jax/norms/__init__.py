"""MEASURE: gradients in, norms out."""

from gradnorm_jax.norms.explanation import Explanation, LeafRule, explain_norms
from gradnorm_jax.norms.fold import Norm, l1, l2, linf, lp, rms
from gradnorm_jax.norms.granularity import (
    Granularity,
    per_example,
    per_group,
    per_leaf,
    per_unit,
    whole_tree,
)
from gradnorm_jax.norms.measures import (
    global_norm,
    group_norms,
    leaf_norms,
    unit_norms,
    unitwise_norm,
)
from gradnorm_jax.norms.noise_scale import (
    NoiseScale,
    NoiseScaleState,
    RunningAverage,
    gradient_noise_scale,
    running_noise_scale,
)
from gradnorm_jax.norms.of_examples import (
    per_example_norms,
    value_and_per_example_norms,
)
from gradnorm_jax.norms.snr import (
    GradientSNR,
    SNRState,
    gradient_snr,
    running_snr,
)

__all__ = [
    "Explanation",
    "GradientSNR",
    "Granularity",
    "LeafRule",
    "NoiseScale",
    "NoiseScaleState",
    "Norm",
    "RunningAverage",
    "SNRState",
    "explain_norms",
    "global_norm",
    "gradient_noise_scale",
    "gradient_snr",
    "group_norms",
    "l1",
    "l2",
    "leaf_norms",
    "linf",
    "lp",
    "per_example",
    "per_example_norms",
    "per_group",
    "per_leaf",
    "per_unit",
    "rms",
    "running_noise_scale",
    "running_snr",
    "unit_norms",
    "unitwise_norm",
    "value_and_per_example_norms",
    "whole_tree",
]
