"""Follower: the newest rows of a run, which another process may still be writing."""

from pathlib import Path

from gradnorm_jax.monitoring import History, archive
from gradnorm_jax.monitoring.keeping import LOOK_BACK, Newest


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
            for chunk in archive.newest_chunks(self.directory, LOOK_BACK):
                self._take_in(chunk)
            return self._history() if chunks else None
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
        self._newest = Newest(len(self._run.columns))

    def _take_in(self, chunk: Path) -> None:
        self._newest.add(*archive.read_chunk(chunk))
        self._last = archive.number_of(chunk)

    def _history(self) -> History:
        return self._run.history(self._newest.steps, self._newest.values)


__all__ = ["Follower"]
