"""Fused bodies for measuring and scaling: functions on arrays that know no norms."""

from gradnorm_jax.kernels._xla import fold_cells, scale, square_sums

__all__ = ["fold_cells", "scale", "square_sums"]
