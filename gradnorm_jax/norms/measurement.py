"""One measurement: the cells of trees, folded over all devices, and their norms."""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax import _sharding, kernels
from gradnorm_jax._layout import Layout
from gradnorm_jax.norms.fold import Norm, partials, step_down


class Measured(NamedTuple):
    """The norms of the parts of a tree, and which of its cells have one that is finite.

    Both are the same on every device.
    """

    norms: jax.Array
    sound: jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Folded:
    """What a norm keeps of the cells of a tree, folded over all devices.

    Attributes:
      leaves: The members of the layout.
      cells: `[cells, k]`.
      layout: How the tree divides into cells and parts.
      norm: What makes norms of them.
    """

    leaves: tuple[jax.Array, ...]
    cells: jax.Array
    layout: Layout
    norm: Norm

    def measured(self) -> Measured:
        """Returns the norms, and which cells have one that is finite."""
        compute = _finished if self.norm.slope is None else _measured
        return compute(self.norm, self.layout, self.cells, self.leaves)

    def for_layout(
        self, layout: Layout, leaves: Sequence[jax.Array], norm: Norm
    ) -> "Folded | None":
        """Returns the same cells for another layout of the same arrays, if they fit."""
        members = tuple(leaves[i] for i in layout.members)
        alike = norm is self.norm and all(
            getattr(layout, name) == getattr(self.layout, name)
            for name in ("members", "shapes", "kept", "split")
        )
        if alike and all(map(operator.is_, members, self.leaves)):
            return Folded(members, self.cells, layout, norm)
        return None


#: What was folded by transformations around the one that is at work.
_SHARED: ContextVar[tuple[Folded, ...]] = ContextVar("shared", default=())


@contextlib.contextmanager
def sharing(*folded: Folded) -> Iterator[None]:
    """Lets `fold` take, of these same arrays, the cells that are known.

    Not by an argument of `update`, which Optax would hand on to functions of users.
    """
    token = _SHARED.set((*_SHARED.get(), *folded))
    try:
        yield
    finally:
        _SHARED.reset(token)


def fold(
    wanted: Sequence[tuple[Layout, Sequence[jax.Array], Norm]],
    *,
    apart: bool = False,
) -> list[Folded]:
    """Folds some trees by some norms.

    What is wanted of the same leaves is found in one traversal, and one norm of all
    trees, on a mesh, with one collective; `apart` from what uses the norms, as
    :func:`kernels.apart` does it, where the leaves are scaled by them.
    """
    known = [_known(*own) for own in wanted]
    rest = [own for own, found in zip(wanted, known, strict=True) if found is None]
    alike: dict[Hashable, list[int]] = {}
    for k, (layout, leaves, _) in enumerate(rest):
        alike.setdefault((layout, *map(id, leaves)), []).append(k)
    asked, trees, values = [], [], []
    for at in alike.values():
        layout, leaves, _ = rest[at[0]]
        norms = tuple(dict.fromkeys(rest[k][2] for k in at))
        members = tuple(jnp.asarray(leaves[i]) for i in layout.members)
        # The derivative is that of `_measured`, unless it is to be found step by step.
        by_slope = all(norm.slope is not None for norm in norms)
        asked.append((layout, norms))
        trees.append(members)
        values.append(jax.lax.stop_gradient(members) if by_slope else members)
    compute = functools.partial(_cells, tuple(asked), kernels.chosen())
    given = tuple(values)
    cells = kernels.apart(compute, given) if apart else compute(given)
    computed = {
        k: Folded(members, found[norms.index(rest[k][2])], layout, rest[k][2])
        for at, (layout, norms), members, found in zip(
            alike.values(), asked, trees, cells, strict=True
        )
        for k in at
    }
    new = iter(computed[k] for k in range(len(rest)))
    return [next(new) if own is None else own for own in known]


def _known(layout: Layout, leaves: Sequence[jax.Array], norm: Norm) -> Folded | None:
    fitting = (folded.for_layout(layout, leaves, norm) for folded in _SHARED.get())
    return next((folded for folded in fitting if folded is not None), None)


def measure(layout: Layout, leaves: Sequence[jax.Array], norm: Norm) -> Measured:
    """Returns the norm of each part, and which cells have a norm that is finite."""
    [folded] = fold([(layout, leaves, norm)])
    return folded.measured()


def first_nonfinite_leaf(layout: Layout, sound: jax.Array | np.ndarray) -> jax.Array:
    """Returns the position of the first leaf with a cell that is not sound, or -1."""
    if not sound.size:
        return jnp.full((), -1, jnp.int32)
    ends = jnp.asarray(layout.offsets[1:])
    # Any other method is a loop, which fails under `vmap` on Explicit axes.
    first = jnp.argmin(sound)
    member = jnp.searchsorted(ends, first, side="right", method="compare_all")
    return jnp.where(jnp.all(sound), -1, jnp.asarray(layout.members)[member])


# Compiled once for each norm and layout, so that a call outside of `jit` is cheap too.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _cells(
    asked: tuple[tuple[Layout, tuple[Norm, ...]], ...],
    implementation: str,
    trees: tuple[tuple[jax.Array, ...], ...],
) -> list[list[jax.Array]]:
    """What norms keep of every cell of every tree: for each tree, of each norm."""
    found = [
        partials(
            norms, leaves, [layout.kept[i] for i in layout.members], implementation
        )
        for (layout, norms), leaves in zip(asked, trees, strict=True)
    ]
    if not any(layout.split for layout, _ in asked):
        return found
    for norm in dict.fromkeys(norm for _, norms in asked for norm in norms):
        own = [
            (k, norms.index(norm))
            for k, (_, norms) in enumerate(asked)
            if norm in norms
        ]
        over_devices = _over_devices(norm, [(asked[k][0], found[k][n]) for k, n in own])
        for (k, n), cells in zip(own, over_devices, strict=True):
            found[k][n] = cells
    return found


def _over_devices(
    norm: Norm, trees: Sequence[tuple[Layout, jax.Array]]
) -> list[jax.Array]:
    """Folds what each device has of some trees, with one collective."""
    placed, axes = [], []
    for layout, cells in trees:
        cells, own = layout.over_the_mesh(cells)
        placed.append(cells)
        axes += own
    dtype = functools.reduce(np.promote_types, [cells.dtype for cells in placed])
    together = jnp.concatenate([cells.astype(dtype) for cells in placed])
    folded = _sharding.all_reduce(together, axes, norm.across, norm.combine)
    ends = np.cumsum([len(cells) for cells in placed])
    return [
        cells.astype(own.dtype)
        for cells, own in zip(jnp.split(folded, ends[:-1]), placed, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _finished(
    norm: Norm, layout: Layout, cells: jax.Array, leaves: tuple[jax.Array, ...]
) -> Measured:
    del leaves
    norms = norm.finish(layout.gather(cells, norm.combine))
    return Measured(norms, jnp.isfinite(norm.finish(cells)))


_measured = jax.custom_jvp(_finished, nondiff_argnums=(0, 1))


@_measured.defjvp
def _measured_jvp(norm: Norm, layout: Layout, primals: tuple, tangents: tuple) -> tuple:
    assert norm.slope is not None
    # d norm = sum over a part's entries of slope(x) dx. Where the norm is 0 so is
    # every x, and the slope is taken at norm 1, where it is 0 for every order. A slope
    # does not depend on the scale: norms with a subnormal reciprocal are stepped down.
    found = _measured(norm, layout, *primals)
    norms = found.norms
    steady = jnp.where(norms == 0, 1, norms)
    factors = step_down(steady)
    sizes = jnp.broadcast_to(jnp.asarray(layout.sizes, norms.dtype), norms.shape)
    cells = [jnp.zeros((0, 1), norms.dtype)]
    for i, x, dx in zip(layout.members, primals[1], tangents[1], strict=True):
        wide = np.promote_types(x.dtype, norms.dtype)
        own_norm, factor, size = (
            layout.spread(value, i, measured=True).astype(wide)
            for value in (steady * factors, factors, sizes)
        )
        slope = norm.slope(x.astype(wide) * factor, own_norm, size)
        summed = tuple(k for k in range(x.ndim) if k not in layout.kept[i])
        product = jnp.real(jnp.conj(slope) * dx.astype(wide))
        sums = _sharding.replicated(jnp.sum(product, summed))
        cells.append(sums.reshape(-1, 1).astype(norms.dtype))
    total = functools.partial(jnp.sum, axis=0)
    placed, axes = layout.over_the_mesh(jnp.concatenate(cells))
    folded = _sharding.all_reduce(placed, axes, "sum", total)
    no_tangent = np.zeros(found.sound.shape, jax.dtypes.float0)
    return found, Measured(layout.gather(folded[:, 0], total), no_tangent)
