"""The plain jax.numpy bodies: the truth that every faster body is tested against."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

# On a CPU, XLA adds float16 numbers one at a time: a row that is converted on its own
# and fits in a core's cache is added five times faster. Measured on 85 M entries.
_CHUNK = 2**16


def fold_cells(
    reduce: Callable[[jax.Array, tuple[int, ...]], jax.Array],
    leaves: Sequence[jax.Array],
    kept: Sequence[tuple[int, ...]],
    dtype: jnp.dtype,
) -> jax.Array:
    """Reduces each leaf over the axes it does not keep, all laid end to end."""
    cells = [
        reduce(x, tuple(k for k in range(x.ndim) if k not in axes)).reshape(-1)
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
                x, cpu=_square_sum_in_chunks, default=lambda y: jnp.sum(squares(y))
            )
        return jnp.sum(squares(x), axes)

    def squares(x: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(x):
            real, imag = jnp.real(x).astype(dtype), jnp.imag(x).astype(dtype)
            return real * real + imag * imag
        x = x.astype(dtype)
        return x * x

    def _square_sum_in_chunks(x: jax.Array) -> jax.Array:
        x = x.reshape(-1)
        whole = x.size // _CHUNK * _CHUNK
        rows = jax.lax.map(
            lambda row: jnp.sum(squares(row)), x[:whole].reshape(-1, _CHUNK)
        )
        return jnp.sum(rows) + jnp.sum(squares(x[whole:]))

    return fold_cells(reduce, leaves, kept, dtype)


def scale(
    x: jax.Array, keep: jax.Array, coarse: jax.Array, fine: jax.Array
) -> jax.Array:
    """Returns `x` where `keep`, else `x * coarse * fine`, multiplied in float32.

    Two factors reach what one cannot: their product may be smaller than the smallest
    normal number.
    """
    wide = jnp.result_type(x.dtype, coarse.dtype)
    return jnp.where(keep, x, (x.astype(wide) * coarse * fine).astype(x.dtype))


def _adds_one_by_one(x: jax.Array, axes: tuple[int, ...]) -> bool:
    if x.dtype != np.float16 or len(axes) != x.ndim or x.size < 4 * _CHUNK:
        return False
    return jax.typeof(x).sharding.mesh.empty  # a sharded leaf is not to be reshaped
