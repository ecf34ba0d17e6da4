"""Rows that are kept in memory: the newest of a run, or all where there is no file."""

import numpy as np

from gradnorm_jax.monitoring.archive import Description
from gradnorm_jax.monitoring.history import History

#: How many rows a look for findings goes back.
LOOK_BACK = 256


class Newest:
    """The newest rows of a run, as far back as anyone looks.

    Args:
      num_columns: How many columns a row has.
      most: How many rows are kept.

    Attributes:
      steps: int64 [rows], rising.
      values: float32 [rows, columns].

    Example:
      >>> newest = Newest(1, most=3)
      >>> newest.add(np.arange(5), np.arange(5.0)[:, None])
      >>> newest.steps
      array([2, 3, 4])
      >>> newest.first_new(np.array([3, 4, 5]), np.array([[3.0], [9.0], [9.0]]))
      1
    """

    def __init__(self, num_columns: int, most: int = LOOK_BACK):
        self.most = most
        self.steps = np.zeros(0, np.int64)
        self.values = np.zeros((0, num_columns), np.float32)

    def add(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Takes in rows; of those before, the ones from `steps[0]` on count no more."""
        kept = self.steps < steps[0]
        self.steps = np.concatenate([self.steps[kept], steps])[-self.most :]
        self.values = np.concatenate([self.values[kept], values])[-self.most :]

    def first_new(self, steps: np.ndarray, values: np.ndarray) -> int:
        """Returns from which row on a later look at a run shows something new.

        New is what comes after all rows here. Where the run went back to a checkpoint,
        so are the steps taken anew: their rows differ from those here.
        """
        if not len(self.steps):
            return 0
        shared = np.flatnonzero((steps >= self.steps[0]) & (steps <= self.steps[-1]))
        if not len(shared):
            return 0
        at = np.searchsorted(self.steps, steps[shared])
        ours, theirs = self.values[at], values[shared]
        same = ((ours == theirs) | (np.isnan(ours) & np.isnan(theirs))).all(axis=1)
        same &= self.steps[at] == steps[shared]
        if same.all():
            return int(shared[-1]) + 1
        # Where even the oldest differs, so do those that are too old to compare.
        return int(shared[same.argmin()]) if same[0] else 0


class Memory:
    """All rows of a run that no file keeps.

    Attributes:
      next_step: The first step that it does not hold yet.
    """

    def __init__(self, description: Description):
        self.next_step = 0
        self._description = description
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []

    def append(self, steps: np.ndarray, rows: np.ndarray) -> None:
        """Keeps rows; those of earlier ones from `steps[0]` on count no longer."""
        while self._chunks and self._chunks[-1][0][-1] >= steps[0]:
            old, values = self._chunks.pop()
            end = int(np.searchsorted(old, steps[0]))
            if end:
                self._chunks.append((old[:end], values[:end]))
        self._chunks.append((steps, rows))
        self.next_step = int(steps[-1]) + 1

    def history(self) -> History:
        """Returns all rows, of which there must be one."""
        steps, rows = zip(*self._chunks, strict=True)
        return self._description.history(np.concatenate(steps), np.concatenate(rows))


__all__ = ["LOOK_BACK", "Memory", "Newest"]
