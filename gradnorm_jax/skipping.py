"""Steps that are skipped as if they never were."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradnorm_jax import _sharding, _trees
from gradnorm_jax._checks import check_state, check_steps, check_transformation
from gradnorm_jax._sharding import Placement
from gradnorm_jax._typing import AUTO, AxisNames, Scalar, Tree
from gradnorm_jax.norms.fold import Norm, accumulator, l2
from gradnorm_jax.norms.granularity import whole_tree
from gradnorm_jax.norms.measurement import fold, sharing
from gradnorm_jax.telemetry import SkipMetrics, SkipState
from gradnorm_jax.thresholds.memoryless import as_threshold, schedule
from gradnorm_jax.thresholds.rule import Context, Threshold, learn, needed

Rule = Scalar | Callable[[jax.Array], Scalar] | Threshold


def skip_step(
    inner: optax.GradientTransformation,
    rule: Rule = jnp.inf,
    *,
    value_rule: Rule | None = None,
    max_consecutive: int | None = 10,
    norm: Norm = l2,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Skips a step whose gradient is too large, or not finite, as if it never was.

    Inside a chain a zero update is no skipped step: the moments of Adam decay, and its
    momentum moves the parameters on. Here the whole state of `inner` stays as it was,
    and the updates are zero. A step is skipped

    - if the norm of the gradients, or the loss with `value_rule`, is not finite;
    - if it is above the limit that its rule decides, unless `max_consecutive` steps
      were skipped in a row: then this one is let through, and counted.

    The rules learn from skipped steps too: from the norm itself with `feed="raw"`, so
    that a new level becomes the usual one, or from the limit with `feed="clipped"`.

    Args:
      inner: Any optimizer or chain. Wrap it whole, clip and all.
      rule: The largest norm of a step that counts: a number, a function of the step, or
        a rule such as `thresholds.rolling_sigma(6.0)`. By default only what is not
        finite is skipped.
      value_rule: The same for the loss, which `update` is then given as `value`. Where
        the loss may be negative, take `rolling_sigma` or `z_score`: the limits of other
        rules are in proportion to what they remember.
      max_consecutive: How many steps may be skipped in a row; `None` for any number. A
        step that is not finite is never let through.
      norm: Which norm is taken of all gradients.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`. The loss
        is taken as it is given: inside `shard_map` give its mean over all devices.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation whose state is a :class:`SkipState` with the :class:`SkipMetrics`
      of the last step. The record of a clip inside is that of the last step that was
      not skipped.

    Guarantees:
      - A skipped step leaves the inner state bit for bit, and with
        `optax.apply_updates` the parameters: the update is -0.0, as -0.0 + 0.0 is 0.0.
      - No NaN or infinity reaches the memory of a rule, and no product with 0 is
        formed, which would keep it.
      - A step that is not skipped has the updates of `inner`, bit for bit.

    Raises:
      ValueError: If a limit is negative, or `max_consecutive` below 1. By `update`:
        if there is a `value_rule` and `value` is not given.

    Example:
      >>> tx = skip_step(optax.adam(0.1), 10.0)
      >>> state = tx.init(jnp.zeros(2))
      >>> for grads in (jnp.array([3.0, 4.0]), jnp.array([30.0, 40.0])):
      ...     updates, state = tx.update(grads, state)
      >>> print(abs(updates), state.metrics.num_skipped)
      [0. 0.] 1

    References:
      The skip-step optimizer of `OLMo-core <https://github.com/allenai/OLMo-core>`_,
      which tests the loss and the norm by `rolling_sigma(6.0)`
    """
    limits = as_threshold(rule, "skip_step(rule=...)")
    value_limits = _value_threshold(value_rule)
    _check(inner, value_limits, max_consecutive, norm)
    within = optax.with_extra_args_support(inner)

    def init(params: Tree) -> SkipState:
        _, leaves, _ = _trees.flatten(params, "skip_step(...).init(params)")
        zero = jnp.zeros((), accumulator(leaves))
        state = SkipState(
            (),
            jnp.zeros((), jnp.int32),
            limits.init(zero),
            value_limits.init(jnp.zeros((), jnp.float32)),
            SkipMetrics.zeros(zero),
        )
        placement = Placement(axis_names, specs, "skip_step(...).init(params)")
        layout = whole_tree().layout(params, placement, measured=False)
        state = _sharding.placed(state, params, layout.split)
        inner_state = _sharding.varied(within.init(params), params, layout.split)
        return state._replace(inner_state=inner_state)

    def update(
        updates: Tree,
        state: Any,
        params: Tree | None = None,
        *,
        value: Scalar | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, SkipState]:
        check_state(state, SkipState, "skip_step")
        placement = Placement(axis_names, specs, "skip_step(...).update(updates)")
        names, leaves, _ = _trees.flatten(updates, placement.caller)
        _sharding.check_averaged(names, leaves, params, placement)
        by_tree = whole_tree().layout
        layout = by_tree(updates, placement)
        trees = [(layout, leaves, norm)]
        if limits.needs_params:
            weights = needed(params, "skip_step(...)")
            of_weights = by_tree(weights, placement)
            trees.append((of_weights, jax.tree.leaves(weights), norm))
        found = fold(trees, apart=True)
        size = found[0].measured().norms
        loss = _loss(value, value_rule)
        finite = jnp.isfinite(size) & jnp.isfinite(loss)
        own = found[-1].measured().norms if limits.needs_params else None
        context = Context(state.step, own, finite)

        def limit_of(rule: Threshold, memory: Any, x: jax.Array) -> jax.Array:
            x = jnp.where(jnp.isfinite(x), x, 0)
            return jnp.asarray(rule.decide(memory, x, context).limit)

        limit = limit_of(limits, state.memory, size)
        value_limit = limit_of(value_limits, state.value_memory, loss)

        large = (size > limit) | (loss > value_limit)
        let_through = jnp.zeros((), bool)
        if max_consecutive is not None:
            skipped_before = state.metrics.consecutive_skipped
            let_through = finite & large & (skipped_before >= max_consecutive)
        skip = ~finite | (large & ~let_through)

        if value is not None:
            extra_args["value"] = value
        with sharing(found[0]):
            outgoing, inner_state = within.update(
                updates, state.inner_state, params, **extra_args
            )
        outgoing = jax.tree.map(
            lambda x: jnp.where(skip, -jnp.zeros_like(x), x), outgoing
        )
        inner_state = jax.tree.map(
            lambda old, new: jnp.where(skip, old, new), state.inner_state, inner_state
        )

        def learned(rule: Threshold, memory: Any, x: jax.Array, limit: Any) -> Any:
            clipped = jnp.where(skip, jnp.minimum(x, limit), x)
            return learn(rule, memory, x, clipped, context)

        metrics = state.metrics.after_a_step(
            norm=size,
            limit=limit,
            skipped=skip,
            let_through=let_through,
            finite=finite,
        )
        after_it = SkipState(
            (),
            jnp.asarray(optax.safe_increment(state.step)),
            learned(limits, state.memory, size, limit),
            learned(value_limits, state.value_memory, loss, value_limit),
            metrics,
        )
        # The arrays of the inner state are where their owner has them.
        own = _sharding.placed_like(after_it, state._replace(inner_state=()))
        return outgoing, own._replace(inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _value_threshold(rule: Rule | None) -> Threshold:
    """A loss may be negative, and so may its limit."""
    if rule is None:
        return schedule(lambda step: jnp.inf)
    if isinstance(rule, Threshold):
        return rule
    return schedule(rule if callable(rule) else lambda step: rule)


def _loss(value: Scalar | None, value_rule: Any) -> jax.Array:
    if value_rule is None:
        return jnp.zeros((), jnp.float32)
    if value is None:
        raise ValueError(
            "`skip_step(...).update(value=...)` must be the loss: there is a"
            " `value_rule`. Call `tx.update(grads, state, params, value=loss)`."
        )
    if jnp.size(value) != 1:
        raise ValueError(
            "`skip_step(...).update(value=...)` must be one number, the loss, got an"
            f" array of shape {jnp.shape(value)}. Take its mean."
        )
    return jnp.asarray(value, jnp.float32).reshape(())


def _check(
    inner: Any, value_rule: Threshold, max_consecutive: int | None, norm: Any
) -> None:
    check_transformation(inner, "skip_step(inner=...)")
    if value_rule.needs_params:
        raise ValueError(
            "`skip_step(value_rule=...)` cannot be relative to the parameters: they"
            " have no loss. Use `rolling_sigma(6.0)`."
        )
    if max_consecutive is not None:
        check_steps(
            max_consecutive,
            1,
            "skip_step(max_consecutive=...)",
            "`None` is for any number of steps.",
        )
    if not isinstance(norm, Norm):
        raise TypeError(
            "`skip_step(norm=...)` must be a Norm such as `gradnorm_jax.norms.l2`, got"
            f" {norm!r}."
        )


__all__ = ["skip_step"]
