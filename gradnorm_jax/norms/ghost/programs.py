"""A traced function as a list of operations, flat, to be added to and run in part."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gradnorm_jax.norms.ghost import versions

if TYPE_CHECKING:
    from jax.extend import core


@dataclasses.dataclass(eq=False)
class Value:
    """What a program computes with.

    Attributes:
      aval: Its shape and dtype.
      op: What computes it; `None` of an input or a constant.
      position: Which output of it.
      constant: What it is, where that is known.
      of_example: Whether it may differ from example to example.
      uses: How many operations of the traced function take it.
    """

    aval: Any
    op: Op | None = None
    position: int = 0
    constant: Any = None
    of_example: bool = False
    uses: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.aval.shape

    @property
    def size(self) -> int:
        """How many entries it has."""
        return self.aval.size


@dataclasses.dataclass(eq=False)
class Op(abc.ABC):
    """One step of a program.

    Attributes:
      name: That of the primitive.
      params: Its parameters.
      inputs: What it takes.
      outputs: What it gives.
      has_effects: Whether it must run though nobody asks for its outputs.
    """

    name: str
    params: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value] = dataclasses.field(default_factory=list, kw_only=True)
    has_effects: bool = dataclasses.field(default=False, kw_only=True)

    def needs(self, positions: set[int]) -> Iterable[Value]:
        """Returns the inputs on which these outputs depend."""
        del positions
        return self.inputs

    @abc.abstractmethod
    def run(self, values: Sequence[Any], positions: set[int]) -> Sequence[Any]:
        """Computes its outputs, at least these."""


@dataclasses.dataclass(eq=False)
class Call(Op):
    """A step that is a function of arrays.

    Attributes:
      fun: What it computes, of all inputs.
    """

    fun: Callable[..., Sequence[Any]]

    def run(self, values: Sequence[Any], positions: set[int]) -> Sequence[Any]:
        """Computes all its outputs."""
        del positions
        return self.fun(*values)


@dataclasses.dataclass(eq=False)
class Program:
    """A function of one example: inputs, operations in order, outputs."""

    inputs: list[Value]
    ops: list[Op]
    outputs: list[Value]

    def add(self, fun: Callable[..., Any], *inputs: Value) -> Value:
        """Appends a function of values, and returns what it computes."""
        aval = jax.eval_shape(fun, *(_struct(x) for x in inputs))
        of_example = any(x.of_example for x in inputs)
        op = Call("function", {}, list(inputs), lambda *xs: [fun(*xs)])
        op.outputs = [Value(aval, op, of_example=of_example)]
        self.ops.append(op)
        return op.outputs[0]

    def run(self, arguments: Sequence[Any], wanted: Sequence[Value]) -> list[Any]:
        """Computes what is wanted, and nothing else."""
        known = dict(zip(self.inputs, arguments, strict=True))
        for op, positions in reversed(self.live(wanted)):
            needed = set(op.needs(positions))
            own = [_read(known, x) if x in needed else None for x in op.inputs]
            found = op.run(own, positions)
            known.update(zip(op.outputs, found, strict=True))
        return [_read(known, x) for x in wanted]

    def live(self, wanted: Sequence[Value]) -> list[tuple[Op, set[int]]]:
        """Returns the operations that are needed, last first, and for which outputs."""
        needed = set(wanted)
        steps = []
        for op in reversed(self.ops):
            positions = {k for k, x in enumerate(op.outputs) if x in needed}
            if positions or op.has_effects:
                steps.append((op, positions))
                needed.update(op.needs(positions))
        return steps


def read(
    closed: core.ClosedJaxpr,
    of_example: Sequence[bool],
    loop: Callable[[core.JaxprEqn, list[Value]], Op],
) -> Program:
    """Reads a traced function, with the calls in it written out.

    Args:
      closed: What `jax.make_jaxpr` returned.
      of_example: Which of its inputs may differ from example to example.
      loop: What becomes of a scan.
    """
    jaxpr = closed.jaxpr
    inputs = [
        Value(x.aval, of_example=own)
        for x, own in zip(jaxpr.invars, of_example, strict=True)
    ]
    program = Program(inputs, [], [])
    program.outputs = _inlined(program, jaxpr, closed.consts, inputs, loop)
    return program


def _inlined(
    program: Program,
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    inputs: Sequence[Value],
    loop: Callable[[core.JaxprEqn, list[Value]], Op],
) -> list[Value]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    for x, constant in zip(jaxpr.constvars, consts, strict=True):
        known[x] = Value(x.aval, constant=constant)

    def value(x: Any) -> Value:
        if versions.is_literal(x):
            return Value(x.aval, constant=x.val)
        return known[x]

    for eqn in jaxpr.eqns:
        own = [value(x) for x in eqn.invars]
        inner = versions.called(eqn)
        if inner is not None:
            if versions.keeps_apart(eqn):
                own = _behind_a_barrier(program, own)
            outputs = _inlined(program, inner.jaxpr, inner.consts, own, loop)
        else:
            op = loop(eqn, own) if eqn.primitive.name == "scan" else _call(eqn, own)
            for x in own:
                x.uses += 1
            program.ops.append(op)
            outputs = op.outputs
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [value(x) for x in jaxpr.outvars]


def _call(eqn: core.JaxprEqn, inputs: list[Value]) -> Op:
    fun = versions.function(eqn)
    name, effects = eqn.primitive.name, bool(eqn.effects)
    op = Call(name, eqn.params, inputs, fun, has_effects=effects)
    of_example = any(x.of_example for x in inputs)
    op.outputs = [
        Value(x.aval, op, k, of_example=of_example) for k, x in enumerate(eqn.outvars)
    ]
    return op


def _behind_a_barrier(program: Program, inputs: list[Value]) -> list[Value]:
    op = Call("optimization_barrier", {}, inputs, _barrier)
    op.outputs = [
        Value(x.aval, op, k, of_example=x.of_example) for k, x in enumerate(inputs)
    ]
    program.ops.append(op)
    return op.outputs


def _barrier(*values: Any) -> Sequence[Any]:
    return jax.lax.optimization_barrier(list(values))


def _read(known: dict[Value, Any], x: Value) -> Any:
    if x in known:
        return known[x]
    assert x.op is None, "an operation was left out that is needed"
    return x.constant


def _struct(x: Value) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype)


def is_zero(x: Value) -> bool:
    """Whether a value is known to be zero everywhere."""
    while x.op is not None and x.op.name in (
        "broadcast_in_dim",
        "convert_element_type",
    ):
        x = x.op.inputs[0]
    known = isinstance(x.constant, np.ndarray | np.generic | int | float)
    return x.op is None and known and np.ndim(x.constant) == 0 and x.constant == 0
