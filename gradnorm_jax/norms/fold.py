r"""Norms as folds: what is kept of an array, how two of them join, what they say.

The law of a fold is that leaves, groups, devices and microbatches combine by one rule:
``finish(combine([partial(x), partial(y)]))`` is the norm of x and y laid end to end.
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
from gradnorm_jax.norms.scales import (
    Kept,
    Leaves,
    at_three_scales,
    cell_shapes,
    real_dtype,
    root_at_the_right_scale,
)


class Norm(NamedTuple):
    """A norm: what it reduces entries to, what it makes of that, and its slope.

    Attributes:
      ord: The order by which users ask for this norm.
      reductions: What is kept of the entries of each cell, in one traversal with what
        other norms keep.
      complete: `(leaves, kept axes, *what the reductions gave) -> [cells, k]`.
      combine: `[cells, k] -> [k]`, a fold along the leading axis.
      finish: `[..., k] -> [...]`, the norms.
      slope: `(x, norm, size) -> d norm / d x` for one entry of a part with `size`
        entries and a norm above 0, the same for (c x, c norm) as for (x, norm); `None`
        where plain differentiation is right.
      across: "sum" or "max" (of numbers >= 0) where `combine` is one, so that devices
        can do it on the way; "gather" where all partials must come together first.
    """

    ord: Ord
    reductions: tuple[kernels.Reduction, ...]
    complete: Callable[..., jax.Array]
    combine: Callable[[jax.Array], jax.Array]
    finish: Callable[[jax.Array], jax.Array]
    slope: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    across: str = "gather"

    def partial(self, leaves: Leaves, kept: Kept) -> jax.Array:
        """Returns what is kept of each cell, `[cells, k]`, in float32 or wider."""
        [found] = partials([self], leaves, kept)
        return found


def partials(
    norms: Sequence[Norm], leaves: Leaves, kept: Kept, implementation: str = "xla"
) -> list[jax.Array]:
    """Returns what each of some norms keeps of each cell, and reads each entry once.

    What is lost to the range of the dtype, or not finite, is read again.
    """
    wanted = list(dict.fromkeys(one for norm in norms for one in norm.reductions))
    dtype = accumulator(leaves)
    found = kernels.reduce_cells(wanted, leaves, kept, dtype, implementation)
    known = dict(zip(wanted, found, strict=True))

    step_by_step = any(norm.slope is None for norm in norms)

    def complete(norm: Norm) -> jax.Array:
        given = leaves, [known[one] for one in norm.reductions]
        if step_by_step and norm.slope is not None:  # has a derivative of its own
            given = jax.lax.stop_gradient(given)
        return norm.complete(given[0], kept, *given[1])

    return [complete(norm) for norm in norms]


def accumulator(leaves: Leaves) -> jnp.dtype:
    """The dtype norms are taken in: float32, or wider where a leaf is."""
    dtypes = (real_dtype(x) for x in leaves)
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

    def complete(self, leaves: Leaves, kept: Kept, largest: jax.Array) -> jax.Array:
        dtype = accumulator(leaves)
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
    return Norm(
        p,
        (_magnitudes,),
        powers.complete,
        powers.combine,
        powers.finish,
        powers.slope,
    )


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


def _largest(
    leaves: Leaves, kept: Kept, largest: jax.Array, squares: jax.Array
) -> jax.Array:
    """The largest entry, or NaN, which the maximum of XLA loses on a CPU."""
    is_nan = jnp.isnan(jax.lax.stop_gradient(squares))
    return _as_it_is(leaves, kept, jnp.where(is_nan, jnp.nan, largest))


def _as_it_is(leaves: Leaves, kept: Kept, found: jax.Array) -> jax.Array:
    del leaves, kept
    return found[:, None]


@jax.custom_jvp
def _absolute(x: jax.Array) -> jax.Array:
    return jnp.abs(x)


@_absolute.defjvp
def _absolute_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """The derivative of |x| is 0 at 0, where that of `jnp.abs` is 1."""
    [x], [dx] = primals, tangents
    return jnp.abs(x), jnp.real(jnp.conj(jnp.sign(x)) * dx)


_magnitudes = kernels.Reduction(
    lambda x, dtype: _absolute(x).astype(dtype), largest=True
)


def _squares_and_size(leaves: Leaves, kept: Kept, plain: jax.Array) -> jax.Array:
    sums = at_three_scales(leaves, kept, plain)
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
    return root_at_the_right_scale(partials, size)


def _cells_of(leaves: Leaves, kept: Kept, cells: jax.Array) -> list[jax.Array]:
    """Cuts what each cell has into one array for each leaf, to broadcast against it."""
    shapes = cell_shapes(leaves, kept)
    bounds = np.cumsum([0, *map(math.prod, shapes)])
    return [
        cells[start:stop].reshape(shape)
        for start, stop, shape in zip(bounds[:-1], bounds[1:], shapes, strict=True)
    ]


#: The sum of absolute values.
l1 = Norm(
    1,
    (kernels.Reduction(lambda x, dtype: jnp.abs(x).astype(dtype)),),
    _as_it_is,
    _sum_partials,
    lambda partials: partials[..., 0],
    lambda x, norm, size: jnp.sign(x),
    "sum",
)
#: The Euclidean norm of a vector, the Frobenius norm of a matrix.
l2 = Norm(
    2,
    (kernels.squares,),
    at_three_scales,
    _sum_partials,
    root_at_the_right_scale,
    lambda x, norm, size: x / norm,
    "sum",
)
#: The largest absolute value.
linf = Norm(
    math.inf,
    (_magnitudes, kernels.squares),
    _largest,
    lambda partials: jnp.max(partials, axis=0, initial=0),
    lambda partials: partials[..., 0],
    across="max",
)
#: The root of the mean square: `l2` over the root of the number of entries.
rms = Norm(
    "rms",
    (kernels.squares,),
    _squares_and_size,
    _sum_partials,
    _root_of_the_mean,
    lambda x, norm, size: x / norm / size,
    "sum",
)


def _nonfinite_entries(leaves: Leaves, kept: Kept, plain: jax.Array) -> jax.Array:
    """Counts them where a sum of squares is not finite, and only then."""
    count = kernels.Reduction(lambda x, dtype: (~jnp.isfinite(x)).astype(dtype))

    def read_again(leaves: Leaves, suspect: jax.Array) -> jax.Array:
        ones = jnp.ones(suspect.shape, plain.dtype)
        counts = kernels.reduce_again(count, leaves, kept, ones, suspect)
        return jnp.where(suspect, counts, 0)

    suspect = ~jnp.isfinite(plain)
    none = lambda leaves, suspect: jnp.zeros(suspect.shape, plain.dtype)  # noqa: E731
    counts = kernels.seldom(jnp.any(suspect), read_again, none, list(leaves), suspect)
    return counts[:, None]


def _counted(
    name: str, reduction: kernels.Reduction, complete: Callable[..., jax.Array]
) -> Norm:
    """A count is a fold too, though no norm."""
    return Norm(
        name,
        (reduction,),
        complete,
        _sum_partials,
        lambda partials: partials[..., 0],
        lambda x, norm, size: jnp.zeros_like(x),
        "sum",
    )


#: How many entries are exactly 0.
zeros = _counted(
    "zeros", kernels.Reduction(lambda x, dtype: (x == 0).astype(dtype)), _as_it_is
)
#: How many entries are NaN or infinite.
nonfinite = _counted("nonfinite", kernels.squares, _nonfinite_entries)
