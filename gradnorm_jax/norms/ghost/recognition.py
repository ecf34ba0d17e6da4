"""How a gradient came about: the products that the last steps of a program add up."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gradnorm_jax.norms.ghost import convolutions, products
from gradnorm_jax.norms.ghost.programs import Op, Program, Value, is_zero
from gradnorm_jax.norms.ghost.scans import Scan
from gradnorm_jax.norms.ghost.sums import wide
from gradnorm_jax.norms.ghost.terms import Axis, Dim, Factor, Term, axes_of, dim_of


class NotUnderstood(Exception):
    """It is not known how a value came about; the message says where that ends."""


@dataclasses.dataclass
class Carried:
    """What a loop adds to.

    Attributes:
      value: The carry as it comes into the body.
      times: How often it is found among what is added up.
    """

    value: Value
    times: int = 0


def terms(x: Value, program: Program, carried: Carried | None = None) -> list[Term]:
    """Returns the products that add up to a value; none where it is zero.

    Args:
      x: A value of the program.
      program: Where what factors are made from can be added.
      carried: In the body of a loop, what the value is added to; it counts as zero.

    Raises:
      NotUnderstood: If the value came about in another way.
    """
    if carried is not None and x is carried.value:
        carried.times += 1
        return []
    if is_zero(x):
        return []
    if x.op is None:
        raise NotUnderstood("it is given, not computed")
    if not jnp.issubdtype(x.aval.dtype, jnp.floating):
        raise NotUnderstood(f"it is of {x.aval.dtype}")
    rule = _RULES.get(x.op.name)
    if rule is None:
        raise NotUnderstood(f"it comes out of `{x.op.name}`")
    return rule(_Step(x, x.op, program, carried))


@dataclasses.dataclass(frozen=True)
class _Step:
    """The operation that computed a value."""

    value: Value
    op: Op
    program: Program
    carried: Carried | None

    def of(self, x: Value) -> list[Term]:
        """The terms of an operand that is added to, but not changed otherwise."""
        return terms(x, self.program, self.carried)

    def of_changed(self, x: Value) -> list[Term]:
        """The terms of an operand that is changed: what is carried must stay as is."""
        return terms(x, self.program)

    def refuse(self, why: str) -> NotUnderstood:
        return NotUnderstood(f"of `{self.op.name}` {why}")


def _unchanged(step: _Step) -> list[Term]:
    return step.of(step.op.inputs[step.value.position])


def _converted(step: _Step) -> list[Term]:
    x = step.op.inputs[0]
    if not jnp.issubdtype(x.aval.dtype, jnp.floating):
        raise step.refuse(f"the operand is of {x.aval.dtype}")
    same = x.aval.dtype == step.value.aval.dtype
    return step.of(x) if same else step.of_changed(x)


def _added(step: _Step) -> list[Term]:
    a, b = step.op.inputs
    if a.shape != step.value.shape or b.shape != step.value.shape:
        raise step.refuse("an operand is spread over others")
    return [*step.of(a), *step.of(b)]


def _subtracted(step: _Step) -> list[Term]:
    a, b = step.op.inputs
    return [*step.of(a), *(term.scaled(-1.0) for term in step.of_changed(b))]


def _negated(step: _Step) -> list[Term]:
    return [term.scaled(-1.0) for term in step.of_changed(step.op.inputs[0])]


def _multiplied(step: _Step) -> list[Term]:
    a, b = step.op.inputs
    for x, other in ((a, b), (b, a)):
        scalar = products.scalar(other)
        if scalar is not None and x.shape == step.value.shape:
            return [term.scaled(scalar) for term in step.of_changed(x)]
    outer = products.outer(a, b, step.value.shape)
    if outer is None:
        raise step.refuse("both operands differ along one dimension")
    return [outer]


def _divided(step: _Step) -> list[Term]:
    x, divisor = step.op.inputs
    scalar = products.scalar(divisor)
    if scalar is None:
        raise step.refuse("the divisor is no number")
    inverse = step.program.add(lambda x: 1 / x, scalar)
    return [term.scaled(inverse) for term in step.of_changed(x)]


def _transposed(step: _Step) -> list[Term]:
    order = step.op.params["permutation"]
    return [term.transposed(order) for term in step.of_changed(step.op.inputs[0])]


def _reshaped(step: _Step) -> list[Term]:
    return _each(step, lambda term: term.reshaped(step.value.shape))


def _broadcast(step: _Step) -> list[Term]:
    if step.op.inputs[0].size != step.value.size:
        raise step.refuse("the operand is spread")
    return _reshaped(step)


def _summed(step: _Step) -> list[Term]:
    return _each(step, lambda term: term.summed(step.op.params["axes"]))


def _padded(step: _Step) -> list[Term]:
    config = step.op.params["padding_config"]
    if not puts_zeros_around(step.op) or any(between for _, _, between in config):
        raise step.refuse("what is put around or between is not plain zeros")
    starts, [x, _] = [low for low, _, _ in config], step.op.inputs
    return [term.padded(starts, step.value.shape) for term in step.of_changed(x)]


def puts_zeros_around(op: Op) -> bool:
    """Whether an operation pads with zeros, or puts them between, and cuts nothing."""
    if op.name != "pad" or not is_zero(op.inputs[1]):
        return False
    return all(min(low, high) >= 0 for low, high, _ in op.params["padding_config"])


def _each(step: _Step, change: Callable[[Term], Term | None]) -> list[Term]:
    changed = [change(term) for term in step.of_changed(step.op.inputs[0])]
    if any(term is None for term in changed):
        raise step.refuse("the dimensions of the product cannot be followed")
    return [term for term in changed if term is not None]


def _dot(step: _Step) -> list[Term]:
    a, b = step.op.inputs
    return [products.dot(a, b, step.op.params["dimension_numbers"])]


def _convolved(step: _Step) -> list[Term]:
    a, b = step.op.inputs
    return [convolutions.term(a, b, step.value.shape, step.op.params)]


def _scattered(step: _Step) -> list[Term]:
    """Rows that are added to a table where indices say."""
    operand, indices, updates = step.op.inputs
    numbers, shape = step.op.params["dimension_numbers"], step.value.shape
    clips = step.op.params["mode"] == jax.lax.GatherScatterMode.CLIP
    inserted = numbers.inserted_window_dims
    within = [k for k in range(len(shape)) if k not in inserted]
    if numbers.operand_batching_dims:
        raise step.refuse("the table is one of many")
    window_of = dict(zip(within, numbers.update_window_dims, strict=True))
    rows = [k for k, own in window_of.items() if updates.shape[own] == shape[k]]
    narrow = [k for k in range(len(shape)) if k not in rows]
    indexed = numbers.scatter_dims_to_operand_dims
    if (
        len(narrow) != 1
        or any(updates.shape[window_of[k]] != 1 for k in narrow if k in window_of)
        or narrow[0] not in indexed
        or shape[narrow[0]] == 1
        or (len(indexed) > 1 and not clips)  # a whole row that is clipped is at 0
    ):
        raise step.refuse("the updates are not whole rows that an index each places")
    [place] = narrow
    column, size = indexed.index(place), shape[place]

    def row_numbers(indices: jax.Array) -> jax.Array:
        own = _wide_enough(indices[..., column : column + 1])
        return jnp.clip(own, 0, size - 1) if clips else own

    found = []
    for term in _expanded(step, updates):
        places = [
            dim
            for k, dim in enumerate(term.dims)
            if k not in numbers.update_window_dims
        ]
        ids = Factor(indices, (*places, ()), row_numbers)
        rest = [term.dims[window_of[k]] for k in rows]
        found.append(_hot(term, rest, place, size, ids))
    return [*step.of(operand), *found]


def _put_in_place(step: _Step) -> list[Term]:
    """One row of a table of zeros."""
    operand, update, *starts = step.op.inputs
    shape = step.value.shape
    narrow = [k for k, n in enumerate(shape) if update.shape[k] != n]
    if not is_zero(operand) or len(narrow) != 1 or update.shape[narrow[0]] != 1:
        raise step.refuse("it is not one row of zeros that is set")
    [dim] = narrow
    size = shape[dim]

    def row_number(start: jax.Array) -> jax.Array:
        return jnp.clip(_wide_enough(start), 0, size - 1)

    ids = Factor(starts[dim], (), row_number)
    found = []
    for term in _expanded(step, update):
        rest = [own for k, own in enumerate(term.dims) if k != dim]
        found.append(_hot(term, rest, dim, size, ids))
    return found


def _wide_enough(indices: jax.Array) -> jax.Array:
    """Returns indices in a dtype that holds the size of any table."""
    return indices if indices.dtype.itemsize >= 4 else indices.astype(jnp.int32)


def _hot(term: Term, rest: list[Dim], place: int, size: int, ids: Factor) -> Term:
    """Puts the rows of a term where indices say along a new dimension."""
    hot = Axis(size)
    dims = (*rest[:place], (hot,), *rest[place:])
    return dataclasses.replace(term, dims=dims, hot=hot, ids=ids)


def _expanded(step: _Step, x: Value) -> list[Term]:
    """The terms of a value where they are smaller than it, else the value as one."""
    try:
        found = step.of_changed(x)
    except NotUnderstood:
        found = []
    factors = {factor.value for term in found for factor in term.factors}
    is_plain = all(term.hot is None and term.window is None for term in found)
    if found and is_plain and sum(factor.size for factor in factors) < x.size:
        return found
    dims = axes_of(x.shape)
    return [Term(None, Factor(x, dims), dims)]


def _reversed(step: _Step) -> list[Term]:
    def change(term: Term) -> Term | None:
        for k in step.op.params["dimensions"]:
            for axis in term.dims[k]:
                if not term.can_change(axis):
                    return None
                term = term.along(axis, (axis,), lambda x, place: jnp.flip(x, place))
        return term

    return _each(step, change)


def _sliced(step: _Step) -> list[Term]:
    params = step.op.params
    strides = params["strides"] or (1,) * len(step.value.shape)
    cuts = list(
        zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    )
    shape = step.op.inputs[0].shape

    def change(term: Term) -> Term | None:
        for k, (start, limit, stride) in enumerate(cuts):
            if (start, limit, stride) == (0, shape[k], 1):
                continue
            if len(term.dims[k]) != 1 or not term.can_change(term.dims[k][0]):
                return None

            def cut(x: jax.Array, place: int, own: tuple = cuts[k]) -> jax.Array:
                return jax.lax.slice_in_dim(x, *own, axis=place)

            new = dim_of(step.value.shape[k])
            term = term.along(term.dims[k][0], new, cut)
        return term

    return _each(step, change)


def _looped(step: _Step) -> list[Term]:
    """What a loop stacks, or adds up in its carry."""
    scan = step.op
    assert isinstance(scan, Scan)
    position, inner = step.value.position, scan.body.outputs[step.value.position]
    if position >= scan.loop.num_carry:
        found = terms(inner, scan.body)
        return [_lifted(step, scan, term, is_stacked=True) for term in found]
    carried = Carried(scan.carried_in(position))
    found = terms(inner, scan.body, carried)
    if carried.times != 1:
        raise step.refuse("the carry is not only added to")
    lifted = [_lifted(step, scan, term, is_stacked=False) for term in found]
    return [*step.of(scan.initial(position)), *lifted]


def _lifted(step: _Step, scan: Scan, term: Term, *, is_stacked: bool) -> Term:
    """Takes a term out of the body of a loop."""
    numbers = [x for x in term.scalars if not isinstance(x, Value)]
    right = term.right.value
    for scalar in term.scalars:
        if isinstance(scalar, Value):
            right = scan.body.add(_times, right, scalar)
    steps = dim_of(scan.loop.length)

    def out(factor: Factor, value: Value) -> Factor:
        value, has_axis = scan.lifted(value)
        if not has_axis:
            return Factor(value, factor.dims, factor.make)
        make = factor.make and jax.vmap(factor.make)
        return Factor(value, (steps, *factor.dims), make)

    lifted = dataclasses.replace(
        term,
        left=term.left and out(term.left, term.left.value),
        right=out(term.right, right),
        ids=term.ids and out(term.ids, term.ids.value),
        scalars=tuple(numbers),
    )
    own = [x for x in lifted.factors if not (is_stacked and x is lifted.ids)]
    if not any({*steps} <= {*factor.axes} for factor in own):
        raise step.refuse("a step does not differ from another")
    if not is_stacked:
        return lifted
    window = lifted.window and ((0, scan.loop.length), *lifted.window)
    return dataclasses.replace(lifted, dims=(steps, *lifted.dims), window=window)


def _times(x: jax.Array, scalar: jax.Array) -> jax.Array:
    x = wide(x)
    return x * scalar.astype(x.dtype)


_RULES: dict[str, Callable[[_Step], list[Term]]] = {
    "add": _added,
    "add_any": _added,
    "broadcast_in_dim": _broadcast,
    "conv_general_dilated": _convolved,
    "convert_element_type": _converted,
    "copy": _unchanged,
    "copy_p": _unchanged,
    "div": _divided,
    "dot_general": _dot,
    "dynamic_update_slice": _put_in_place,
    "expand_dims": _reshaped,
    "mul": _multiplied,
    "neg": _negated,
    "optimization_barrier": _unchanged,
    "pad": _padded,
    "reduce_sum": _summed,
    "reshape": _reshaped,
    "rev": _reversed,
    "scan": _looped,
    "scatter-add": _scattered,
    "slice": _sliced,
    "squeeze": _reshaped,
    "sub": _subtracted,
    "transpose": _transposed,
}
