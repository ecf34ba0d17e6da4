"""THE CORRIDOR: gradients to norms, to limits, to clipped gradients, to the record."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradnorm_jax import _sharding, _trees, kernels
from gradnorm_jax._checks import check_kind, check_limit, check_state
from gradnorm_jax._layout import Layout
from gradnorm_jax._sharding import Placement
from gradnorm_jax._typing import AUTO, AxisNames, Bound, Scalar, Tree
from gradnorm_jax.norms.fold import Norm, accumulator, l2, linf
from gradnorm_jax.norms.granularity import Granularity, whole_tree
from gradnorm_jax.norms.measurement import (
    Measured,
    first_nonfinite_leaf,
    fold,
)
from gradnorm_jax.shrink import Scaling, Shrink, rescale, scaling
from gradnorm_jax.telemetry import ClipMetrics, ClipState
from gradnorm_jax.thresholds.memoryless import as_threshold
from gradnorm_jax.thresholds.rule import Context, Threshold, learn, needed

POLICIES = ("propagate", "zero", "drop")


def clip_by_norm(
    threshold: Scalar | Callable[[jax.Array], Scalar] | Threshold,
    *,
    granularity: Granularity = whole_tree(),  # noqa: B008 - frozen
    norm: Norm = l2,
    shrink: Shrink = rescale,
    nonfinite: str = "propagate",
    eps: Scalar = 0.0,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales gradients down where their norm exceeds a threshold.

    For each part :math:`p` that ``granularity`` tells apart, with norm :math:`n_p`
    and a limit :math:`c_p` that ``threshold`` decides from the norms seen so far,

    .. math:: g_p \leftarrow \frac{\mathrm{shrink}(n_p, c_p)}{n_p} \, g_p .

    By default this is the clip by global norm. The methods in
    :mod:`gradnorm_jax.methods` are calls of this function.

    Args:
      threshold: A limit for every part, a function of the step, or a rule from
        :mod:`gradnorm_jax.thresholds`.
      granularity: What has one norm: ``whole_tree()``, ``per_leaf()``,
        ``per_group(...)``, ``per_unit()``.
      norm: Which norm is taken of a part: ``l2``, ``l1``, ``linf``, ``lp(p)``, ``rms``.
      shrink: What a norm above its limit becomes: ``rescale`` (the limit), or
        ``normalize`` (the limit, and so do smaller ones), or another one of
        :mod:`gradnorm_jax.shrink`.
      nonfinite: What becomes of a norm that is NaN or infinite. "propagate": its part
        becomes NaN, unless its limit is infinite. "zero": all updates of the step are
        zero. "drop": only the parts without a finite norm are zero. The rule's memory
        stays as it was: with "drop" that of these parts, else all of it.
      eps: Added to the norm; with 1e-6 the scale is that of PyTorch,
        min(1, max_norm / (norm + eps)), which shrinks a norm at its limit too.
      axis_names: The mesh axes to reduce norms over inside `shard_map`: by default
        those over which the type of a leaf says that it varies. An axis that is left
        out holds independent models; `()` is for gradients that are the same on every
        device. An axis of `jax.vmap` is reduced over if it is named.
      specs: The PartitionSpec of each leaf inside `shard_map`, or a prefix of that
        tree, where types do not tell: with `check_vma=False`, and where parts lie
        across the shards of a leaf, as units do.

    Returns:
      A transformation whose state is a :class:`ClipState`: the rule's memory, and
      the :class:`ClipMetrics` of the last step. ``update`` takes the extra argument
      ``norms``: norms computed elsewhere, of the shape of ``metrics.norms``, by which
      it then clips without measuring.

    Guarantees:
      - No norm exceeds its limit after ``rescale``, to rounding.
      - With ``eps=0``, a part with ``norm <= limit`` comes out bit for bit as it went
        in.
      - Direction, tree structure and dtypes never change. Norms are float32 or wider,
        and right wherever they fit into it, though their squares may not.
      - ``init`` and ``update`` return one tree structure: the state rides in `scan`.
      - ``None`` and ``optax.MaskedNode`` in place of a leaf pass by.
      - Sharded gradients are clipped as if they were on one device, under ``jit`` and
        inside ``shard_map``, with one collective; the state is the same on every
        device, and ``init`` puts it on the mesh of the parameters.

      =================  ==========================  ====================
      a part with        becomes                     ``metrics.scales``
      =================  ==========================  ====================
      norm 0             itself                      1
      limit inf          itself                      1
      limit 0            0                           0
      a NaN or an inf    NaN (``"propagate"``)       NaN
      a NaN or an inf    0 (``"zero"``, ``"drop"``)  0
      =================  ==========================  ====================

    Raises:
      ValueError: If ``threshold`` or ``eps`` is a negative number, or ``nonfinite`` no
        policy. By ``update``: if the rule needs ``params`` and gets none.
      TypeError: By ``init`` and ``update``: if a leaf is of an integer dtype.
      DistributedNormError: Inside ``shard_map``: by ``update``, if it cannot be known
        how a leaf is split, or a gradient differs where its parameter is replicated; by
        ``init`` too, if ``specs`` do not agree with the types, or parts need them.

    Example:
      >>> clip = clip_by_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> clipped, state = clip.update(grads, clip.init(grads))
      >>> print(clipped["w"], state.metrics.norms)
      [0.6 0.8] 5.0

    References:
      Pascanu et al., `On the difficulty of training recurrent neural networks
      <https://arxiv.org/abs/1211.5063>`_, 2013
    """
    rule = as_threshold(threshold, "clip_by_norm(threshold=...)")
    _check(granularity, norm, shrink, nonfinite, eps)

    def init(params: Tree) -> ClipState:
        _, leaves, _ = _trees.flatten(params, "clip_by_norm(...).init(params)")
        placement = Placement(axis_names, specs, "clip_by_norm(...).init(params)")
        layout = granularity.layout(params, placement, measured=False)
        zeros = jnp.zeros(layout.part_shape, accumulator(leaves))
        state = ClipState(
            jnp.zeros((), jnp.int32), rule.init(zeros), ClipMetrics.zeros(zeros)
        )
        return _sharding.placed(state, params, layout.split)

    def update(
        updates: Tree,
        state: Any,
        params: Tree | None = None,
        *,
        norms: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, ClipState]:
        del extra_args
        placement = Placement(axis_names, specs, "clip_by_norm(...).update(updates)")
        names, leaves, treedef = _trees.flatten(updates, placement.caller)
        _sharding.check_averaged(names, leaves, params, placement)
        measured = norms is None or rule.needs_params
        layout = granularity.layout(updates, placement, measured=measured)
        _check_state(state, layout)

        # MEASURE
        trees = [(layout, leaves, norm)] if norms is None else []
        if rule.needs_params:
            weights = needed(params, "clip_by_norm(...)")
            of_weights = granularity.layout(weights, placement)
            trees.append((of_weights, jax.tree.leaves(weights), norm))
        found = fold(trees, apart=True)
        sizes, sound = found[0].measured() if norms is None else _given(norms, layout)
        first_bad = first_nonfinite_leaf(layout, sound)

        # DECIDE
        finite = jnp.isfinite(sizes)
        taken_in = jnp.broadcast_to(jnp.all(finite), finite.shape)
        if nonfinite == "drop":
            taken_in = finite
        own = found[-1].measured().norms if rule.needs_params else None
        context = Context(state.step, own, taken_in)
        bound = rule.decide(state.memory, jnp.where(finite, sizes, 0), context)

        # APPLY
        factors, zero = kernels.apart(
            functools.partial(_factors, shrink, nonfinite), sizes, bound, eps
        )
        limits = bound.limit if shrink.spikes_only else None
        clipped = [
            _apply(layout, k, x, factors, zero, limits) for k, x in enumerate(leaves)
        ]

        # RECORD
        after = _unless(zero, factors.scale(sizes))
        memory = learn(rule, state.memory, sizes, after, context)
        metrics = state.metrics.after_a_step(
            state.step,
            norms=sizes,
            limits=jnp.maximum(bound.limit, 0),
            scales=_unless(zero, factors.scales),
            was_clipped=~factors.keep & finite,
            first_nonfinite_leaf=first_bad,
        )
        step = jnp.asarray(optax.safe_increment(state.step))
        after_it = ClipState(step, memory, metrics)
        return (
            jax.tree.unflatten(treedef, clipped),
            _sharding.placed_like(after_it, state),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _factors(
    shrink: Shrink, nonfinite: str, norms: jax.Array, bound: Bound, eps: Scalar
) -> tuple[Scaling, jax.Array | None]:
    """How each part is scaled, and what is set to zero: nothing, all, or parts."""
    factors = scaling(norms, bound, eps, shrink)
    bad = ~jnp.isfinite(norms)
    match nonfinite:
        case "zero":
            return factors, jnp.any(bad)
        case "drop":
            return factors, bad
    return factors, None


def _apply(
    layout: Layout,
    position: int,
    x: jax.Array,
    factors: Scaling,
    zero: Any,
    limits: jax.Array | None,
) -> jax.Array:
    """Scales one leaf by the factors of its parts, and sets it to zero where asked.

    With `limits`, entries that are not above the limit of their part stay as they are.
    """
    if layout.scales(position):
        keep, coarse, fine = (layout.spread(values, position) for values in factors)
        if limits is not None:
            size = jnp.abs(x)
            size = size.astype(np.promote_types(size.dtype, limits.dtype))
            keep = keep | (size <= layout.spread(limits, position))
        x = kernels.scale(x, keep, coarse, fine)
        if zero is not None and zero.ndim:
            zero = layout.spread(zero, position)
    elif zero is None or zero.ndim:
        return x
    return _unless(zero, x)


def _unless(zero: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if zero is None else jnp.where(_sharding.spread_like(zero, x), 0, x)


def _given(norms: Any, layout: Layout) -> Measured:
    """Returns norms that were computed elsewhere, checked."""
    leaves = jax.tree.leaves(norms)
    if len(leaves) != 1 or jnp.shape(leaves[0]) not in ((), layout.part_shape):
        raise ValueError(
            "`clip_by_norm(...).update(norms=...)` must be one array of shape"
            f" {layout.part_shape}, as `state.metrics.norms` is, got {norms!r}."
        )
    norms = jnp.asarray(leaves[0])
    wide = np.promote_types(norms.dtype, np.float32)
    norms = jnp.broadcast_to(norms.astype(wide), layout.part_shape)
    return Measured(norms, jnp.ones(0, bool))


def _check_state(state: Any, layout: Layout) -> None:
    check_state(state, ClipState, "clip_by_norm")
    if state.metrics.norms.shape != layout.part_shape:
        raise ValueError(
            "`clip_by_norm(...).update(updates)`: the updates have norms of shape"
            f" {layout.part_shape}, but `init` was given a tree with norms of shape"
            f" {state.metrics.norms.shape}. Both must have the same leaves."
        )


def _check(granularity: Any, norm: Any, shrink: Any, nonfinite: Any, eps: Any) -> None:
    for argument, value, kind, way_out in (
        ("granularity", granularity, Granularity, "`whole_tree()` or `per_leaf()`"),
        ("norm", norm, Norm, "`gradnorm_jax.norms.l2` or `gradnorm_jax.norms.lp(3)`"),
        ("shrink", shrink, Shrink, "`gradnorm_jax.shrink.rescale`"),
    ):
        check_kind(value, kind, f"clip_by_norm({argument}=...)", way_out)
    if nonfinite not in POLICIES:
        raise ValueError(
            f"`clip_by_norm(nonfinite=...)` must be one of {POLICIES}, got"
            f" {nonfinite!r}."
        )
    if shrink.spikes_only and norm is not linf:
        raise ValueError(
            f"`clip_by_norm(shrink={shrink}, norm=...)` must be `norms.linf`: what is"
            f" compared with the limit are single entries, got the norm {norm.ord!r}."
        )
    check_limit(eps, "clip_by_norm(eps=...)")


__all__ = ["clip_by_norm"]
