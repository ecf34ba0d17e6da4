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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax import _trees
from gradnorm_jax._typing import Groups, PerLeaf, Tree

Combine = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the cells of each leaf go; hashable, made once for each traced shape.

    Attributes:
      names: The path of each leaf.
      shapes: The shape of each leaf.
      kept: The axes of each leaf along which its cells differ.
      fold: How cells become parts: "all", "each", "groups" or "examples".
      labels: The label of each group.
      measured: The group that each leaf's norm enters, -1 for none.
      scaled: The group by which each leaf is scaled, -1 for none.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[int, ...], ...]
    fold: str
    labels: tuple[Any, ...] = ()
    measured: tuple[int, ...] = ()
    scaled: tuple[int, ...] = ()

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
        entries = [math.prod(self.shapes[i]) for i in self.members]
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
        start, stop = self.offsets[position : position + 2]
        shape = self.cell_shapes[position]
        return (
            parts[start] if math.prod(shape) == 1 else parts[start:stop].reshape(shape)
        )

    def split(self, cells: jax.Array) -> list[jax.Array]:
        """Cuts what each cell has into one array for each member."""
        return [
            cells[start:stop].reshape(shape)
            for start, stop, shape in zip(
                self.offsets[:-1], self.offsets[1:], self.cell_shapes, strict=True
            )
        ]


def by_tree(tree: Tree, caller: str) -> Layout:
    """One part: the whole tree."""
    names, leaves, _ = _trees.flatten(tree, caller)
    return Layout(names, _shapes(leaves), ((),) * len(leaves), "all")


def by_leaf(tree: Tree, stacked_axes: PerLeaf | None, caller: str) -> Layout:
    """A part for each leaf, and for each layer of a leaf that stacks layers."""
    names, leaves, _ = _trees.flatten(tree, caller)
    argument = f"{caller.split('(')[0]}(stacked_axes=...)"
    axes = _trees.per_leaf(stacked_axes, names, argument)
    kept = tuple(
        _normal(() if axis is None else axis, x.shape, name, argument)
        for axis, x, name in zip(axes, leaves, names, strict=True)
    )
    return Layout(names, _shapes(leaves), kept, "each")


def by_unit(tree: Tree, axes: PerLeaf | None, caller: str) -> Layout:
    """A part for each unit: a slice along the axes that `axes` does not name."""
    names, leaves, _ = _trees.flatten(tree, caller)
    argument = f"{caller.split('(')[0]}(axes=...)"
    kept = []
    for axis, x, name in zip(
        _trees.per_leaf(axes, names, argument), leaves, names, strict=True
    ):
        summed = (
            _fan_in(x.shape, name, argument)
            if axis is None
            else _normal(axis, x.shape, name, argument)
        )
        kept.append(tuple(k for k in range(len(x.shape)) if k not in summed))
    return Layout(names, _shapes(leaves), tuple(kept), "each")


def by_group(tree: Tree, groups: Groups, scaled: Groups | None, caller: str) -> Layout:
    """A part for each label; `scaled` labels the leaves that a part scales."""
    names, leaves, treedef = _trees.flatten(tree, caller)
    function = caller.split("(")[0]
    measured = _trees.labels(groups, names, treedef, f"{function}(groups=...)")
    named = groups.values() if _trees.is_patterns(groups) else measured
    labels = tuple(dict.fromkeys(x for x in named if x is not None))
    if not labels:
        raise ValueError(
            f"`{function}(groups=...)` puts no leaf into a group. The leaves are"
            f" {_trees.listed(names)}."
        )
    number = {None: -1} | {label: k for k, label in enumerate(labels)}
    targets = measured
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
        _shapes(leaves),
        ((),) * len(leaves),
        "groups",
        labels,
        tuple(number[label] for label in measured),
        tuple(number[label] for label in targets),
    )


def by_example(tree: Tree, caller: str, *, each_leaf: bool = False) -> Layout:
    """A part for each entry of the leading axis, over all leaves or in each leaf."""
    names, leaves, _ = _trees.flatten(tree, caller)
    sizes = {x.shape[0] if x.shape else None for x in leaves}
    if len(sizes) > 1 or None in sizes:
        raise ValueError(
            f"`{caller}`: every leaf needs the examples along its axis 0, got shapes"
            f" {[x.shape for x in leaves]}. `jax.vmap(jax.grad(loss), (None, 0))`"
            " makes such gradients."
        )
    fold = "each" if each_leaf else "examples"
    return Layout(names, _shapes(leaves), ((0,),) * len(leaves), fold)


def _shapes(leaves: list) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(x.shape) for x in leaves)


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
