"""Rows of parts: in the order of the network, and in blocks when there are many."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

MOST_ROWS = 150

Members = dict[str, list[int]]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which parts form which row of a picture.

    Row `r` is of the parts `order[starts[r]:starts[r + 1]]`.
    """

    labels: tuple[str, ...]
    order: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.labels)

    @property
    def grouped(self) -> bool:
        """Whether any row is of more than one part."""
        return len(self.labels) < len(self.order)

    def combine(self, norms: np.ndarray) -> np.ndarray:
        """Returns the norm of each row: [steps, parts] to float64 [steps, rows]."""
        norms = norms[:, self.order].astype(np.float64)
        return np.sqrt(self._sums_of_squares(norms)) if self.grouped else norms

    def largest(self, norms: np.ndarray) -> np.ndarray:
        """Returns the largest norm of each row over the steps: float64 [rows]."""
        if not self.grouped:
            return norms.max(axis=0)[self.order].astype(np.float64)
        squares = self._sums_of_squares(norms[:, self.order].astype(np.float64))
        return np.sqrt(squares.max(axis=0))

    def _sums_of_squares(self, norms: np.ndarray) -> np.ndarray:
        return np.add.reduceat(np.square(norms, out=norms), self.starts, axis=1)

    def row_of(self) -> np.ndarray:
        """Returns the row of each part, by its place in `order`."""
        lengths = np.diff([*self.starts, len(self.order)])
        return np.repeat(np.arange(len(self)), lengths)

    def shifts(self) -> np.ndarray:
        """Returns how far each part, by its place in `order`, is from its row's middle.

        From -0.5 to 0.5 for the parts of a row, so that equal norms do not coincide.
        """
        lengths = np.diff([*self.starts, len(self.order)])
        return np.concatenate([(np.arange(n) + 0.5) / n - 0.5 for n in lengths])

    def blocks(self) -> list[tuple[str, int, int]]:
        """Returns the name, the first row and the end of each run of rows of a block.

        Example:
          >>> arrange(["embed", "block_1/bias", "block_1/kernel"]).blocks()
          [('embed', 0, 1), ('block_1', 1, 3)]
        """
        if self.grouped:
            return [(label, r, r + 1) for r, label in enumerate(self.labels)]
        found, start = [], 0
        for block, labels in itertools.groupby(self.labels, key=block_of):
            run = list(labels)
            name = block if len(run) > 1 else run[0]
            found.append((name, start, start + len(run)))
            start += len(run)
        return found


def arrange(parts: Sequence[str], most_parts: int = MOST_ROWS) -> Rows:
    """Puts parts in the order of the network and groups them to at most 150 rows.

    A row is a part; when these are more than `most_parts` it is a block, such as a
    layer; and when the blocks are too many, neighbors share a row.
    """
    members = {parts[i]: [i] for i in network_order(parts)}
    if len(members) > most_parts:
        members = _by_block(members)
    if len(members) > MOST_ROWS:
        members = _by_neighbor(members)
    starts = np.cumsum([0, *map(len, members.values())])[:-1]
    return Rows(tuple(members), np.concatenate(list(members.values())), starts)


def network_order(parts: Sequence[str]) -> list[int]:
    """Returns the positions of the parts, from the input of the network on.

    A tree lists the keys of a dict sorted as text, `block_10` before `block_2`. Where
    names that differ in their numbers are sorted so, the numbers decide; any other
    order is the network's own.
    """
    paths = [part.split("/") for part in parts]
    children: dict[tuple, dict[str, int]] = {}
    for path in paths:
        for depth, name in enumerate(path):
            children.setdefault(tuple(path[:depth]), {})[name] = 0
    for siblings in children.values():
        names: list[str] = []
        for _, alike in itertools.groupby(siblings, key=_without_numbers):
            run = list(alike)
            names += sorted(run, key=_natural) if run == sorted(run) else run
        siblings.update((name, rank) for rank, name in enumerate(names))

    def rank(position: int) -> list[int]:
        path = paths[position]
        return [children[tuple(path[:d])][name] for d, name in enumerate(path)]

    return sorted(range(len(parts)), key=rank)


def block_of(part: str) -> str:
    """Returns the block of a part: its path to the first name with a number in it.

    Example:
      >>> block_of("decoder/block_3/mlp/kernel")
      'decoder/block_3'
      >>> block_of("layers/mlp/kernel[3]")  # layer 3 of a stacked leaf
      'layers[3]'
      >>> block_of("embed/table")
      'embed'
    """
    path, *layer = re.split(r"(?=\[[\d,]+\]$)", part)
    names = path.split("/")
    numbered = (d for d, name in enumerate(names) if re.search(r"\d", name))
    depth = next(numbered, 0)
    return "".join(["/".join(names[: depth + 1]), *layer])


def _by_block(members: Members) -> Members:
    """Groups parts by block, below the numbered names that all paths share."""
    paths = {part: part.split("/") for part in members}
    shared = number_alike(paths.values(), min(map(len, paths.values())) - 1)
    names = next(iter(paths.values()))[:shared]
    shared = max((d + 1 for d, x in enumerate(names) if re.search(r"\d", x)), default=0)
    blocks: Members = {}
    for part, path in paths.items():
        block = block_of("/".join(path[shared:]))
        blocks.setdefault(block, []).extend(members[part])
    return blocks


def _by_neighbor(members: Members) -> Members:
    shared = math.ceil(len(members) / MOST_ROWS)
    neighbors: Members = {}
    names = list(members)
    for first in range(0, len(names), shared):
        run = names[first : first + shared]
        label = " \N{HORIZONTAL ELLIPSIS} ".join(dict.fromkeys((run[0], run[-1])))
        neighbors[label] = [i for name in run for i in members[name]]
    return neighbors


def number_alike(paths: Iterable[Sequence[str]], most: int) -> int:
    """Returns how many names all paths begin with, `most` at most."""
    for depth, alike in enumerate(zip(*paths, strict=False)):
        if depth == most or len(set(alike)) > 1:
            return depth
    return most


def tell_apart(names: Iterable[str]) -> dict[str, str]:
    """Shortens paths by what all of them begin and end with.

    Example:
      >>> tell_apart(["params/dense_0/kernel", "params/dense_1/kernel"])
      {'params/dense_0/kernel': 'dense_0', 'params/dense_1/kernel': 'dense_1'}
    """
    paths = {name: name.split("/") for name in names}
    if len(paths) < 2:
        return {name: name for name in paths}
    most = min(map(len, paths.values())) - 1
    start = number_alike(paths.values(), most)
    end = number_alike([path[::-1] for path in paths.values()], most - start)
    return {
        name: "/".join(path[start : len(path) - end]) for name, path in paths.items()
    }


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "", name)


def _natural(name: str) -> list[str | int]:
    pieces = re.split(r"(\d+)", name)
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)]
