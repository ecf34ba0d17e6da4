"""The ways to measure the gradients of examples, and to add them up by their scales."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from gradnorm_jax import kernels
from gradnorm_jax._layout import Layout
from gradnorm_jax._typing import Tree
from gradnorm_jax.norms.examples import OneExample
from gradnorm_jax.norms.of_examples import (
    norms_by_ghost,
    norms_of_formed,
    norms_of_members,
    together,
)
from gradnorm_jax.shrink import Scaling

if TYPE_CHECKING:  # loaded by whoever traces a loss
    from gradnorm_jax.norms.ghost.programs import Value
    from gradnorm_jax.norms.ghost.tracing import Backward

# What the norms come from is kept for so many examples that it is no larger than the
# parameters, and for no fewer than these: each time, the sum of all gradients is read
# and written once more.
_FEW_EXAMPLES = 16


@dataclasses.dataclass(frozen=True)
class Way:
    """How gradients of examples are measured, and then added up.

    Attributes:
      measure: `batch -> (result, norms, what is kept for later)`.
      add: `(batch, what was kept, factors, which examples are added) -> leaves`.
      microbatch_size: How many examples to take at a time, if it is not said.
    """

    measure: Callable[[Tree], tuple[Any, jax.Array, Any]]
    add: Callable[[Tree, Any, Scaling, jax.Array], list[jax.Array]]
    microbatch_size: int | None = None


def _one_pass(one: OneExample, layout: Layout) -> Way:
    """Adds up what the norms came from, multiplied by the scales."""
    from gradnorm_jax.norms.ghost.totals import total_of
    from gradnorm_jax.norms.ghost.tracing import trace

    backward = trace(one)
    totals = [
        total_of(gradient, backward.program, bool(kept))
        for gradient, kept in zip(backward.gradient, layout.kept, strict=True)
    ]
    formed = {i: x.formed for i, x in enumerate(totals) if x.formed is not None}
    norms = norms_of_members(backward, layout, formed)
    values = list(dict.fromkeys(x for total in totals for x in total.values))

    def measure(batch: Tree) -> tuple[Any, jax.Array, Any]:
        result, pieces, rest = backward.run(batch, norms, values)
        size = len(jax.tree.leaves(batch)[0])
        return result, together(layout, pieces, size), rest

    def add(batch: Tree, found: Any, factors: Scaling, added: jax.Array) -> list:
        del batch

        def without_others(
            arrays: list[jax.Array], factors: Scaling, added: jax.Array
        ) -> tuple[list[jax.Array], Scaling]:
            some_are = jnp.any(added)
            own = [
                _zero_unless(added if value.of_example else some_are, x)
                for value, x in zip(values, arrays, strict=True)
            ]
            return own, jax.tree.map(lambda x: _zero_unless(added, x), factors)

        # What is not finite stays so though it is multiplied by 0.
        arrays, factors = kernels.seldom(
            ~jnp.all(added),
            without_others,
            lambda arrays, factors, added: (arrays, factors),
            found,
            factors,
            added,
        )
        known = dict(zip(values, arrays, strict=True))
        return [
            leaf.combine(
                [known[x] for x in leaf.values], [*_weights(layout, i, factors), added]
            )
            for i, leaf in enumerate(totals)
        ]

    return Way(measure, add, _examples_at_a_time(backward, values))


def _examples_at_a_time(backward: "Backward", kept: "list[Value]") -> int | None:
    # In a loop on a CPU, XLA takes up to 30 times as long for the same convolution.
    if any(op.name == "conv_general_dilated" for op in backward.program.ops):
        return None
    size = sum(x.size for x in kept if x.of_example)
    room = sum(x.size for x in backward.gradient)
    return max(_FEW_EXAMPLES, room // max(size, 1))


def _two_pass(one: OneExample, layout: Layout) -> Way:
    """Differentiates the weighted sum of the losses, once the norms are known."""
    if layout.fold != "all":
        raise ValueError(
            "`clipped_grad(granularity=..., implementation='two_pass')`: a second pass"
            " has one weight for each example, so only `whole_tree()` will do. Use"
            " 'one_pass' or 'vmap'."
        )
    from gradnorm_jax.norms.ghost.formulas import weighted
    from gradnorm_jax.norms.ghost.sums import wide

    compute = norms_by_ghost(one, layout)

    def measure(batch: Tree) -> tuple[Any, jax.Array, Any]:
        result, pieces = compute(batch)
        size = len(jax.tree.leaves(batch)[0])
        return result, together(layout, pieces, size), None

    def add(batch: Tree, found: Any, factors: Scaling, added: jax.Array) -> list:
        del found
        weights = functools.reduce(jnp.multiply, _weights(layout, 0, factors))
        weights = jax.lax.stop_gradient(jnp.where(added, weights, 0))
        # Small losses would be lost in 16 bits: the largest weight is 1 there.
        unit = jnp.max(weights)
        weights = weights / jnp.where(unit > 0, unit, 1)
        # A NaN stays one though its weight is 0: another example takes its place.
        source = jnp.where(added, jnp.arange(len(added)), jnp.argmax(added))
        batch = jax.tree.map(lambda x: x[source], batch)

        def weighted_loss(params: Tree) -> jax.Array:
            result = jax.vmap(one.loss, (None, 0))(params, batch)
            values = result[0] if one.has_aux else result
            return jnp.sum(wide(values) * weights.astype(wide(values).dtype))

        grads = jax.tree.leaves(jax.grad(weighted_loss)(one.params))
        some_are = jnp.any(added)
        return [_zero_unless(some_are, weighted(x, [unit])) for x in grads]

    return Way(measure, add)


def _by_vmap(one: OneExample, layout: Layout) -> Way:
    """Forms the gradients of all examples: the truth."""
    from gradnorm_jax.norms.ghost.formulas import weighted

    def measure(batch: Tree) -> tuple[Any, jax.Array, Any]:
        result, grads = jax.vmap(one.value_and_grad, (None, 0))(one.params, batch)
        leaves = jax.tree.leaves(grads)
        pieces = norms_of_formed(leaves, layout)
        size = len(jax.tree.leaves(batch)[0])
        return result, together(layout, pieces, size), leaves

    def add(batch: Tree, leaves: Any, factors: Scaling, added: jax.Array) -> list:
        del batch
        return [
            jnp.sum(weighted(x, [*_weights(layout, i, factors), added]), axis=0)
            for i, x in enumerate(leaves)
        ]

    return Way(measure, add)


WAYS = {"one_pass": _one_pass, "two_pass": _two_pass, "vmap": _by_vmap}


def _weights(layout: Layout, position: int, factors: Scaling) -> list[jax.Array]:
    """The factors of each example for one leaf."""
    both = (jnp.where(factors.keep, 1, x) for x in (factors.coarse, factors.fine))
    return [jax.vmap(lambda parts: layout.spread(parts, position))(x) for x in both]


def _zero_unless(added: jax.Array, x: jax.Array) -> jax.Array:
    added = added.reshape(*added.shape, *[1] * (x.ndim - added.ndim))
    return jnp.where(added, x, jnp.zeros((), x.dtype))
