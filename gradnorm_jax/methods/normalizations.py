"""Scalings by a norm that is given, of every gradient and not of large ones alone."""

import optax

from gradnorm_jax._typing import AUTO, AxisNames, Tree
from gradnorm_jax.clipping import clip_by_norm
from gradnorm_jax.methods.fixed import Limit
from gradnorm_jax.norms import Granularity, whole_tree
from gradnorm_jax.shrink import normalize, smooth
from gradnorm_jax.thresholds.memoryless import as_threshold


def normalize_by_norm(
    norm: Limit = 1.0,
    *,
    granularity: Granularity = whole_tree(),  # noqa: B008 - frozen
    nonfinite: str = "propagate",
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales all updates to a norm: normalized gradient descent.

    .. math:: g \leftarrow c \, \frac{g}{\lVert g \rVert}

    A gradient of 0 stays 0. With `per_leaf()` it is block-normalized descent, with
    `per_unit()` each output of a kernel has the norm.

    Args:
      norm: What norms become (:math:`c`): a number, a function of the step, or a rule.
      granularity: What has one norm.
      nonfinite: As in :func:`clip_by_norm`.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`.

    Raises:
      ValueError: If `norm` is a negative number.

    Example:
      >>> tx = normalize_by_norm()
      >>> print(tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))[0])
      [0.6 0.8]

    References:
      Hazan et al., `Beyond Convexity: Stochastic Quasi-Convex Optimization
      <https://arxiv.org/abs/1507.02030>`_, 2015
    """
    return clip_by_norm(
        as_threshold(norm, "normalize_by_norm(norm=...)"),
        granularity=granularity,
        shrink=normalize,
        nonfinite=nonfinite,
        axis_names=axis_names,
        specs=specs,
    )


def smooth_clip(
    max_norm: Limit,
    *,
    granularity: Granularity = whole_tree(),  # noqa: B008 - frozen
    nonfinite: str = "propagate",
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales all updates so that their norm stays below a limit, without a kink.

    .. math:: g \leftarrow \frac{g}{1 + \lVert g \rVert / c}

    The step of (L0, L1)-smooth descent: small gradients keep their size, large ones
    have the norm :math:`c`, and a norm of :math:`c` is halved. It scales every norm,
    and the record counts every step as clipped.

    Args:
      max_norm: The limit (:math:`c`): a number, a function of the step, or a rule.
      granularity: What has one norm.
      nonfinite: As in :func:`clip_by_norm`.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`.

    Raises:
      ValueError: If `max_norm` is a negative number.

    Example:
      >>> clip = smooth_clip(5.0)
      >>> print(clip.update(jnp.array([3.0, 4.0]), clip.init(jnp.zeros(2)))[0])
      [1.5 2. ]

    References:
      Zhang et al., `Why Gradient Clipping Accelerates Training: A Theoretical
      Justification for Adaptivity <https://arxiv.org/abs/1905.11881>`_, 2020;
      Zhang et al., `Improved Analysis of Clipping Algorithms for Non-convex
      Optimization <https://arxiv.org/abs/2010.02519>`_, 2020, whose code uses this form
    """
    return clip_by_norm(
        as_threshold(max_norm, "smooth_clip(max_norm=...)"),
        granularity=granularity,
        shrink=smooth,
        nonfinite=nonfinite,
        axis_names=axis_names,
        specs=specs,
    )
