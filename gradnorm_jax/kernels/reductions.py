"""Reductions of leaves: what is kept of their entries, in one traversal."""

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax._sharding import is_on_one_device, replicated
from gradnorm_jax.kernels.branches import seldom

# On a CPU, XLA reduces one entry at a time but where it knows a library, and for that
# it finds less work for several cores. So rows are joined to one another: so many at a
# time that what is kept of them hardly counts, and so long that cores share a row, and
# that a round fits into their caches. Measured on two cores with 2 MiB each; rows of an
# odd length took five times as long there.
_ROWS = 8
_ROUND = 2**18
_ALIGNED = 64

# Where there is a library, a leaf has to have this many entries for rows to be worth
# what they take to compile.
_LARGE = 2**22

# Leaves of one shape below this many entries are copied together: that takes less time
# than to start a kernel for each.
_TINY = 2**13

# A leaf below this many entries is reduced at once, and is read again with others, up
# to a stack of this many.
_SMALL = 2**16
_STACK = 2**20


class Reduction(NamedTuple):
    """What is kept of entries: a function of each, added up, or the largest of it.

    Attributes:
      of: `(x, dtype) -> array` of the shape of `x`, in `dtype`.
      largest: Whether the largest is kept, of numbers that are not below 0.
    """

    of: Callable[[jax.Array, jnp.dtype], jax.Array]
    largest: bool = False

    def over(self, x: jax.Array, axes: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        """Reduces an array over some of its axes."""
        return self.across(self.of(x, dtype), axes)

    def across(self, found: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        """Reduces what was found of entries over some axes."""
        return jnp.max(found, axes, initial=0) if self.largest else jnp.sum(found, axes)

    def join(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Reduces two arrays entry by entry."""
        return jnp.maximum(a, b) if self.largest else a + b


def _squares(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """|x|^2; by parts, as the product of a complex infinity would be NaN."""
    if jnp.iscomplexobj(x):
        return _squares(jnp.real(x), dtype) + _squares(jnp.imag(x), dtype)
    x = x.astype(dtype)
    return x * x


#: The sum of squares, which XLA has a library for, but for float16.
squares = Reduction(_squares)


def fold_cells(
    reduce: Callable[[jax.Array, tuple[int, ...]], jax.Array],
    leaves: Sequence[jax.Array],
    kept: Sequence[tuple[int, ...]],
    dtype: jnp.dtype,
) -> jax.Array:
    """Reduces each leaf over the axes it does not keep, all laid end to end."""
    cells = [
        _laid_out(reduce(x, _not_kept(x, axes)))
        for x, axes in zip(leaves, kept, strict=True)
    ]
    return jnp.concatenate(cells) if cells else jnp.zeros((0,), dtype)


def reduce_cells(
    reductions: Sequence[Reduction],
    leaves: Sequence[jax.Array],
    kept: Sequence[tuple[int, ...]],
    dtype: jnp.dtype,
    implementation: str = "xla",
) -> list[jax.Array]:
    """Does what `fold_cells` does for some reductions, and reads each entry once.

    With "pallas", leaves that are whole and real are read by its kernel.
    """
    # What many cells are stays in order: to put it there again would take its time.
    together = [
        x.size < _TINY and not axes and implementation == "xla"
        for x, axes in zip(leaves, kept, strict=True)
    ]
    groups = _alike(leaves, kept, together)
    known: dict[int, list[jax.Array]] = {}
    if implementation == "pallas":
        known = _by_pallas(reductions, leaves, kept, dtype)
    found = []
    for members in groups:
        first, summed = members[0], _not_kept(leaves[members[0]], kept[members[0]])
        if first in known:
            own = known[first]
        elif len(members) == 1:
            own = _reduced(tuple(reductions), leaves[first], summed, dtype)
        else:
            stack = jnp.stack([leaves[i] for i in members])
            axes = tuple(1 + k for k in summed)
            own = _at_once(tuple(reductions), dtype, axes, stack)
        found.append([_laid_out(x) for x in own])
    order = _order(groups, leaves, kept)
    if not found:
        return [jnp.zeros((0,), dtype) for _ in reductions]
    every = zip(*found, strict=True)
    return [_ordered(jnp.concatenate(cells), order) for cells in every]


def reduce_again(
    reduction: Reduction,
    leaves: Sequence[jax.Array],
    kept: Sequence[tuple[int, ...]],
    factors: jax.Array,
    wanted: jax.Array,
) -> jax.Array:
    """Reduces each cell that is wanted, multiplied by a factor of its own.

    Made for a branch that hardly ever runs: it is to compile fast. Small leaves of one
    shape are stacked and read together, so that there are few reductions to compile. A
    large leaf is not copied, and read only if one of its cells is wanted; what is not
    wanted may be any number.
    """
    groups = _alike(leaves, kept, [x.size < _SMALL for x in leaves])
    bounds = _bounds(leaves, kept)
    found = []
    for members in groups:
        at = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in members])
        own = factors[at]
        stack = [leaves[i] for i in members]
        read = functools.partial(_stacked, reduction, kept[members[0]])
        if stack[0].size < _SMALL:
            found.append(read(stack, own))
        else:
            needed = jnp.any(wanted[at])
            found.append(seldom(needed, read, lambda stack, own: own, stack, own))
    if not found:
        return jnp.zeros((0,), factors.dtype)
    return _ordered(jnp.concatenate(found), _order(groups, leaves, kept))


def _alike(
    leaves: Sequence[jax.Array], kept: Sequence[tuple[int, ...]], small: Sequence[bool]
) -> list[list[int]]:
    """Gathers the positions of small leaves of one shape, a bounded number at a time.

    Leaves on a mesh stay alone: to stack them could move them between devices.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, (x, axes) in enumerate(zip(leaves, kept, strict=True)):
        key = (x.shape, x.dtype, axes) if small[i] and is_on_one_device(x) else i
        groups.setdefault(key, []).append(i)
    return [
        members[start : start + step]
        for members in groups.values()
        for step in [max(1, _STACK // max(1, leaves[members[0]].size))]
        for start in range(0, len(members), step)
    ]


def _stacked(
    reduction: Reduction,
    axes: tuple[int, ...],
    leaves: list[jax.Array],
    factors: jax.Array,
) -> jax.Array:
    """Reduces the cells of leaves of one shape, multiplied by their factors."""
    # Of a constant x, XLA makes (x * c)^2 into x^2 * c^2, and c^2 is infinite or 0.
    stack = jnp.stack(jax.lax.optimization_barrier(leaves))
    shape = [n if k in axes else 1 for k, n in enumerate(leaves[0].shape)]
    factor = factors.reshape(len(leaves), *shape)
    summed = tuple(1 + k for k in range(leaves[0].ndim) if k not in axes)
    wide = stack.astype(np.promote_types(stack.dtype, factors.dtype))
    if jnp.iscomplexobj(wide):
        wide = jax.lax.complex(jnp.real(wide) * factor, jnp.imag(wide) * factor)
    else:
        wide = wide * factor
    return _laid_out(reduction.over(wide, summed, factors.dtype))


def _reduced(
    reductions: tuple[Reduction, ...],
    x: jax.Array,
    axes: tuple[int, ...],
    dtype: jnp.dtype,
) -> list[jax.Array]:
    if not _is_for_rows(reductions, x, axes):
        return _at_once(reductions, dtype, axes, x)
    at_once = functools.partial(_at_once, reductions, dtype, axes)
    by_rows = functools.partial(_by_rows, reductions, dtype)
    return jax.lax.platform_dependent(x, cpu=by_rows, default=at_once)


def _at_once(
    reductions: tuple[Reduction, ...],
    dtype: jnp.dtype,
    axes: tuple[int, ...],
    x: jax.Array,
) -> list[jax.Array]:
    return [reduction.over(x, axes, dtype) for reduction in reductions]


def _by_pallas(
    reductions: Sequence[Reduction],
    leaves: Sequence[jax.Array],
    kept: Sequence[tuple[int, ...]],
    dtype: jnp.dtype,
) -> dict[int, list[jax.Array]]:
    from gradnorm_jax.kernels.pallas import reduce_leaves

    at = [
        k
        for k, (x, axes) in enumerate(zip(leaves, kept, strict=True))
        if x.size and not axes and not jnp.iscomplexobj(x) and is_on_one_device(x)
    ]
    run = functools.partial(reduce_leaves, tuple(reductions), dtype=dtype)
    members = [leaves[k] for k in at]
    found = jax.lax.platform_dependent(
        members, cuda=run, default=functools.partial(run, interpret=True)
    )
    return {k: [one[n] for one in found] for n, k in enumerate(at)}


def _is_for_rows(
    reductions: tuple[Reduction, ...], x: jax.Array, axes: tuple[int, ...]
) -> bool:
    alone = reductions == (squares,)
    if alone and x.dtype == jnp.bfloat16:  # the library is faster than rows of bits
        return False
    in_library = alone and x.dtype != np.float16 and not jnp.iscomplexobj(x)
    least = _LARGE if in_library else _SMALL
    return (
        len(axes) == x.ndim
        and least <= x.size < 2**31  # an index has 32 bits
        and is_on_one_device(x)
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)  # traced once
def _by_rows(
    reductions: tuple[Reduction, ...], dtype: jnp.dtype, x: jax.Array
) -> list[jax.Array]:
    """Joins the rows of a leaf to one another, and then the entries of what is left.

    The derivative is that of all entries at once: that of a join would depend on where
    equal entries stand, and the bits of bfloat16 have none.
    """
    own, x = x.dtype, x.reshape(-1)
    if own == jnp.bfloat16:  # in a loop it would be held in float32
        x = jax.lax.bitcast_convert_type(x, np.uint16)
    rounds = math.ceil(x.size / _ROUND)
    length = x.size // (rounds * _ROWS) // _ALIGNED * _ALIGNED

    def step(k: jax.Array, pairs: list[jax.Array]) -> list[jax.Array]:
        joined = _unpaired(pairs, len(reductions))
        for row in range(_ROWS):
            start = (k * _ROWS + row) * length
            part = jax.lax.dynamic_slice_in_dim(x, start, length)
            part = jax.lax.bitcast_convert_type(part, own) if own != x.dtype else part
            joined = [
                one.join(kept, one.of(part, dtype))
                for one, kept in zip(reductions, joined, strict=True)
            ]
        return _in_pairs(joined)

    start = _in_pairs([jnp.zeros(length, dtype)] * len(reductions))
    pairs = jax.lax.fori_loop(0, rounds, step, start)
    joined = _unpaired(pairs, len(reductions))
    rest = x[rounds * _ROWS * length :]
    rest = jax.lax.bitcast_convert_type(rest, own) if own != x.dtype else rest
    return [
        one.join(one.across(kept, (0,)), one.over(rest, (0,), dtype))
        for one, kept in zip(reductions, joined, strict=True)
    ]


@_by_rows.defjvp
def _by_rows_jvp(
    reductions: tuple[Reduction, ...], dtype: jnp.dtype, primals: tuple, tangents: tuple
) -> tuple[list[jax.Array], list[jax.Array]]:
    axes = tuple(range(primals[0].ndim))
    at_once = functools.partial(_at_once, reductions, dtype, axes)
    return jax.jvp(at_once, primals, tangents)


def _in_pairs(arrays: list[jax.Array]) -> list[jax.Array]:
    """Packs two arrays into a complex one.

    A fused loop of XLA has one array to write: what is not in it reads the rows again.
    """
    pairs = [
        jax.lax.complex(*two) for two in zip(arrays[::2], arrays[1::2], strict=False)
    ]
    return pairs + arrays[2 * len(pairs) :]


def _unpaired(pairs: list[jax.Array], count: int) -> list[jax.Array]:
    parts = [part(x) for x in pairs[: count // 2] for part in (jnp.real, jnp.imag)]
    return parts + pairs[count // 2 :]


def _laid_out(cells: jax.Array) -> jax.Array:
    return replicated(cells).reshape(-1)


def _not_kept(x: jax.Array, kept: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(k for k in range(x.ndim) if k not in kept)


def _bounds(leaves: Sequence[jax.Array], kept: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Where the cells of each leaf begin among all, and where the last ones end."""
    counts = [
        math.prod(x.shape[k] for k in axes)
        for x, axes in zip(leaves, kept, strict=True)
    ]
    return np.cumsum([0, *counts])


def _order(
    groups: Sequence[Sequence[int]],
    leaves: Sequence[jax.Array],
    kept: Sequence[tuple[int, ...]],
) -> np.ndarray | None:
    """Where each cell stands if leaves are in the order of groups; `None` if there."""
    leaf_order = [*itertools.chain(*groups)]
    if leaf_order == sorted(leaf_order):
        return None
    bounds = _bounds(leaves, kept)
    cells = [np.arange(bounds[i], bounds[i + 1]) for i in leaf_order]
    return np.argsort(np.concatenate(cells))


def _ordered(x: jax.Array, order: np.ndarray | None) -> jax.Array:
    return x if order is None else x[order]
