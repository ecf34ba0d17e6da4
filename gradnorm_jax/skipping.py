"""Wrappers that hold, reset or feed back what an inner transformation remembers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradnorm_jax import _trees, kernels
from gradnorm_jax._typing import Scalar, Tree
from gradnorm_jax.norms import granularity as norms_by
from gradnorm_jax.norms.fold import Norm, accumulator, l2
from gradnorm_jax.telemetry import SkipMetrics, SkipState
from gradnorm_jax.thresholds.memoryless import as_threshold
from gradnorm_jax.thresholds.rule import (
    Context,
    Threshold,
    check_steps,
    learn,
)

Rule = Scalar | Callable[[jax.Array], Scalar] | Threshold


def skip_step(
    inner: optax.GradientTransformation,
    rule: Rule = jnp.inf,
    *,
    value_rule: Rule | None = None,
    max_consecutive: int | None = 10,
    norm: Norm = l2,
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
      value_rule: The same for the loss, which `update` is then given as `value`.
      max_consecutive: How many steps may be skipped in a row; `None` for any number. A
        step that is not finite is never let through.
      norm: Which norm is taken of all gradients.

    Returns:
      A transformation whose state is a :class:`SkipState` with the :class:`SkipMetrics`
      of the last step.

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
      Groeneveld et al., `OLMo: Accelerating the Science of Language Models
      <https://arxiv.org/abs/2402.00838>`_, 2024
    """
    limits = as_threshold(rule, "skip_step(rule=...)")
    value_limits = as_threshold(
        jnp.inf if value_rule is None else value_rule, "skip_step(value_rule=...)"
    )
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
        # A buffer for each array: none can be donated twice.
        state = jax.tree.map(jnp.copy, state)
        return state._replace(inner_state=within.init(params))

    def update(
        updates: Tree,
        state: Any,
        params: Tree | None = None,
        *,
        value: Scalar | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, SkipState]:
        _, leaves, _ = _trees.flatten(updates, "skip_step(...).update(updates)")
        layout = norms_by.whole_tree().layout(updates)
        size = kernels.apart(
            lambda *leaves: norms_by.measure(layout, leaves, norm)[0],
            state.step >= 0,
            *leaves,
        )
        loss = _loss(value, value_rule)
        finite = jnp.isfinite(size) & jnp.isfinite(loss)
        context = Context(state.step, _param_norm(params, limits, norm), finite)
        limit = limits.decide(state.memory, size, context).limit
        value_limit = value_limits.decide(state.value_memory, loss, context).limit

        large = (size > limit) | (loss > value_limit)
        weary = jnp.zeros((), bool)
        if max_consecutive is not None:
            weary = state.metrics.consecutive_skipped >= max_consecutive
        skip = ~finite | (large & ~weary)

        if value is not None:
            extra_args["value"] = value
        outgoing, inner_state = within.update(
            updates, state.inner_state, params, **extra_args
        )
        outgoing = jax.tree.map(lambda x: jnp.where(skip, -0.0, x), outgoing)
        inner_state = jax.tree.map(
            lambda old, new: jnp.where(skip, old, new), state.inner_state, inner_state
        )

        def learned(rule: Threshold, memory: Any, x: jax.Array, limit: Any) -> Any:
            known = jnp.where(skip, jnp.minimum(x, limit), x)
            return learn(rule, memory, x, known, context)

        metrics = state.metrics.after_a_step(
            norm=size,
            limit=limit,
            skipped=skip,
            let_through=finite & large & weary,
            finite=finite,
        )
        return outgoing, SkipState(
            inner_state,
            jnp.asarray(optax.safe_increment(state.step)),
            learned(limits, state.memory, size, limit),
            learned(value_limits, state.value_memory, loss, value_limit),
            metrics,
        )

    return optax.GradientTransformationExtraArgs(init, update)


class ResetState(NamedTuple):
    """The state of `reset_state_every`: the inner one, and the steps so far."""

    inner_state: Any
    step: jax.Array


def reset_state_every(
    inner: optax.GradientTransformation, every: int, *, warmup_steps: int = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Starts an inner transformation anew every so many steps, as SPAM does.

    What a gradient spike left in the moments of Adam is then gone. All of the inner
    state is reset, step counters too, so that debiasing and warm-ups start again: wrap
    what holds the moments, and leave the schedule of the learning rate outside.

    Args:
      inner: What is reset, such as `optax.scale_by_adam()`.
      every: After how many steps (:math:`\Delta T`); 500 in SPAM, 1000 in Stable-SPAM.
      warmup_steps: Over how many steps after a reset the updates grow from 0 to their
        size, along half a cosine; 150 in SPAM.

    Returns:
      A transformation whose state is a :class:`ResetState`. `update` needs `params`.

    Raises:
      ValueError: If a number of steps is too small. By `update`: without `params`.

    Example:
      >>> moments = reset_state_every(optax.scale_by_adam(), 2)
      >>> tx = optax.chain(moments, optax.scale_by_learning_rate(1e-3))
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jnp.ones(2), state, params)
      >>> print(optax.tree.get(state, "count"))
      1

    References:
      Huang et al., `SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training
      <https://arxiv.org/abs/2501.06842>`_, 2025
    """
    _check_inner(inner, "reset_state_every(inner=...)")
    check_steps(every, 1, "reset_state_every(every=...)", "500 is that of SPAM.")
    check_steps(
        warmup_steps, 0, "reset_state_every(warmup_steps=...)", "0 is no warm-up."
    )
    within = optax.with_extra_args_support(inner)

    def init(params: Tree) -> ResetState:
        return ResetState(within.init(params), jnp.zeros((), jnp.int32))

    def update(
        updates: Tree, state: Any, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, ResetState]:
        if params is None:
            raise ValueError(
                "`reset_state_every(...).update(params=...)` must be given, to start"
                " the inner state anew. Call `tx.update(grads, state, params)`."
            )
        since = state.step % every
        due = (since == 0) & (state.step > 0)
        inner_state = jax.tree.map(
            lambda old, new: jnp.where(due, new, old),
            state.inner_state,
            within.init(params),
        )
        outgoing, inner_state = within.update(
            updates, inner_state, params, **extra_args
        )
        if warmup_steps:
            share = jnp.minimum((since + 1).astype(jnp.float32) / warmup_steps, 1)
            grown = (1 - jnp.cos(jnp.pi * share)) / 2
            factor = jnp.where(state.step < every, 1, grown)
            outgoing = jax.tree.map(lambda x: x * factor.astype(x.dtype), outgoing)
        step = jnp.asarray(optax.safe_increment(state.step))
        return outgoing, ResetState(inner_state, step)

    return optax.GradientTransformationExtraArgs(init, update)


class ResidualState(NamedTuple):
    """The state of `with_residual`: the inner one, and what was clipped off so far."""

    inner_state: Any
    residual: Tree


def with_residual(
    clip: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds what a clip took away from the last gradients to the next (U-Clip).

    .. math::

        u_t = \mathrm{clip}(g_t + \Delta_t), \qquad
        \Delta_{t+1} = g_t + \Delta_t - u_t

    Nothing is lost on average: the sum of the updates is that of the gradients up to
    the last residual. It costs one array as large as the parameters, in float32 or
    wider. A step that is not finite leaves it as it was.

    Args:
      clip: Any clip, such as `clip_by_global_norm(1.0)`.

    Returns:
      A transformation whose state is a :class:`ResidualState`.

    Example:
      >>> tx = with_residual(gn.clip_by_global_norm(1.0))
      >>> state = tx.init(jnp.zeros(1))
      >>> for grad in (2.5, 0.0, 0.0):
      ...     updates, state = tx.update(jnp.array([grad]), state)
      ...     print(updates, state.residual)
      [1.] [1.5]
      [1.] [0.5]
      [0.5] [0.]

    References:
      Elesedy and Hutter, `U-Clip: On-Average Unbiased Stochastic Gradient Clipping
      <https://arxiv.org/abs/2302.02971>`_, 2023
    """
    _check_inner(clip, "with_residual(clip=...)")
    within = optax.with_extra_args_support(clip)

    def init(params: Tree) -> ResidualState:
        residual = jax.tree.map(
            lambda x: jnp.zeros_like(x, np.promote_types(x.dtype, np.float32)), params
        )
        return ResidualState(within.init(params), residual)

    def update(
        updates: Tree, state: Any, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, ResidualState]:
        owed = jax.tree.map(
            lambda x, rest: x.astype(rest.dtype) + rest, updates, state.residual
        )
        offered = jax.tree.map(lambda x, own: x.astype(own.dtype), owed, updates)
        outgoing, inner_state = within.update(
            offered, state.inner_state, params, **extra_args
        )
        residual = jax.tree.map(lambda x, y: x - y.astype(x.dtype), owed, outgoing)
        sound = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(residual)]
        finite = jnp.all(jnp.stack(sound)) if sound else jnp.ones((), bool)
        residual = jax.tree.map(
            lambda old, new: jnp.where(finite, new, old), state.residual, residual
        )
        return outgoing, ResidualState(inner_state, residual)

    return optax.GradientTransformationExtraArgs(init, update)


def _loss(value: Scalar | None, value_rule: Any) -> jax.Array:
    if value_rule is None:
        return jnp.zeros((), jnp.float32)
    if value is None:
        raise ValueError(
            "`skip_step(...).update(value=...)` must be the loss: there is a"
            " `value_rule`. Call `tx.update(grads, state, params, value=loss)`."
        )
    return jnp.asarray(value, jnp.float32).reshape(())


def _param_norm(params: Tree | None, rule: Threshold, norm: Norm) -> jax.Array | None:
    if not rule.needs_params:
        return None
    if params is None:
        raise ValueError(
            "`skip_step(...).update(params=...)` must be given: the rule is relative to"
            " the norm of the parameters. Call `tx.update(grads, state, params)`."
        )
    return norms_by.whole_tree().measure(params, norm)


def _check(
    inner: Any, value_rule: Threshold, max_consecutive: int | None, norm: Any
) -> None:
    _check_inner(inner, "skip_step(inner=...)")
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


def _check_inner(inner: Any, caller: str) -> None:
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"`{caller}` must be an Optax transformation such as `optax.adam(1e-3)`,"
            f" got {inner!r}."
        )


__all__ = [
    "ResetState",
    "ResidualState",
    "reset_state_every",
    "skip_step",
    "with_residual",
]
