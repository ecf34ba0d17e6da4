"""Fused bodies for measuring and scaling: functions on arrays that know no norms."""

from gradnorm_jax.kernels._xla import (
    apart,
    fold_cells,
    scale,
    seldom,
    square_sums,
    square_sums_again,
)

__all__ = ["apart", "fold_cells", "scale", "seldom", "square_sums", "square_sums_again"]
