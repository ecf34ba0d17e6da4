"""What devices tell one another inside `shard_map`: one collective for all cells."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

#: Names of mesh axes.
Axes = tuple[str, ...]


def in_place(x: jax.Array, dims: Sequence[Axes]) -> jax.Array:
    """Puts the block of one device into an array of zeros of the whole shape."""
    if not any(dims):
        return x
    shape = [n * ways(axes) for n, axes in zip(x.shape, dims, strict=True)]
    starts = _starts(x.shape, dims)
    return jax.lax.dynamic_update_slice(jnp.zeros(shape, x.dtype), x, starts)


def own_block(x: jax.Array, dims: Sequence[Axes]) -> jax.Array:
    """Takes the block of one device out of an array of the whole shape."""
    if not any(dims):
        return x
    shape = [n // ways(axes) for n, axes in zip(x.shape, dims, strict=True)]
    return jax.lax.dynamic_slice(x, _starts(shape, dims), shape)


def all_reduce(
    cells: jax.Array,
    axes: Sequence[Axes],
    how: str,
    combine: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Folds what every device has of each cell, `[cells, k]`, in one collective.

    Args:
      cells: What this device has of them.
      axes: The mesh axes over which each cell is folded.
      how: "sum" or "max" (of numbers >= 0) where `combine` is one, else "gather".
      combine: `[devices, ..., k] -> [..., k]`.
    """
    union = tuple(dict.fromkeys(axis for own in axes for axis in own))
    if not union:
        return cells
    if how == "max":
        return _largest(cells, union)
    if how == "sum":
        # What does not differ along an axis is added once for each device on it.
        copies = np.array([ways([a for a in union if a not in own]) for own in axes])
        if np.any(copies > 1):
            cells = cells / copies[:, None].astype(cells.dtype)
        return _over(jax.lax.psum, cells, union)
    own_row = in_place(cells[None], (union, (), ()))
    gathered = _over(jax.lax.psum, own_row, union)
    grid = gathered.reshape(*map(jax.lax.axis_size, union), *cells.shape)
    parts, order = [], []
    for own in dict.fromkeys(axes):
        members = np.array([k for k, other in enumerate(axes) if other == own])
        once = grid[tuple(slice(None) if a in own else 0 for a in union)]
        once = once.reshape(-1, *cells.shape)[:, members]
        parts.append(combine(once) if own else once[0])
        order.append(members)
    return jnp.concatenate(parts)[np.argsort(np.concatenate(order))]


def ways(axes: Sequence[str]) -> int:
    """How many devices there are along mesh axes together."""
    return math.prod(map(jax.lax.axis_size, axes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _largest(x: jax.Array, axes: Axes) -> jax.Array:
    """The maximum of numbers >= 0, NaN where one is: on a CPU, `pmax` loses it.

    The bits of such numbers, taken for integers, are in the same order, NaN above all.
    """
    known = jnp.where(jnp.isnan(x), jnp.nan, jnp.abs(x)).astype(x.dtype)
    integer = jnp.int32 if x.dtype.itemsize == 4 else jnp.int64
    bits = jax.lax.bitcast_convert_type(known, integer)
    return jax.lax.bitcast_convert_type(_over(jax.lax.pmax, bits, axes), x.dtype)


@_largest.defjvp
def _largest_jvp(axes: Axes, primals: tuple, tangents: tuple) -> tuple:
    (x,), (dx,) = primals, tangents
    largest = _largest(x, axes)
    reached = (x == largest).astype(x.dtype)  # shared evenly, as `jnp.max` does
    num = _over(jax.lax.psum, reached, axes)
    share = reached * dx / jnp.maximum(num, 1)
    return largest, _over(jax.lax.psum, share, axes)


def _over(collective: Callable, x: jax.Array, axes: Axes) -> jax.Array:
    """Takes a collective over the axes of the mesh, and over those of `vmap`."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    reduce = {jax.lax.psum: jnp.sum, jax.lax.pmax: jnp.max}[collective]
    for axis in axes:
        # There it moves nothing. A `psum` fails on Explicit meshes in JAX 0.12.
        if axis not in manual:
            x = reduce(jax.lax.all_gather(x, axis), axis=0)
    own = tuple(axis for axis in axes if axis in manual)
    return collective(x, own) if own else x


def _starts(shape: Sequence[int], dims: Sequence[Axes]) -> list:
    return [
        jax.lax.axis_index(axes) * n if axes else 0
        for n, axes in zip(shape, dims, strict=True)
    ]
