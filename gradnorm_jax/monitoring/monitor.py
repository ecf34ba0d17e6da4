"""Monitor: takes the rows of norms out of the optimizer's state while a run goes on."""

import os
import warnings
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from gradnorm_jax.monitoring import plots, records
from gradnorm_jax.monitoring.archive import Archive, load
from gradnorm_jax.monitoring.diagnosis import DEFAULT_RULES, Finding, diagnose
from gradnorm_jax.monitoring.history import History
from gradnorm_jax.monitoring.report import report, write
from gradnorm_jax.monitoring.telling import Teller
from gradnorm_jax.monitoring.writers import as_writer

#: How many rows a drain looks back on for findings.
_LOOK_BACK = 512
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
        upon: "log" it, "raise" an error, "off", or call this function with it. Each is
        told once, and again every 500 steps.
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
      FindingError: By a drain, with `warn="raise"`.

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
        ignore: Sequence[str] = (),
        resume: bool = False,
        record: Sequence[str] = ("grad", "update", "param"),
        groups: Any = None,
        stacked_axes: Any = None,
    ):
        if not isinstance(every, int) or every < 1:
            raise ValueError(
                f"`Monitor(every=...)` must be a whole number of at least 1, got"
                f" {every!r}. It is the number of calls from one drain to the next."
            )
        self.every, self.rules, self.ignore = every, tuple(rules), tuple(ignore)
        self._teller = Teller(warn, self.rules, self.ignore)
        self._is_first = records.is_first_process()
        self._log, self._log_parts = log if self._is_first else None, log_parts
        self._writer = None if self._log is None else as_writer(self._log)
        self._dir = None if dir is None else Path(dir)
        self._resume = resume
        self._names = names
        self._columns: Any = None
        self._archive: Archive | None = None
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []
        self._next_step = self._seen = 0
        self._calls = 0
        self._source: str | None = None
        self._state: Any = None  # the last one given, not drained yet
        self._copy: records.Copy | None = None  # on its way to the host
        self._stats: list[Any] = []  # given to `append` since the last drain
        self._stats_copy: list[Any] = []  # on their way to the host
        self._sent: set[str] = set()
        self._warned = False
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
        self._check_source("a state")
        self._calls += 1
        self._state = state
        if self._calls % self.every == 0:
            self._drain()

    def append(self, stats: Any) -> None:
        """Takes one row that `measure` returned, or those that a `scan` gave out.

        Args:
          stats: What `gradnorm_jax.measure` returned.
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
        self._stats.append(records.start_stats(stats))
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
          ValueError: If there is none yet.
        """
        self._take_in()
        if self._archive is not None:
            return load(self._archive.directory)
        if not self._kept:
            raise ValueError(
                "`Monitor.history`: no row was taken in yet. They are by the second"
                " drain, so after 2 * `every` calls, or by `Monitor.close()`."
            )
        return self._history_of(*map(np.concatenate, zip(*self._kept, strict=True)))

    def findings(self) -> list[Finding]:
        """Returns what is to be said of the run so far."""
        return diagnose(self.history, self.rules, ignore=self.ignore)

    def report(self, path: str | os.PathLike) -> None:
        """Writes one HTML page of what has been recorded so far.

        Args:
          path: Where the page goes. After `close` it shows the whole run.
        """
        if self._is_first:
            write(self.history, path, self.findings())

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
        return _PICTURES[kind](self.history)

    def close(self) -> None:
        """Takes in all that the last state holds. Closing twice does nothing more."""
        if self._state is not None or self._stats:
            self._drain()
        self._take_in()
        if self._writer is not None and self._writer is not self._log:
            self._writer.close()
        self._writer = None

    def __enter__(self) -> "Monitor":
        """Returns the monitor itself."""
        return self

    def __exit__(self, *exception) -> None:
        """Closes the monitor."""
        self.close()

    def __repr__(self) -> str:
        """Says how far it is."""
        where = f", dir={str(self._dir)!r}" if self._dir else ""
        return f"Monitor({self._next_step} steps, {len(self.columns)} columns{where})"

    def _repr_html_(self) -> str:
        """The report, in a frame of its own."""
        page = escape(report(self.history, self.findings()))
        return f'<iframe srcdoc="{page}" style="width:100%;height:45em;border:0">'

    def _open(self, columns: Any) -> None:
        self._columns = columns
        if self._dir is not None and self._is_first:
            self._archive = Archive(
                self._dir,
                columns.names,
                dict(zip(columns.parts, columns.sizes, strict=True)),
                dict(zip(columns.parts, columns.dims, strict=True)),
                resume=self._resume,
            )
            self._next_step = self._seen = self._archive.next_step

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
        copy = None if found is None else records.start_copy(found)
        stats, self._stats = self._stats, []
        self._take_in()
        self._copy, self._stats_copy = copy, stats
        if found is not None and copy is None:
            warnings.warn(
                "`Monitor.close` could not read the last rows: the last state that it"
                " was given has been donated since. Call the monitor after every step.",
                stacklevel=3,
            )

    def _take_in(self) -> None:
        """Takes in the rows of the copy that are new, oldest first."""
        if self._stats_copy:
            values = records.finish_stats(self._stats_copy, len(self.columns))
            self._stats_copy = []
            self._keep(self._next_step + np.arange(len(values)), values)
        if self._copy is None:
            return
        steps, values, rows = records.finish_copy(self._copy)
        self._copy = None
        dropped = rows - self._seen - len(steps)
        arrived, self._seen = rows - self._seen, rows
        if len(steps) and steps[-1] >= self._next_step:
            new = steps >= self._next_step
            steps, values = steps[new], values[new]
        else:  # nothing new, or the run went back to an earlier state
            new = len(steps) and steps[-1] + 1 != self._next_step
            steps, values = (steps, values) if new else (steps[:0], values[:0])
        if len(steps):
            self._keep(steps, values)
        if dropped > 0:
            self._warn_of_dropped(dropped, arrived, len(values))

    def _keep(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Stores rows, sends their scalars, and tells what is found in them."""
        if self._archive is not None:
            self._archive.append(steps, values)
        self._next_step = int(steps[-1]) + 1
        kept = [(s[s < steps[0]], v[s < steps[0]]) for s, v in self._kept]
        self._kept = [*kept, (steps, values)]
        numbers = np.array([len(s) for s, _ in self._kept])
        later = np.cumsum(numbers[::-1])[::-1] - numbers
        recent = self._kept[int(np.sum(later >= _LOOK_BACK)) :]
        if self._archive is not None:
            self._kept = recent
        if self._log is not None:
            self._send(self._history_of(steps, values))
        self._teller.tell(
            self._history_of(*map(np.concatenate, zip(*recent, strict=True)))
        )

    def _send(self, new: History) -> None:
        """Sends the scalars of the newest row; not those that there never were."""
        metrics = new.metrics() | (new.columns() if self._log_parts else {})
        self._sent |= {k for k, v in metrics.items() if not np.all(np.isnan(v))}
        scalars = {k: float(v[-1]) for k, v in metrics.items() if k in self._sent}
        if "grad_norm/global_preclip" in metrics:
            largest = metrics["grad_norm/global_preclip"].max()
            scalars["grad_norm/global_preclip_max"] = float(largest)
        self._writer = self._writer or as_writer(self._log)
        self._writer.write(int(new.steps[-1]), scalars)

    def _history_of(self, steps: np.ndarray, values: np.ndarray) -> History:
        assert self._columns is not None
        return History.from_rows(
            self.columns,
            steps,
            values,
            sizes=self._columns.sizes,
            dims=self._columns.dims,
        )

    def _warn_of_dropped(self, dropped: int, steps: int, window: int) -> None:
        if not self._warned:
            warnings.warn(
                f"`Monitor` lost {dropped} rows: {steps} steps passed since the last"
                f" drain and the ring holds {window}. Use `watch(..., window={steps})`,"
                " a smaller `Monitor(every=...)`, or a shorter inner `scan`. A state"
                " from a checkpoint needs `Monitor(resume=True)` in the `dir` of its"
                " run. This is said once.",
                stacklevel=5,
            )
        self._warned = True
