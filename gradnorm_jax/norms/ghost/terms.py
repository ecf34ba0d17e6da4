r"""A gradient as a sum of products that were never formed.

A term is an einsum of two factors,
:math:`\sum_t X_{t,\text{rows}} Y_{t,\text{columns}}`. Its dimensions are named by axes:
each dimension of a factor, and of the gradient, is laid out over some of them in order,
so that transposes and reshapes of the gradient only move names. What an axis means
follows from where it stands: one of the left factor and the gradient is a row, one of
both factors and the gradient is a batch dimension, and one that the gradient does not
have is summed over.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from gradnorm_jax.norms.ghost.programs import Value


@dataclasses.dataclass(eq=False)
class Axis:
    """A dimension, or a piece of one; told apart by identity."""

    size: int

    def __repr__(self) -> str:
        return f"<{self.size}>"


#: The axes over which one dimension is laid out, the last one fastest.
Dim = tuple[Axis, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """One side of a product.

    Attributes:
      value: What it is made from.
      dims: The axes of each of its dimensions once it is made.
      make: Makes it from the value; `None` where it is the value.
    """

    value: Value
    dims: tuple[Dim, ...]
    make: Callable[[jax.Array], jax.Array] | None = None

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All its axes in order."""
        return tuple(axis for dim in self.dims for axis in dim)

    def along(
        self, axis: Axis, new: Dim, change: Callable[[jax.Array, int], jax.Array]
    ) -> "Factor":
        """Returns the factor changed along one axis, which then has another name."""
        place = self.axes.index(axis)
        sizes = [x.size for x in self.axes]

        def make(value: jax.Array) -> jax.Array:
            x = value if self.make is None else self.make(value)
            return change(x.reshape(sizes), place)

        dims = tuple(new if x is axis else (x,) for x in self.axes)
        return Factor(self.value, dims, make)


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """One summand of a gradient.

    Attributes:
      left: The factor with the rows; `None` for the number 1.
      right: The factor with the columns.
      dims: The axes of each dimension of the gradient.
      scalars: Values and numbers by which the product is multiplied.
      hot: An axis of the gradient along which only one index is not zero, ...
      ids: ... and what says which; `hot` is in no factor.
      window: Where the term begins along each dimension of the gradient, and how long
        that is, if it is not all of it.
    """

    left: Factor | None
    right: Factor
    dims: tuple[Dim, ...]
    scalars: tuple[Value | float, ...] = ()
    hot: Axis | None = None
    ids: Factor | None = None
    window: tuple[tuple[int, int], ...] | None = None

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The factors that there are."""
        return tuple(x for x in (self.left, self.right, self.ids) if x is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the gradient, or of the window that the term is of it."""
        return tuple(math.prod(axis.size for axis in dim) for dim in self.dims)

    def scaled(self, scalar: Value | float) -> "Term":
        """Returns a multiple."""
        return dataclasses.replace(self, scalars=(*self.scalars, scalar))

    def transposed(self, permutation: Sequence[int]) -> "Term":
        """Returns the term with the dimensions of the gradient in another order."""
        window = self.window and tuple(self.window[k] for k in permutation)
        dims = tuple(self.dims[k] for k in permutation)
        return dataclasses.replace(self, dims=dims, window=window)

    def summed(self, dims: Sequence[int]) -> "Term | None":
        """Returns the sum of the gradient over some dimensions."""
        left = [dim for k, dim in enumerate(self.dims) if k not in dims]
        if self.window or any(self.hot in self.dims[k] for k in dims):
            return None
        return dataclasses.replace(self, dims=tuple(left))

    def reshaped(self, shape: Sequence[int]) -> "Term | None":
        """Returns the term of the gradient in another shape, if axes can be cut so."""
        if self.window:
            return self._reshaped_around_the_window(shape)
        term, flat = self, [axis for dim in self.dims for axis in dim]
        dims: list[Dim] = []
        for size in shape:
            dim: list[Axis] = []
            have = 1
            while have < size:
                if not flat or size % have:
                    return None
                axis, missing = flat.pop(0), size // have
                if axis.size == 1:
                    continue
                if missing % axis.size:
                    if axis.size % missing or axis is self.hot:
                        return None
                    outer, inner = Axis(missing), Axis(axis.size // missing)
                    term = term.cut({axis: (outer, inner)})
                    flat.insert(0, inner)
                    axis = outer
                dim.append(axis)
                have *= axis.size
            dims.append(tuple(dim))
        return dataclasses.replace(term, dims=tuple(dims))

    def _reshaped_around_the_window(self, shape: Sequence[int]) -> "Term | None":
        """Allows only for dimensions of size 1 that come or go."""
        assert self.window is not None
        whole = [n for _, n in self.window]
        kept = [k for k, n in enumerate(whole) if n != 1]
        if [n for n in shape if n != 1] != [whole[k] for k in kept]:
            return None
        rest = iter(kept)
        dims, window = [], []
        for n in shape:
            k = next(rest) if n != 1 else None
            dims.append(() if k is None else self.dims[k])
            window.append((0, 1) if k is None else self.window[k])
        return dataclasses.replace(self, dims=tuple(dims), window=tuple(window))

    def cut(self, pieces: Mapping[Axis, Dim]) -> "Term":
        """Returns the term with some axes cut into pieces, or renamed."""

        def renamed(dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
            return tuple(
                tuple(piece for axis in dim for piece in pieces.get(axis, (axis,)))
                for dim in dims
            )

        def of(factor: Factor | None) -> Any:
            return factor and dataclasses.replace(factor, dims=renamed(factor.dims))

        return dataclasses.replace(
            self,
            left=of(self.left),
            right=of(self.right),
            ids=of(self.ids),
            dims=renamed(self.dims),
            hot=None if self.hot is None else pieces.get(self.hot, (self.hot,))[0],
        )

    def along(
        self, axis: Axis, new: Dim, change: Callable[[jax.Array, int], jax.Array]
    ) -> "Term":
        """Returns the term with its factors changed along an axis of the gradient."""

        def of(factor: Factor | None) -> Any:
            if factor is None or axis not in factor.axes:
                return factor
            return factor.along(axis, new, change)

        renamed = self.cut({axis: new})
        return dataclasses.replace(renamed, left=of(self.left), right=of(self.right))

    def can_change(self, axis: Axis) -> bool:
        """Whether its factors alone say what it is along an axis of the gradient."""
        by_ids = self.ids is not None and axis in self.ids.axes
        return not self.window and axis is not self.hot and not by_ids

    def padded(self, starts: Sequence[int], shape: Sequence[int]) -> "Term":
        """Returns the term as a window of a larger gradient."""
        own = self.window or tuple((0, n) for n in self.shape)
        window = tuple(
            (start + inner, n)
            for (inner, _), start, n in zip(own, starts, shape, strict=True)
        )
        return dataclasses.replace(self, window=window)


def dim_of(size: int) -> Dim:
    """Returns a new axis; none for a dimension of size 1, along which nothing lies."""
    return (Axis(size),) if size != 1 else ()


def axes_of(shape: Sequence[int]) -> tuple[Dim, ...]:
    """Returns a new axis for each dimension."""
    return tuple(map(dim_of, shape))


def aligned(terms: Sequence[Term]) -> list[Term] | None:
    """Returns terms whose gradients are cut into axes of the same sizes.

    `None` where the cuts of one fall between those of another in a way that neither can
    follow.
    """
    boundaries = [
        _boundaries(dim) for dim in zip(*(t.dims for t in terms), strict=True)
    ]
    if any(cuts is None for cuts in boundaries):
        return None
    found = []
    for term in terms:
        pieces: dict[Axis, Dim] = {}
        for dim, cuts in zip(term.dims, boundaries, strict=True):
            assert cuts is not None
            size = math.prod(axis.size for axis in dim)
            for axis in dim:
                inside = [c for c in cuts if size // axis.size <= c <= size]
                size //= axis.size
                steps = sorted(inside, reverse=True)
                parts = tuple(Axis(a // b) for a, b in itertools.pairwise(steps))
                if len(parts) > 1:
                    if axis is term.hot:
                        return None
                    pieces[axis] = parts
        found.append(term.cut(pieces) if pieces else term)
    return found


def _boundaries(dims: Sequence[Dim]) -> list[int] | None:
    """The strides at which any of these layouts of one dimension is cut."""
    cuts: set[int] = set()
    for dim in dims:
        stride = 1
        cuts.add(1)
        for axis in reversed(dim):
            stride *= axis.size
            cuts.add(stride)
    ordered = sorted(cuts)
    if any(b % a for a, b in itertools.pairwise(ordered)):
        return None
    return ordered
