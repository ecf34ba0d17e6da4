"""Terms brought to one form: matrices to be multiplied, laid end to end."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax.norms.ghost.programs import Value
from gradnorm_jax.norms.ghost.terms import Axis, Dim, Factor, Term, aligned


class Matrices(NamedTuple):
    """Terms of one example, as matrices for each batch index.

    Attributes:
      left: `[batch, length, rows]`; `None` for ones, of one row.
      right: `[batch, length, columns]`.
      ids: `[length]`, where the rows stand along the hot axis, if they have one.
    """

    left: jax.Array | None
    right: jax.Array
    ids: jax.Array | None


class Sizes(NamedTuple):
    """How large the matrices of a sum are; `rows` are all those of the gradient."""

    batch: int
    length: int
    rows: int
    columns: int


@dataclasses.dataclass(frozen=True, eq=False)
class Sum:
    """Terms of a gradient, or of one window of it, that have their axes in common.

    Attributes:
      terms: Each with its rows in the left factor.
      batch: The axes along which matrices lie side by side.
      hot: The axis of the rows along which some terms have an index each.
      rows: The other axes of the rows.
      columns: The axes of the columns.
    """

    terms: tuple[Term, ...]
    batch: Dim
    hot: Axis | None
    rows: Dim
    columns: Dim

    @property
    def window(self) -> tuple[tuple[int, int], ...] | None:
        """Where it stands in the gradient, if it is not all of it."""
        return self.terms[0].window

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the gradient or window."""
        return self.terms[0].shape

    @functools.cached_property
    def values(self) -> list[Value]:
        """All that it is computed from, each once."""
        factors = [factor.value for term in self.terms for factor in term.factors]
        scalars = [
            x for term in self.terms for x in term.scalars if isinstance(x, Value)
        ]
        return list(dict.fromkeys([*factors, *scalars]))

    @functools.cached_property
    def sizes(self) -> Sizes:
        """How large its matrices are."""
        return Sizes(
            _size(self.batch),
            sum(_size(_summed(term)) for term in self.terms),
            _size(self.rows) * (self.hot.size if self.hot else 1),
            _size(self.columns),
        )

    def matrices(self, arrays: Sequence[jax.Array]) -> list[Matrices]:
        """Returns the matrices of one example, those without ids and those with.

        Args:
          arrays: What `values` are.
        """
        known = dict(zip(self.values, arrays, strict=True))
        hot = () if self.hot is None else (self.hot,)
        found = []
        for is_sparse, rows in ((False, (*hot, *self.rows)), (True, self.rows)):
            parts = [
                self._matrices_of(term, rows, known)
                for term in self.terms
                if (term.ids is not None) == is_sparse
            ]
            if parts:
                found.append(_end_to_end(parts))
        return found

    def unfolded(self, product: jax.Array) -> jax.Array:
        """Returns `[batch, rows, columns]` in the shape of the gradient or window."""
        hot = () if self.hot is None else (self.hot,)
        axes = (*self.batch, *hot, *self.rows, *self.columns)
        order = [axes.index(axis) for dim in self.terms[0].dims for axis in dim]
        laid_out = product.reshape([axis.size for axis in axes])
        return jnp.transpose(laid_out, order).reshape(self.shape)

    def _matrices_of(self, term: Term, rows: Dim, known: dict[Value, Any]) -> Matrices:
        def arranged(factor: Factor, *groups: Dim) -> jax.Array:
            return _arranged(factor, known[factor.value], groups)

        summed = _summed(term)
        right = arranged(term.right, self.batch, summed, self.columns)
        for scalar in term.scalars:
            if isinstance(scalar, Value):  # in 16 bits it may be 0, or infinite
                right = wide(right) * known[scalar].astype(wide(right).dtype)
            else:
                right = right * jnp.asarray(scalar, right.dtype)
        left = None
        if term.left is not None:
            left = arranged(term.left, self.batch, summed, rows)
        if term.ids is None or self.hot is None:
            return Matrices(left, right, None)
        ids = arranged(term.ids, summed)
        stands = (ids >= 0) & (ids < self.hot.size)
        right = jnp.where(stands[:, None], right, 0)
        return Matrices(left, right, jnp.where(stands, ids, 0))


def sums(terms: Sequence[Term]) -> list[Sum] | None:
    """Gathers terms into sums that do not overlap.

    `None` where terms overlap whose axes do not go together.
    """
    groups: dict[Any, list[Term]] = {}
    for term in terms:
        groups.setdefault((term.window, term.shape), []).append(term)
    found = [_in_common(members) for members in groups.values()]
    if any(x is None for x in found):
        return None
    whole: list[Sum] = [x for x in found if x is not None]
    if any(_overlap(a, b) for a, b in itertools.combinations(whole, 2)):
        return None
    return whole


def _in_common(terms: Sequence[Term]) -> Sum | None:
    """Calls the axes of all terms what those of the first are called."""
    kept = {axis for term in terms for dim in term.dims for axis in dim}
    if any(term.ids is not None and kept & {*term.ids.axes} for term in terms):
        return None
    cut = aligned(terms)
    if cut is None:
        return None
    names = [axis for dim in cut[0].dims for axis in dim]
    named = [
        term.cut(
            {
                own: (name,)
                for own, name in zip(itertools.chain(*term.dims), names, strict=True)
            }
        )
        for term in cut
    ]
    hot = {term.hot for term in named if term.hot is not None}
    wanted = _roles(next((t for t in named if t.hot is not None), named[0]))
    turned = [t if _roles(t) == wanted else _turned(t) for t in named]
    if len(hot) > 1 or not wanted or any(_roles(t) != wanted for t in turned):
        return None

    def of(role: str) -> Dim:
        return tuple(x for x in names if wanted[x] == role and x not in hot)

    return Sum(
        tuple(turned), of("batch"), next(iter(hot), None), of("row"), of("column")
    )


def _roles(term: Term) -> dict[Axis, str]:
    """What each axis of the gradient is; empty where one is in no factor."""
    left = term.left.axes if term.left is not None else ()
    right = term.right.axes
    roles = {}
    for axis in itertools.chain(*term.dims):
        if axis is term.hot:
            roles[axis] = "row"
        elif axis in left:
            roles[axis] = "batch" if axis in right else "row"
        elif axis in right:
            roles[axis] = "column"
        else:
            return {}
    return roles


def _turned(term: Term) -> Term:
    if term.left is None or term.hot is not None:
        return term
    return dataclasses.replace(term, left=term.right, right=term.left)


def _overlap(a: Sum, b: Sum) -> bool:
    if a.window is None or b.window is None:
        return True
    return all(
        start < other + width and other < start + length
        for (start, _), length, (other, _), width in zip(
            a.window, a.shape, b.window, b.shape, strict=True
        )
    )


def _summed(term: Term) -> Dim:
    """The axes of the sum; those of one factor alone are summed before."""
    kept = set(itertools.chain(*term.dims))
    left = term.left.axes if term.left is not None else ()
    ids = term.ids.axes if term.ids is not None else ()
    both = [x for x in left if x in term.right.axes]
    return tuple(dict.fromkeys(x for x in (*ids, *both) if x not in kept))


def _arranged(factor: Factor, value: jax.Array, groups: Sequence[Dim]) -> jax.Array:
    """Returns a factor with one dimension for each group of axes."""
    x = value if factor.make is None else factor.make(value)
    x = x.reshape([axis.size for axis in factor.axes])
    wanted = [axis for group in groups for axis in group]
    alone = tuple(k for k, axis in enumerate(factor.axes) if axis not in wanted)
    x = jnp.sum(x, alone) if alone else x
    own = [axis for axis in factor.axes if axis in wanted]
    x = jnp.transpose(x, [own.index(axis) for axis in wanted if axis in own])
    x = x.reshape([axis.size if axis in own else 1 for axis in wanted])
    x = jnp.broadcast_to(x, [axis.size for axis in wanted])
    return x.reshape([_size(group) for group in groups])


def _end_to_end(parts: Sequence[Matrices]) -> Matrices:
    if len(parts) == 1:
        return parts[0]
    dtype = jnp.result_type(*(x.right for x in parts))
    ones = [jnp.ones((*x.right.shape[:2], 1), dtype) for x in parts]
    left = [
        one if x.left is None else x.left.astype(dtype)
        for x, one in zip(parts, ones, strict=True)
    ]
    ids = [x.ids for x in parts if x.ids is not None]
    return Matrices(
        None if all(x.left is None for x in parts) else jnp.concatenate(left, 1),
        jnp.concatenate([x.right.astype(dtype) for x in parts], 1),
        jnp.concatenate(ids) if ids else None,
    )


def wide(x: jax.Array) -> jax.Array:
    """Returns an array in float32, or in its own dtype where that is wider."""
    return x.astype(np.promote_types(x.dtype, np.float32))


def _size(axes: Dim) -> int:
    return math.prod(axis.size for axis in axes)
