"""Sums of per-example gradients, each bounded by its own norm before it is added."""

from gradnorm_jax.summing.clipped import (
    ClippedGrad,
    ClippedGrads,
    SumState,
    clipped_grad,
)

__all__ = ["ClippedGrad", "ClippedGrads", "SumState", "clipped_grad"]
