"""What a rule is: three functions over norms, and how it learns from a step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradnorm_jax._typing import Bound, Scalar

#: A number, or a function of the step such as an Optax schedule.
Value = Scalar | Callable[[jax.Array], Scalar]


class Context(NamedTuple):
    """What a rule may look at besides the norms.

    Attributes:
      step: How many updates came before this one, int32.
      param_norms: The norms of the parameters by the same parts, if it asked for them.
      taken_in: Which parts may be learned from: none that has no finite norm.
    """

    step: jax.Array
    param_norms: jax.Array | None = None
    taken_in: jax.Array | bool = True


class Threshold(NamedTuple):
    """A rule: what it remembers, what it decides, what it learns from a step.

    Attributes:
      init: `norms -> memory`; `norms` are zeros of the shape and dtype to come.
      decide: `(memory, norms, context) -> Bound`.
      observe: `(memory, norms, clipped norms, context) -> memory`, of the structure,
        shapes and dtypes that `init` gave. What it makes of a norm that is not finite
        is discarded.
      needs_params: Whether `context.param_norms` is to be measured.
      observe_share: `(memory, share, context) -> memory`, for a rule that can learn
        from the share of many norms that passed, as those of the examples of a batch.
    """

    init: Callable[[jax.Array], Any]
    decide: Callable[[Any, jax.Array, Context], Bound]
    observe: Callable[[Any, jax.Array, jax.Array, Context], Any]
    needs_params: bool = False
    observe_share: Callable[[Any, jax.Array, Context], Any] | None = None


class Memory(NamedTuple):
    """What a rule made by `remembering` remembers of each part.

    Attributes:
      seen: How many norms it has taken in, int32.
      own: What is particular to the rule.
      run: With `rearm_after`: for how many of its norms in a row the part was clipped,
        int32; the mean of the logarithms of these norms; and the unit of the norms in
        `own`. Else `()`.
    """

    seen: jax.Array
    own: Any
    run: Any


class MemoryOfEach(NamedTuple):
    """The memories of `each`, one for each part."""

    parts: tuple


def learn(
    rule: Threshold,
    memory: Any,
    norms: jax.Array,
    clipped: jax.Array,
    context: Context,
) -> Any:
    """Returns the memory after a step, without what must not be taken in.

    An array of the memory of another rule than those made by `remembering` may have no
    entry for each part: it changes only if all parts are taken in.
    """
    learned = rule.observe(memory, norms, clipped, context)
    return keep(memory, learned, ~jnp.asarray(context.taken_in))


def keep(old: Any, new: Any, parts: jax.Array) -> Any:
    """Returns `new`, with what `old` holds of some parts; dtypes are those of `old`."""

    def kept(old: Any, new: Any) -> Any:
        if isinstance(old, Memory):  # has heeded `taken_in` itself
            return new
        if isinstance(old, MemoryOfEach):
            own = zip(old.parts, new.parts, parts, strict=True)
            return MemoryOfEach(tuple(keep(*memories) for memories in own))
        by_part = old.shape[old.ndim - parts.ndim :] == parts.shape
        where = parts if by_part else jnp.any(parts)
        return jnp.where(where, old, new.astype(old.dtype))

    special = (Memory, MemoryOfEach)
    return jax.tree.map(kept, old, new, is_leaf=lambda x: isinstance(x, special))


def needed(params: Any, caller: str) -> Any:
    """Returns the parameters for a rule that asks for their norms."""
    if params is None:
        raise ValueError(
            f"`{caller}.update(params=...)` must be given: the rule is relative to the"
            " norms of the parameters. Call `tx.update(grads, state, params)`."
        )
    return params


def at(value: Value, context: Context) -> Scalar:
    """Returns a number that may be given as a function of the step."""
    return value(context.step) if callable(value) else value
