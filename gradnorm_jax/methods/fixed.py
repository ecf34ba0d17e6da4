"""Clips whose limit is given: a number, a schedule, a share of the parameters."""

from collections.abc import Callable, Mapping

import jax
import optax

from gradnorm_jax._checks import check_limit
from gradnorm_jax._typing import AUTO, Axis, AxisNames, Groups, PerLeaf, Scalar, Tree
from gradnorm_jax.clipping import clip_by_norm
from gradnorm_jax.norms import per_group, per_leaf, per_unit, rms
from gradnorm_jax.thresholds.memoryless import as_threshold, each, relative_to_params
from gradnorm_jax.thresholds.rule import Threshold

Limit = Scalar | Callable[[jax.Array], Scalar] | Threshold


def clip(max_delta: Scalar) -> optax.GradientTransformation:
    r"""Clips every entry of the updates into :math:`[-\delta, \delta]`.

    This is `optax.clip`, which has no norm to get wrong: it changes the direction of
    the update, passes a NaN on and keeps no record. To bound entries and keep the
    direction, use `clip_by_norm(max_delta, norm=norms.linf)`.

    Args:
      max_delta: The largest absolute value of an entry (:math:`\delta`).

    Raises:
      ValueError: If `max_delta` is negative.

    Example:
      >>> tx = clip(1.0)
      >>> print(tx.update(jnp.array([3.0, -0.5]), tx.init(jnp.zeros(2)))[0])
      [ 1.  -0.5]
    """
    check_limit(max_delta, "clip(max_delta=...)")
    return optax.clip(max_delta)


def clip_by_global_norm(
    max_norm: Limit,
    *,
    nonfinite: str = "propagate",
    eps: Scalar = 0.0,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales all updates together so that their global norm is at most a limit.

    .. math:: g \leftarrow g \, \min\!\Big(1, \frac{c}{\lVert g \rVert}\Big)

    The same call as `optax.clip_by_global_norm`, right in any dtype and at any
    magnitude, with the norm in the state.

    Args:
      max_norm: The limit (:math:`c`): a number, a function of the step, or a rule of
        `gradnorm_jax.thresholds`.
      nonfinite: What becomes of a gradient that holds a NaN or an infinity:
        "propagate", "zero" or "drop", as in :func:`clip_by_norm`.
      eps: Added to the norm; 1e-6 gives the scale of `torch.nn.utils.clip_grad_norm_`.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`. `update` takes the extra argument
      `norms`: a global norm computed elsewhere, to clip by instead of measuring.

    Raises:
      ValueError: If `max_norm` is a negative number.

    Example:
      >>> clip = clip_by_global_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
      >>> clipped, state = clip.update(grads, clip.init(grads))
      >>> print(clipped["w"], clipped["b"], state.metrics.norms)
      [0.6 0. ] 0.8 5.0
      >>> halved, _ = clip.update(grads, state, norms=2.0)
      >>> print(halved["b"])
      2.0

    References:
      Pascanu et al., `On the difficulty of training recurrent neural networks
      <https://arxiv.org/abs/1211.5063>`_, 2013
    """
    rule = as_threshold(max_norm, "clip_by_global_norm(max_norm=...)")
    return clip_by_norm(
        rule,
        nonfinite=nonfinite,
        eps=eps,
        axis_names=axis_names,
        specs=specs,
    )


def clip_by_leaf_norm(
    max_norm: Limit,
    *,
    stacked_axes: PerLeaf | None = None,
    nonfinite: str = "propagate",
    eps: Scalar = 0.0,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each leaf so that its norm is at most a limit.

    .. math:: g_l \leftarrow g_l \, \min\!\Big(1, \frac{c}{\lVert g_l \rVert}\Big)

    The clip of `tf.clip_by_norm` and of the `clipnorm` of Keras. The direction of the
    whole update changes, that of each leaf does not.

    Args:
      max_norm: The limit (:math:`c`): a number, a function of the step, or a rule.
      stacked_axes: The axis along which leaves stack layers, one for all or
        `{pattern: axis}`; each layer is then clipped on its own.
      nonfinite: As in :func:`clip_by_norm`.
      eps: Added to the norm.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`.

    Raises:
      ValueError: If `max_norm` is a negative number.

    Example:
      >>> clip = clip_by_leaf_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
      >>> clipped, state = clip.update(grads, clip.init(grads))
      >>> print(clipped["w"], clipped["b"], state.metrics.norms)
      [0.6 0.8] [0.5] [0.5 5. ]
    """
    return clip_by_norm(
        as_threshold(max_norm, "clip_by_leaf_norm(max_norm=...)"),
        granularity=per_leaf(stacked_axes=stacked_axes),
        nonfinite=nonfinite,
        eps=eps,
        axis_names=axis_names,
        specs=specs,
    )


def clip_by_group_norm(
    max_norms: Mapping[str, Limit],
    *,
    scaled: Groups | None = None,
    nonfinite: str = "propagate",
    eps: Scalar = 0.0,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each group of leaves so that its norm is at most the group's limit.

    .. math:: g_j \leftarrow g_j \, \min\!\Big(1, \frac{c_j}{\lVert g_j \rVert}\Big)

    Args:
      max_norms: `{pattern: limit}`. The leaves whose whole path a pattern matches are a
        group; the first pattern that matches counts. A leaf that none matches is left
        as it is. A limit is a number, a function of the step, or a rule.
      scaled: Which leaves a group scales, where these are not the ones its norm is
        taken over: `{pattern: one of the patterns of max_norms}`.
      nonfinite: As in :func:`clip_by_norm`.
      eps: Added to the norm.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`, its norms in the order of `max_norms`.

    Raises:
      ValueError: If a limit is a negative number, or a pattern matches no leaf.

    Example:
      >>> clip = clip_by_group_norm({"embed": 1.0, "layers/.*": 10.0})
      >>> grads = {"embed": jnp.array([3.0, 4.0]), "layers": {"w": jnp.ones(4)}}
      >>> clipped, state = clip.update(grads, clip.init(grads))
      >>> print(clipped["embed"], clipped["layers"]["w"], state.metrics.norms)
      [0.6 0.8] [1. 1. 1. 1.] [5. 2.]
    """
    caller = "clip_by_group_norm(max_norms=...)"
    if not isinstance(max_norms, Mapping) or not max_norms:
        raise TypeError(
            f"`{caller}` must be a mapping of path patterns to limits, such as"
            f" {{'encoder/.*': 1.0, '.*': 10.0}}, got {max_norms!r}."
        )
    rules = [as_threshold(limit, caller) for limit in max_norms.values()]
    return clip_by_norm(
        each(rules),
        granularity=per_group({p: p for p in max_norms}, scaled=scaled),
        nonfinite=nonfinite,
        eps=eps,
        axis_names=axis_names,
        specs=specs,
    )


def clip_by_unit_norm(
    max_norm: Limit,
    *,
    axes: PerLeaf | None = None,
    nonfinite: str = "propagate",
    eps: Scalar = 0.0,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each unit, the weights into one output, to a norm of at most a limit.

    Args:
      max_norm: The limit: a number, a function of the step, or a rule.
      axes: The axes that one unit spans, for every leaf or as `{pattern: axes}`; by
        default those of kernels in the layout of Flax, as in `unit_norms`.
      nonfinite: As in :func:`clip_by_norm`.
      eps: Added to the norm.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`.

    Raises:
      ValueError: If `max_norm` is a negative number, or a pattern matches no leaf.

    Example:
      >>> clip = clip_by_unit_norm(1.0)
      >>> grads = jnp.array([[3.0, 0.0], [4.0, 0.5]])
      >>> print(clip.update(grads, clip.init(grads))[0])
      [[0.6 0. ]
       [0.8 0.5]]
    """
    return clip_by_norm(
        as_threshold(max_norm, "clip_by_unit_norm(max_norm=...)"),
        granularity=per_unit(axes=axes),
        nonfinite=nonfinite,
        eps=eps,
        axis_names=axis_names,
        specs=specs,
    )


def clip_by_block_rms(
    threshold: Limit,
    *,
    stacked_axes: PerLeaf | None = None,
    nonfinite: str = "propagate",
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each leaf so that the root of its mean square is at most a limit.

    .. math:: u_l \leftarrow \frac{u_l}{\max(1, \mathrm{RMS}(u_l) / d)}

    The same call as `optax.clip_by_block_rms`; chained after a preconditioner it is the
    update clipping of Adafactor.

    Args:
      threshold: The limit (:math:`d`): a number, a function of the step, or a rule.
      stacked_axes: The axis along which leaves stack layers; each then has its own RMS.
      nonfinite: As in :func:`clip_by_norm`.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`.

    Raises:
      ValueError: If `threshold` is a negative number.

    Example:
      >>> clip = clip_by_block_rms(1.0)
      >>> print(clip.update(jnp.full(4, 3.0), clip.init(jnp.zeros(4)))[0])
      [1. 1. 1. 1.]

    References:
      Shazeer and Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
      <https://arxiv.org/abs/1804.04235>`_, 2018
    """
    return clip_by_norm(
        as_threshold(threshold, "clip_by_block_rms(threshold=...)"),
        granularity=per_leaf(stacked_axes=stacked_axes),
        norm=rms,
        nonfinite=nonfinite,
        axis_names=axis_names,
        specs=specs,
    )


def adaptive_grad_clip(
    clipping: Scalar,
    eps: Scalar = 1e-3,
    axis: Axis | Mapping[str, Axis] | None = None,
    *,
    nonfinite: str = "propagate",
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales each unit to a norm in proportion to that of its weights (AGC).

    .. math:: g_i \leftarrow g_i \, \min\!\Big(1,
        \frac{\lambda \max(\lVert w_i \rVert, \varepsilon)}{\lVert g_i \rVert}\Big)

    The same call as `optax.adaptive_grad_clip`. `update` needs `params`. The paper
    leaves the last layer out: wrap it in `optax.masked`. A bias that starts at 0 can
    move by at most :math:`\lambda \varepsilon` a step.

    Args:
      clipping: The largest ratio of the norms (:math:`\lambda`); 0.01 in the paper, for
        batches of 4096, and more for smaller ones.
      eps: The smallest norm that a unit of weights counts with (:math:`\varepsilon`).
      axis: The axes that one unit spans, for every leaf or as `{pattern: axes}`; by
        default those of kernels in the layout of Flax, as in `unit_norms`.
      nonfinite: As in :func:`clip_by_norm`.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with a :class:`ClipState`.

    Raises:
      ValueError: If `clipping` or `eps` is negative. By `update`: without `params`.

    Example:
      >>> clip = adaptive_grad_clip(0.01)
      >>> params = jnp.array([[3.0, 0.3], [4.0, 0.4]])
      >>> grads = jnp.full((2, 2), 0.003)
      >>> clipped, state = clip.update(grads, clip.init(params), params)
      >>> print(state.metrics.limits)
      [0.05  0.005]

    References:
      Brock et al., `High-Performance Large-Scale Image Recognition Without
      Normalization <https://arxiv.org/abs/2102.06171>`_, 2021
    """
    return clip_by_norm(
        relative_to_params(clipping, floor=eps),
        granularity=per_unit(axes=axis),
        nonfinite=nonfinite,
        axis_names=axis_names,
        specs=specs,
    )
