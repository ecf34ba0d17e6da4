r"""Norms as folds: what is kept of an array, how two of them join, what they say.

The law of a fold is that leaves, groups, devices and microbatches combine by one rule:
``finish(combine([partial(x), partial(y)]))`` is the norm of x and y laid end to end.

The sum of squares of float32 numbers overflows above :math:`1.8 \cdot 10^{19}` and
reads 0 below :math:`10^{-23}`, long before the norm itself does. So :data:`l2` keeps
it at three scales, :math:`\sum x^2`, :math:`\sum (2^{-d} x)^2` and
:math:`\sum (2^{u} x)^2`, of which one is always right. The last two follow from the
first by a multiplication unless it is lost, and only then are the leaves read again.
All three are plain sums, so that the fold stays one addition, on any mesh.
"""

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax import kernels
from gradnorm_jax._typing import Ord

Leaves = Sequence[jax.Array]
Kept = Sequence[tuple[int, ...]]


class Norm(NamedTuple):
    """A norm: three functions that fold it, and its slope.

    Attributes:
      ord: The order by which users ask for this norm.
      partial: `(leaves, kept axes) -> [cells, k]`, in float32 or wider.
      combine: `[cells, k] -> [k]`, a fold along the leading axis.
      finish: `[..., k] -> [...]`, the norms.
      slope: `(x, norm, size) -> d norm / d x` for one entry of a part with `size`
        entries and a norm above 0, the same for (c x, c norm) as for (x, norm); `None`
        where plain differentiation is right.
      across: "sum" or "max" (of numbers >= 0) where `combine` is one, so that devices
        can do it on the way; "gather" where all partials must come together first.
    """

    ord: Ord
    partial: Callable[[Leaves, Kept], jax.Array]
    combine: Callable[[jax.Array], jax.Array]
    finish: Callable[[jax.Array], jax.Array]
    slope: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    across: str = "gather"


def accumulator(leaves: Leaves) -> jnp.dtype:
    """The dtype norms are taken in: float32, or wider where a leaf is."""
    dtypes = (_real_dtype(x) for x in leaves)
    return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))


def from_ord(order: Ord, caller: str) -> Norm:
    """Returns the norm of an order: 1, 2, any p >= 1, inf, or "rms"."""
    match order:
        case "rms":
            return rms
        case str() | bool():
            pass
        case numbers.Real():
            order = float(order)
            if order == 2:
                return l2
            if order == 1:
                return l1
            if order == math.inf:
                return linf
            if order > 1:
                return lp(order)
    raise ValueError(
        f"`{caller}(ord=...)` must be a number p >= 1, `jnp.inf` or 'rms', got"
        f" {order!r}."
    )


def lp(p: float) -> Norm:
    r"""The p-norm :math:`(\sum |x|^p)^{1/p}` for p >= 1, right at any magnitude.

    Kept of a cell are its largest entry m and :math:`\sum (|x| / m)^p`.

    Example:
      >>> norm = lp(3.0)
      >>> x = jnp.array([3e30, 4e30, 5e30])
      >>> print(norm.finish(norm.combine(norm.partial([x], [()]))))
      6e+30
    """
    if not p >= 1 or p == math.inf:
        raise ValueError(f"`lp(p=...)` must be a finite number p >= 1, got {p!r}.")
    return _lp(float(p))


class _Powers(NamedTuple):
    """The functions of a p-norm."""

    p: float

    def partial(self, leaves: Leaves, kept: Kept) -> jax.Array:
        dtype = accumulator(leaves)
        largest = _largest(leaves, kept)[:, 0]
        units = iter(_cells_of(leaves, kept, _divisor(largest)))

        def reduce(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
            ratio = _ratio(jnp.abs(x).astype(dtype), next(units))
            return jnp.sum(ratio**self.p, axes)

        sums = kernels.fold_cells(reduce, leaves, kept, dtype)
        return jnp.stack([largest, sums], axis=-1)

    def combine(self, partials: jax.Array) -> jax.Array:
        largest = jnp.max(partials[..., 0], axis=0, initial=0)
        ratio = _ratio(partials[..., 0], _divisor(largest)[None])
        sums = jnp.sum(partials[..., 1] * ratio**self.p, axis=0)
        return jnp.stack([largest, sums], axis=-1)

    def finish(self, partials: jax.Array) -> jax.Array:
        largest, sums = partials[..., 0], partials[..., 1]
        # The divisor of a non-finite entry is 1: it is for m to say so.
        sums = jnp.where(jnp.isfinite(largest), sums, 1)
        return largest * sums ** (1 / self.p)

    def slope(self, x: jax.Array, norm: jax.Array, size: jax.Array) -> jax.Array:
        del size
        ratio = jnp.abs(x) / jnp.real(norm)
        return jnp.sign(x) * (ratio ** (self.p - 1)).astype(x.dtype)


@functools.cache
def _lp(p: float) -> Norm:
    powers = _Powers(p)
    return Norm(p, powers.partial, powers.combine, powers.finish, powers.slope)


def _divisor(largest: jax.Array) -> jax.Array:
    return jnp.where((largest > 0) & (largest < jnp.inf), largest, 1)


def _ratio(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """Divides x, where XLA takes x * (1 / divisor) and flushes that to 0."""
    factor = step_down(divisor)
    return (x * factor) / (divisor * factor)


def step_down(x: jax.Array) -> jax.Array:
    """A power of two by which x can be multiplied so that 1 / x is a normal number."""
    return jnp.where(x > 2.0**100, 2.0**-100, 1).astype(x.dtype)


def _sum_partials(partials: jax.Array) -> jax.Array:
    return jnp.sum(partials, axis=0)


def _absolute_sums(leaves: Leaves, kept: Kept) -> jax.Array:
    dtype = accumulator(leaves)
    return kernels.fold_cells(
        lambda x, axes: jnp.sum(jnp.abs(x).astype(dtype), axes), leaves, kept, dtype
    )[:, None]


def _largest(leaves: Leaves, kept: Kept) -> jax.Array:
    dtype = accumulator(leaves)
    return kernels.fold_cells(
        lambda x, axes: jnp.max(_absolute(x).astype(dtype), axes, initial=0),
        leaves,
        kept,
        dtype,
    )[:, None]


def _absolute(x: jax.Array) -> jax.Array:
    """|x|, with the derivative 0 at 0 (that of `jnp.abs` is 1 there)."""
    return jnp.abs(x) if jnp.iscomplexobj(x) else x * jax.lax.stop_gradient(jnp.sign(x))


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


def _square_sums_at_three_scales(leaves: Leaves, kept: Kept) -> jax.Array:
    dtype = accumulator(leaves)
    scales = _Scales.of(dtype)
    plain = kernels.square_sums(leaves, kept, dtype)
    fragile = [_squares_can_leave(x, dtype) for x in leaves]

    def trust(leaves: Leaves, plain: jax.Array) -> jax.Array:
        del leaves
        return _three_scales(plain, plain, jnp.zeros_like(plain, bool), scales)

    if not any(fragile):
        return trust(leaves, plain)

    shapes = _cell_shapes(leaves, kept)
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
        again = kernels.square_sums_again(leaves, kept, factors.astype(dtype), lost)
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


def _root_at_the_right_scale(
    partials: jax.Array, size: jax.Array | float = 1.0
) -> jax.Array:
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
    own, wide = jnp.finfo(_real_dtype(x)), jnp.finfo(dtype)
    return (
        2 * own.maxexp + x.size.bit_length() >= wide.maxexp
        or 2 * (own.minexp - own.nmant) < wide.minexp
    )


def _squares_and_size(leaves: Leaves, kept: Kept) -> jax.Array:
    sums = _square_sums_at_three_scales(leaves, kept)
    size = kernels.fold_cells(
        lambda x, axes: jnp.full(
            [x.shape[k] for k in range(x.ndim) if k not in axes],
            math.prod(x.shape[k] for k in axes),
            sums.dtype,
        ),
        leaves,
        kept,
        sums.dtype,
    )
    return jnp.concatenate([sums, size[:, None]], axis=-1)


def _root_of_the_mean(partials: jax.Array) -> jax.Array:
    size = jnp.maximum(partials[..., 3], 1)
    return _root_at_the_right_scale(partials, size)


def _cell_shapes(leaves: Leaves, kept: Kept) -> list[tuple[int, ...]]:
    return [
        tuple(size if k in axes else 1 for k, size in enumerate(x.shape))
        for x, axes in zip(leaves, kept, strict=True)
    ]


def _cells_of(leaves: Leaves, kept: Kept, cells: jax.Array) -> list[jax.Array]:
    """Cuts what each cell has into one array for each leaf, to broadcast against it."""
    shapes = _cell_shapes(leaves, kept)
    bounds = np.cumsum([0, *map(math.prod, shapes)])
    return [
        cells[start:stop].reshape(shape)
        for start, stop, shape in zip(bounds[:-1], bounds[1:], shapes, strict=True)
    ]


def _real_dtype(x: jax.Array) -> np.dtype:
    return jnp.finfo(x.dtype).dtype


#: The sum of absolute values.
l1 = Norm(
    1,
    _absolute_sums,
    _sum_partials,
    lambda partials: partials[..., 0],
    lambda x, norm, size: jnp.sign(x),
    "sum",
)
#: The Euclidean norm of a vector, the Frobenius norm of a matrix.
l2 = Norm(
    2,
    _square_sums_at_three_scales,
    _sum_partials,
    _root_at_the_right_scale,
    lambda x, norm, size: x / norm,
    "sum",
)
#: The largest absolute value.
linf = Norm(
    math.inf,
    _largest,
    lambda partials: jnp.max(partials, axis=0, initial=0),
    lambda partials: partials[..., 0],
    across="max",
)
#: The root of the mean square: `l2` over the root of the number of entries.
rms = Norm(
    "rms",
    _squares_and_size,
    _sum_partials,
    _root_of_the_mean,
    lambda x, norm, size: x / norm / size,
    "sum",
)


def _counted(name: str, test: Callable[[jax.Array], jax.Array]) -> Norm:
    """A count is a fold too, though no norm."""

    def partial(leaves: Leaves, kept: Kept) -> jax.Array:
        dtype = accumulator(leaves)
        return kernels.fold_cells(
            lambda x, axes: jnp.sum(test(x), axes, dtype), leaves, kept, dtype
        )[:, None]

    return Norm(name, partial, _sum_partials, lambda x: x[..., 0], across="sum")


#: How many entries are exactly 0.
zeros = _counted("zeros", lambda x: x == 0)
#: How many entries are NaN or infinite.
nonfinite = _counted("nonfinite", lambda x: ~jnp.isfinite(x))
