"""APPLY: what a norm above its limit becomes, and the factors that make it so."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradnorm_jax._typing import Bound, Scalar

# Past this, limit / norm may be too small or too large for one float32 factor.
_FAR = 2.0**100


class Shrink(NamedTuple):
    """What a norm becomes, as a function of the norm and its bound.

    Attributes:
      name: By which it is shown.
      target: `(norms, Bound) -> norms`, elementwise; a norm that comes back as it was
        leaves its part as it was.
      spikes_only: Whether only those entries of a part are scaled that are above its
        limit themselves.
    """

    name: str
    target: Callable[[jax.Array, Bound], jax.Array]
    spikes_only: bool = False

    def __repr__(self) -> str:
        return self.name


class Scaling(NamedTuple):
    """How each part is scaled: not at all where `keep`, else by `coarse * fine`."""

    keep: jax.Array
    coarse: jax.Array
    fine: jax.Array

    @property
    def scales(self) -> jax.Array:
        """The factor for each part; 1 where it is kept, 0 where it is below float32."""
        return jnp.where(self.keep, 1, self.coarse * self.fine)

    def scale(self, norms: jax.Array) -> jax.Array:
        """The norm of each part once it is scaled."""
        return jnp.where(self.keep, norms, norms * self.coarse * self.fine)


def scaling(norms: jax.Array, bound: Bound, eps: Scalar, shrink: Shrink) -> Scaling:
    """Returns the factors that bring each norm to what it should become.

    A norm of 0 and a limit of infinity keep their part. A norm that is not finite
    gives the scale NaN.
    """
    limit = jnp.maximum(bound.limit, 0)
    measured = norms + eps
    target = shrink.target(measured, bound._replace(limit=limit))
    keep = (target == measured) | (norms == 0) | (limit == jnp.inf)
    far_above = (measured > _FAR) | ((measured / _FAR > target) & (target > 0))
    far_below = (measured < 1 / _FAR) | (target / _FAR > measured)
    coarse = jnp.where(far_above, 1 / _FAR, jnp.where(far_below, _FAR, 1))
    coarse = coarse.astype(norms.dtype)
    fine = target / jnp.where(norms == 0, 1, measured * coarse)
    return Scaling(keep, coarse, jnp.where(jnp.isfinite(norms), fine, jnp.nan))


def _reciprocal(norms: jax.Array, bound: Bound) -> jax.Array:
    larger = norms > bound.limit
    room = jnp.where(larger, bound.limit - bound.center, 0)
    excess = jnp.where(larger, norms - bound.center, 1)
    return jnp.where(larger, bound.center + room * (room / excess), norms)


def _smooth(norms: jax.Array, bound: Bound) -> jax.Array:
    less, more = jnp.minimum(norms, bound.limit), jnp.maximum(norms, bound.limit)
    return less / (1 + less / jnp.where(more > 0, more, 1))


#: A larger norm becomes the limit. The direction stays, the length is bounded.
rescale = Shrink("rescale", lambda norms, bound: jnp.minimum(norms, bound.limit))
#: Every norm becomes the limit, smaller ones too, as in normalized gradient descent.
normalize = Shrink(
    "normalize", lambda norms, bound: jnp.broadcast_to(bound.limit, norms.shape)
)
#: A larger norm becomes center + (limit - center)^2 / (norm - center), as in ZClip.
#: The further it is above the limit, the nearer to the center it comes down.
reciprocal = Shrink("reciprocal", _reciprocal)
#: A larger norm becomes the center, the mean of a rule that has one, else 0.
center = Shrink(
    "center",
    lambda norms, bound: jnp.where(norms > bound.limit, bound.center, norms),
)
#: A larger norm becomes 0.
zero = Shrink("zero", lambda norms, bound: jnp.where(norms > bound.limit, 0, norms))
#: Every norm becomes norm limit / (norm + limit), which is below both, as in the smooth
#: clip of (L0, L1)-smooth descent.
smooth = Shrink("smooth", _smooth)
#: A larger norm becomes the limit, a smaller one the floor of a rule that has one.
band = Shrink(
    "band",
    lambda norms, bound: jnp.minimum(jnp.maximum(norms, bound.floor), bound.limit),
)
#: A larger norm becomes the limit by scaling only the entries above it, as in AdaClip.
#: For the norm `linf`.
spikes = rescale._replace(name="spikes", spikes_only=True)

__all__ = [
    "Scaling",
    "Shrink",
    "band",
    "center",
    "normalize",
    "reciprocal",
    "rescale",
    "smooth",
    "spikes",
    "zero",
]
