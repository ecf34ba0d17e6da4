"""What is computed of the gradient of each leaf in place of the gradient itself."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gradnorm_jax.norms.examples import in_turn
from gradnorm_jax.norms.ghost import costs, formulas, recognition
from gradnorm_jax.norms.ghost.costs import SMALL, Cost
from gradnorm_jax.norms.ghost.programs import Program, Value, is_zero
from gradnorm_jax.norms.ghost.recognition import NotUnderstood, puts_zeros_around
from gradnorm_jax.norms.ghost.scans import Scan
from gradnorm_jax.norms.ghost.sums import Sum, sums

# What changes the order, the shape, the sign or the dtype of a gradient, not its norm.
_ISOMETRIC = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "expand_dims",
    "neg",
    "optimization_barrier",
    "reshape",
    "rev",
    "squeeze",
    "transpose",
}


@dataclasses.dataclass(frozen=True)
class LeafNorm:
    """How the norm of the gradient of one leaf is found.

    Attributes:
      value: The norms of pieces of the gradient; `None` where it is zero.
      costs: What each part of it takes.
    """

    value: Value | None
    costs: tuple[Cost, ...]


def norm_of(gradient: Value, program: Program, kept: tuple[int, ...] = ()) -> LeafNorm:
    """Adds to a program the norm of a gradient, or of each slice along some axes."""
    if kept:
        norms = program.add(functools.partial(formulas.norm, kept=kept), gradient)
        why = "its slices have norms of their own"
        return LeafNorm(norms, (_cost_of_forming(gradient, "formed", why),))
    x = without_moves(gradient)
    if isinstance(x.op, Scan) and x.position >= x.op.loop.num_carry:
        return _norm_of_steps(x, x.op, program)
    found = origin(x, program)
    match found.rule:
        case "zero":
            return LeafNorm(None, (Cost("zero", 0, 0, False, found.why),))
        case "sums":
            return _norm_of_sums(x, found.sums, program)
        case "unknown":
            return _norm_in_turn(x, program, found.why)
    return _formed(x, program, found.rule, found.why)


class Origin(NamedTuple):
    """How a gradient came about.

    Attributes:
      rule: "zero"; "plain", where to form it costs no more than what is there anyway;
        "sums", of products; "unknown".
      why: In words.
      sums: The sums that it is.
    """

    rule: str
    why: str
    sums: Sequence[Sum] = ()


def origin(x: Value, program: Program) -> Origin:
    """Finds out how a value came about that is the last of its moves."""
    if is_zero(x):
        return Origin("zero", "it is not used")
    if x.size == 0:
        return Origin("zero", "it has no entries")
    if x.op is None:
        return Origin("plain", "it is given, not computed")
    if not x.of_example:
        return Origin("plain", "it is the same for all examples")
    if x.uses > 1:
        return Origin("plain", "it is computed for other leaves too")
    try:
        parts = sums(recognition.terms(x, program))
    except NotUnderstood as reason:
        if last_steps(x, program) is None:
            return Origin("plain", "it is no larger than what it is made of")
        return Origin("unknown", str(reason))
    if parts is None:
        return Origin("unknown", "its terms overlap in part")
    if not parts:
        return Origin("zero", "it is not used")
    return Origin("sums", "", parts)


_FORMULAS = {
    "gram": formulas.norm_by_gram,
    "outer": formulas.norm_of_outer_product,
    "product": formulas.norm_by_product,
    "product in turn": formulas.norm_by_products_in_turn,
}


def _norm_of_sums(x: Value, parts: Sequence[Sum], program: Program) -> LeafNorm:
    chosen = tuple(costs.cheapest(part) for part in parts)
    if all(cost.rule == "product" for cost in chosen):
        return LeafNorm(program.add(formulas.norm, x), chosen)
    norms = [
        program.add(functools.partial(_FORMULAS[cost.rule], part), *part.values)
        for part, cost in zip(parts, chosen, strict=True)
    ]
    value = norms[0] if len(norms) == 1 else program.add(_stacked, *norms)
    return LeafNorm(value, chosen)


def _norm_of_steps(x: Value, scan: Scan, program: Program) -> LeafNorm:
    """The norms of what a loop stacks are those of its steps."""
    found = norm_of(scan.body.outputs[x.position], scan.body)
    own = tuple(_repeated(cost, scan.loop.length) for cost in found.costs)
    if found.value is None:
        return LeafNorm(None, own)
    if x.size <= SMALL:  # one norm of all steps costs less than one in each
        return LeafNorm(program.add(formulas.norm, x), own)
    return LeafNorm(scan.stacked(found.value), own)


def _norm_in_turn(x: Value, program: Program, why: str) -> LeafNorm:
    """The gradient is formed from smaller values, one example after the other."""
    if x.size <= SMALL:
        return _formed(x, program, "plain", f"it has few entries, and {why}")
    steps = last_steps(x, program)
    if steps is None:
        return _formed(x, program, "formed", why)

    def norm(*arrays: jax.Array) -> jax.Array:
        [gradient] = steps.run(arrays, [x])
        return formulas.norm(gradient)

    value = program.add(in_turn(norm), *steps.inputs)
    return LeafNorm(value, (Cost("formed in turn", 2 * x.size, x.size, True, why),))


def last_steps(x: Value, program: Program) -> Program | None:
    """Returns how a value is computed from smaller ones; `None` if it is not.

    What is used more than once is computed anyway, and not again here.
    """
    large, cut, waiting = set(), {}, [x]
    while waiting:
        value = waiting.pop()
        is_small = value.size < x.size or not value.of_example
        if value.op is None or is_small or (value.uses > 1 and value is not x):
            cut[value] = None
        elif value.op not in large:
            large.add(value.op)
            waiting += value.op.inputs
    if sum(value.size for value in cut if value.of_example) >= x.size:
        return None
    inputs = [value for value in cut if value.op is not None or value.constant is None]
    return Program(inputs, [op for op in program.ops if op in large], [x])


def _formed(x: Value, program: Program, rule: str, why: str) -> LeafNorm:
    norm = program.add(formulas.norm, x)
    return LeafNorm(norm, (_cost_of_forming(x, rule, why),))


def _cost_of_forming(x: Value, rule: str, why: str) -> Cost:
    return Cost(rule, 2 * x.size, x.size, False, why)


def _repeated(cost: Cost, times: int) -> Cost:
    return cost._replace(flops=cost.flops * times, why=f"{cost.why}, {times} steps")


def without_moves(x: Value) -> Value:
    """Returns a value of the same norm, before it was moved, turned or converted."""
    while x.op is not None and (x.op.name in _ISOMETRIC or puts_zeros_around(x.op)):
        source = x.op.inputs[x.position]
        is_spread = x.op.name != "pad" and source.size != x.size
        if is_spread or not jnp.issubdtype(source.aval.dtype, jnp.floating):
            break
        x = source
    return x


def _stacked(*norms: jax.Array) -> jax.Array:
    return jnp.concatenate([x.reshape(-1) for x in norms])
