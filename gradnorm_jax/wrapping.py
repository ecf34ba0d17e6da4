"""Wrappers that start a state anew, or give back what a clip took away."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from gradnorm_jax import _layout, _sharding, kernels
from gradnorm_jax._checks import check_state, check_steps, check_transformation
from gradnorm_jax._sharding import Placement
from gradnorm_jax._typing import AUTO, AxisNames, Tree


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
    check_transformation(inner, "reset_state_every(inner=...)")
    check_steps(every, 1, "reset_state_every(every=...)", "500 is that of SPAM.")
    check_steps(
        warmup_steps, 0, "reset_state_every(warmup_steps=...)", "0 is no warm-up."
    )
    if not isinstance(warmup_steps, Tracer) and warmup_steps > every:
        raise ValueError(
            "`reset_state_every(warmup_steps=...)` must be at most `every`, got"
            f" {warmup_steps} and {every}: the updates would never reach their size."
        )
    within = optax.with_extra_args_support(inner)

    def init(params: Tree) -> ResetState:
        step = _sharding.placed(jnp.zeros((), jnp.int32), params)
        return ResetState(within.init(params), step)

    def update(
        updates: Tree, state: Any, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, ResetState]:
        check_state(state, ResetState, "reset_state_every")
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
        if not (isinstance(warmup_steps, int) and warmup_steps == 0):
            share = (since + 1).astype(jnp.float32) / jnp.maximum(warmup_steps, 1)
            full = (share >= 1) | (state.step < every)
            factor = (1 - jnp.cos(jnp.pi * share)) / 2
            scale = functools.partial(
                kernels.scale, keep=full, coarse=factor, fine=jnp.ones_like(factor)
            )
            outgoing = jax.tree.map(scale, outgoing)
        step = jnp.asarray(optax.safe_increment(state.step))
        return outgoing, ResetState(inner_state, step)

    return optax.GradientTransformationExtraArgs(init, update)


class ResidualState(NamedTuple):
    """The state of `with_residual`: the inner one, and what was clipped off so far."""

    inner_state: Any
    residual: Tree


def with_residual(
    clip: optax.GradientTransformation,
    *,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds what a clip took away from the last gradients to the next (U-Clip).

    .. math::

        u_t = \mathrm{clip}(g_t + \Delta_t), \qquad
        \Delta_{t+1} = g_t + \Delta_t - u_t

    Nothing is lost on average: the sum of the updates is that of the gradients up to
    the last residual. It costs one array as large as the parameters, in float32 or
    wider, in which the sum is clipped. In a step that is not finite, what got no update
    keeps its residual.

    Args:
      clip: Any clip, such as `clip_by_global_norm(1.0)`.
      axis_names: Which mesh axes a leaf is split over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

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
    check_transformation(clip, "with_residual(clip=...)")
    within = optax.with_extra_args_support(clip)

    def init(params: Tree) -> ResidualState:
        inner_state = within.init(params)
        residual = jax.tree.map(
            lambda x: jnp.zeros_like(x, _wide(jnp.result_type(x))), params
        )
        return ResidualState(inner_state, residual)

    def update(
        updates: Tree, state: Any, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, ResidualState]:
        check_state(state, ResidualState, "with_residual")

        placement = Placement(axis_names, specs, "with_residual(...).update(updates)")

        def owe(x: jax.Array, rest: jax.Array) -> jax.Array:
            wide = np.promote_types(x.dtype, rest.dtype)
            return x.astype(wide) + rest.astype(wide)

        owed = jax.tree.map(owe, updates, state.residual)
        clipped, inner_state = within.update(
            owed, state.inner_state, params, **extra_args
        )
        outgoing = jax.tree.map(lambda x, own: x.astype(own.dtype), clipped, updates)
        bad, moved = _flags(owed, outgoing, placement)

        def rest(
            old: jax.Array, owed: jax.Array, given: jax.Array, moved: jax.Array
        ) -> jax.Array:
            new = owed - given.astype(owed.dtype)
            moved = ~bad | moved
            return jnp.where(moved & jnp.isfinite(new), new.astype(old.dtype), old)

        residual = jax.tree.map(rest, state.residual, owed, outgoing, moved)
        return outgoing, ResidualState(inner_state, residual)

    return optax.GradientTransformationExtraArgs(init, update)


def _flags(owed: Tree, given: Tree, placement: Placement) -> tuple[jax.Array, Tree]:
    """Whether anything owed is not finite, and which leaves were given something."""
    layout = _layout.by_tree(owed, placement, caller=placement.caller)
    flags = [
        jnp.stack(
            [
                jnp.any(~jnp.isfinite(whole)),
                jnp.any(jnp.isfinite(part) & (part != 0)),
            ]
        )
        for whole, part in zip(*map(jax.tree.leaves, (owed, given)), strict=True)
    ]
    if not flags:
        return jnp.zeros((), bool), given
    cells, axes = layout.over_the_mesh(jnp.stack(flags).astype(jnp.float32))
    found = _sharding.all_reduce(cells, axes, "max", functools.partial(jnp.max, axis=0))
    structure = jax.tree.structure(owed)
    return jnp.any(found[:, 0] > 0), structure.unflatten(list(found[:, 1] > 0))


def _wide(dtype: Any) -> np.dtype:
    return np.promote_types(dtype, np.float32)


__all__ = ["ResetState", "ResidualState", "reset_state_every", "with_residual"]
