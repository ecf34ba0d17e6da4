"""DECIDE: from the norms seen so far to how large each norm may be.

A threshold never sees a gradient. It is three functions over norms, which come as one
array with an entry for each part (or of shape `()` where there is one part).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gradnorm_jax._typing import Bound, Scalar


class Context(NamedTuple):
    """What a rule may look at besides the norms.

    Attributes:
      step: How many updates came before this one, int32.
      param_norms: The norms of the parameters by the same parts, if it asked for them.
    """

    step: jax.Array
    param_norms: jax.Array | None = None


class Threshold(NamedTuple):
    """A rule: what it remembers, what it decides, what it learns from a step.

    Attributes:
      init: `norms -> memory`; `norms` are zeros of the shape and dtype to come.
      decide: `(memory, norms, context) -> Bound`.
      observe: `(memory, norms, clipped norms, context) -> memory`, of the structure,
        shapes and dtypes that `init` gave. What it makes of a step with a norm that is
        not finite is discarded.
      needs_params: Whether `context.param_norms` is to be measured.
    """

    init: Callable[[jax.Array], Any]
    decide: Callable[[Any, jax.Array, Context], Bound]
    observe: Callable[[Any, jax.Array, jax.Array, Context], Any]
    needs_params: bool = False


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


def each(rules: Sequence[Threshold]) -> Threshold:
    """A rule of its own for each part, in the order of the parts.

    Args:
      rules: As many rules as there are parts.
    """

    def init(norms: jax.Array) -> tuple:
        if norms.shape != (len(rules),):
            raise ValueError(
                f"`each(rules=...)` must hold one rule for each part, got {len(rules)}"
                f" rules for norms of shape {norms.shape}."
            )
        return tuple(rule.init(norm) for rule, norm in zip(rules, norms, strict=True))

    def decide(memory: tuple, norms: jax.Array, context: Context) -> Bound:
        bounds = [
            rule.decide(own, norms[k], _own(context, k))
            for k, (rule, own) in enumerate(zip(rules, memory, strict=True))
        ]
        return Bound(
            jnp.stack([jnp.asarray(b.limit, norms.dtype) for b in bounds]),
            jnp.stack([jnp.asarray(b.center, norms.dtype) for b in bounds]),
        )

    def observe(
        memory: tuple, norms: jax.Array, clipped: jax.Array, context: Context
    ) -> tuple:
        return tuple(
            rule.observe(own, norms[k], clipped[k], _own(context, k))
            for k, (rule, own) in enumerate(zip(rules, memory, strict=True))
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


def check_limit(limit: Any, caller: str) -> None:
    """Refuses a limit that is no number, or one that is known to be below 0 or NaN."""
    if isinstance(limit, Tracer):
        return
    known = None if isinstance(limit, bool | str) else _as_numbers(limit)
    if known is None:
        raise TypeError(
            f"`{caller}` must be a number, got {limit!r}. Thresholds may also be a"
            " function of the step, or a rule of `gradnorm_jax.thresholds`."
        )
    if np.any(known < 0) or np.any(np.isnan(known)):
        raise ValueError(
            f"`{caller}` must not be negative or NaN, got {limit}. To stop the updates"
            " of some parameters, use `optax.freeze`; to clip nothing and only measure,"
            " use the limit `jnp.inf`."
        )


def _as_numbers(limit: Any) -> np.ndarray | None:
    known = np.asarray(limit)
    is_number = np.issubdtype(known.dtype, np.number) or known.dtype == jnp.bfloat16
    return known.astype(np.float64) if is_number else None


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
    norms = context.param_norms
    return context._replace(param_norms=None if norms is None else norms[part])


__all__ = [
    "Bound",
    "Context",
    "Threshold",
    "constant",
    "each",
    "relative_to_params",
    "schedule",
]
