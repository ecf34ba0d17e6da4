"""Rules that remember nothing: constants, schedules, a share of the parameters."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gradnorm_jax._checks import check_limit
from gradnorm_jax._typing import Bound, Scalar
from gradnorm_jax.thresholds.rule import Context, MemoryOfEach, Threshold


def constant(limit: Scalar) -> Threshold:
    r"""The same limit for every part, at every step.

    Args:
      limit: The largest norm, at least 0. It may be traced, and then counts as 0 where
        it is negative. An infinite one never clips: it only measures.

    Raises:
      ValueError: If `limit` is known and negative or NaN.

    Example:
      >>> rule = constant(1.0)
      >>> print(rule.decide((), jnp.array([2.0, 3.0]), Context(jnp.int32(0))).limit)
      [1. 1.]
    """
    check_limit(limit, "constant(limit=...)")
    return _memoryless(lambda norms, context: limit)


def schedule(limit_fn: Callable[[jax.Array], Scalar]) -> Threshold:
    """A limit that is a function of the step, such as any Optax schedule.

    Args:
      limit_fn: `step -> limit`; the first step is 0.

    Example:
      >>> rule = schedule(lambda step: 1.0 / (1.0 + step))
      >>> print(rule.decide((), jnp.array(2.0), Context(jnp.int32(3))).limit)
      0.25
    """
    if not callable(limit_fn):
        raise TypeError(
            "`schedule(limit_fn=...)` must be a function of the step, got"
            f" {limit_fn!r}. For one limit at every step, use `constant`."
        )
    return _memoryless(lambda norms, context: limit_fn(context.step))


def relative_to_params(factor: Scalar, *, floor: Scalar = 1e-3) -> Threshold:
    r"""A limit in proportion to the norm of the parameters, as in AGC.

    .. math:: c_p = \lambda \max(\lVert w_p \rVert, \varepsilon)

    Args:
      factor: How large a gradient may be for a parameter of norm 1 (:math:`\lambda`).
      floor: The smallest norm that a parameter counts with (:math:`\varepsilon`), so
        that parameters that start at 0 can move.

    Raises:
      ValueError: If `factor` or `floor` is known and negative or NaN.

    References:
      Brock et al., `High-Performance Large-Scale Image Recognition Without
      Normalization <https://arxiv.org/abs/2102.06171>`_, 2021
    """
    check_limit(factor, "relative_to_params(factor=...)")
    check_limit(floor, "relative_to_params(floor=...)")

    def limit(norms: jax.Array, context: Context) -> jax.Array:
        assert context.param_norms is not None
        return factor * jnp.maximum(context.param_norms, floor)

    return _memoryless(limit)._replace(needs_params=True)


def each(rules: Sequence[Scalar | Callable | Threshold]) -> Threshold:
    """A rule of its own for each part, in the order of the parts.

    Args:
      rules: As many rules as there are parts; numbers and functions of the step too. A
        `warmup_limit` is that of the part alone.

    Raises:
      TypeError: If one of them is no rule.
    """
    rules = [as_threshold(rule, "each(rules=...)") for rule in rules]

    def init(norms: jax.Array) -> MemoryOfEach:
        if norms.shape != (len(rules),):
            raise ValueError(
                f"`each(rules=...)` must hold one rule for each part, got {len(rules)}"
                f" rules for norms of shape {norms.shape}."
            )
        own = zip(rules, norms, strict=True)
        return MemoryOfEach(tuple(rule.init(norm) for rule, norm in own))

    def decide(memory: MemoryOfEach, norms: jax.Array, context: Context) -> Bound:
        bounds = [
            rule.decide(own, norms[k], _own(context, k))
            for k, (rule, own) in enumerate(zip(rules, memory.parts, strict=True))
        ]
        return Bound(
            *(
                jnp.stack([jnp.asarray(x, norms.dtype) for x in values])
                for values in zip(*bounds, strict=True)
            )
        )

    def observe(
        memory: MemoryOfEach, norms: jax.Array, clipped: jax.Array, context: Context
    ) -> MemoryOfEach:
        return MemoryOfEach(
            tuple(
                rule.observe(own, norms[k], clipped[k], _own(context, k))
                for k, (rule, own) in enumerate(zip(rules, memory.parts, strict=True))
            )
        )

    return Threshold(init, decide, observe, any(rule.needs_params for rule in rules))


def as_threshold(threshold: Scalar | Callable | Threshold, caller: str) -> Threshold:
    """Returns the rule that a user means: a number, a function of the step, a rule."""
    if isinstance(threshold, Threshold):
        return threshold
    if callable(threshold):
        return schedule(threshold)
    check_limit(threshold, caller)
    return constant(threshold)


def _memoryless(limit: Callable[[jax.Array, Context], Scalar]) -> Threshold:
    def decide(memory: tuple, norms: jax.Array, context: Context) -> Bound:
        del memory
        limits = jnp.asarray(limit(norms, context), norms.dtype)
        if limits.shape not in ((), norms.shape):
            raise ValueError(
                f"A limit must be one number, or one for each of the {norms.shape}"
                f" parts that have a norm, got an array of shape {limits.shape}."
            )
        return Bound(jnp.broadcast_to(limits, norms.shape))

    return Threshold(lambda norms: (), decide, lambda memory, *_: memory)


def _own(context: Context, part: int) -> Context:
    return Context(
        context.step,
        None if context.param_norms is None else context.param_norms[part],
        jnp.atleast_1d(context.taken_in)[part],
    )
