"""Operations that multiply two arrays, as terms."""

from collections.abc import Sequence
from typing import Any

from gradnorm_jax.norms.ghost.programs import Value
from gradnorm_jax.norms.ghost.terms import Dim, Factor, Term, axes_of, dim_of


def dot(a: Value, b: Value, dimension_numbers: Any) -> Term:
    """Returns a `dot_general`."""
    (a_sums, b_sums), (a_batch, b_batch) = dimension_numbers
    left, right = list(axes_of(a.shape)), list(axes_of(b.shape))
    for k, other in zip((*a_sums, *a_batch), (*b_sums, *b_batch), strict=True):
        right[other] = left[k]
    free = [left[k] for k in range(len(left)) if k not in (*a_sums, *a_batch)]
    free += [right[k] for k in range(len(right)) if k not in (*b_sums, *b_batch)]
    dims = (*(left[k] for k in a_batch), *free)
    return Term(Factor(a, tuple(left)), Factor(b, tuple(right)), dims)


def outer(a: Value, b: Value, shape: Sequence[int]) -> Term | None:
    """Returns a product of arrays that are spread, each over dimensions of the other.

    `None` where both differ along one dimension: that is no product of factors.
    """
    dims: dict[int, Dim] = {}
    factors = []
    for x in (a, b):
        places, source = _before_it_was_spread(x)
        own: list[Dim] = []
        for place, size in zip(places, source.shape, strict=True):
            own.append(dim_of(size))
            if size == 1:
                continue
            if place in dims:
                return None
            dims[place] = own[-1]
        factors.append(Factor(source, tuple(own)))
    if any(n != 1 and k not in dims for k, n in enumerate(shape)):
        return None
    return Term(
        factors[0], factors[1], tuple(dims.get(k, ()) for k in range(len(shape)))
    )


def scalar(x: Value) -> Value | None:
    """Returns the number that is spread to an array; `None` where it is not one."""
    while x.op is not None and x.op.name == "broadcast_in_dim" and x.shape:
        x = x.op.inputs[0]
    return None if x.shape else x


def _before_it_was_spread(x: Value) -> tuple[tuple[int, ...], Value]:
    """Returns what is spread to `x`, and which dimension each of its own becomes."""
    places = tuple(range(len(x.shape)))
    while x.op is not None and x.op.name in ("broadcast_in_dim", "reshape"):
        source = x.op.inputs[0]
        if x.op.name == "broadcast_in_dim":
            own = x.op.params["broadcast_dimensions"]
        else:
            own = _places_of_a_reshape(source.shape, x.shape)
        if own is None:
            break
        places, x = tuple(places[k] for k in own), source
    return places, x


def _places_of_a_reshape(
    old: Sequence[int], new: Sequence[int]
) -> tuple[int, ...] | None:
    """Which dimension each old one becomes, where only those of size 1 are new."""
    places, k = [], 0
    for n in old:
        while k < len(new) and new[k] != n:
            if new[k] != 1:
                return None
            k += 1
        if k == len(new):
            return None
        places.append(k)
        k += 1
    return tuple(places) if all(n == 1 for n in new[k:]) else None
