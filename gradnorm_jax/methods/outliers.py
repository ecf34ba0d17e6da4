"""Clips of norms that are large among those seen so far."""

import math

import optax

from gradnorm_jax._typing import AUTO, AxisNames, Scalar, Tree
from gradnorm_jax.clipping import clip_by_norm
from gradnorm_jax.norms import (
    Granularity,
    linf,
    per_unit,
    whole_tree,
)
from gradnorm_jax.shrink import (
    Shrink,
    center,
    reciprocal,
    rescale,
)
from gradnorm_jax.thresholds import (
    percentile,
    rolling_sigma,
    second_moment,
    z_score,
)
from gradnorm_jax.thresholds.rule import Value

_MODES = {"adaptive_scaling": reciprocal, "mean": center, "sigma": rescale}


def autoclip(
    q: Value = 10.0,
    *,
    window: int = 1000,
    granularity: Granularity = whole_tree(),  # noqa: B008 - frozen
    nonfinite: str = "propagate",
    rearm_after: int | None = None,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips to a percentile of the norms seen so far (AutoClip).

    .. math:: g \leftarrow g \min\!\Big(1,
        \frac{\mathrm{percentile}_p(n_1, \ldots, n_t)}{n_t}\Big)

    The paper keeps every norm since the first step, here the last `window` ones count.
    With the paper's 10 it clips nine steps of ten, and is near to normalized descent;
    90 clips one of ten.

    Args:
      q: Which percentile, 0 to 100 (:math:`p`).
      window: How many norms are remembered.
      granularity: What has one norm; the whole tree in the paper.
      nonfinite: As in :func:`clip_by_norm`.
      rearm_after: As in :func:`gradnorm_jax.thresholds.percentile`.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`.

    Raises:
      ValueError: If a number is outside of its range.

    Example:
      >>> clip = autoclip(50.0)
      >>> state = clip.init(jnp.zeros(1))
      >>> for norm in (1.0, 2.0, 9.0):
      ...     clipped, state = clip.update(jnp.array([norm]), state)
      >>> print(clipped)
      [2.]

    References:
      Seetharaman et al., `AutoClip: Adaptive Gradient Clipping for Source Separation
      Networks <https://arxiv.org/abs/2007.14469>`_, 2020
    """
    return clip_by_norm(
        percentile(q, window=window, rearm_after=rearm_after),
        granularity=granularity,
        nonfinite=nonfinite,
        axis_names=axis_names,
        specs=specs,
    )


def zclip(
    z: Value = 2.5,
    *,
    decay: Scalar = 0.97,
    mode: str = "adaptive_scaling",
    warmup_steps: int = 25,
    warmup_limit: Scalar = math.inf,
    granularity: Granularity = whole_tree(),  # noqa: B008 - frozen
    nonfinite: str = "propagate",
    rearm_after: int | None = None,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips norms that are outliers among those seen so far (ZClip).

    With the running mean :math:`\mu` and deviation :math:`\sigma` of the clipped norms,
    a norm with :math:`z = (n - \mu) / \sigma > z_\mathrm{thres}` becomes

    .. math:: \mu + \frac{z_\mathrm{thres}^2}{z} \sigma

    The reference code also clips to a norm of 1, which the paper does not have: chain
    `clip_by_global_norm(1.0)` behind it. Its `percentile` mode is `mode="sigma"` here.

    Args:
      z: How many deviations above the mean are too large (:math:`z_\mathrm{thres}`).
      decay: What mean and variance keep at each step (:math:`\alpha`).
      mode: What an outlier becomes: "adaptive_scaling", as above; "mean":
        :math:`\mu`; "sigma": :math:`\mu + z_\mathrm{thres} \sigma`.
      warmup_steps: From how many norms mean and variance are taken first.
      warmup_limit: The largest norm during the warm-up.
      granularity: What has one norm; the whole tree in the paper.
      nonfinite: As in :func:`clip_by_norm`.
      rearm_after: As in :func:`gradnorm_jax.thresholds.z_score`. Without it a lasting
        rise of the norms is clipped for good.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`.

    Raises:
      ValueError: If a number is outside of its range, or `mode` no mode.

    Example:
      >>> clip = zclip(2.0, mode="mean", warmup_steps=2)
      >>> state = clip.init(jnp.zeros(1))
      >>> for norm in (1.0, 3.0, 9.0):
      ...     clipped, state = clip.update(jnp.array([norm]), state)
      >>> print(clipped)
      [2.]

    References:
      Kumar et al., `ZClip: Adaptive Spike Mitigation for LLM Pre-Training
      <https://arxiv.org/abs/2504.02507>`_, 2025
    """
    return clip_by_norm(
        z_score(
            z,
            decay=decay,
            warmup_steps=warmup_steps,
            warmup_limit=warmup_limit,
            rearm_after=rearm_after,
        ),
        granularity=granularity,
        shrink=_shrink(mode),
        nonfinite=nonfinite,
        axis_names=axis_names,
        specs=specs,
    )


def clip_by_rolling_sigma(
    k: Value = 3.0,
    *,
    window: int = 128,
    feed: str = "raw",
    granularity: Granularity = whole_tree(),  # noqa: B008 - frozen
    nonfinite: str = "propagate",
    rearm_after: int | None = None,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips to some standard deviations above the mean of the last norms.

    .. math:: g \leftarrow g \min\!\Big(1, \frac{\bar n + k s}{\lVert g \rVert}\Big)

    with mean and deviation of the last norms before the clip, the present one not
    included, from half a window on. Levanter clips so, with the deviation of a
    population; with 6 deviations OLMo-core and MaxText skip a step instead:
    `skip_step(inner, rolling_sigma(6.0))`.

    Args:
      k: How many deviations above the mean are too large (:math:`k`).
      window: How many norms are remembered.
      feed: Which norms are remembered: "raw" or "clipped".
      granularity: What has one norm.
      nonfinite: As in :func:`clip_by_norm`.
      rearm_after: As in :func:`gradnorm_jax.thresholds.rolling_sigma`.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`.

    Raises:
      ValueError: If a number is outside of its range.

    Example:
      >>> clip = clip_by_rolling_sigma(1.0, window=4)
      >>> state = clip.init(jnp.zeros(1))
      >>> for norm in (1.0, 1.0, 9.0):
      ...     clipped, state = clip.update(jnp.array([norm]), state)
      >>> print(clipped)
      [1.]

    References:
      The clip of `Levanter <https://github.com/stanford-crfm/levanter>`_, the skip-step
      optimizer of `OLMo-core <https://github.com/allenai/OLMo-core>`_
    """
    return clip_by_norm(
        rolling_sigma(k, window=window, feed=feed, rearm_after=rearm_after),
        granularity=granularity,
        nonfinite=nonfinite,
        axis_names=axis_names,
        specs=specs,
    )


def clip_by_second_moment(
    factor: Value = 5000.0,
    *,
    decay: Scalar = 0.999,
    warmup_steps: int = 20,
    nonfinite: str = "propagate",
    rearm_after: int | None = None,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each entry by the running mean of its square, the clip of SPAM.

    .. math:: g_i \leftarrow \mathrm{sign}(g_i) \min\!\big(|g_i|, \sqrt{\tau v_i}\big),
        \qquad v_i \leftarrow \beta v_i + (1 - \beta) g_i^2

    SPAM reads :math:`v` from Adam; here the clip has its own, so that it goes before
    any optimizer. Entries that are 0 do not count, while Adam's :math:`v` would decay.
    SPAM resets the optimizer too: see :func:`reset_state_every`. Every entry has a
    record: the state holds six arrays as large as the parameters (nine with
    `rearm_after`), and on a mesh every device holds all of them.

    Args:
      factor: The largest ratio of a square to its running mean (:math:`\tau`).
      decay: What the mean keeps at each step (:math:`\beta_2`).
      warmup_steps: How many gradients of an entry are taken in before it is clipped.
      nonfinite: As in :func:`clip_by_norm`.
      rearm_after: As in :func:`gradnorm_jax.thresholds.second_moment`.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`.

    Raises:
      ValueError: If a number is outside of its range.

    Example:
      >>> clip = clip_by_second_moment(4.0, decay=0.0, warmup_steps=1)
      >>> state = clip.init(jnp.zeros(2))
      >>> for grads in (jnp.array([1.0, 1.0]), jnp.array([1.0, -9.0])):
      ...     clipped, state = clip.update(grads, state)
      >>> print(clipped)
      [ 1. -2.]

    References:
      Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training
      <https://arxiv.org/abs/2501.06842>`_, 2025
    """
    return clip_by_norm(
        second_moment(
            factor, decay=decay, warmup_steps=warmup_steps, rearm_after=rearm_after
        ),
        granularity=per_unit(axes=()),
        norm=linf,
        nonfinite=nonfinite,
        axis_names=axis_names,
        specs=specs,
    )


def _shrink(mode: str) -> Shrink:
    if mode not in _MODES:
        raise ValueError(
            f"`zclip(mode=...)` must be one of {tuple(_MODES)}, got {mode!r}."
        )
    return _MODES[mode]
