"""The door to the device: what a monitor reads of a state, and what columns mean."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from gradnorm_jax import telemetry

Names = Mapping[str, str] | Callable[[str], str]


class Copy(NamedTuple):
    """The rows of a ring, on their way to the host; of NumPy, from a checkpoint."""

    ring: Any
    steps: Any
    rows: Any


def is_first_process() -> bool:
    """Whether this process is the one that reads and writes."""
    return jax.process_index() == 0


def describe(
    params: Any,
    record: Sequence[str],
    groups: Any,
    stacked_axes: Any,
    names: Names | None,
) -> telemetry.Columns:
    """Says what the columns are that `watch` records of these parameters."""
    known = (*telemetry.KINDS, *telemetry.DETAILS, *telemetry.EXTRAS)
    if isinstance(record, str) or not set(record) <= set(known):
        raise ValueError(
            f"`Monitor(record=...)` must be a tuple of some of {known}, the one that"
            f" `watch` was given, got {record!r}."
        )
    parts = telemetry.layout(params, groups, stacked_axes, caller="Monitor(params)")
    return _renamed(telemetry.columns_of(parts, tuple(record)), names)


def check_columns(state: Any, columns: telemetry.Columns) -> None:
    """Refuses a ring with as many columns as are known, but others.

    It waits for the state: once is enough.
    """
    [given, *_] = jax.tree.leaves(telemetry.find(state, telemetry.WatchState)[0][-1:])
    if int(jax.device_get(given)) != columns.checksum:
        raise ValueError(
            "`Monitor` was made for other columns than those in the state, though as"
            " many. Give `Monitor` and `watch` the same parameters, `record=`,"
            " `groups=` and `stacked_axes=`."
        )


def find_ring(state: Any, num_columns: int) -> Copy:
    """Returns the ring in anything that holds the state of `watch`."""
    found = telemetry.find(state, telemetry.WatchState)
    if not found:
        raise ValueError(
            f"`Monitor` found no `WatchState` in a {type(state).__name__}. Make"
            " the optimizer with `watch(optax....)`, and give the monitor the"
            " state that its `init` and `update` return."
        )
    watched = found[0]
    # Flax NNX keeps each array of a state in a variable.
    arrays: list[Any] = [
        jax.tree.leaves(x) for x in (watched.ring, watched.steps, watched.rows)
    ]
    ring, steps, rows = (x[0] for x in arrays)
    if isinstance(ring, Tracer):
        raise ValueError(
            "`Monitor` was called inside `jit` or another transformation. Call it"
            " with the state that the compiled step returns."
        )
    if ring.ndim != 2 or ring.shape[1] != num_columns:
        raise ValueError(
            f"`Monitor` expects a ring of {num_columns} columns for these"
            f" parameters, but the state has one of shape {np.shape(ring)}. Give"
            " `Monitor` and `watch` the same parameters, `record=`, `groups=` and"
            " `stacked_axes=`."
        )
    if not (isinstance(ring, np.ndarray) or _is_readable(ring)):
        raise ValueError(
            "`Monitor` was given a ring that is split over processes, of which one"
            " alone cannot read it. `watch(...).init(params)` puts it on every"
            " device whole: return it so from the step, with `out_shardings`."
        )
    return Copy(ring, steps, rows)


def start_copy(found: Copy) -> Copy | None:
    """Starts to copy a ring to the host; `None` if it was donated since."""
    if any(isinstance(x, jax.Array) and x.is_deleted() for x in found):
        return None
    copy = Copy(*map(_copied, found))
    for array in copy:
        if isinstance(array, jax.Array):
            array.copy_to_host_async()
    return copy


def finish_copy(copy: Copy) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the steps and values of the rows in a ring, oldest first.

    And how many rows were ever written to it.
    """
    ring, steps, rows = jax.device_get(copy)
    total, window = int(rows), len(ring)
    order = np.arange(max(0, total - window), total) % window
    return np.asarray(steps, np.int64)[order], np.asarray(ring)[order], total


def columns_of_stats(stats: Any, names: Names | None) -> telemetry.Columns:
    """Says what the columns of what `measure` returned are."""
    if not isinstance(stats, telemetry.Stats):
        raise TypeError(
            "`Monitor.append(stats=...)` must be what `gradnorm_jax.measure` returns,"
            f" got a {type(stats).__name__}."
        )
    if isinstance(stats.values, Tracer):
        raise ValueError(
            "`Monitor.append` was called inside `jit` or another transformation. Call"
            " it with what the compiled step returns."
        )
    return _renamed(stats.columns, names)


def start_stats(stats: Any) -> Any:
    """Starts to copy what was measured to the host."""
    if hasattr(stats.values, "copy_to_host_async"):
        stats.values.copy_to_host_async()
    return stats.values


def finish_stats(values: Sequence[Any], num_columns: int) -> list[np.ndarray]:
    """Returns what was measured each time, in a `scan` too: `[rows, columns]`."""
    return [np.asarray(x).reshape(-1, num_columns) for x in jax.device_get(values)]


def _renamed(columns: telemetry.Columns, names: Names | None) -> telemetry.Columns:
    if names is None:
        return columns
    if not callable(names) and not isinstance(names, Mapping):
        raise TypeError(
            "`Monitor(names=...)` must be `{name: other name}` or a function of a name,"
            f" got {names!r}."
        )
    if isinstance(names, Mapping) and not set(names) <= set(columns.parts):
        wrong = next(name for name in names if name not in columns.parts)
        raise ValueError(
            f"`Monitor(names=...)` names {wrong!r}, which is no part. The parts are"
            f" {', '.join(columns.parts[:5])}{', ...' * (len(columns.parts) > 5)}."
        )
    new = names if callable(names) else lambda part: names.get(part, part)
    of = {part: str(new(part)) for part in columns.parts}
    if len(set(of.values())) < len(of):
        raise ValueError(
            "`Monitor(names=...)` must give every part a name of its own, got"
            f" {sorted(of.values())}."
        )
    halves = [name.partition("/") for name in columns.names]
    # Of "clip/scale" and its like the part is none of the tree's: the kind tells.
    kinds = (*telemetry.KINDS, *telemetry.DETAILS)
    return columns._replace(
        names=tuple(
            f"{kind}/{of[part]}" if kind in kinds else kind + slash + part
            for kind, slash, part in halves
        ),
        parts=tuple(of.values()),
    )


def _is_readable(array: jax.Array) -> bool:
    return array.is_fully_replicated or array.is_fully_addressable


def _copied(array: Any) -> Any:
    """Copies what this process holds, so that no other one need take part.

    No computation: one on a single device is refused where `jax.set_mesh` names more.
    """
    if not isinstance(array, jax.Array):  # from a checkpoint
        return np.array(array)
    local = array.addressable_data(0) if array.is_fully_replicated else array
    return jax.device_put(local, local.sharding, may_alias=False)
