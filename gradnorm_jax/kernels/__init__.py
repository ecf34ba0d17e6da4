"""Fused bodies for measuring and scaling: functions on arrays that know no norms."""

from gradnorm_jax.kernels.branches import apart, seldom
from gradnorm_jax.kernels.choice import chosen, implementation
from gradnorm_jax.kernels.reductions import (
    Reduction,
    fold_cells,
    reduce_again,
    reduce_cells,
    squares,
)
from gradnorm_jax.kernels.scaling import scale

__all__ = [
    "Reduction",
    "apart",
    "chosen",
    "fold_cells",
    "implementation",
    "reduce_again",
    "reduce_cells",
    "scale",
    "seldom",
    "squares",
]
