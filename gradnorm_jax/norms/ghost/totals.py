"""The weighted sum of the gradients of all examples, from what they are made of."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gradnorm_jax.norms.examples import in_turn, sum_in_turn
from gradnorm_jax.norms.ghost import costs, formulas, recognition
from gradnorm_jax.norms.ghost.leaves import last_steps, origin, without_moves
from gradnorm_jax.norms.ghost.programs import Program, Value
from gradnorm_jax.norms.ghost.recognition import NotUnderstood
from gradnorm_jax.norms.ghost.sums import Sum, sums, wide

#: Factors by which the gradient of each example is multiplied one after the other: of
#: shape `[B]` or, with a factor for each cell, `[B, ...]`. One of booleans says which
#: examples are added at all.
Weights = Sequence[jax.Array]


@dataclasses.dataclass(frozen=True)
class LeafTotal:
    """How the weighted sum of the gradients of one leaf is found.

    Attributes:
      values: What to compute of each example.
      combine: `(what they are of all examples, weights) -> sum`.
      formed: The gradient, where it is formed.
    """

    values: tuple[Value, ...]
    combine: Callable[[Sequence[jax.Array], Weights], jax.Array]
    formed: Value | None = None


def total_of(gradient: Value, program: Program, form: bool = False) -> LeafTotal:
    """Adds to a program what the weighted sum of gradients is found from."""
    formed = _formed(gradient)
    if form:
        return formed
    found = origin(without_moves(gradient), program)
    if found.rule == "zero":
        return LeafTotal((), lambda arrays, weights: _zeros(gradient))
    if found.rule == "unknown":
        steps = last_steps(gradient, program)
        if steps is None or gradient.size <= costs.SMALL:
            return formed
        fun = functools.partial(_total_in_turn, gradient, steps)
        return LeafTotal(tuple(steps.inputs), fun)
    parts = _sums_of(gradient, program) if found.rule == "sums" else None
    if parts is None or all(costs.cheapest(part).rule == "product" for part in parts):
        return formed
    if len(parts) == 1 and parts[0].window is None and costs.is_worth_keeping(parts[0]):
        product = in_turn(functools.partial(formulas.product, parts[0]))
        value = program.add(product, *parts[0].values)
        return _formed(value)
    values = tuple(dict.fromkeys(x for part in parts for x in part.values))
    fun = functools.partial(_total_of_sums, parts, values, gradient)
    return LeafTotal(values, fun)


def _sums_of(gradient: Value, program: Program) -> Sequence[Sum] | None:
    """The sums of a gradient with its moves; `None` if those cannot be followed."""
    try:
        return sums(recognition.terms(gradient, program))
    except NotUnderstood:
        return None


def _formed(value: Value) -> LeafTotal:
    def total(arrays: Sequence[jax.Array], weights: Weights) -> jax.Array:
        [grads] = arrays
        if not value.of_example:
            grads = jnp.broadcast_to(grads, (len(weights[0]), *grads.shape))
        return jnp.sum(formulas.weighted(grads, weights), 0)

    return LeafTotal((value,), total, value)


def _total_of_sums(
    parts: Sequence[Sum],
    values: Sequence[Value],
    gradient: Value,
    arrays: Sequence[jax.Array],
    weights: Weights,
) -> jax.Array:
    known = dict(zip(values, arrays, strict=True))
    whole = _zeros(gradient)
    for part in parts:
        own = formulas.total(part, [known[x] for x in part.values], weights)
        if part.window is None:
            whole = whole + own
        else:
            starts = [start for start, _ in part.window]
            cut = tuple(
                slice(start, start + n)
                for start, n in zip(starts, own.shape, strict=True)
            )
            whole = whole.at[cut].add(own)
    return whole


def _total_in_turn(
    gradient: Value, steps: Program, arrays: Sequence[jax.Array], weights: Weights
) -> jax.Array:
    def of_one(*own: jax.Array) -> jax.Array:
        [grad] = steps.run(own[len(weights) :], [gradient])
        return formulas.weighted(grad, own[: len(weights)])

    batched = [*(True for _ in weights), *(x.of_example for x in steps.inputs)]
    return sum_in_turn(of_one, batched, *weights, *arrays)


def _zeros(gradient: Value) -> jax.Array:
    return wide(jnp.zeros(gradient.shape, gradient.aval.dtype))
