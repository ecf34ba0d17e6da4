"""The loss of one example and its gradient, as a program that can be run in part."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax

from gradnorm_jax._typing import Tree
from gradnorm_jax.norms.examples import OneExample, first
from gradnorm_jax.norms.ghost import scans
from gradnorm_jax.norms.ghost.programs import Program, Value


@dataclasses.dataclass(frozen=True)
class Backward:
    """The value and the gradient of one example, not computed yet.

    Attributes:
      program: What computes them, of the leaves of the parameters and the example.
      result: The value and what is beside it.
      gradient: The gradient, leaf by leaf.
      params: The leaves of the parameters.
      treedef: The structure of the result.
    """

    program: Program
    result: list[Value]
    gradient: list[Value]
    params: list[jax.Array]
    treedef: Any

    def run(
        self, batch: Tree, wanted: Sequence[Value], factors: Sequence[Value] = ()
    ) -> tuple[Any, list[jax.Array], list[jax.Array]]:
        """Returns the result of all examples, what is wanted, `[B, ...]`, and factors.

        A factor that is the same for all examples has no axis of examples.
        """
        groups = (self.result, wanted, factors)
        ends = list(itertools.accumulate(map(len, groups)))

        def of_one(example: Tree) -> list[list[jax.Array]]:
            arguments = [*self.params, *jax.tree.leaves(example)]
            found = self.program.run(arguments, list(itertools.chain(*groups)))
            return [found[: ends[0]], found[ends[0] : ends[1]], found[ends[1] :]]

        axes = [0, 0, [0 if x.of_example else None for x in factors]]
        result, found, rest = jax.vmap(of_one, out_axes=axes)(batch)
        return jax.tree.unflatten(self.treedef, result), found, rest


def trace(one: OneExample) -> Backward:
    """Writes down how the gradient of one example is computed."""
    example = jax.tree.map(first, one.batch)
    closed, shapes = jax.make_jaxpr(one.value_and_grad, return_shape=True)(
        one.params, example
    )
    params, leaves = jax.tree.leaves(one.params), jax.tree.leaves(example)
    of_example = [*(False for _ in params), *(True for _ in leaves)]
    program = scans.read(closed, of_example)
    treedef = jax.tree.structure(shapes[0])
    split = treedef.num_leaves
    return Backward(
        program, program.outputs[:split], program.outputs[split:], params, treedef
    )
