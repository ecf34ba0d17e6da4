"""Monitor: takes the rows of norms out of the optimizer's state while a run goes on."""

import contextlib
import logging
import operator
import os
import warnings
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from gradnorm_jax.monitoring import plots, records
from gradnorm_jax.monitoring.archive import (
    Archive,
    Description,
    newest_chunks,
    read_chunk,
)
from gradnorm_jax.monitoring.diagnosis import DEFAULT_RULES, Finding
from gradnorm_jax.monitoring.history import History
from gradnorm_jax.monitoring.keeping import LOOK_BACK, Memory, Newest
from gradnorm_jax.monitoring.report import report, write
from gradnorm_jax.monitoring.telling import Sender, Teller

_PICTURES = {"trace": plots.norm_trace, "heat": plots.heat_map, "flow": plots.flow}


class Monitor:
    r"""Reads the ring that `watch` keeps in a state: to files, trackers and findings.

    Call it with the state after every step, or after every inner `scan`. Most calls
    only count. Every `every`-th call *drains*: it starts a copy of the ring to the
    host, and takes in the copy that the drain before it started. So the host never
    waits for the step in flight, and the state may be donated to the next step. What is
    taken in is up to `2 * every` calls old until `close`.

    Between two drains the monitor keeps a reference to the last state that it was
    given, no copy. `close` reads the last rows from it. They are lost, with a warning,
    only if that state has been donated to a further step: so call the monitor right
    after the step, before anything that may raise.

    In a program of many processes every process makes and calls a monitor, and process
    0 alone reads and writes.

    Args:
      params: The parameters that are watched, or their shapes as
        `jax.ShapeDtypeStruct`; `None` where only `append` is used.
      every: How many calls lie between two drains. The ring of `watch(window=...)`
        must hold the rows of that many calls, or the oldest are lost.
      dir: The directory of this run, which keeps every row. It is made; it may not hold
        another run. Without it the rows are kept in memory.
      log: Where about ten scalars go at each drain: a path, a W&B run, MLflow, a
        function, a list of them; see :func:`as_writer`.
      log_parts: Send every column of the newest row too: "grad/<part>" and its like.
      warn: What to do with a finding of level "warning" or "error" that a drain comes
        upon: "log" it, "raise" if it is an error, which ends the training up to
        `2 * every` calls late, "off", or call this function with it. Each is told once,
        and where it lasts or comes back again after 500 steps.
      rules: The rules of :func:`diagnose`.
      names: Other names for the parts: `{name: other}`, or a function.
      ignore: Patterns of the parts that are left out of findings.
      resume: Go on with the run in `dir`, if there is one. Steps count from the `init`
        of the state, so resume with a state that was restored from a checkpoint.
      record: The kinds of norms, as given to `watch`.
      groups: The groups of leaves, as given to `watch`.
      stacked_axes: The axes of stacked layers, as given to `watch`.

    Raises:
      FileExistsError: If `dir` holds a run and `resume` is not set.
      ValueError: If `every` is not positive, if the run to resume has other columns;
        and when called, if the state is not watched or its ring has other columns.
      FindingError: By a drain that comes upon an error, with `warn="raise"`.

    Attributes:
      num_dropped: How many rows were written over before they were read.

    Example::

        with Monitor(params, every=50, dir="runs/a") as monitor:
            for batch in batches:
                params, state = step(params, state, batch)
                monitor(state)
        print(*monitor.findings(), sep="\n")
        monitor.report("report.html")
    """

    def __init__(
        self,
        params: Any = None,
        *,
        every: int = 50,
        dir: str | os.PathLike | None = None,
        log: Any = None,
        log_parts: bool = False,
        warn: str | Callable[[Finding], Any] = "log",
        rules: Sequence[Callable] = DEFAULT_RULES,
        names: records.Names | None = None,
        ignore: str | Sequence[str] = (),
        resume: bool = False,
        record: Sequence[str] = ("grad", "update", "param"),
        groups: Any = None,
        stacked_axes: Any = None,
    ):
        if not hasattr(every, "__index__") or operator.index(every) < 1:
            raise ValueError(
                f"`Monitor(every=...)` must be a whole number of at least 1, got"
                f" {every!r}. It is the number of calls from one drain to the next."
            )
        self.every, self.num_dropped = every, 0
        self._teller = Teller(warn, rules, ignore)
        self._is_first = records.is_first_process()
        self._sender = Sender(log if self._is_first else None, log_parts)
        self._dir = None if dir is None else Path(dir)
        self._resume = resume
        self._names = names
        self._columns: Any = None
        self._store: Archive | Memory | None = None
        self._newest = Newest(0)
        self._rows_read: int | None = 0  # of those ever written to the ring
        self._calls = 0
        self._source: str | None = None
        self._state: Any = None  # the last one given, not drained yet
        self._copy: records.Copy | None = None  # on its way to the host
        self._stats: list[tuple[int | None, Any]] = []  # given since the last drain
        self._stats_copy: list[tuple[int | None, Any]] = []  # on their way to the host
        if params is not None:
            self._open(records.describe(params, record, groups, stacked_axes, names))

    def __call__(self, state: Any) -> None:
        """Counts; on every `every`-th call drains the ring in the state.

        Args:
          state: Anything that holds the state of `watch`: an optimizer state, a
            `TrainState`, an `nnx.Optimizer`, a tuple, a dict.
        """
        if not self._is_first:
            return
        if self._columns is None:
            raise ValueError(
                "`Monitor(params=...)` must be given to read a state: the names of the"
                " parts come from there."
            )
        if self._source is None:
            self._find(state)  # so that a mistake shows at the first step
            records.check_columns(state, self._columns)
        self._check_source("a state")
        self._calls += 1
        self._state = state
        if self._calls % self.every == 0:
            self._drain()

    def append(self, stats: Any, *, step: int | None = None) -> None:
        """Takes one row that `measure` returned, or those that a `scan` gave out.

        Args:
          stats: What `gradnorm_jax.measure` returned.
          step: The number of its first step; without it, the one after the last row. A
            step that is given again replaces what came from it on.
        """
        if not self._is_first:
            return
        columns = records.columns_of_stats(stats, self._names)
        self._check_source("what `measure` returned")
        if self._columns is None:
            self._open(columns)
        if columns.names != self.columns:
            raise ValueError(
                f"`Monitor.append(stats=...)` has {len(columns.names)} columns, those"
                f" before it {len(self.columns)}. Measure the same at every step, and"
                " what `Monitor(params, record=...)` says, if that is given."
            )
        self._stats.append((step, records.start_stats(stats)))
        self._calls += 1
        if self._calls % self.every == 0:
            self._drain()

    @property
    def columns(self) -> tuple[str, ...]:
        """The name of each column of a row."""
        return () if self._columns is None else self._columns.names

    @property
    def history(self) -> History:
        """All rows that were taken in so far; after `close` the whole run.

        Raises:
          ValueError: If there is none yet; in a process that is not the first, which
            alone reads.
        """
        self._settle()
        if not self._is_first:
            raise ValueError(
                "`Monitor.history`: process 0 alone reads the rows. Ask there:"
                " `if jax.process_index() == 0`."
            )
        if self._store is None or not len(self._newest.steps):
            raise ValueError(
                "`Monitor.history`: no row was taken in yet. They are by the second"
                " drain, so after 2 * `every` calls, or by `Monitor.close()`."
            )
        return self._store.history()

    def findings(self) -> list[Finding]:
        """Returns what is to be said of the run so far."""
        self._settle()
        return self._findings(self.history) if len(self._newest.steps) else []

    def report(self, path: str | os.PathLike) -> None:
        """Writes one HTML page of what has been recorded so far.

        Args:
          path: Where the page goes. After `close` it shows the whole run.
        """
        if self._is_first:
            history = self.history
            write(history, path, self._findings(history))

    def to_dict(self) -> dict[str, np.ndarray]:
        """Returns every column by its name, and the steps as "step"."""
        history = self.history
        return {"step": history.steps} | history.columns() | history.scalars

    def to_pandas(self) -> Any:
        """Returns a pandas `DataFrame` with a row for each step."""
        try:
            import pandas  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise ImportError(
                "`Monitor.to_pandas()` needs pandas: `pip install pandas`. Without it,"
                " `to_dict()` gives the same columns."
            ) from error
        return pandas.DataFrame(self.to_dict()).set_index("step")

    def plot(self, kind: str = "trace") -> Any:
        """Draws one of the pictures of the report as a matplotlib figure.

        Args:
          kind: "trace", "heat" or "flow".
        """
        if kind not in _PICTURES:
            raise ValueError(
                f"`Monitor.plot(kind=...)` must be one of {tuple(_PICTURES)}, got"
                f" {kind!r}."
            )
        history = self.history
        return _PICTURES[kind](history, self._findings(history))

    def close(self) -> None:
        """Takes in all that the last state holds. Closing twice does nothing more."""
        with contextlib.ExitStack() as stack:  # all of it, whatever is raised
            stack.callback(self._sender.close)
            stack.callback(self._settle)
            if self._state is not None or self._stats:
                self._drain()

    def __enter__(self) -> "Monitor":
        """Returns the monitor itself."""
        return self

    def __exit__(self, *exception) -> None:
        """Closes the monitor."""
        self.close()

    def __repr__(self) -> str:
        """Says how far it is."""
        where = f", dir={str(self._dir)!r}" if self._dir else ""
        number = self._store.next_step if self._store else 0
        return f"Monitor({number} steps, {len(self.columns)} columns{where})"

    def _repr_html_(self) -> str:
        """The report, in a frame of its own."""
        self._settle()
        if not len(self._newest.steps):
            return escape(repr(self))
        history = self.history
        page = escape(report(history, self._findings(history)))
        return f'<iframe srcdoc="{page}" style="width:100%;height:45em;border:0">'

    def _findings(self, history: History) -> list[Finding]:
        return self._teller.look(history)

    def _open(self, columns: Any) -> None:
        """Gets ready for rows with these columns, from now on or as a run goes on."""
        self._columns = columns
        self._newest = Newest(len(columns.names))
        self._description = Description(
            columns.names,
            dict(zip(columns.parts, columns.sizes, strict=True)),
            dict(zip(columns.parts, columns.dims, strict=True)),
        )
        if not self._is_first:
            return
        if self._dir is None:
            self._store = Memory(self._description)
            return
        self._store = Archive(self._dir, self._description, resume=self._resume)
        for chunk in newest_chunks(self._dir, LOOK_BACK):
            self._newest.add(*read_chunk(chunk))
            self._rows_read = None

    def _check_source(self, source: str) -> None:
        if self._source not in (None, source):
            raise ValueError(
                f"`Monitor` was given {self._source} before, and now {source}. Both"
                " count the steps: make a monitor for each."
            )
        self._source = source

    def _find(self, state: Any) -> records.Copy:
        return records.find_ring(state, len(self.columns))

    def _drain(self) -> None:
        """Starts a copy to the host and takes in the copy that was started before."""
        found = None if self._state is None else self._find(self._state)
        self._state = None
        arrived = self._copy, self._stats_copy
        self._copy = None if found is None else records.start_copy(found)
        self._stats_copy, self._stats = self._stats, []
        if found is not None and self._copy is None:
            warnings.warn(
                "`Monitor` could not read the last rows: the state that it was given"
                " has been donated since. Give it the state that the step returns,"
                " right after every step.",
                stacklevel=3,
            )
        self._take_in(*arrived)

    def _settle(self) -> None:
        """Takes in what is on its way."""
        arrived = self._copy, self._stats_copy
        self._copy, self._stats_copy = None, []
        self._take_in(*arrived)

    def _take_in(self, copy: records.Copy | None, stats: list) -> None:
        """Stores the rows that are new, sends scalars, and tells what is found."""
        arrived = self._of_stats(stats) + ([] if copy is None else self._of_ring(copy))
        for steps, values in arrived:
            assert self._store is not None
            if steps[0] < self._store.next_step:
                logging.getLogger("gradnorm_jax").warning(
                    "`Monitor`: the run went back from step %d to step %d; rows from"
                    " there on replace those that were recorded before.",
                    self._store.next_step,
                    steps[0],
                )
            self._store.append(steps, values)
            self._newest.add(steps, values)
        if not arrived:
            return
        self._sender.send(self._description.history(*arrived[-1]))
        newest = self._newest
        self._teller.tell(self._description.history(newest.steps, newest.values))

    def _of_stats(self, stats: list) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns what was measured: a piece for each time that the steps went back."""
        if not stats:
            return []
        assert self._store is not None
        rows = records.finish_stats([x for _, x in stats], len(self.columns))
        numbers, following = [], self._store.next_step
        for (step, _), some in zip(stats, rows, strict=True):
            first = following if step is None else step
            numbers.append(np.arange(first, first + len(some)))
            following = first + len(some)
        steps, values = np.concatenate(numbers), np.concatenate(rows)
        cuts = np.flatnonzero(np.diff(steps) <= 0) + 1
        return list(zip(np.split(steps, cuts), np.split(values, cuts), strict=True))

    def _of_ring(self, copy: records.Copy) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns the new rows of a ring, if there are any, as one piece."""
        steps, values, rows = records.finish_copy(copy)
        self._newest.most = max(LOOK_BACK, len(copy.ring))
        if self._rows_read is not None:
            self._warn_of_dropped(rows - self._rows_read - len(steps), rows, len(steps))
        self._rows_read = rows
        first = self._newest.first_new(steps, values)
        return [(steps[first:], values[first:])] if first < len(steps) else []

    def _warn_of_dropped(self, dropped: int, rows: int, window: int) -> None:
        if dropped > 0 and not self.num_dropped:
            arrived = rows - (self._rows_read or 0)
            warnings.warn(
                f"`Monitor` lost {dropped} rows: {arrived} were written since the last"
                f" drain and the ring holds {window}. Use `watch(window={arrived})`, a"
                " smaller `Monitor(every=...)`, or a shorter inner `scan`. A state"
                " from a checkpoint needs `Monitor(resume=True)` in the `dir` of its"
                " run. This is said once; `num_dropped` counts on.",
                stacklevel=6,
            )
        self.num_dropped += max(dropped, 0)
