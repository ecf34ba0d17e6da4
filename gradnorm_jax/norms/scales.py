r"""Sums of squares that survive what squares do not.

The sum of squares of float32 numbers overflows above :math:`1.8 \cdot 10^{19}` and
reads 0 below :math:`10^{-23}`, long before the norm itself does. So the L2 norm keeps
it at three scales, :math:`\sum x^2`, :math:`\sum (2^{-d} x)^2` and
:math:`\sum (2^{u} x)^2`, of which one is always right. The last two follow from the
first by a multiplication unless it is lost, and only then are the leaves read again.
All three are plain sums, so that the fold stays one addition, on any mesh.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax import kernels

Leaves = Sequence[jax.Array]
Kept = Sequence[tuple[int, ...]]


class _Scales(NamedTuple):
    """Where squares of `dtype` are safe, and the powers of two that make them so."""

    down: jax.Array
    up: jax.Array
    lost_entry: jax.Array
    low: jax.Array

    @classmethod
    def of(cls, dtype: jnp.dtype) -> "_Scales":
        info = jnp.finfo(dtype)
        digits = info.nmant + 1
        # 2^100 and 2^90 in float32. An entry whose square is flushed to 0 is wrong by
        # at most the smallest normal number, so a sum of n squares is right to the
        # last digit where it is above n times `lost_entry`, whatever was flushed.
        return cls(
            dtype.type(2.0 ** -(info.maxexp * 25 // 32)),
            dtype.type(2.0 ** (info.maxexp * 45 // 64)),
            dtype.type(2.0 ** (info.minexp + digits)),
            dtype.type(2.0 ** (info.minexp + digits + 40)),
        )


def at_three_scales(leaves: Leaves, kept: Kept, plain: jax.Array) -> jax.Array:
    """Returns sums of squares of x, and of x lowered and raised: `[cells, 3]`."""
    dtype = plain.dtype
    scales = _Scales.of(dtype)
    fragile = [_squares_can_leave(x, dtype) for x in leaves]

    def trust(leaves: Leaves, plain: jax.Array) -> jax.Array:
        del leaves
        return _three_scales(plain, plain, jnp.zeros_like(plain, bool), scales)

    if not any(fragile):
        return trust(leaves, plain)

    shapes = cell_shapes(leaves, kept)
    counts = [math.prod(shape) for shape in shapes]
    floors = [
        scales.lost_entry * (x.size // max(count, 1)) if is_fragile else 0
        for x, count, is_fragile in zip(leaves, counts, fragile, strict=True)
    ]
    floor = np.array(floors, dtype).repeat(counts)

    def is_lost(plain: jax.Array) -> jax.Array:
        return ~((plain >= floor) & (plain < jnp.inf))  # a NaN is lost too

    def read_again(leaves: Leaves, plain: jax.Array) -> jax.Array:
        tiny, lost = plain < floor, is_lost(plain)
        factors = jnp.where(tiny, scales.up, jnp.where(lost, scales.down, 1))
        again = kernels.reduce_again(
            kernels.squares, leaves, kept, factors.astype(dtype), lost
        )
        return _three_scales(plain, jnp.where(lost, again, plain), tiny, scales)

    needed = jnp.any(is_lost(plain))
    return kernels.seldom(needed, read_again, trust, list(leaves), plain)


def _three_scales(
    plain: jax.Array, scaled: jax.Array, tiny: jax.Array, scales: _Scales
) -> jax.Array:
    """The sum as it is, lowered and raised; `scaled` holds it where `plain` is lost."""
    large = ~(plain < jnp.inf)
    true = jnp.where(tiny, _times_twice(scaled, 1 / scales.up), plain)
    true = jnp.where(large, jnp.inf, true)
    lowered = jnp.where(large, scaled, _times_twice(true, scales.down))
    raised = jnp.where(tiny, scaled, _times_twice(true, scales.up))
    return jnp.stack([true, lowered, raised], axis=-1)


def _times_twice(x: jax.Array, factor: jax.Array) -> jax.Array:
    # XLA makes x * (factor * factor) of two constants, and that is 0 or infinity.
    return jax.lax.optimization_barrier(x * factor) * factor


def root_at_the_right_scale(
    partials: jax.Array, size: jax.Array | float = 1.0
) -> jax.Array:
    """Returns the root of sums of squares over `size`, by the one that is right."""
    scales = _Scales.of(partials.dtype)
    true, lowered, raised = partials[..., 0], partials[..., 1], partials[..., 2]
    return jnp.where(
        true < scales.low,
        jnp.sqrt(raised / size) / scales.up,
        jnp.where(
            true < jnp.inf,
            jnp.sqrt(true / size),
            jnp.sqrt(lowered / size) / scales.down,
        ),
    )


def _squares_can_leave(x: jax.Array, dtype: jnp.dtype) -> bool:
    own, wide = jnp.finfo(real_dtype(x)), jnp.finfo(dtype)
    return (
        2 * own.maxexp + x.size.bit_length() >= wide.maxexp
        or 2 * (own.minexp - own.nmant) < wide.minexp
    )


def cell_shapes(leaves: Leaves, kept: Kept) -> list[tuple[int, ...]]:
    """Returns the shape of the cells of each leaf, to broadcast against it."""
    return [
        tuple(size if k in axes else 1 for k, size in enumerate(x.shape))
        for x, axes in zip(leaves, kept, strict=True)
    ]


def real_dtype(x: jax.Array) -> np.dtype:
    """Returns the dtype of the entries, or of their parts."""
    return jnp.finfo(x.dtype).dtype
