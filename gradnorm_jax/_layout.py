"""How the leaves of a tree divide into parts that have one norm each.

Every leaf is cut into *cells* along its kept axes: one cell for the whole leaf, one
for each stacked layer, unit or example. Cells fold into *parts*: all into one, each
into its own, by group, or by example. Norms, limits and scales are then one array
with an entry for each part, whatever the tree looks like.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax import _sharding, _trees
from gradnorm_jax._sharding import Placement, Split
from gradnorm_jax._typing import AUTO, Groups, PerLeaf, Tree

Combine = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the cells of each leaf go; hashable, made once for each traced shape.

    Attributes:
      names: The path of each leaf.
      shapes: The shape of each leaf, of the whole of it where it is split and known.
      kept: The axes of each leaf along which its cells differ.
      fold: How cells become parts: "all", "each", "groups" or "examples".
      labels: The label of each group.
      measured: The group that each leaf's norm enters, -1 for none.
      scaled: The group by which each leaf is scaled, -1 for none.
      split: How each leaf is split over the mesh; `()` where all are whole.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[int, ...], ...]
    fold: str
    labels: tuple[Any, ...] = ()
    measured: tuple[int, ...] = ()
    scaled: tuple[int, ...] = ()
    split: tuple[Split, ...] = ()

    @functools.cached_property
    def members(self) -> tuple[int, ...]:
        """The positions of the leaves that have a norm taken of them."""
        if self.fold != "groups":
            return tuple(range(len(self.shapes)))
        return tuple(i for i, group in enumerate(self.measured) if group >= 0)

    @functools.cached_property
    def cell_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of the cells of each member, as it broadcasts against the leaf."""
        return tuple(
            tuple(
                size if axis in self.kept[i] else 1
                for axis, size in enumerate(self.shapes[i])
            )
            for i in self.members
        )

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Where the cells of each member begin, and where the last ones end."""
        sizes = [math.prod(shape) for shape in self.cell_shapes]
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int32)

    @functools.cached_property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of the norms: `()` for one part, else `(parts,)`."""
        match self.fold:
            case "all":
                return ()
            case "each":
                return (int(self.offsets[-1]),)
            case "groups":
                return (len(self.labels),)
        return self.shapes[0][:1] if self.shapes else (0,)

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """How many entries each part has."""
        entries = [self.size(i) for i in self.members]
        counts = [math.prod(shape) for shape in self.cell_shapes]
        cells = np.array(
            [n / max(k, 1) for n, k in zip(entries, counts, strict=True)], np.float64
        ).repeat(counts)
        return self.gather(cells, lambda x: np.sum(x, axis=0), np)

    @functools.cached_property
    def part_names(self) -> tuple[str, ...]:
        """A name for each part: a path, `path[k]` for its layers, or a label."""
        if self.fold == "groups":
            return tuple(map(str, self.labels))
        if self.fold != "each":
            return tuple(map(str, range(math.prod(self.part_shape))))
        named = []
        for i, shape in zip(self.members, self.cell_shapes, strict=True):
            inner = [size for axis, size in enumerate(shape) if axis in self.kept[i]]
            named += [
                self.names[i] + (f"[{','.join(map(str, index))}]" if index else "")
                for index in np.ndindex(*inner)
            ]
        return tuple(named)

    def size(self, position: int) -> int:
        """How many entries the whole of a leaf has."""
        size = math.prod(self.shapes[position])
        if self.split and self.split[position].dims is None:
            return size * self.split[position].ways
        return size

    def gather(self, cells: Any, combine: Combine, xp: Any = jnp) -> Any:
        """Folds what each cell has, along the leading axis, into what each part has."""
        match self.fold:
            case "all":
                return combine(cells)
            case "each":
                return cells
            case "examples":
                shape = (len(self.members), *self.part_shape, *cells.shape[1:])
                return combine(cells.reshape(shape))
        owner = [self.measured[i] for i in self.members]
        return xp.stack(
            [
                combine(cells[np.flatnonzero(np.asarray(owner) == group)])
                for group in range(len(self.labels))
            ]
        )

    def scales(self, position: int) -> bool:
        """Whether a leaf belongs to a part that scales it."""
        return self.fold != "groups" or self.scaled[position] >= 0

    def spread(
        self, parts: jax.Array, position: int, *, measured: bool = False
    ) -> jax.Array:
        """Returns what a leaf's parts have, shaped to broadcast against that leaf.

        The parts that scale the leaf or, if `measured`, those whose norm it enters.
        """
        match self.fold:
            case "all":
                return parts
            case "groups":
                return parts[(self.measured if measured else self.scaled)[position]]
            case "examples":
                rank = len(self.shapes[position])
                return parts.reshape(-1, *[1] * (rank - 1))
        if math.prod(self.cell_shapes[position]) == 1:
            return parts[self.offsets[position]]
        return self.block(parts, position)

    def block(self, cells: jax.Array, position: int) -> jax.Array:
        """Returns what the cells of a leaf have that lie on this device.

        Where every leaf is a member.
        """
        start, stop = self.offsets[position : position + 2]
        cells = cells[start:stop].reshape(self.cell_shapes[position])
        return _sharding.own_block(cells, self._cut(position))

    def over_the_mesh(
        self, cells: jax.Array
    ) -> tuple[jax.Array, list[tuple[str, ...]]]:
        """Puts the cells of this device, `[cells, k]`, among those of all devices.

        Returns them with the mesh axes over which each is still to be folded.
        """
        if not self.split:
            return cells, [()] * cells.shape[0]
        counts = [math.prod(shape) for shape in self.cell_shapes]
        axes = [self.split[i].axes for i in self.members]
        each = [a for a, count in zip(axes, counts, strict=True) for _ in range(count)]
        if not any(any(self._cut(i)) for i in self.members):
            return cells, each
        placed, start = [], 0
        for i, shape in zip(self.members, self.cell_shapes, strict=True):
            cut = self._cut(i)
            own = [n // _sharding.ways(a) for n, a in zip(shape, cut, strict=True)]
            stop = start + math.prod(own)
            block = cells[start:stop].reshape(*own, -1)
            block = _sharding.in_place(block, (*cut, ()))
            placed.append(block.reshape(-1, cells.shape[1]))
            start = stop
        return jnp.concatenate(placed), each

    def _cut(self, position: int) -> tuple[tuple[str, ...], ...]:
        """The mesh axes that cut the axes along which the cells of a leaf differ."""
        kept, rank = self.kept[position], len(self.shapes[position])
        dims = self.split[position].dims if self.split else None
        if dims is None:
            return ((),) * rank
        return tuple(axes if k in kept else () for k, axes in enumerate(dims))


class _Leaves(NamedTuple):
    """What the layouts below start from."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    split: tuple[Split, ...]
    treedef: Any


def by_tree(
    tree: Tree,
    placement: Placement = Placement(),  # noqa: B008 - frozen
    *,
    caller: str,
    measured: bool = True,
) -> Layout:
    """One part: the whole tree."""
    names, shapes, split, _ = _read(tree, placement, caller, measured)
    return Layout(names, shapes, ((),) * len(names), "all", split=split)


def by_leaf(
    tree: Tree,
    placement: Placement = Placement(),  # noqa: B008 - frozen
    *,
    stacked_axes: PerLeaf | None,
    caller: str,
    measured: bool = True,
) -> Layout:
    """A part for each leaf, and for each layer of a leaf that stacks layers."""
    names, shapes, split, _ = _read(tree, placement, caller, measured)
    argument = f"{caller.split('(')[0]}(stacked_axes=...)"
    axes = _trees.per_leaf(stacked_axes, names, argument)
    kept = tuple(
        _normal(() if axis is None else axis, shape, name, argument)
        for axis, shape, name in zip(axes, shapes, names, strict=True)
    )
    if split:
        for own, name, stacked in zip(split, names, kept, strict=True):
            if stacked:
                _sharding.check_cut_is_known(own, name, placement.caller or caller)
    return Layout(names, shapes, kept, "each", split=split)


def by_unit(
    tree: Tree,
    placement: Placement = Placement(),  # noqa: B008 - frozen
    *,
    axes: PerLeaf | None,
    caller: str,
    measured: bool = True,
) -> Layout:
    """A part for each unit: a slice along the axes that `axes` does not name."""
    names, shapes, split, _ = _read(tree, placement, caller, measured)
    argument = f"{caller.split('(')[0]}(axes=...)"
    settings = _trees.per_leaf(axes, names, argument)
    kept = []
    for k, (axis, shape, name) in enumerate(zip(settings, shapes, names, strict=True)):
        summed = (
            _fan_in(shape, name, argument)
            if axis is None
            else _normal(axis, shape, name, argument)
        )
        kept.append(tuple(k for k in range(len(shape)) if k not in summed))
        # By default the shape of the whole leaf says what a unit is.
        if split and (kept[-1] or (axis is None and len(shape) > 1)):
            _sharding.check_cut_is_known(split[k], name, placement.caller or caller)
    return Layout(names, shapes, tuple(kept), "each", split=split)


def by_group(
    tree: Tree,
    placement: Placement = Placement(),  # noqa: B008 - frozen
    *,
    groups: Groups,
    scaled: Groups | None = None,
    caller: str,
    measured: bool = True,
) -> Layout:
    """A part for each label; `scaled` labels the leaves that a part scales."""
    names, shapes, split, treedef = _read(tree, placement, caller, measured)
    function = caller.split("(")[0]
    owners = _trees.labels(groups, names, treedef, f"{function}(groups=...)")
    named = groups.values() if _trees.is_patterns(groups) else owners
    labels = tuple(dict.fromkeys(x for x in named if x is not None))
    if not labels:
        raise ValueError(
            f"`{function}(groups=...)` puts no leaf into a group. The leaves are"
            f" {_trees.listed(names)}."
        )
    number = {None: -1} | {label: k for k, label in enumerate(labels)}
    targets = owners
    if scaled is not None:
        targets = _trees.labels(scaled, names, treedef, f"{function}(scaled=...)")
        for name, label in zip(names, targets, strict=True):
            if label not in number:
                raise ValueError(
                    f"`{function}(scaled=...)` puts leaf {name!r} into group {label!r},"
                    f" which has no norm. Groups with a norm are {list(labels)}."
                )
    return Layout(
        names,
        shapes,
        ((),) * len(names),
        "groups",
        labels,
        tuple(number[label] for label in owners),
        tuple(number[label] for label in targets),
        split,
    )


def by_example(
    tree: Tree,
    placement: Placement = Placement(),  # noqa: B008 - frozen
    *,
    caller: str,
    each_leaf: bool = False,
    measured: bool = True,
) -> Layout:
    """A part for each entry of the leading axis, over all leaves or in each leaf.

    The examples of a device stay on it: what is split is the gradient of one.
    """
    names, shapes, split, _ = _read(tree, placement, caller, measured, examples=True)
    if placement.axis_names is AUTO:
        for own, name in zip(split, names, strict=False):
            _sharding.check_cut_is_known(own, name, placement.caller or caller)
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) > 1 or None in sizes:
        raise ValueError(
            f"`{caller}`: every leaf needs the examples along its axis 0, got shapes"
            f" {list(shapes)}. `jax.vmap(jax.grad(loss), (None, 0))` makes such"
            " gradients."
        )
    fold = "each" if each_leaf else "examples"
    return Layout(names, shapes, ((0,),) * len(names), fold, split=split)


def _read(
    tree: Tree,
    placement: Placement,
    caller: str,
    measured: bool,
    *,
    examples: bool = False,
) -> _Leaves:
    names, leaves, treedef = _trees.flatten(tree, caller)
    split = _sharding.splits(tree, names, leaves, placement, caller, measured=measured)
    if examples:
        split = tuple(own.without_the_first_dimension() for own in split)
    shapes = tuple(tuple(x.shape) for x in leaves)
    if split:
        shapes = tuple(own.whole(x) for own, x in zip(split, shapes, strict=True))
    return _Leaves(names, shapes, split, treedef)


def _normal(axes: Any, shape: tuple[int, ...], name: str, caller: str) -> tuple:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    for axis in axes:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"`{caller}` names axis {axis} of leaf {name!r}, whose shape is"
                f" {shape}. Give the axes by pattern, as in {{'layers/.*': 0}}."
            )
    return tuple(sorted({axis % len(shape) for axis in axes}))


def _fan_in(shape: tuple[int, ...], name: str, caller: str) -> tuple[int, ...]:
    """The axes that one output of a kernel sums over, in the layout of Flax."""
    if sum(size != 1 for size in shape) <= 1:
        return tuple(range(len(shape)))
    if len(shape) <= 3:
        return (0,)
    if len(shape) <= 5:
        return tuple(range(len(shape) - 1))
    raise ValueError(
        f"`{caller}` must be given for leaf {name!r} of shape {shape}: which axes one"
        " unit spans is known only up to 5 dimensions."
    )
