"""Rules that remember how norms spread: running means, and means of squares."""

import math

import jax
import jax.numpy as jnp

from gradnorm_jax._checks import check_between, check_decay, check_steps
from gradnorm_jax._typing import Bound, Scalar
from gradnorm_jax.thresholds.memory import (
    debiased,
    remembering,
    square_toward,
    toward,
)
from gradnorm_jax.thresholds.rule import Context, Threshold, Value, at


def z_score(
    z: Value,
    *,
    decay: Scalar = 0.97,
    feed: str = "clipped",
    warmup_steps: int = 25,
    warmup_limit: Scalar = math.inf,
    rearm_after: int | None = None,
) -> Threshold:
    r"""A limit some standard deviations above the running mean, as in ZClip.

    .. math::

        c = \mu + z \sigma, \qquad
        \mu \leftarrow \alpha \mu + (1 - \alpha) x, \qquad
        \sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha) (x - \mu)^2

    with the new :math:`\mu` in the last; after the warm-up they are the mean and the
    population variance of its norms. The bound's center is :math:`\mu`: with the shrink
    `reciprocal` a norm at :math:`z' > z` deviations comes down to
    :math:`\mu + z^2 \sigma / z'`, with `center` to :math:`\mu`, with `rescale` to
    :math:`c`. Remembers two numbers of each part.

    Args:
      z: How many standard deviations above the mean are too large (:math:`z`).
      decay: What the mean keeps at each step (:math:`\alpha`).
      feed: Which norms it learns from (:math:`x`): "raw", or "clipped" as in the paper.
      warmup_steps: From how many norms mean and variance are taken first.
      warmup_limit: The largest norm of all parts together during the warm-up, as in
        :func:`remembering`.
      rearm_after: After how many clipped steps in a row mean and deviation are scaled
        to the norms of these steps; `None` is the paper's rule, which clips for good
        once the norms have risen for good.

    Raises:
      ValueError: If a number is outside of its range.

    Example:
      >>> clip = gn.clip_by_norm(z_score(2.0, warmup_steps=2))
      >>> state = clip.init(jnp.zeros(1))
      >>> for norm in (1.0, 3.0, 9.0):
      ...     _, state = clip.update(jnp.array([norm]), state)
      >>> print(state.metrics.limits)
      4.0

    References:
      Kumar et al., `ZClip: Adaptive Spike Mitigation for LLM Pre-Training
      <https://arxiv.org/abs/2504.02507>`_, 2025
    """
    check_between(z, 0, math.inf, "z_score(z=...)", "Common are 2 to 6.")
    check_decay(decay, "z_score(decay=...)")
    check_steps(warmup_steps, 2, "z_score(warmup_steps=...)", "One has no deviation.")

    def bound(own: tuple, seen: jax.Array, norms: jax.Array, context: Context) -> Bound:
        mean, deviation = own
        return Bound(mean + at(z, context) * deviation, mean)

    def learn(own: tuple, seen: jax.Array, norms: jax.Array, context: Context) -> tuple:
        mean, deviation = own
        warm = seen >= warmup_steps
        rate = jnp.where(warm, 1 - decay, 1 / (seen + 1).astype(norms.dtype))
        gain = rate * (1 - rate) * jnp.where(warm, 1 - rate, 1)
        distance = jnp.abs(norms - mean)
        return (
            toward(mean, norms, rate),
            square_toward(deviation, distance, rate, gain),
        )

    return remembering(
        caller="z_score",
        start=lambda norms: (norms, norms),
        bound=bound,
        learn=learn,
        level=lambda own, seen: own[0],
        feed=feed,
        warmup_steps=warmup_steps,
        warmup_limit=warmup_limit,
        rearm_after=rearm_after,
    )


def moment_ratio(*, decay_mean: Scalar = 0.7, decay_square: Scalar = 0.9) -> Threshold:
    r"""The ratio of two running moments of the norm, this one included, as in AdaGN.

    .. math::

        c_t = \frac{\hat\mu_t}{\sqrt{\hat\nu_t}}, \qquad
        \mu_t = \gamma_1 \mu_{t-1} + (1 - \gamma_1) n_t, \qquad
        \nu_t = \gamma_2 \nu_{t-1} + (1 - \gamma_2) n_t^2

    both debiased as in Adam. Made for the shrink `normalize`: norms become about 1
    whatever they were, so it belongs before an optimizer that does not mind, as Adam.
    It learns from raw norms and cannot lock in, so it has nothing to re-arm. Remembers
    two numbers of each part.

    Args:
      decay_mean: What the mean keeps at each step (:math:`\gamma_1`).
      decay_square: What the mean square keeps at each step (:math:`\gamma_2`).

    Raises:
      ValueError: If a number is outside of its range.

    References:
      Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam
      <https://arxiv.org/abs/2502.17055>`_, 2025
    """
    check_decay(decay_mean, "moment_ratio(decay_mean=...)")
    check_decay(decay_square, "moment_ratio(decay_square=...)")

    def learn(own: tuple, seen: jax.Array, norms: jax.Array, context: Context) -> tuple:
        mean, root = own
        rate = debiased(decay_square, seen, norms.dtype)
        return (
            toward(mean, norms, debiased(decay_mean, seen, norms.dtype)),
            square_toward(root, norms, rate, rate),
        )

    def bound(own: tuple, seen: jax.Array, norms: jax.Array, context: Context) -> Bound:
        mean, root = learn(own, seen, norms, context)
        return Bound(mean / jnp.where(root > 0, root, 1))

    return remembering(
        caller="moment_ratio",
        start=lambda norms: (norms, norms),
        bound=bound,
        learn=learn,
        level=lambda own, seen: own[0],
    )


def second_moment(
    factor: Value,
    *,
    decay: Scalar = 0.999,
    feed: str = "clipped",
    warmup_steps: int = 1,
    warmup_limit: Scalar = math.inf,
    rearm_after: int | None = None,
) -> Threshold:
    r"""A limit in proportion to the root of the running mean square, as in SPAM.

    .. math::

        c = \sqrt{\tau v}, \qquad v \leftarrow \beta v + (1 - \beta) x^2

    :math:`v` starts at 0 and is not debiased. In SPAM it is the second moment of Adam
    and every entry is a part: `per_unit(axes=())`. Remembers one number of each part.

    Args:
      factor: The largest ratio of a square to its running mean (:math:`\tau`).
      decay: What the mean keeps at each step (:math:`\beta`).
      feed: Which norms it learns from (:math:`x`): "raw", or "clipped" as in the paper.
      warmup_steps: How many norms are taken in before it decides.
      warmup_limit: The largest norm of all parts together during the warm-up, as in
        :func:`remembering`.
      rearm_after: After how many clipped steps in a row the mean is set to the norms of
        these steps; `None` is the rule as published.

    Raises:
      ValueError: If a number is outside of its range.

    References:
      Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training
      <https://arxiv.org/abs/2501.06842>`_, 2025
    """
    check_between(factor, 0, math.inf, "second_moment(factor=...)", "5000 in SPAM.")
    check_decay(decay, "second_moment(decay=...)")
    check_steps(
        warmup_steps, 1, "second_moment(warmup_steps=...)", "The first norm is all new."
    )

    def bound(
        root: jax.Array, seen: jax.Array, norms: jax.Array, context: Context
    ) -> Bound:
        return Bound(jnp.sqrt(at(factor, context)) * root)

    def learn(
        root: jax.Array, seen: jax.Array, norms: jax.Array, context: Context
    ) -> jax.Array:
        return square_toward(root, norms, 1 - decay, 1 - decay)

    return remembering(
        caller="second_moment",
        start=lambda norms: norms,
        bound=bound,
        learn=learn,
        level=lambda root, seen: root,
        feed=feed,
        warmup_steps=warmup_steps,
        warmup_limit=warmup_limit,
        rearm_after=rearm_after,
    )
