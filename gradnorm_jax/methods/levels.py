"""Clips to a level that follows the norms seen so far."""

import optax

from gradnorm_jax._typing import AUTO, AxisNames, Groups, PerLeaf, Scalar, Tree
from gradnorm_jax.clipping import clip_by_norm
from gradnorm_jax.norms import (
    Granularity,
    linf,
    per_group,
    per_leaf,
    whole_tree,
)
from gradnorm_jax.shrink import (
    band,
    normalize,
    spikes,
)
from gradnorm_jax.thresholds import (
    ema_band,
    ema_relative,
    max_ema,
    moment_ratio,
    quantile,
)
from gradnorm_jax.thresholds.rule import Value


def adagc(
    factor: Value = 1.05,
    *,
    decay: Scalar = 0.98,
    warmup_steps: int = 100,
    warmup_limit: Scalar = 1.0,
    stacked_axes: PerLeaf | None = None,
    nonfinite: str = "propagate",
    rearm_after: int | None = None,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each leaf in proportion to the running mean of its clipped norms (AdaGC).

    .. math::

        h_l = \min\!\Big(1, \lambda_\mathrm{rel} \frac{\gamma_l}{\lVert g_l \rVert}
        \Big), \qquad g_l \leftarrow h_l g_l, \qquad
        \gamma_l \leftarrow \beta \gamma_l + (1 - \beta) \lVert h_l g_l \rVert

    During the warm-up all leaves are clipped together, to a global norm of
    :math:`\lambda_\mathrm{abs}`, and :math:`\gamma_l` is the least norm of the leaf. A
    step without a gradient for a leaf counts neither there nor later: a single 0 would
    freeze it for good. The limit grows by a factor of at most
    :math:`\beta + (1 - \beta) \lambda_\mathrm{rel}`, 1.001, a step.

    Args:
      factor: How far above its mean a norm may be (:math:`\lambda_\mathrm{rel}`).
      decay: What the mean keeps at each step (:math:`\beta`).
      warmup_steps: For how many steps the global norm is clipped (:math:`T_w`).
      warmup_limit: To which norm that is (:math:`\lambda_\mathrm{abs}`).
      stacked_axes: The axis along which leaves stack layers; each layer then has a
        mean.
      nonfinite: As in :func:`clip_by_norm`.
      rearm_after: As in :func:`gradnorm_jax.thresholds.ema_relative`. Without it a
        lasting rise of the norms is followed at 0.1 % a step.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`.

    Raises:
      ValueError: If a number is outside of its range.

    Example:
      >>> clip = adagc(1.5, warmup_steps=1)
      >>> state = clip.init(jnp.zeros(1))
      >>> for norm in (0.5, 9.0):
      ...     clipped, state = clip.update(jnp.array([norm]), state)
      >>> print(clipped)
      [0.75]

    References:
      Wang et al., `AdaGC: Improving Training Stability for Large Language Model
      Pretraining <https://arxiv.org/abs/2502.11034>`_, 2025
    """
    return clip_by_norm(
        ema_relative(
            factor,
            decay=decay,
            warmup_steps=warmup_steps,
            warmup_limit=warmup_limit,
            rearm_after=rearm_after,
        ),
        granularity=per_leaf(stacked_axes=stacked_axes),
        nonfinite=nonfinite,
        axis_names=axis_names,
        specs=specs,
    )


def clip_by_ema_norm(
    ratio: Value,
    *,
    decay: Scalar = 0.95,
    stacked_axes: PerLeaf | None = None,
    nonfinite: str = "propagate",
    rearm_after: int | None = None,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips each leaf to a multiple of the running mean of its clipped norms.

    .. math:: c_l = r \, \bar n_l, \qquad
        \bar n_l \leftarrow \beta \bar n_l + (1 - \beta) \min(n_l, c_l)

    The adaptive clip of OLMo: :func:`adagc` without its warm-up; the mean starts as the
    first norm.

    Args:
      ratio: How far above its mean a norm may be (:math:`r`).
      decay: What the mean keeps at each step (:math:`\beta`); OLMo takes the larger one
        of Adam's.
      stacked_axes: The axis along which leaves stack layers; each layer then has a
        mean.
      nonfinite: As in :func:`clip_by_norm`.
      rearm_after: As in :func:`gradnorm_jax.thresholds.ema_relative`.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`.

    Raises:
      ValueError: If a number is outside of its range.

    Example:
      >>> clip = clip_by_ema_norm(2.0)
      >>> state = clip.init(jnp.zeros(1))
      >>> for norm in (0.5, 9.0):
      ...     clipped, state = clip.update(jnp.array([norm]), state)
      >>> print(clipped)
      [1.]

    References:
      The optimizer of `OLMo <https://github.com/allenai/OLMo>`_
    """
    return clip_by_norm(
        ema_relative(ratio, decay=decay, rearm_after=rearm_after),
        granularity=per_leaf(stacked_axes=stacked_axes),
        nonfinite=nonfinite,
        axis_names=axis_names,
        specs=specs,
    )


def aggc(
    groups: Groups,
    *,
    low: Value,
    high: Value,
    decay: Scalar = 0.98,
    feed: str = "raw",
    nonfinite: str = "propagate",
    rearm_after: int | None = None,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Brings the norm of each group into a band around its running mean (AGGC).

    .. math::

        g_j \leftarrow \frac{\mathrm{clip}(n_j, \alpha_\mathrm{low} S_j,
        \alpha_\mathrm{high} S_j)}{n_j} g_j, \qquad
        S_j \leftarrow \beta S_j + (1 - \beta) n_j

    The mean starts as the first norm; the reference code starts it at 0 and feeds it
    the clipped norms (`feed="clipped"`). Its scripts give a band whose lower edge is
    above the upper one, and never scale by less than 0.9: every step is scaled by 0.9.
    There is no default to take over.

    Args:
      groups: The label of each leaf, as in `per_group`: `{".*q_proj.*": "q", ...}`.
      low: The lower edge for a mean of 1 (:math:`\alpha_\mathrm{low}`); 0 raises
        nothing.
      high: The upper edge for a mean of 1 (:math:`\alpha_\mathrm{high}`). Both may be
        functions of the step.
      decay: What the mean keeps at each step (:math:`\beta`).
      feed: Whether the mean is that of the "raw" norms or of the "clipped" ones.
      nonfinite: As in :func:`clip_by_norm`.
      rearm_after: As in :func:`gradnorm_jax.thresholds.ema_band`.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`.

    Raises:
      ValueError: If a number is outside of its range, or a pattern matches no leaf.

    Example:
      >>> clip = aggc({".*": "all"}, low=0.5, high=2.0)
      >>> state = clip.init(jnp.zeros(1))
      >>> for norm in (1.0, 0.1):
      ...     clipped, state = clip.update(jnp.array([norm]), state)
      >>> print(clipped)
      [0.5]

    References:
      Li et al., `AGGC: Adaptive Group Gradient Clipping for Stabilizing Large Language
      Model Training <https://arxiv.org/abs/2601.11864>`_, 2026
    """
    return clip_by_norm(
        ema_band(low, high, decay=decay, feed=feed, rearm_after=rearm_after),
        granularity=per_group(groups),
        shrink=band,
        nonfinite=nonfinite,
        axis_names=axis_names,
        specs=specs,
    )


def adagn(
    *,
    decay_mean: Scalar = 0.7,
    decay_square: Scalar = 0.9,
    stacked_axes: PerLeaf | None = None,
    nonfinite: str = "propagate",
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Normalizes each leaf, to the ratio of two moments of its norm (AdaGN).

    .. math:: g_l \leftarrow \frac{g_l}{\lVert g_l \rVert}
        \frac{\hat\mu_l}{\sqrt{\hat\nu_l}}

    with the debiased running means :math:`\mu` of the norm and :math:`\nu` of its
    square. Norms come out as about 1 whatever they were: put it before an optimizer
    that does not mind, such as Adam. After a spike the next norms are small, as
    :math:`\nu` remembers it longer than :math:`\mu`.

    Args:
      decay_mean: What :math:`\mu` keeps at each step (:math:`\gamma_1`).
      decay_square: What :math:`\nu` keeps at each step (:math:`\gamma_2`).
      stacked_axes: The axis along which leaves stack layers; each layer is then
        normalized.
      nonfinite: As in :func:`clip_by_norm`.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`.

    Raises:
      ValueError: If a number is outside of its range.

    Example:
      >>> tx = adagn()
      >>> print(tx.update(jnp.array([0.3, 0.4]), tx.init(jnp.zeros(2)))[0])
      [0.6 0.8]

    References:
      Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam
      <https://arxiv.org/abs/2502.17055>`_, 2025
    """
    return clip_by_norm(
        moment_ratio(decay_mean=decay_mean, decay_square=decay_square),
        granularity=per_leaf(stacked_axes=stacked_axes),
        shrink=normalize,
        nonfinite=nonfinite,
        axis_names=axis_names,
        specs=specs,
    )


def adaclip(
    *,
    decay: Scalar = 0.999,
    stacked_axes: PerLeaf | None = None,
    nonfinite: str = "propagate",
    rearm_after: int | None = None,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the entries above the running mean of a leaf's largest entry (AdaClip).

    .. math::

        T \leftarrow \theta T + (1 - \theta) \max |g|, \qquad
        \hat T = \frac{T}{1 - \theta^t}, \qquad
        g_i \leftarrow \frac{\hat T}{\max |g|} g_i \text{ where } |g_i| > \hat T

    The direction of the leaf changes. The reference code forgets to reset :math:`T`
    with its step counter, and hardly clips after a reset; here
    :func:`reset_state_every` resets both, or neither.

    Args:
      decay: What the mean keeps at each step (:math:`\theta`).
      stacked_axes: The axis along which leaves stack layers; each layer then has a
        mean.
      nonfinite: As in :func:`clip_by_norm`.
      rearm_after: As in :func:`gradnorm_jax.thresholds.max_ema`.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`.

    Raises:
      ValueError: If a number is outside of its range.

    Example:
      >>> clip = adaclip(decay=0.5)
      >>> state = clip.init(jnp.zeros(2))
      >>> for grads in (jnp.array([1.0, 1.0]), jnp.array([1.0, 4.0])):
      ...     clipped, state = clip.update(grads, state)
      >>> print(clipped)  # (0.5 * 0.5 * 1 + 0.5 * 4) / (1 - 0.5**2) = 3
      [1. 3.]

    References:
      Huang et al., `Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam
      <https://arxiv.org/abs/2502.17055>`_, 2025
    """
    return clip_by_norm(
        max_ema(decay=decay, rearm_after=rearm_after),
        granularity=per_leaf(stacked_axes=stacked_axes),
        norm=linf,
        shrink=spikes,
        nonfinite=nonfinite,
        axis_names=axis_names,
        specs=specs,
    )


def clip_by_quantile(
    q: Value = 0.5,
    *,
    rate: Value = 0.2,
    start: Scalar = 0.1,
    granularity: Granularity = whole_tree(),  # noqa: B008 - frozen
    nonfinite: str = "propagate",
    rearm_after: int | None = None,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips to a limit that moves until a share of the steps passes (Andrew et al.).

    .. math:: C \leftarrow C \exp\big(-\eta \, (\mathbf{1}[n \le C] - q)\big)

    In the paper, :math:`\mathbf{1}[\ldots]` is the share of the examples of a batch,
    with noise, for privacy. Here a step has one norm, and the share is that of steps.

    Args:
      q: The share of steps that pass, in [0, 1] (:math:`\gamma` in the paper).
      rate: By how much the logarithm of the limit moves a step (:math:`\eta_C`).
      start: The first limit (:math:`C^0`).
      granularity: What has one norm.
      nonfinite: As in :func:`clip_by_norm`.
      rearm_after: As in :func:`gradnorm_jax.thresholds.quantile`.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`.

    Raises:
      ValueError: If a number is outside of its range.

    Example:
      >>> clip = clip_by_quantile(start=1.0)
      >>> print(clip.update(jnp.array([3.0, 4.0]), clip.init(jnp.zeros(2)))[0])
      [0.6 0.8]

    References:
      Andrew et al., `Differentially Private Learning with Adaptive Clipping
      <https://arxiv.org/abs/1905.03871>`_, 2021
    """
    return clip_by_norm(
        quantile(q, rate=rate, start=start, rearm_after=rearm_after),
        granularity=granularity,
        nonfinite=nonfinite,
        axis_names=axis_names,
        specs=specs,
    )
