"""The norms of one run, step by step, as NumPy columns."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from gradnorm_jax._typing import DETAILS, KINDS


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class History:
    """The recorded norms of a run: one row a step, one column a part.

    Nothing is filtered: a NaN, an inf and an exact zero are in here as they occurred.

    Attributes:
      steps: The number of each step, rising: int64, shape [T].
      parts: The name of each part: a leaf, a layer of a stacked leaf, or a group.
      grad: L2 norms of the gradients before the clip, float32 [T, L], or `None`.
      update: L2 norms of what was added to the parameters, [T, L], or `None`.
      param: L2 norms of the parameters before the update, [T, L], or `None`.
      scalars: `loss`, `clip/limit`, `clip/scale`, `clip/fraction`, and on request
        `noise_scale/simple`, each of shape [T], and NaN where a step had none.
      details: What else was recorded of the gradients, each of shape [T, L]:
        `grad_max`, the largest absolute value, `grad_zeros` and `grad_nonfinite`, how
        many entries are exactly 0, NaN or infinite.
      sizes: How many entries each part has, int64 [L], or `None` if unknown.
      dims: How many dimensions each part has, or `None` if unknown. A stacked layer has
        those of the layer, a group has `None`.

    Example:
      >>> rows = [[3.0, 4.0, 0.5], [6.0, 8.0, 0.4]]
      >>> history = History.from_rows(("grad/a", "grad/b", "loss"), [0, 1], rows)
      >>> history
      History(steps 0 to 1, 2 parts, norms of grad)
      >>> history.global_norm()
      array([ 5., 10.])
    """

    steps: np.ndarray
    parts: tuple[str, ...]
    grad: np.ndarray | None
    update: np.ndarray | None
    param: np.ndarray | None
    scalars: dict[str, np.ndarray]
    details: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    sizes: np.ndarray | None = None
    dims: tuple[int | None, ...] | None = None

    @classmethod
    def from_rows(
        cls,
        columns: Sequence[str],
        steps,
        rows,
        sizes: Sequence[int] | np.ndarray | None = None,
        dims: Sequence[int | None] | None = None,
    ) -> "History":
        """Takes the rows of a ring apart by the names of their columns.

        Args:
          columns: The name of each column, as `telemetry.columns` gives them.
          steps: The number of each row's step.
          rows: The values, of shape [steps, columns].
          sizes: The number of entries of each part, in the order of the columns.
          dims: The number of dimensions of each part, in the order of the columns.

        Raises:
          ValueError: If there are more or fewer `sizes` or `dims` than parts.
        """
        rows = np.asarray(rows, np.float32).reshape(-1, len(columns))
        positions: dict[str, list[int]] = {kind: [] for kind in (*KINDS, *DETAILS)}
        scalars = {}
        for position, name in enumerate(columns):
            kind, _, _ = name.partition("/")
            if kind in positions:
                positions[kind].append(position)
            else:
                scalars[name] = rows[:, position]
        of = {kind: rows[:, at] for kind, at in positions.items() if at}
        parts = parts_of(columns)
        for name, given in (("sizes", sizes), ("dims", dims)):
            if given is not None and len(given) != len(parts):
                raise ValueError(
                    f"`History.from_rows({name}=...)` must have one entry for each of"
                    f" the {len(parts)} parts, got {len(given)}. The parts are"
                    f" {', '.join(list(parts)[:3])}, ..., in the order of the columns."
                )
        return cls(
            np.asarray(steps, np.int64),
            parts,
            **{kind: of.get(kind) for kind in KINDS},
            scalars=scalars,
            details={kind: of[kind] for kind in DETAILS if kind in of},
            sizes=None if sizes is None else np.asarray(sizes, np.int64),
            dims=None if dims is None else tuple(dims),
        )

    def __repr__(self) -> str:
        """Says in one line what is recorded."""
        span = f"steps {self.steps[0]} to {self.steps[-1]}" if len(self) else "no steps"
        parts = f"{len(self.parts)} part{'s' * (len(self.parts) != 1)}"
        norms = f"norms of {', '.join(self.kinds)}" if self.kinds else "no norms"
        return f"History({span}, {parts}, {norms})"

    def __len__(self) -> int:
        """The number of recorded steps."""
        return len(self.steps)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which norms were recorded, of `grad`, `update` and `param`."""
        return tuple(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def stride(self) -> int:
        """How many steps lie from one row to the next, as with `watch(every=...)`."""
        if len(self) < 2:
            return 1
        apart = np.sort(np.diff(self.steps))
        return int(apart[(len(apart) - 1) // 2])

    @property
    def dropped(self) -> int:
        """How many rows are missing between the first and the last one.

        The ring wrote over them before they were read.
        """
        if not len(self):
            return 0
        gaps = np.diff(self.steps) // self.stride - 1
        return int(np.maximum(gaps, 0).sum())

    def norms(self, kind: str = "grad") -> np.ndarray:
        """Returns the norms of one kind.

        Args:
          kind: `"grad"`, `"update"` or `"param"`.

        Raises:
          ValueError: If there is no such kind, or the run did not record it.
        """
        found = getattr(self, kind) if kind in KINDS else None
        if found is None:
            raise ValueError(
                f"`History.norms(kind={kind!r})`: this run recorded {self.kinds}. Kinds"
                f" are {KINDS}; pass `record=` to both `watch` and `Monitor`."
            )
        return found

    def columns(self) -> dict[str, np.ndarray]:
        """Returns what was recorded of each part: "grad/<part>" and its like, [T]."""
        of = {kind: self.norms(kind) for kind in self.kinds} | self.details
        return {
            f"{kind}/{part}": values[:, position]
            for kind, values in of.items()
            for position, part in enumerate(self.parts)
        }

    def global_norm(self, kind: str = "grad") -> np.ndarray:
        """Returns the norm of all recorded parts together: float64, shape [T].

        Args:
          kind: `"grad"`, `"update"` or `"param"`.
        """
        norms = self.norms(kind)
        return np.sqrt(np.einsum("tl,tl->t", norms, norms, dtype=np.float64))

    @functools.cached_property
    def update_ratio(self) -> np.ndarray:
        """Norm of the update over norm of the parameter: float64, shape [T, L].

        It is inf where a parameter of norm 0 moved and 0 where it did not.
        """
        return ratio(self.norms("update"), self.norms("param"))

    def metrics(self) -> dict[str, np.ndarray]:
        """Returns the few scalars of each step that a tracker should plot.

        Which norm is meant is in the name: `grad_norm/global_preclip` is taken before
        the clip. What was not recorded is left out.

        Example:
          >>> columns = ("grad/a", "grad/b", "loss")
          >>> history = History.from_rows(columns, [0], [[3.0, 4.0, 0.5]])
          >>> for name, values in history.metrics().items():
          ...     print(name, values)
          grad_norm/global_preclip [5.]
          grad_norm/leaf_min [3.]
          grad_norm/leaf_max [4.]
          loss [0.5]
        """
        metrics = {}
        if self.grad is not None:
            metrics["grad_norm/global_preclip"] = self.global_norm("grad")
            metrics["grad_norm/leaf_min"] = self.grad.min(axis=1)
            metrics["grad_norm/leaf_max"] = self.grad.max(axis=1)
        for kind in ("update", "param"):
            if kind in self.kinds:
                metrics[f"{kind}_norm/global"] = self.global_norm(kind)
        if {"update", "param"} <= set(self.kinds):
            metrics["update_ratio/median"] = np.median(self.update_ratio, axis=1)
            metrics["update_ratio/max"] = self.update_ratio.max(axis=1)
        return metrics | self.scalars


def parts_of(columns: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the parts, in the order of their columns."""
    halves = (name.partition("/") for name in columns)
    known = (*KINDS, *DETAILS)
    return tuple(dict.fromkeys(part for kind, _, part in halves if kind in known))


def ratio(update: np.ndarray, param: np.ndarray) -> np.ndarray:
    """Divides norms of updates by norms of parameters; a part that rests at 0 has 0."""
    update = np.asarray(update, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(update == 0, update, update / np.asarray(param, np.float64))
