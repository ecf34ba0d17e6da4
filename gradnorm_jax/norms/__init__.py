"""MEASURE: gradients in, norms out."""

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

__all__ = [
    "Granularity",
    "Norm",
    "global_norm",
    "group_norms",
    "l1",
    "l2",
    "leaf_norms",
    "linf",
    "lp",
    "per_example",
    "per_group",
    "per_leaf",
    "per_unit",
    "rms",
    "unit_norms",
    "unitwise_norm",
    "whole_tree",
]
