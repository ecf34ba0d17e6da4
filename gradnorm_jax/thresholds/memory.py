"""What every rule with memory shares: whom it learns from, warm-up, and re-arming."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gradnorm_jax._checks import check_limit, check_steps
from gradnorm_jax._typing import Bound, Scalar
from gradnorm_jax.thresholds.rule import Context, Memory, Threshold

FEEDS = ("raw", "clipped")


def remembering(
    *,
    start: Callable[[jax.Array], Any],
    bound: Callable[[Any, jax.Array, jax.Array, Context], Bound],
    learn: Callable[[Any, jax.Array, jax.Array, Context], Any],
    level: Callable[[Any, jax.Array], jax.Array],
    feed: str = "raw",
    warmup_steps: int = 0,
    warmup_limit: Scalar = math.inf,
    rearm_after: int | None = None,
    caller: str = "remembering",
) -> Threshold:
    r"""A rule with memory, from what is particular to it.

    What all such rules share is here. A norm of 0 teaches nothing: a tensor that got no
    gradient would else get a limit of 0, and never a gradient again. During the warm-up
    the limit is infinite, or all parts are clipped together by their global norm. And a
    rule that feeds on clipped norms can lock in once the norms have risen for good:
    with `rearm_after`, when a part was clipped that many times in a row, all that is
    remembered of it is scaled so that its level is that of the run.

    Args:
      start: `norms -> own`: what is remembered before the first norm; the norms are
        zeros of the shape and dtype to come.
      bound: `(own, seen, norms, context) -> Bound`, once the rule has warmed up.
      learn: `(own, seen, fed norms, context) -> own`. What it makes of parts that
        `context.taken_in` leaves out is discarded in arrays of the shape of the norms;
        larger ones it must leave as they are itself.
      level: `(own, seen) -> norms`: about how large the norms are that it remembers.
        With `rearm_after`, `bound`, `learn` and `level` must not mind the unit in which
        norms are measured.
      feed: What the rule learns from: "raw" norms, or "clipped" ones.
      warmup_steps: How many norms are taken in before the rule decides.
      warmup_limit: The largest root of the sum of the squares of all norms during the
        warm-up: the global norm, where they are L2 norms of the parts of a tree.
      rearm_after: After how many clipped steps in a row the memory is scaled.
      caller: What errors call the rule.

    Raises:
      ValueError: If `feed` is no feed, `warmup_limit` negative, or a number of steps
        too small.

    Example:
      >>> import jax.numpy as jnp
      >>> largest_so_far = remembering(
      ...     start=lambda norms: norms,
      ...     bound=lambda own, seen, norms, context: Bound(own),
      ...     learn=lambda own, seen, norms, context: jnp.maximum(own, norms),
      ...     level=lambda own, seen: own,
      ...     warmup_steps=1,
      ... )
      >>> clip = gn.clip_by_norm(largest_so_far)
      >>> state = clip.init(jnp.zeros(2))
      >>> for norm in (3.0, 2.0, 5.0):
      ...     grads, state = clip.update(jnp.array([norm, 0.0]), state)
      >>> print(grads)
      [3. 0.]
    """
    _check(feed, warmup_steps, warmup_limit, rearm_after, caller)

    def init(norms: jax.Array) -> Memory:
        none = jnp.zeros(norms.shape, jnp.int32)
        run = (none, norms, jnp.ones_like(norms)) if rearm_after is not None else ()
        return Memory(none, start(norms), run)

    def decide(memory: Memory, norms: jax.Array, context: Context) -> Bound:
        seen, own, run = memory
        bounds = bound(own, seen, norms / run[2] if run else norms, context)
        if run:
            bounds = Bound(*(run[2] * edge for edge in bounds))
        if isinstance(warmup_steps, int) and warmup_steps == 0:
            return bounds
        cold, warm = seen < warmup_steps, _together(norms, warmup_limit)
        return Bound(*map(functools.partial(jnp.where, cold), warm, bounds))

    def observe(
        memory: Memory, norms: jax.Array, clipped: jax.Array, context: Context
    ) -> Memory:
        seen, own, run = memory
        fed = norms if feed == "raw" else clipped
        teaches = (fed != 0) & context.taken_in
        learned = learn(
            own,
            seen,
            fed / run[2] if run else fed,
            context._replace(taken_in=teaches),
        )

        def gated(old: jax.Array, new: jax.Array) -> jax.Array:
            if old.ndim > norms.ndim:
                return new
            by_part = old.shape == norms.shape
            return jnp.where(teaches if by_part else jnp.any(teaches), new, old)

        own = jax.tree.map(gated, own, learned)
        now_seen = seen + teaches.astype(jnp.int32)
        if rearm_after is None:
            return Memory(now_seen, own, ())

        steps, mean_log, unit = run
        counts = (norms > 0) & context.taken_in
        in_a_row = (clipped < norms) & (seen >= warmup_steps)
        steps = jnp.where(counts, jnp.where(in_a_row, steps + 1, 0), steps)
        share = 1 / jnp.maximum(steps, 1).astype(norms.dtype)
        logs = jnp.log(jnp.where(norms > 0, norms, 1))
        mean_log = jnp.where(counts & in_a_row, toward(mean_log, logs, share), mean_log)
        own_level = level(own, now_seen)
        due = (steps >= rearm_after) & (own_level > 0)
        unit = jnp.where(due, jnp.exp(mean_log) / own_level, unit)
        return Memory(now_seen, own, (jnp.where(due, 0, steps), mean_log, unit))

    return Threshold(init, decide, observe)


def toward(old: jax.Array, new: jax.Array, rate: Scalar) -> jax.Array:
    """A running mean: moves from old to new by a share of the way."""
    return old + rate * (new - old)


def square_toward(old: jax.Array, new: jax.Array, rate: Scalar, gain: Scalar):
    r"""Returns :math:`\sqrt{(1-r) a^2 + g b^2}`, at any magnitude.

    As a difference to :math:`a`, so that errors of the root do not add up over steps.
    """
    largest = jnp.maximum(old, new)
    unit = jnp.where(largest > 0, largest, 1)
    a, b = old / unit, new / unit
    gained = gain * b**2 - rate * a**2
    both = a + root(a**2 + gained)
    return old + unit * (gained / jnp.where(both > 0, both, 1))


def root(x: jax.Array) -> jax.Array:
    """The square root, of which the derivative at 0 is 0; 0 for what is below."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def debiased(decay: Scalar, seen: jax.Array, dtype: jnp.dtype) -> jax.Array:
    r"""The share :math:`(1-\beta) / (1-\beta^t)` that the t-th norm has in a mean."""
    known = isinstance(decay, int | float)
    rate = math.log(decay) if known and decay > 0 else jnp.log(decay)
    steps = (seen + 1).astype(dtype)
    share = jnp.asarray(1 - decay, dtype) / -jnp.expm1(rate * steps)
    return jnp.where(seen == 0, 1, share)


def _together(norms: jax.Array, limit: Scalar) -> Bound:
    """Clips all parts by the root of the sum of their squared norms."""
    if isinstance(limit, int | float) and limit == math.inf:
        return Bound(jnp.full_like(norms, jnp.inf))
    if norms.ndim == 0:
        limits = jnp.asarray(limit, norms.dtype)
        return Bound(limits, center=jnp.where(limits == jnp.inf, 0, limits))
    finite = jnp.where(jnp.isfinite(norms), norms, 0)
    largest = jnp.max(finite, initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    total = unit * root(jnp.sum((finite / unit) ** 2))
    clipped = norms * jnp.minimum(1, limit / jnp.where(total > 0, total, 1))
    limits = jnp.where(limit == jnp.inf, jnp.inf, clipped)
    return Bound(limits, center=clipped)


def _check(
    feed: Any,
    warmup_steps: Any,
    warmup_limit: Any,
    rearm_after: int | None,
    caller: str,
) -> None:
    if feed not in FEEDS:
        raise ValueError(
            f"`{caller}(feed=...)` must be one of {FEEDS}, got {feed!r}: does the rule"
            " learn from the norms before the clip, or after it?"
        )
    check_steps(warmup_steps, 0, f"{caller}(warmup_steps=...)", "0 is no warm-up.")
    check_limit(warmup_limit, f"{caller}(warmup_limit=...)")
    if rearm_after is not None:
        check_steps(
            rearm_after,
            1,
            f"{caller}(rearm_after=...)",
            "`None` keeps the rule as it was published.",
        )
