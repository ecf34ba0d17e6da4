"""The files of a run: whole after a kill at any moment, and read back into columns.

A run is a directory of its own:

- `run.json` says what the columns are, and how many entries and dimensions each part
  has;
- `rows-00000001.npz`, `rows-00000002.npz`, ... hold the rows, one file a drain;
- `scalars.jsonl` has one line of strict JSON a step, for people and other tools.

The `.npz` files are the truth. Each comes into being by one rename, so that there is
never half of one; a last line that was cut short, or a temporary file that a killed
process left, is passed over.
"""

import contextlib
import json
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gradnorm_jax.monitoring.history import History, parts_of

FORMAT = "gradnorm_jax run"
VERSION = 1
RUN, SCALARS = "run.json", "scalars.jsonl"


class Archive:
    """A run that is open for writing.

    Attributes:
      next_step: The first step that no file holds yet.
    """

    def __init__(
        self,
        directory: Path,
        description: "Description",
        *,
        resume: bool,
    ):
        """Makes the directory, or goes on with the run that it holds."""
        self.directory = directory
        self.columns = tuple(description.columns)
        if directory.exists() and not directory.is_dir():
            raise FileExistsError(
                f"`Monitor(dir={str(directory)!r})` is a file. Name a directory for the"
                " run, which is made."
            )
        directory.mkdir(parents=True, exist_ok=True)
        chunks = chunks_of(directory)
        if chunks:
            self._check_that_it_can_go_on(resume)
        self._next_chunk = number_of(chunks[-1]) + 1 if chunks else 1
        self.next_step = int(read_chunk(chunks[-1])[0][-1]) + 1 if chunks else 0
        self._cut_torn_line()
        known = {"parts": description.sizes, "dims": description.dims}
        says = {"format": FORMAT, "version": VERSION, "columns": self.columns}
        says |= {name: of for name, of in known.items() if of is not None}
        text = json.dumps(says, indent=1, allow_nan=False) + "\n"
        write_whole(directory / RUN, lambda file: file.write(text.encode()))

    def append(self, steps: np.ndarray, rows: np.ndarray) -> None:
        """Writes rows; those of earlier chunks from `steps[0]` on count no longer."""
        steps, rows = np.asarray(steps, np.int64), np.asarray(rows, np.float32)
        path = self.directory / f"rows-{self._next_chunk:08d}.npz"
        write_whole(path, lambda file: np.savez(file, steps=steps, values=rows))
        self._next_chunk += 1
        self.next_step = int(steps[-1]) + 1
        lines = _lines(History.from_rows(self.columns, steps, rows))
        with open(self.directory / SCALARS, "ab", buffering=0) as file:
            file.write(lines.encode())

    def history(self) -> History:
        """Returns all rows that were written."""
        return load(self.directory)

    def _check_that_it_can_go_on(self, resume: bool) -> None:
        if not resume:
            raise FileExistsError(
                f"`Monitor(dir={str(self.directory)!r})` already holds a run. Name"
                " another directory, or go on with that run by `resume=True`."
            )
        recorded = read_description(self.directory).columns
        if recorded != self.columns:
            raise ValueError(
                f"`Monitor(dir={str(self.directory)!r}, resume=True)`: that run has"
                f" {len(recorded)} columns, this one {len(self.columns)};"
                f" {_first_difference(recorded, self.columns)}. Name another directory"
                " for another model or another `record=`."
            )

    def _cut_torn_line(self) -> None:
        path = self.directory / SCALARS
        if path.exists():
            text = path.read_bytes()
            os.truncate(path, text.rfind(b"\n") + 1)


def load(directory: str | os.PathLike) -> History:
    """Reads the run in a directory, also one that was killed or is still being written.

    Where a run went back, to a checkpoint for instance, the steps that were taken
    anew replace those that they repeat.

    Args:
      directory: The directory that was given to `Monitor(dir=...)`.

    Returns:
      All rows that were written, in the order of their steps.

    Raises:
      FileNotFoundError: If the directory is not there or holds no run.
      ValueError: If the run has no rows yet, or a file of it is damaged.
    """
    directory = Path(directory)
    run = read_description(directory)
    steps, rows = [], []
    end = math.inf  # the first step of the chunks after this one
    for path in reversed(chunks_of(directory)):
        chunk_steps, chunk_rows = read_chunk(path)
        valid = chunk_steps < end
        steps.append(chunk_steps[valid])
        rows.append(chunk_rows[valid])
        end = min(end, chunk_steps[0])
    if not steps:
        raise ValueError(
            f"`load({str(directory)!r})`: this run has no rows yet. They are written by"
            " the second drain, so after 2 * `every` calls, or by `Monitor.close()`."
        )
    return run.history(np.concatenate(steps[::-1]), np.concatenate(rows[::-1]))


class Description(NamedTuple):
    """What the columns and the parts of a run are."""

    columns: tuple[str, ...]
    sizes: dict[str, int] | None = None
    dims: dict[str, int | None] | None = None

    def history(self, steps: np.ndarray, rows: np.ndarray) -> History:
        """Returns some rows of the run as a history."""
        sizes, dims = self._in_order(self.sizes), self._in_order(self.dims)
        return History.from_rows(self.columns, steps, rows, sizes, dims)

    def _in_order(self, of_parts: dict | None) -> list | None:
        """Lists what is known of each part, if of all, in the order of the columns."""
        parts = parts_of(self.columns)
        if of_parts is None or not set(parts) <= of_parts.keys():
            return None
        return [of_parts[part] for part in parts]


def read_description(directory: Path) -> Description:
    """Returns what the columns and the parts of the run in a directory are."""
    path = directory / RUN
    if not directory.is_dir():
        raise FileNotFoundError(
            f"There is no directory {str(directory)!r}. Give the one that was given to"
            " `Monitor(dir=...)`."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(directory)!r} is not a run: a run has the files {RUN} and"
            " rows-*.npz. Give the directory that was given to `Monitor(dir=...)`."
        )
    try:
        description = json.loads(path.read_text())
        name, version = description["format"], description["version"]
        columns = tuple(description["columns"])
        sizes, dims = description.get("parts"), description.get("dims")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} does not describe a run: {error!r}. It must have the keys"
            " `format`, `version` and `columns`, as `Monitor` writes them."
        ) from error
    if (name, version) != (FORMAT, VERSION):
        raise ValueError(
            f"{str(path)!r} is a {name!r} of version {version}, but this"
            f" gradnorm_jax reads version {VERSION} of a {FORMAT!r}. Read it with the"
            " gradnorm_jax that wrote it."
        )
    return Description(columns, sizes, dims)


def chunks_of(directory: Path) -> list[Path]:
    """Returns the files of rows, oldest first."""
    return sorted(directory.glob("rows-*.npz"), key=number_of)


def newest_chunks(directory: Path, rows: int) -> list[Path]:
    """Returns the last files that hold so many rows together, oldest first."""
    chunks = chunks_of(directory)
    first = len(chunks)
    while first and rows > 0:
        first -= 1
        rows -= len(read_chunk(chunks[first])[0])
    return chunks[first:]


def number_of(chunk: Path) -> int:
    """Returns which file of rows it is, counted from 1."""
    return int(chunk.stem.removeprefix("rows-"))


def read_chunk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and the values of the rows in a file."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as chunk:
            return chunk["steps"], chunk["values"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{str(path)!r} is damaged: {error!r}. Take it out of the directory to"
            " read the rows of the other files."
        ) from error


def write_whole(path: Path, write) -> None:
    """Writes a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _lines(history: History) -> str:
    """Writes the metrics of each step as a line of JSON."""
    metrics = history.metrics()
    columns = [history.steps.tolist(), *map(_strict, metrics.values())]
    names = ("step", *metrics)
    encode = json.JSONEncoder(check_circular=False, allow_nan=False).encode
    return "".join(
        encode(dict(zip(names, line, strict=True))) + "\n"
        for line in zip(*columns, strict=True)
    )


def _strict(values: np.ndarray) -> list[float | str]:
    """Says numbers in strict JSON, which has no NaN and no infinity, to 7 digits."""
    return [float(f"{x:.7g}") if math.isfinite(x) else str(x) for x in values.tolist()]


def _first_difference(recorded: Sequence[str], wanted: Sequence[str]) -> str:
    for position, (old, new) in enumerate(zip(recorded, wanted, strict=False)):
        if old != new:
            return f"column {position} is {old!r} there and {new!r} here"
    longer = max(recorded, wanted, key=len)
    return f"{longer[min(len(recorded), len(wanted))]!r} is only in one of them"
