"""The plain jax.numpy bodies: the truth that every faster body is tested against."""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_batching import custom_vmap

from gradnorm_jax._sharding import is_on_one_device, replicated, spread_like

# On a CPU, XLA adds float16 numbers one at a time. Rows of this many, converted and
# added to one another, are four times faster. Measured on 85 M entries.
_CHUNK = 2**15

# A leaf below this many entries is read again with others, up to a stack of this many.
_SMALL = 2**16
_STACK = 2**20


def fold_cells(
    reduce: Callable[[jax.Array, tuple[int, ...]], jax.Array],
    leaves: Sequence[jax.Array],
    kept: Sequence[tuple[int, ...]],
    dtype: jnp.dtype,
) -> jax.Array:
    """Reduces each leaf over the axes it does not keep, all laid end to end."""
    cells = [
        _laid_out(reduce(x, tuple(k for k in range(x.ndim) if k not in axes)))
        for x, axes in zip(leaves, kept, strict=True)
    ]
    return jnp.concatenate(cells) if cells else jnp.zeros((0,), dtype)


def square_sums(
    leaves: Sequence[jax.Array], kept: Sequence[tuple[int, ...]], dtype: jnp.dtype
) -> jax.Array:
    """Sums |x|^2 over each cell in `dtype`."""

    def reduce(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        if _adds_one_by_one(x, axes):
            return jax.lax.platform_dependent(
                x,
                cpu=lambda y: _square_sum_in_chunks(y, dtype),
                default=lambda y: jnp.sum(_squares(y, dtype)),
            )
        return jnp.sum(_squares(x, dtype), axes)

    return fold_cells(reduce, leaves, kept, dtype)


def square_sums_again(
    leaves: Sequence[jax.Array],
    kept: Sequence[tuple[int, ...]],
    factors: jax.Array,
    wanted: jax.Array,
) -> jax.Array:
    """Sums |factor x|^2 over each cell where it is wanted, with a factor for each cell.

    Made for a branch that hardly ever runs: it is to compile fast. Small leaves of one
    shape are stacked and read together, so that there are few reductions to compile. A
    large leaf is not copied, and read only if one of its cells is wanted.
    """
    bounds = np.cumsum(
        [0, *(_num_cells(x, axes) for x, axes in zip(leaves, kept, strict=True))]
    )
    sums, order = [], []
    for members in _alike(leaves, kept):
        cells = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in members])
        own = factors[cells]
        stack = [leaves[i] for i in members]
        read = functools.partial(_stacked_sums, kept[members[0]])
        if stack[0].size < _SMALL:
            sums.append(read(stack, own))
        else:  # what is not wanted may be any number
            needed = jnp.any(wanted[cells])
            sums.append(seldom(needed, read, lambda stack, own: own, stack, own))
        order.append(cells)
    if not sums:
        return jnp.zeros((0,), factors.dtype)
    return jnp.concatenate(sums)[np.argsort(np.concatenate(order))]


def scale(
    x: jax.Array, keep: jax.Array, coarse: jax.Array, fine: jax.Array
) -> jax.Array:
    """Returns `x` where `keep`, else `x * coarse * fine`, multiplied in float32.

    Two factors reach what one cannot: their product may be smaller than the smallest
    normal number.
    """
    wide = np.promote_types(x.dtype, coarse.dtype)
    scaled = x.astype(wide) * coarse.astype(wide) * fine.astype(wide)
    return jnp.where(spread_like(keep, x), x, scaled.astype(x.dtype))


def seldom(
    needed: jax.Array, rare: Callable[..., Any], usual: Callable[..., Any], *args: Any
) -> Any:
    """Returns `rare(*args)` where it is needed; it must be right where it is not, too.

    Under `vmap`, where a branch would be computed for all anyway, there is none: JAX
    chooses there between all that enters a branch, which fails on Explicit axes, and in
    `shard_map` for what is the same on every device.
    """

    @custom_vmap
    def choose(needed: jax.Array, *args: Any) -> Any:
        return jax.lax.cond(needed, rare, usual, *args)

    @choose.def_vmap
    def _(size: int, batched: list, needed: jax.Array, *args: Any) -> tuple[Any, Any]:
        in_axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
        result = jax.vmap(rare, tuple(in_axes[1:]), axis_size=size)(*args)
        return result, jax.tree.map(lambda _: True, result)

    return choose(needed, *args)


def apart(fun: Callable[..., Any], live: jax.Array, *args: Any) -> Any:
    """Returns `fun(*args)`, kept on a CPU from being compiled into what uses it.

    There XLA repeats the few scalar operations that lead to a factor inside the kernel
    of every leaf, and computes what a sum reads again, entry by entry, inside the sum.
    A branch keeps them apart, on one device. `live` must be true, and not be known to
    be.
    """
    arrays = jax.tree.leaves(args)
    traced = any(isinstance(x, Tracer) for x in arrays)
    if not traced or not all(map(is_on_one_device, arrays)):
        return fun(*args)

    def behind_a_branch(live: jax.Array, *args: Any) -> Any:
        result = jax.eval_shape(fun, *args)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result)
        return jax.lax.cond(live, fun, lambda *_: nothing, *args)

    return jax.lax.platform_dependent(
        live, *args, cpu=behind_a_branch, default=lambda live, *args: fun(*args)
    )


def _alike(
    leaves: Sequence[jax.Array], kept: Sequence[tuple[int, ...]]
) -> list[list[int]]:
    """Gathers the positions of small leaves of one shape, a bounded number at a time.

    Leaves on a mesh stay alone: to stack them could move them between devices.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, (x, axes) in enumerate(zip(leaves, kept, strict=True)):
        alone = x.size >= _SMALL or not is_on_one_device(x)
        key = i if alone else (x.shape, x.dtype, axes)
        groups.setdefault(key, []).append(i)
    return [
        members[start : start + step]
        for members in groups.values()
        for step in [max(1, _STACK // max(1, leaves[members[0]].size))]
        for start in range(0, len(members), step)
    ]


def _stacked_sums(
    axes: tuple[int, ...], leaves: list[jax.Array], factors: jax.Array
) -> jax.Array:
    """Sums |factor x|^2 over the cells of leaves of one shape, laid end to end."""
    # Of a constant x, XLA makes (x * c)^2 into x^2 * c^2, and c^2 is infinite or 0.
    stack = jnp.stack(jax.lax.optimization_barrier(leaves))
    shape = [n if k in axes else 1 for k, n in enumerate(leaves[0].shape)]
    factor = factors.reshape(len(leaves), *shape)
    summed = tuple(1 + k for k in range(leaves[0].ndim) if k not in axes)
    return _laid_out(jnp.sum(_squares(stack, factors.dtype, factor), summed))


def _laid_out(cells: jax.Array) -> jax.Array:
    return replicated(cells).reshape(-1)


def _squares(x: jax.Array, dtype: jnp.dtype, factor: Any = None) -> jax.Array:
    """|factor x|^2; by parts, as the product of a complex infinity would be NaN."""
    if jnp.iscomplexobj(x):
        real, imag = jnp.real(x), jnp.imag(x)
        return _squares(real, dtype, factor) + _squares(imag, dtype, factor)
    x = x.astype(dtype)
    if factor is not None:
        x = x * factor
    return x * x


def _square_sum_in_chunks(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    x = x.reshape(-1)
    whole = x.size // _CHUNK * _CHUNK
    sums, _ = jax.lax.scan(
        lambda sums, row: (sums + _squares(row, dtype), None),
        jnp.zeros(_CHUNK, dtype),
        x[:whole].reshape(-1, _CHUNK),
    )
    return jnp.sum(sums) + jnp.sum(_squares(x[whole:], dtype))


def _adds_one_by_one(x: jax.Array, axes: tuple[int, ...]) -> bool:
    return (
        x.dtype == np.float16
        and len(axes) == x.ndim
        and x.size >= 8 * _CHUNK
        and is_on_one_device(x)
    )


def _num_cells(x: jax.Array, axes: tuple[int, ...]) -> int:
    return math.prod(x.shape[k] for k in axes)
