"""What JAX says of an equation, where its versions say it in different words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

if TYPE_CHECKING:  # slow to load, and so loaded by whoever traces
    from jax.extend import core

# The parameter under which a call keeps the program that it calls. Not of calls that
# have rules of their own for derivatives: those stay whole.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}


class Loop(NamedTuple):
    """What a scan is made of: its inputs are constants, carry and slices, in order."""

    body: core.ClosedJaxpr
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: Any


def called(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Returns the program that an equation does nothing but call."""
    jaxpr = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
    if jaxpr is None:
        return None
    from jax.extend import core

    return jaxpr if hasattr(jaxpr, "consts") else core.ClosedJaxpr(jaxpr, ())


def keeps_apart(eqn: core.JaxprEqn) -> bool:
    """Whether a call computes a checkpoint again, and must not be merged with it."""
    params = eqn.params
    return bool(params.get("differentiated") and params.get("prevent_cse"))


def loop(eqn: core.JaxprEqn) -> Loop:
    """Reads a scan by its shapes: what is sliced or stacked has one more axis outside.

    What counts constants and carries has other names from version to version.
    """
    body = eqn.params["jaxpr"]
    num_slices = _num_stacked(eqn.invars, body.jaxpr.invars)
    num_carry = len(eqn.outvars) - _num_stacked(eqn.outvars, body.jaxpr.outvars)
    return Loop(
        body,
        len(eqn.invars) - num_carry - num_slices,
        num_carry,
        eqn.params["length"],
        eqn.params["reverse"],
        eqn.params["unroll"],
    )


def function(eqn: core.JaxprEqn) -> Callable[..., Sequence[jax.Array]]:
    """Returns an equation as a function of its inputs."""
    from jax.extend import core

    taken: dict[Any, int] = {}
    for position, x in enumerate(eqn.invars):
        if not is_literal(x):
            taken.setdefault(x, position)
    names = core.DebugInfo("ghost", eqn.primitive.name, ("",) * len(taken), None)
    alone = core.Jaxpr((), list(taken), eqn.outvars, [eqn], eqn.effects, names)
    fun = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))
    return lambda *inputs: fun(*(inputs[k] for k in taken.values()))


def is_literal(x: Any) -> bool:
    """Whether an input of an equation is a number that is written there."""
    from jax.extend import core

    return isinstance(x, core.Literal)


def _num_stacked(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    return sum(
        len(x.aval.shape) > len(y.aval.shape) for x, y in zip(outer, inner, strict=True)
    )
