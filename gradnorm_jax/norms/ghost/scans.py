"""A loop in a program: what is asked of its body comes out of it, and nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax

from gradnorm_jax.norms.ghost import programs, versions
from gradnorm_jax.norms.ghost.programs import Op, Program, Value

if TYPE_CHECKING:
    from jax.extend import core


@dataclasses.dataclass(eq=False)
class Scan(Op):
    """A `lax.scan`.

    Attributes:
      loop: What it is made of.
    """

    loop: versions.Loop

    @functools.cached_property
    def body(self) -> Program:
        """One step of the loop."""
        first = self.loop.num_consts
        last = first + self.loop.num_carry
        any_of = [x.of_example for x in self.inputs]
        carried = any(any_of)
        of_example = [
            carried if first <= k < last else own for k, own in enumerate(any_of)
        ]
        return read(self.loop.body, of_example)

    def carried_in(self, position: int) -> Value:
        """Returns the input of the body that an output of it becomes."""
        return self.body.inputs[self.loop.num_consts + position]

    def initial(self, position: int) -> Value:
        """Returns what a carry starts as."""
        return self.inputs[self.loop.num_consts + position]

    def lifted(self, x: Value) -> tuple[Value, bool]:
        """Returns a value of the body, outside, and whether it has an axis of steps."""
        while x.op is not None and x.op.name == "optimization_barrier":
            x = x.op.inputs[x.position]
        if x.op is None and x not in self.body.inputs:
            return x, False
        if x.op is None:
            position = self.body.inputs.index(x)
            if position < self.loop.num_consts:
                return self.inputs[position], False
            if position >= self.loop.num_consts + self.loop.num_carry:
                return self.inputs[position], True
        return self.stacked(x), True

    def stacked(self, x: Value) -> Value:
        """Lets a value of the body out, one for each step of the loop."""
        for outer, inner in zip(self.outputs, self.body.outputs, strict=True):
            if inner is x and outer.position >= self.loop.num_carry:
                return outer
        aval = jax.ShapeDtypeStruct((self.loop.length, *x.shape), x.aval.dtype)
        outer = Value(aval, self, len(self.outputs), of_example=True)
        self.outputs.append(outer)
        self.body.outputs.append(x)
        return outer

    def needs(self, positions: set[int]) -> Iterable[Value]:
        """Returns the inputs on which these outputs depend."""
        return [self.inputs[k] for k in self._needed(positions)[0]]

    def run(self, values: Sequence[Any], positions: set[int]) -> Sequence[Any]:
        """Computes these outputs, and the carries on which they depend."""
        loop, body = self.loop, self.body
        used, wanted = self._needed(positions)
        first, last = loop.num_consts, loop.num_consts + loop.num_carry
        carry_places = [k for k in used if first <= k < last]
        slice_places = [k for k in used if k >= last]
        consts = {k: values[k] for k in used if k < first}
        carries = [k - first for k in carry_places]
        stacks = sorted(k for k in wanted if k >= loop.num_carry)

        def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
            known = consts | dict(zip(carry_places, carry, strict=True))
            known |= dict(zip(slice_places, slices, strict=True))
            arguments = [known.get(k) for k in range(len(body.inputs))]
            outputs = [body.outputs[k] for k in (*carries, *stacks)]
            found = body.run(arguments, outputs)
            return found[: len(carries)], found[len(carries) :]

        carry, stacked = jax.lax.scan(
            step,
            [values[k] for k in carry_places],
            [values[k] for k in slice_places],
            length=loop.length,
            reverse=loop.reverse,
            unroll=loop.unroll,
        )
        found = dict(zip(carries, carry, strict=True))
        found |= dict(zip(stacks, stacked, strict=True))
        return [found.get(k) for k in range(len(self.outputs))]

    def _needed(self, positions: set[int]) -> tuple[list[int], set[int]]:
        """The inputs needed for some outputs, and all outputs that then are needed."""
        first, num_carry = self.loop.num_consts, self.loop.num_carry
        place = {x: k for k, x in enumerate(self.body.inputs)}
        wanted = set(positions)
        while True:
            outputs = [self.body.outputs[k] for k in sorted(wanted)]
            used = {
                place[x]
                for op, own in self.body.live(outputs)
                for x in op.needs(own)
                if x in place
            }
            used |= {place[x] for x in outputs if x in place}
            carried = {k - first for k in used if first <= k < first + num_carry}
            carried |= {k for k in wanted if k < num_carry}
            if carried <= wanted:
                break
            wanted |= carried
        used |= {first + k for k in wanted if k < num_carry}
        return sorted(used), wanted


def read(closed: core.ClosedJaxpr, of_example: Sequence[bool]) -> Program:
    """Reads a traced function, its loops as :class:`Scan`."""
    return programs.read(closed, of_example, _scan)


def _scan(eqn: core.JaxprEqn, inputs: list[Value]) -> Scan:
    loop, effects = versions.loop(eqn), bool(eqn.effects)
    scan = Scan("scan", eqn.params, inputs, loop, has_effects=effects)
    of_example = any(x.of_example for x in inputs)
    scan.outputs = [
        Value(x.aval, scan, k, of_example=of_example) for k, x in enumerate(eqn.outvars)
    ]
    return scan
