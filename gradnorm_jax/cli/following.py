"""Follower: the newest rows of a run, which another process may still be writing."""

from pathlib import Path

import numpy as np

from gradnorm_jax.monitoring import History, archive

#: How many of the newest rows are looked at.
ROWS = 512


class Follower:
    """Reads the files of a run one after the other, each of them once.

    It keeps the newest rows alone, so that a look costs the same in a long run.

    Args:
      directory: The directory of the run.

    Raises:
      FileNotFoundError: If the directory is not there or holds no run.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._start()

    @property
    def is_empty(self) -> bool:
        """Whether no row was found so far."""
        return self._last is None

    def catch_up(self) -> History | None:
        """Reads all that is new, and returns the newest rows if anything was."""
        found = None
        while (look := self.next()) is not None:
            found = look
        return found

    def next(self) -> History | None:
        """Reads the next file, and returns the newest rows; `None` if there is none.

        The first look is at the newest rows that are there.
        """
        chunks = archive.chunks_of(self.directory)
        numbers = [archive.number_of(chunk) for chunk in chunks]
        if self._last is not None and (not numbers or numbers[-1] < self._last):
            self._start()  # the directory holds another run by now
        if self._last is None:
            return self._newest(chunks)
        fresh = [
            chunk
            for chunk, number in zip(chunks, numbers, strict=True)
            if number > self._last
        ]
        if not fresh:
            return None
        self._take_in(fresh[0])
        return self._history()

    def _start(self) -> None:
        self._run = archive.read_description(self.directory)
        self._last: int | None = None
        self._steps = np.zeros(0, np.int64)
        self._values = np.zeros((0, len(self._run.columns)), np.float32)

    def _newest(self, chunks: list[Path]) -> History | None:
        rows, first = 0, len(chunks)
        while first and rows < ROWS:
            first -= 1
            rows += len(archive.read_chunk(chunks[first])[0])
        for chunk in chunks[first:]:
            self._take_in(chunk)
        return self._history() if chunks else None

    def _take_in(self, chunk: Path) -> None:
        steps, values = archive.read_chunk(chunk)
        kept = self._steps < steps[0]  # where a run went back, the new rows count
        self._steps = np.concatenate([self._steps[kept], steps])[-ROWS:]
        self._values = np.concatenate([self._values[kept], values])[-ROWS:]
        self._last = archive.number_of(chunk)

    def _history(self) -> History:
        return self._run.history(self._steps, self._values)


__all__ = ["ROWS", "Follower"]
