"""Rules that remember one number of each part: a running mean, or a tracker."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax._checks import check_between, check_decay, check_steps
from gradnorm_jax._typing import Bound, Scalar
from gradnorm_jax.thresholds.memory import (
    debiased,
    remembering,
    toward,
)
from gradnorm_jax.thresholds.rule import Context, Memory, Threshold, Value, at

_FIRST = "The first norm has nothing to be compared with."


def ema_band(
    low: Value,
    high: Value,
    *,
    decay: Scalar = 0.98,
    feed: str = "raw",
    warmup_steps: int = 1,
    warmup_limit: Scalar = math.inf,
    rearm_after: int | None = None,
) -> Threshold:
    r"""A band around the running mean of the norms, as in AGGC.

    .. math::

        l = \alpha_\mathrm{low} S, \qquad u = \alpha_\mathrm{high} S, \qquad
        S \leftarrow \beta S + (1 - \beta) x

    :math:`S` starts as the first norm, or the least of the warm-up. With the shrink
    `band` a norm above the band comes down to :math:`u`, one below it up to :math:`l`;
    other shrinks know :math:`u` only. Remembers one number of each part.

    Args:
      low: The lower edge for a mean of 1 (:math:`\alpha_\mathrm{low}`).
      high: The upper edge for a mean of 1 (:math:`\alpha_\mathrm{high}`).
      decay: What the mean keeps at each step (:math:`\beta`).
      feed: Which norms it learns from (:math:`x`): "raw" or "clipped".
      warmup_steps: Over how many norms the least is taken first; with 1 the mean starts
        as the first norm.
      warmup_limit: The largest norm of all parts together during the warm-up, as in
        :func:`remembering`.
      rearm_after: After how many clipped steps in a row the mean is set to the norms of
        these steps; `None` is the rule as published.

    Raises:
      ValueError: If a number is outside of its range, or `low` is above `high`.

    References:
      Li et al., `AGGC: Adaptive Group Gradient Clipping for Stabilizing Large Language
      Model Training <https://arxiv.org/abs/2601.11864>`_, 2026
    """
    caller = "ema_band"
    check_between(low, 0, math.inf, f"{caller}(low=...)", "0 raises no norm.")
    check_between(high, 0, math.inf, f"{caller}(high=...)", "Common are 1.05 to 3.")
    check_decay(decay, f"{caller}(decay=...)")
    check_steps(warmup_steps, 1, f"{caller}(warmup_steps=...)", _FIRST)
    if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
        raise ValueError(
            f"`ema_band(low=..., high=...)` must be a band: low <= high, got {low} and"
            f" {high}. To raise no norm, use low=0."
        )

    def bound(
        mean: jax.Array, seen: jax.Array, norms: jax.Array, context: Context
    ) -> Bound:
        return Bound(at(high, context) * mean, floor=at(low, context) * mean)

    def learn(
        mean: jax.Array, seen: jax.Array, norms: jax.Array, context: Context
    ) -> jax.Array:
        later = toward(mean, norms, 1 - decay)
        first = jnp.where(seen == 0, norms, jnp.minimum(mean, norms))
        return jnp.where(seen < warmup_steps, first, later)

    return remembering(
        caller="ema_band",
        start=lambda norms: norms,
        bound=bound,
        learn=learn,
        level=lambda mean, seen: mean,
        feed=feed,
        warmup_steps=warmup_steps,
        warmup_limit=warmup_limit,
        rearm_after=rearm_after,
    )


def ema_relative(
    factor: Value,
    *,
    decay: Scalar = 0.98,
    feed: str = "clipped",
    warmup_steps: int = 1,
    warmup_limit: Scalar = math.inf,
    rearm_after: int | None = None,
) -> Threshold:
    r"""A limit in proportion to the running mean of the norms, as in AdaGC.

    .. math::

        c = \lambda \gamma, \qquad \gamma \leftarrow \beta \gamma + (1 - \beta) x

    This is :func:`ema_band` without a lower edge. :math:`\gamma` starts as the first
    norm, or the least of the warm-up. Remembers one number of each part.

    Args:
      factor: The limit for a mean of 1 (:math:`\lambda`).
      decay: What the mean keeps at each step (:math:`\beta`).
      feed: Which norms it learns from (:math:`x`): "raw", or "clipped" as in the paper,
        with which it grows by at most :math:`\beta + (1 - \beta) \lambda` a step.
      warmup_steps: Over how many norms the least is taken first; 100 in AdaGC.
      warmup_limit: The largest norm of all parts together during the warm-up, as in
        :func:`remembering`; 1 in AdaGC.
      rearm_after: After how many clipped steps in a row the mean is set to the norms of
        these steps; `None` is the rule as published.

    Raises:
      ValueError: If a number is outside of its range.

    Example:
      >>> clip = gn.clip_by_norm(ema_relative(1.5, decay=0.5))
      >>> state = clip.init(jnp.zeros(1))
      >>> for norm in (2.0, 9.0, 9.0):
      ...     _, state = clip.update(jnp.array([norm]), state)
      >>> print(state.metrics.limits)
      3.75

    References:
      Wang et al., `AdaGC: Improving Training Stability for Large Language Model
      Pretraining <https://arxiv.org/abs/2502.11034>`_, 2025
    """
    check_between(factor, 0, math.inf, "ema_relative(factor=...)", "1.05 in AdaGC.")
    check_decay(decay, "ema_relative(decay=...)")
    check_steps(warmup_steps, 1, "ema_relative(warmup_steps=...)", _FIRST)
    return ema_band(
        0.0,
        factor,
        decay=decay,
        feed=feed,
        warmup_steps=warmup_steps,
        warmup_limit=warmup_limit,
        rearm_after=rearm_after,
    )


def max_ema(
    factor: Value = 1.0,
    *,
    decay: Scalar = 0.999,
    feed: str = "raw",
    warmup_steps: int = 0,
    warmup_limit: Scalar = math.inf,
    rearm_after: int | None = None,
) -> Threshold:
    r"""The debiased running mean of the norms, this one included, as in AdaClip.

    .. math::

        T_t = \theta T_{t-1} + (1 - \theta) n_t, \qquad c_t = \frac{T_t}{1 - \theta^t}

    In Stable-SPAM the norm is the largest entry of a leaf (`norms.linf`), and only the
    entries above the limit are scaled (`shrink.spikes`). Remembers one number of each
    part.

    Args:
      factor: The limit for a mean of 1.
      decay: What the mean keeps at each step (:math:`\theta`).
      feed: Which norms it learns from: "raw" as in the paper, or "clipped".
      warmup_steps: How many norms are taken in before it decides.
      warmup_limit: The largest norm of all parts together during the warm-up, as in
        :func:`remembering`.
      rearm_after: After how many clipped steps in a row the mean is set to the norms of
        these steps; `None` is the rule as published.

    Raises:
      ValueError: If a number is outside of its range.

    References:
      Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam
      <https://arxiv.org/abs/2502.17055>`_, 2025
    """
    check_between(factor, 0, math.inf, "max_ema(factor=...)", "1 in the paper.")
    check_decay(decay, "max_ema(decay=...)")

    def learn(
        mean: jax.Array, seen: jax.Array, norms: jax.Array, context: Context
    ) -> jax.Array:
        return toward(mean, norms, debiased(decay, seen, norms.dtype))

    def bound(
        mean: jax.Array, seen: jax.Array, norms: jax.Array, context: Context
    ) -> Bound:
        return Bound(at(factor, context) * learn(mean, seen, norms, context))

    return remembering(
        caller="max_ema",
        start=lambda norms: norms,
        bound=bound,
        learn=learn,
        level=lambda mean, seen: mean,
        feed=feed,
        warmup_steps=warmup_steps,
        warmup_limit=warmup_limit,
        rearm_after=rearm_after,
    )


def quantile(
    q: Value,
    *,
    rate: Value = 0.2,
    start: Scalar = 0.1,
    rearm_after: int | None = None,
) -> Threshold:
    r"""A limit that moves until a share q of the norms is below it.

    .. math:: C \leftarrow C \exp\big(-\eta \, (\mathbf{1}[n \le C] - q)\big)

    It remembers raw norms in one number of each part, and cannot lock in. It follows a
    rise by a factor :math:`s` within :math:`\log(s) / (\eta q)` steps, a fall within
    :math:`\log(s) / (\eta (1 - q))`.

    Args:
      q: The share of norms that pass, in [0, 1] (:math:`q`).
      rate: By how much the logarithm of the limit moves a step (:math:`\eta`).
      start: The first limit (:math:`C_0`).
      rearm_after: After how many clipped steps in a row the limit is set to the norms
        of these steps.

    Raises:
      ValueError: If a number is outside of its range.

    Example:
      >>> clip = gn.clip_by_norm(quantile(0.9, rate=0.5, start=1.0))
      >>> state = clip.init(jnp.zeros(1))
      >>> _, state = clip.update(jnp.array([4.0]), state)
      >>> print(round(float(state.memory.own), 3))  # exp(0.5 * 0.9)
      1.568

    References:
      Andrew et al., `Differentially Private Learning with Adaptive Clipping
      <https://arxiv.org/abs/1905.03871>`_, 2021
    """
    check_between(q, 0, 1, "quantile(q=...)", "For percents use `percentile`.")
    check_between(rate, 0, math.inf, "quantile(rate=...)", "0.2 in the paper.")
    check_between(
        start,
        float(np.finfo(np.float32).tiny),
        float(np.finfo(np.float32).max),
        "quantile(start=...)",
        "By factors it leaves neither 0 nor infinity. 0.1 is that of the paper.",
    )

    def moved(limit: jax.Array, passed: jax.Array, context: Context) -> jax.Array:
        # The error of exp would be the same at every step, and add up.
        growth = jnp.expm1(-at(rate, context) * (passed - at(q, context)))
        return limit + limit * growth

    def observe_share(memory: Memory, share: jax.Array, context: Context) -> Memory:
        own = moved(memory.own, share, context)
        return memory._replace(own=own, seen=memory.seen + 1)

    rule = remembering(
        caller="quantile",
        start=lambda norms: jnp.full_like(norms, start),
        bound=lambda limit, seen, norms, context: Bound(limit),
        learn=lambda limit, seen, norms, context: moved(
            limit, (norms <= limit).astype(norms.dtype), context
        ),
        level=lambda limit, seen: limit,
        rearm_after=rearm_after,
    )
    return rule._replace(observe_share=observe_share)
