"""What a rule is: three functions over norms, and how it learns from a step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

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
    """

    init: Callable[[jax.Array], Any]
    decide: Callable[[Any, jax.Array, Context], Bound]
    observe: Callable[[Any, jax.Array, jax.Array, Context], Any]
    needs_params: bool = False


class Memory(NamedTuple):
    """What a rule made by `remembering` remembers of each part.

    Attributes:
      seen: How many norms it has taken in, int32.
      own: What is particular to the rule: arrays in the unit of a norm.
      run: With `rearm_after`: for how many of its norms in a row the part was clipped,
        int32; the mean of the logarithms of these norms; and the unit in which `own` is
        measured. Else `()`.
    """

    seen: jax.Array
    own: Any
    run: Any


class MemoryOfEach(tuple):
    """The memories of `each`, one for each part."""

    __slots__ = ()


jax.tree_util.register_pytree_node(
    MemoryOfEach, lambda memory: (tuple(memory), None), lambda _, own: MemoryOfEach(own)
)


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
            own = zip(old, new, parts, strict=True)
            return MemoryOfEach(keep(*memories) for memories in own)
        by_part = old.shape[old.ndim - parts.ndim :] == parts.shape
        where = parts if by_part else jnp.any(parts)
        return jnp.where(where, old, new.astype(old.dtype))

    special = (Memory, MemoryOfEach)
    return jax.tree.map(kept, old, new, is_leaf=lambda x: isinstance(x, special))


def at(value: Value, context: Context) -> Scalar:
    """Returns a number that may be given as a function of the step."""
    return value(context.step) if callable(value) else value


def check_limit(limit: Any, caller: str) -> None:
    """Refuses a limit that is no number, or one that is known to be below 0 or NaN."""
    known = _known(limit, caller)
    if known is not None and (np.any(known < 0) or np.any(np.isnan(known))):
        raise ValueError(
            f"`{caller}` must not be negative or NaN, got {limit}. To stop the updates"
            " of some parameters, use `optax.freeze`; to clip nothing and only measure,"
            " use the limit `jnp.inf`."
        )


def check_between(value: Any, low: float, high: float, caller: str, why: str) -> None:
    """Refuses a number outside of a closed range, unless it is traced or a schedule."""
    if callable(value):
        return
    known = _known(value, caller)
    if known is not None and not np.all((low <= known) & (known <= high)):
        raise ValueError(
            f"`{caller}` must be between {low:g} and {high:g}, got {value}. {why}"
        )


def check_decay(value: Any, caller: str) -> None:
    """Refuses a decay outside of [0, 1)."""
    known = _known(value, caller)
    if known is not None and not np.all((known >= 0) & (known < 1)):
        raise ValueError(
            f"`{caller}` must be at least 0 and below 1, got {value}. It is the share"
            " of a running mean that is kept at each step: 0.98 remembers 50 of them."
        )


def check_steps(value: Any, least: int, caller: str, why: str) -> None:
    """Refuses what is not a whole number of steps, or too few of them."""
    if isinstance(value, Tracer):
        return
    dtype = np.asarray(value).dtype
    if not np.issubdtype(dtype, np.integer) or np.ndim(value):
        raise TypeError(f"`{caller}` must be a whole number of steps, got {value!r}.")
    if value < least:
        raise ValueError(f"`{caller}` must be at least {least}, got {value}. {why}")


def check_window(value: Any, least: int, caller: str, why: str) -> None:
    """Refuses a number of norms to remember that is too small, or not known."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"`{caller}` must be a known number, as it is the size of an array, got"
            f" {value!r}. `optax.inject_hyperparams` takes `static_args='window'`."
        )
    check_steps(value, least, caller, why)


def _known(number: Any, caller: str) -> np.ndarray | None:
    """Returns a number that is known, or `None` for one that is traced."""
    if isinstance(number, Tracer):
        return None
    if not isinstance(number, bool | str):
        known = np.asarray(number)
        if np.issubdtype(known.dtype, np.number) or known.dtype == jnp.bfloat16:
            return known.astype(np.float64)
    raise TypeError(
        f"`{caller}` must be a number, got {number!r}. Thresholds may also be a"
        " function of the step, or a rule of `gradnorm_jax.thresholds`."
    )
