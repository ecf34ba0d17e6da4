"""Rules that remember the last norms of each part, in a window of fixed size.

A window is a ring of shape `(window, *norms.shape)`: the norm that is taken in after
`seen` others is in row `seen % window`. Where there is none yet, it holds infinity.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradnorm_jax._checks import check_between, check_steps, check_window
from gradnorm_jax._typing import Bound, Scalar
from gradnorm_jax.thresholds.memory import remembering, root
from gradnorm_jax.thresholds.rule import Context, Threshold, Value, at


class Ordered(NamedTuple):
    """A window, and the same norms in ascending order between -infinity and infinity.

    Where the k-th of them is in row k + 1, to take one out and to put one in changes
    each row by what its neighbors hold: nothing is ever sorted.
    """

    ring: jax.Array
    ordered: jax.Array


def percentile(
    q: Value,
    *,
    window: int = 1000,
    feed: str = "raw",
    warmup_steps: int = 0,
    warmup_limit: Scalar = math.inf,
    rearm_after: int | None = None,
) -> Threshold:
    r"""A percentile of the last norms, this one included, as in AutoClip.

    .. math:: c_t = \mathrm{percentile}_q(n_{t-w+1}, \ldots, n_t)

    interpolated linearly, as `numpy.percentile` does. Remembers `2 * (window + 1)`
    numbers of each part; no step sorts them anew.

    Args:
      q: Which percentile, 0 to 100 (:math:`q`).
      window: Of how many norms (:math:`w`).
      feed: Which norms it remembers: "raw" as in the paper, or "clipped".
      warmup_steps: How many norms are taken in before it decides.
      warmup_limit: The largest norm of all parts together during the warm-up, as in
        :func:`remembering`.
      rearm_after: After how many clipped steps in a row the window is scaled so that
        its median is the norm of these steps; `None` is the rule as published, which
        needs a window full of larger norms to follow them. At a low percentile many
        steps are clipped in a row by chance: the window is then scaled by about 1.

    Raises:
      ValueError: If a number is outside of its range.

    Example:
      >>> clip = gn.clip_by_norm(percentile(50.0, window=3))
      >>> state = clip.init(jnp.zeros(1))
      >>> for norm in (9.0, 1.0, 2.0, 4.0):
      ...     _, state = clip.update(jnp.array([norm]), state)
      >>> print(state.metrics.limits)
      2.0

    References:
      Seetharaman et al., `AutoClip: Adaptive Gradient Clipping for Source Separation
      Networks <https://arxiv.org/abs/2007.14469>`_, 2020
    """
    check_between(q, 0, 100, "percentile(q=...)", "It is in percent: 10 in AutoClip.")
    check_window(window, 1, "percentile(window=...)", "1000 is a common one.")

    def learn(
        own: Ordered, seen: jax.Array, norms: jax.Array, context: Context
    ) -> Ordered:
        ring, ordered = own
        # To take out and to put in infinity changes nothing.
        oldest = jnp.where(context.taken_in, _oldest(ring, seen), jnp.inf)[None]
        newest = jnp.where(context.taken_in, norms, jnp.inf)[None]
        inner = _exchange(ordered[:-2], ordered[1:-1], ordered[2:], oldest, newest)
        return Ordered(
            _put(ring, seen, norms, context),
            jnp.concatenate([ordered[:1], inner, ordered[-1:]]),
        )

    def bound(
        own: Ordered, seen: jax.Array, norms: jax.Array, context: Context
    ) -> Bound:
        ring, ordered = own
        last = jnp.minimum(seen, window - 1)  # with the norm of this step
        lower, rest = _rank(last.astype(norms.dtype), at(q, context) / 100)
        a, b, c, d = (_row(ordered, lower.astype(jnp.int32) + k) for k in range(4))
        oldest = _oldest(ring, seen)
        at_lower = _exchange(a, b, c, oldest, norms)
        at_upper = _exchange(b, c, d, oldest, norms)
        return Bound(at_lower + jnp.where(rest > 0, rest * (at_upper - at_lower), 0))

    def start(norms: jax.Array) -> Ordered:
        lowest = jnp.full_like(norms, -jnp.inf)[None]
        return Ordered(
            _ring(norms, window), jnp.concatenate([lowest, _ring(norms, window + 1)])
        )

    def median(own: Ordered, seen: jax.Array) -> jax.Array:
        return _row(own.ordered, (jnp.clip(seen, 1, window) + 1) // 2)

    return remembering(
        caller="percentile",
        start=start,
        bound=bound,
        learn=learn,
        level=median,
        feed=feed,
        warmup_steps=warmup_steps,
        warmup_limit=warmup_limit,
        rearm_after=rearm_after,
    )


def rolling_sigma(
    k: Value,
    *,
    window: int = 128,
    feed: str = "raw",
    warmup_steps: int | None = None,
    warmup_limit: Scalar = math.inf,
    rearm_after: int | None = None,
) -> Threshold:
    r"""A limit some standard deviations above the mean of the last norms.

    .. math:: c = \bar n + k s

    with the mean and the standard deviation (of a sample: over :math:`w - 1`) of the
    last norms, this one not included. OLMo-core and MaxText skip steps by such a rule,
    with 6 deviations; Levanter clips, with 3, and the deviation of a population. Where
    norms did not vary at all, any larger one is too large. Remembers `window` numbers
    of each part.

    Args:
      k: How many standard deviations above the mean are too large (:math:`k`).
      window: Of how many norms (:math:`w`).
      feed: Which norms it remembers: "raw", so that a new level becomes the usual one,
        or "clipped".
      warmup_steps: How many norms are taken in before it decides; half of the window,
        if not given.
      warmup_limit: The largest norm of all parts together during the warm-up, as in
        :func:`remembering`.
      rearm_after: After how many clipped steps in a row the window is scaled so that
        its mean is the norm of these steps.

    Raises:
      ValueError: If a number is outside of its range.

    Example:
      >>> clip = gn.clip_by_norm(rolling_sigma(1.0, window=2, warmup_steps=2))
      >>> state = clip.init(jnp.zeros(1))
      >>> for norm in (9.0, 1.0, 2.0, 4.0):
      ...     _, state = clip.update(jnp.array([norm]), state)
      >>> print(round(float(state.metrics.limits), 3))  # of 1 and 2
      2.207

    References:
      The skip-step optimizer of `OLMo-core <https://github.com/allenai/OLMo-core>`_
    """
    check_between(k, 0, math.inf, "rolling_sigma(k=...)", "Common are 3 and 6.")
    check_window(window, 2, "rolling_sigma(window=...)", "One has no deviation.")
    if warmup_steps is None:
        warmup_steps = max(2, window // 2)
    check_steps(
        warmup_steps, 2, "rolling_sigma(warmup_steps=...)", "One has no deviation."
    )

    def moments(ring: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and deviation, at any magnitude, 0 where there is none."""
        full = jnp.clip(seen, 1, window).astype(ring.dtype)
        present = ring < jnp.inf
        norms = jnp.where(present, ring, 0)
        sizes = jnp.max(jnp.abs(norms), axis=0)
        unit = jnp.where(sizes > 0, sizes, 1)
        ratios = norms / unit[None]
        mean = jnp.sum(ratios, axis=0) / full
        distances = jnp.where(present, ratios - mean[None], 0)
        squares = jnp.sum(distances**2, axis=0)
        return unit * mean, unit * root(squares / jnp.maximum(full - 1, 1))

    def bound(
        ring: jax.Array, seen: jax.Array, norms: jax.Array, context: Context
    ) -> Bound:
        mean, deviation = moments(ring, seen)
        return Bound(mean + at(k, context) * deviation, mean)

    return remembering(
        caller="rolling_sigma",
        start=lambda norms: _ring(norms, window),
        bound=bound,
        learn=_put,
        level=lambda ring, seen: moments(ring, seen)[0],
        feed=feed,
        warmup_steps=warmup_steps,
        warmup_limit=warmup_limit,
        rearm_after=rearm_after,
    )


def _rank(last: jax.Array, share: Scalar) -> tuple[jax.Array, jax.Array]:
    """Splits `share * last` into its whole part and the rest, to the last digit.

    The product with a number of 12 bits is exact, for windows of up to 4096.
    """
    coarse = round(share * 4096) / 4096
    exact, small = last * coarse, last * (share - coarse)
    lower = jnp.floor(exact + small)
    return lower, jnp.clip((exact - lower) + small, 0, 1)


def _ring(norms: jax.Array, rows: int) -> jax.Array:
    return jnp.full_like(norms, jnp.inf, shape=(rows, *norms.shape))


def _row(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Returns the entry of each part in its own row; the last row counts beyond it."""
    return jnp.take_along_axis(rows, index[None], axis=0, mode="clip")[0]


def _oldest(ring: jax.Array, seen: jax.Array) -> jax.Array:
    return _row(ring, seen % len(ring))


def _put(
    ring: jax.Array, seen: jax.Array, norms: jax.Array, context: Context
) -> jax.Array:
    """Puts the norm of each part that is taken in into the place of its oldest."""
    entries = jnp.where(context.taken_in, norms, _oldest(ring, seen))
    row = (seen % len(ring))[None]
    return jnp.put_along_axis(ring, row, entries[None], axis=0, inplace=False)


def _exchange(
    below: jax.Array,
    here: jax.Array,
    above: jax.Array,
    oldest: jax.Array,
    newest: jax.Array,
) -> jax.Array:
    """What ascending rows hold once one entry is taken out and another is put in."""
    here_after = jnp.where(here < oldest, here, above)
    below_after = jnp.where(below < oldest, below, here)
    return jnp.maximum(below_after, jnp.minimum(newest, here_after))
