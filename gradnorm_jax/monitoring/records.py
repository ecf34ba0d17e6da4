"""Monitor: takes the rows of norms out of the optimizer's state while a run goes on."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gradnorm_jax import telemetry
from gradnorm_jax.monitoring.archive import Archive, load
from gradnorm_jax.monitoring.report import write


class Monitor:
    """Reads the ring that `watch` keeps in a state and writes it to files.

    Call it with the state after every step, or after every inner `scan`. Most calls
    only count. Every `every`-th call *drains*: it starts a copy of the ring to the
    host, and writes the copy that the drain before it started. So the host never waits
    for the step in flight, and the state may be donated to the next step. What is on
    disk is up to `2 * every` calls old until `close`.

    Between two drains the monitor keeps a reference to the last state that it was
    given, no copy. `close` reads the last rows from it. They are lost, with a warning,
    only if that state has been donated to a further step: so call the monitor right
    after the step, before anything that may raise.

    In a program of many processes every process makes and calls a monitor, and process
    0 alone reads and writes.

    Args:
      params: The parameters that are watched, or their shapes as
        `jax.ShapeDtypeStruct`.
      every: How many calls lie between two drains. The ring of `watch(window=...)`
        must hold the steps of that many calls, or the oldest are lost.
      log: The directory of this run. It is made; it may not hold another run.
      resume: Go on with the run in `log`, if there is one. Steps count from the `init`
        of the state, so resume with a state that was restored from a checkpoint.
      record: The kinds of norms, as given to `watch`.
      groups: The groups of leaves, as given to `watch`.
      stacked_axes: The axes of stacked layers, as given to `watch`.

    Raises:
      FileExistsError: If `log` holds a run and `resume` is not set.
      ValueError: If `every` is not positive, if the run to resume has other columns;
        and when called, if the state is not watched or its ring has other columns.

    Example::

        with Monitor(params, every=50, log="runs/a") as monitor:
            for batch in batches:
                params, state = step(params, state, batch)
                monitor(state)
        history = load("runs/a")
    """

    def __init__(
        self,
        params: Any,
        *,
        every: int = 50,
        log: str | os.PathLike,
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
        self.every = every
        self._log = Path(log)
        if isinstance(record, str) or not set(record) <= set(telemetry.KINDS):
            raise ValueError(
                f"`Monitor(record=...)` must be a tuple of some of {telemetry.KINDS},"
                f" the one that `watch` was given, got {record!r}."
            )
        # The ring has its columns in this order, whatever the order of `record` is.
        record = tuple(kind for kind in telemetry.KINDS if kind in record)
        self._columns = telemetry.columns(
            params, record=record, groups=groups, stacked_axes=stacked_axes
        )
        self._archive = None
        if jax.process_index() == 0:
            parts = telemetry.layout(
                params, groups, stacked_axes, caller="Monitor(params)"
            )
            sizes = dict(zip(parts.part_names, parts.sizes.tolist(), strict=True))
            self._archive = Archive(Path(log), self._columns, sizes, resume=resume)
        self._calls = 0
        self._state: Any = None  # the last one given, not drained yet
        self._copy: tuple[jax.Array, jax.Array] | None = None  # on its way to the host
        self._warned = False

    def __call__(self, state: Any) -> None:
        """Counts; on every `every`-th call drains the ring in the state.

        Args:
          state: Anything that holds the state of `watch`: an optimizer state, a
            `TrainState`, a tuple, a dict.
        """
        if self._archive is None:
            return
        if self._calls == 0:
            self._find(state)  # so that a mistake shows at the first step
        self._calls += 1
        self._state = state
        if self._calls % self.every == 0:
            self._drain()

    def close(self) -> None:
        """Writes all that the last state holds. Closing twice does nothing more."""
        if self._state is not None:
            self._drain()
        self._write()

    def report(self, path: str | os.PathLike) -> None:
        """Writes one HTML page of what has been recorded so far.

        Args:
          path: Where the page goes. After `close` it shows the whole run.
        """
        if self._archive is not None:
            self._write()
            write(load(self._log), path)

    def __enter__(self) -> "Monitor":
        """Returns the monitor itself."""
        return self

    def __exit__(self, *exception) -> None:
        """Closes the monitor."""
        self.close()

    def _find(self, state: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the ring and the number of rows that were ever written to it."""
        found = telemetry.find(state, telemetry.WatchState)
        if not found:
            raise ValueError(
                f"`Monitor` found no `WatchState` in a {type(state).__name__}. Make"
                " the optimizer with `watch(optax....)`, and give the monitor the"
                " state that its `init` and `update` return."
            )
        ring, rows = found[0].ring, found[0].rows
        if isinstance(ring, np.ndarray):  # from a checkpoint
            ring, rows = jnp.asarray(ring), jnp.asarray(rows)
        if isinstance(ring, Tracer):
            raise ValueError(
                "`Monitor` was called inside `jit` or another transformation. Call it"
                " with the state that the compiled step returns."
            )
        if not (ring.is_fully_replicated or ring.is_fully_addressable):
            raise ValueError(
                "`Monitor` was given a ring that is split over processes, of which one"
                " alone cannot read it. `watch(...).init(params)` puts it on every"
                " device whole: return it so from the step, with `out_shardings`."
            )
        if ring.ndim != 2 or ring.shape[1] != len(self._columns):
            raise ValueError(
                f"`Monitor` expects a ring of {len(self._columns)} columns for these"
                f" parameters, but the state has one of shape {ring.shape}. Give"
                " `Monitor` and `watch` the same parameters, `record=`, `groups=` and"
                " `stacked_axes=`."
            )
        return ring, rows

    def _drain(self) -> None:
        """Starts a copy of the ring to the host and writes the copy before it."""
        ring, rows = self._find(self._state)
        self._state = None
        copy = None
        if not ring.is_deleted():
            copy = _copy(ring), _copy(rows)
            for array in copy:
                array.copy_to_host_async()
        self._write()
        self._copy = copy
        if copy is None:
            warnings.warn(
                "`Monitor.close` could not read the last rows: the last state that it"
                " was given has been donated since. Call the monitor after every step.",
                stacklevel=3,
            )

    def _write(self) -> None:
        """Writes the rows of the copy that are not written yet, oldest first."""
        if self._copy is None or self._archive is None:
            return
        ring, rows = jax.device_get(self._copy)
        self._copy = None
        rows, window, first = int(rows), len(ring), self._archive.next_step
        oldest = max(0, rows - window)
        if rows < first:  # the run went back to an earlier state
            first = oldest
        steps = np.arange(max(oldest, first), rows)
        if len(steps):
            self._archive.append(steps, ring[steps % window])
        if oldest > first:
            self._warn_of_dropped(oldest - first, rows - first, window)

    def _warn_of_dropped(self, dropped: int, steps: int, window: int) -> None:
        if not self._warned:
            warnings.warn(
                f"`Monitor` lost {dropped} rows: {steps} steps passed since the last"
                f" drain and the ring holds {window}. Use `watch(..., window={steps})`,"
                " a smaller `Monitor(every=...)`, or a shorter inner `scan`. A state"
                " from a checkpoint needs `Monitor(resume=True)` in the `log` of its"
                " run. This is said once.",
                stacklevel=5,
            )
        self._warned = True


def _copy(array: jax.Array) -> jax.Array:
    """Copies what this process holds, so that no other one need take part.

    No computation: one on a single device is refused where `jax.set_mesh` names more.
    """
    local = array.addressable_data(0) if array.is_fully_replicated else array
    return jax.device_put(local, local.sharding, may_alias=False)
