"""Scaling, leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax._sharding import spread_like


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
