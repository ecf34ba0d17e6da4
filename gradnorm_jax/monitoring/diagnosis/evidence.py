"""Evidence: a history, and what several rules need of it, computed once."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, ParamSpec

import numpy as np

from gradnorm_jax.monitoring.diagnosis.finding import Finding
from gradnorm_jax.monitoring.history import History, ratio
from gradnorm_jax.monitoring.rows import network_order

#: Steps before this one say nothing of the rest of a run.
WARMUP = 20
#: How many finite rows any verdict takes that is no plain fact.
FEWEST_ROWS = 20
#: How many rows are "the last steps".
LATE_ROWS = 128
#: A relative update is the median of so many rows; a long run is judged by so many such
#: windows, evenly spread.
RATIO_ROWS, MOST_RATIO_WINDOWS = 50, 200

BLOCK = 2048  # rows that are in work at one time

Rule = Callable[[History], Iterable[Finding]]
P = ParamSpec("P")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Evidence(History):
    """A history as the rules of this package look at it.

    Attributes:
      warmup: Steps before this one count for no verdict that rests on statistics.
      ignored: The positions of the parts that are left out of everything.
    """

    warmup: int = WARMUP
    ignored: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls, history: History, *, warmup: int = WARMUP, ignored: Iterable[int] = ()
    ) -> "Evidence":
        """Returns the evidence of a history, and evidence as it is."""
        if isinstance(history, cls):
            return history
        fields = dataclasses.fields(History)
        known = {field.name: getattr(history, field.name) for field in fields}
        return cls(**known, warmup=warmup, ignored=frozenset(ignored))

    @functools.cached_property
    def kept(self) -> np.ndarray:
        """The positions of the parts that count, in the order of the network.

        A part without entries has a norm of 0 whatever happens: it is none of them.
        """
        empty = frozenset() if self.sizes is None else np.flatnonzero(self.sizes == 0)
        left_out = self.ignored.union(empty)
        order = [i for i in network_order(self.parts) if i not in left_out]
        return np.array(order, np.intp)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the parts that count, in the order of the network."""
        return tuple(self.parts[i] for i in self.kept)

    @functools.cached_property
    def matrices(self) -> np.ndarray:
        """Which of the parts that count are matrices: bool.

        One has two dimensions or more. A part of which that is unknown, such as a
        group, counts as one.
        """
        dims = self.dims or [None] * len(self.parts)
        known = [dims[i] for i in self.kept]
        return np.array([number is None or number >= 2 for number in known], bool)

    @functools.cached_property
    def totals(self) -> dict[str, np.ndarray]:
        """The norm of all parts that count together, by kind: float64 [T]."""
        return {kind: self._total(kind) for kind in self.kinds}

    def _total(self, kind: str) -> np.ndarray:
        if not self.ignored:
            return self.global_norm(kind)
        total = np.zeros(len(self))
        for rows in self.blocks():
            norms = self.norms(kind)[rows][:, self.kept]
            total[rows] = np.sqrt(np.square(norms, dtype=np.float64).sum(axis=1))
        return total

    def blocks(self) -> Iterable[slice]:
        """Returns the rows in blocks, so that no copy is larger than one."""
        starts = range(0, len(self), BLOCK)
        return [slice(start, start + BLOCK) for start in starts]

    @functools.cached_property
    def finite(self) -> np.ndarray:
        """In which rows every norm is finite: bool [T]."""
        finite = np.ones(len(self), bool)
        for total in self.totals.values():
            finite &= np.isfinite(total)
        return finite

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The rows that count: finite, and after the warm-up; none if they are few."""
        rows = np.flatnonzero(self.finite & (self.steps >= self.warmup))
        return rows if len(rows) >= FEWEST_ROWS else rows[:0]

    @property
    def late(self) -> np.ndarray:
        """The last rows that count, 128 at most."""
        return self.rows[-LATE_ROWS:]

    def at(self, kind: str, rows: Any, parts: Any = slice(None)) -> np.ndarray:
        """Returns norms of a few rows of the parts that count: float64 [rows, parts].

        Args:
          kind: `"grad"`, `"update"` or `"param"`.
          rows: Positions of rows.
          parts: Which of the parts that count.
        """
        return self.norms(kind)[rows][..., self.kept[parts]].astype(np.float64)

    def named(self, which) -> tuple[str, ...]:
        """Returns the names of some of the parts that count, given as a mask."""
        return tuple(self.names[i] for i in np.flatnonzero(which))

    def counted(self, rows: int) -> str:
        """Says a number of rows: steps, or those of them that were recorded."""
        return several(rows, "step" if self.stride == 1 else "recorded step")

    def step(self, row) -> int:
        """Returns the number of the step in a row."""
        return int(self.steps[row])

    @functools.cached_property
    def relative_updates(self) -> list[tuple[np.ndarray, float]]:
        """The median over matrices and 50 rows of update norm / parameter norm.

        It is of windows of rows in which anything moved, and of the matrices that did:
        a list of the rows and the value of each window, in their order.
        """
        if not {"update", "param"} <= set(self.kinds) or not self.matrices.any():
            return []
        rows = self.rows[self.totals["update"][self.rows] > 0]
        number = len(rows) // RATIO_ROWS or (len(rows) >= FEWEST_ROWS)
        most = min(number, MOST_RATIO_WINDOWS)
        ends = len(rows) - RATIO_ROWS * _spread(number, most)[::-1]
        found = []
        for end in ends:
            window = rows[max(0, end - RATIO_ROWS) : end]
            ratios = self.ratios(window)
            moving = (ratios > 0).any(axis=0)
            if moving.any():
                middle = np.median(ratios[:, moving], axis=1)
                found.append((window, float(np.median(middle))))
        return found

    def ratios(self, rows: np.ndarray) -> np.ndarray:
        """Returns update norm / parameter norm of the matrices: [rows, matrices]."""
        update, param = (
            self.at(kind, rows, self.matrices) for kind in ("update", "param")
        )
        return ratio(update, param)


def rule(
    search: Callable[Concatenate[Evidence, P], Iterable[Finding]],
) -> Callable[P, Rule]:
    """Makes of a search through evidence a function that returns it as a rule.

    The numbers that the search goes by become the arguments of that function.
    """
    _, *options = inspect.signature(search).parameters.values()
    signature = inspect.Signature(options, return_annotation=Rule)

    @functools.wraps(search)
    def with_options(*args: P.args, **kwargs: P.kwargs) -> Rule:
        if args and isinstance(args[0], History):
            name = search.__name__
            raise TypeError(f"`{name}` makes rules and is none. Call it: `{name}()`.")
        signature.bind(*args, **kwargs)  # so that a mistake shows here

        @functools.wraps(search)
        def rule(history: History) -> Iterable[Finding]:
            return search(Evidence.of(history), *args, **kwargs)

        return rule

    with_options.__dict__["__signature__"] = signature
    return with_options


def runs_of(flags: np.ndarray) -> list[tuple[int, int]]:
    """Returns where each run of true begins and ends, the end not included.

    Example:
      >>> runs_of(np.array([True, True, False, True]))
      [(0, 2), (3, 4)]
    """
    padded = np.concatenate([[False], flags, [False]])
    edges = np.flatnonzero(padded[1:] != padded[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def several(number: int, word: str) -> str:
    """Says how many of a thing there are.

    Example:
      >>> several(1, "step"), several(1200, "step")
      ('1 step', '1,200 steps')
    """
    return f"{number:,} {word}{'s' * (number != 1)}"


def _spread(number: int, most: int) -> np.ndarray:
    """Returns `most` of the numbers below `number`, evenly, the ends included."""
    return np.round(np.linspace(0, number - 1, most)).astype(np.intp)


__all__ = ["Evidence", "Rule", "rule"]
