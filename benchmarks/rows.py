"""What a row is, and how it is printed, checked and written.

A row is one comparison of ours with one peer. Times are medians; the ratio is the
median of the ratios of ours to theirs within a round, beside its quartiles.
"""

import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

MIB = 2**20
GRACE = 3 * MIB  # of temporary memory: small programs hold a few buffers of any kind
#: The columns of a line on a terminal, 120 wide; a written table has some more.
SHOWN = {
    "what": 22,
    "tree": 19,
    "dtype": 8,
    "peer": 21,
    "ours ms": 8,
    "ratio": 5,
    "quartiles": 9,
    "stream": 6,
    "limits": 6,
}
NUMBERS = {"ours ms", "theirs ms", "ratio", "stream", "compile ms", "temp MiB"}
FEW = 4  # rounds, of which there are no quartiles to speak of


class Limits(NamedTuple):
    """What a row has to keep; `None` where nothing is asked.

    `at_most` is of the ratio of the times, `at_least` of the share of the bandwidth,
    `memory` and `build` of temporary memory and of compile time as ratios to the
    peer's, and `ms` of our time alone. A ratio is held against a limit as it is
    printed, to two places: what is past them is noise.
    """

    at_most: float | None = None
    at_least: float | None = None
    memory: float | None = None
    build: float | None = None
    ms: float | None = None


class Row(NamedTuple):
    """One comparison: what was measured, and how it should come out.

    Attributes:
      suite: The suite it belongs to.
      what: What was measured.
      tree: The tree it was measured on, with its numbers and leaves.
      dtype: The dtype of the tree.
      peer: What it was compared with.
      ours_ms: Our time; `None` if it was not run.
      theirs_ms: The time of the peer.
      ratio: The median of the ratios of ours to theirs within a round.
      low: The first quartile of these ratios.
      high: The third.
      rounds: How many there were.
      moved: The bytes that have to be read and written, if memory is the limit.
      share: These bytes a second, as a share of what a stream reaches on the device.
      build_ms: What compiling ours took, once; tracing apart, but for `examples`.
      peer_build_ms: The same of the peer.
      memory: The most temporary memory of ours, in bytes: what is given and returned
        is not in it.
      peer_memory: The same of the peer.
      note: What else there is to say.
      limits: What it has to keep.
    """

    suite: str
    what: str
    tree: str
    dtype: str
    peer: str
    ours_ms: float | None = None
    theirs_ms: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int | None = None
    moved: int | None = None
    share: float | None = None
    build_ms: float | None = None
    peer_build_ms: float | None = None
    memory: int | None = None
    peer_memory: int | None = None
    note: str = ""
    limits: Limits = Limits()

    @property
    def name(self) -> str:
        """What the row is called where it is named alone."""
        kind = ", ".join(word for word in (self.what, self.tree, self.dtype) if word)
        return f"{kind}, against {self.peer}"


def kept(row: Row) -> list[tuple[str, bool]]:
    """Returns the limits of a row in words, each with whether it was kept."""
    limits = row.limits
    found = []
    if limits.at_most is not None and row.ratio is not None:
        text = f"time <= {limits.at_most:.2f}"
        found.append((text, round(row.ratio, 2) <= limits.at_most))
    if limits.at_least is not None and row.share is not None:
        text = f"stream >= {limits.at_least:.2f}"
        found.append((text, round(row.share, 2) >= limits.at_least))
    if limits.memory is not None and row.memory is not None:
        allowed = limits.memory * (row.peer_memory or 0) + GRACE
        found.append((f"memory <= {limits.memory:.2f}", row.memory <= allowed))
    if limits.build is not None and row.build_ms is not None:
        waited = row.build_ms / (row.peer_build_ms or math.inf)
        text = f"compile <= {limits.build:.2f}"
        found.append((text, round(waited, 2) <= limits.build))
    if limits.ms is not None and row.ours_ms is not None:
        found.append((f"ms <= {limits.ms:g}", row.ours_ms <= limits.ms))
    return found


def missed(rows: Iterable[Row]) -> list[str]:
    """Names each limit that was not kept, and what was measured instead."""
    return [
        f"{row.suite}: {row.name}: {text} is missed: {_measured(row, text)}"
        for row in rows
        for text, is_kept in kept(row)
        if not is_kept
    ]


def header() -> str:
    """Returns the names of the columns of `line`, above a rule."""
    return f"{_set({name: name for name in SHOWN})}\n{'-' * 120}"


def line(row: Row) -> str:
    """Returns a row as one line for a terminal, with `missed` where a limit is."""
    is_missed = any(not is_kept for _, is_kept in kept(row))
    return _set(_cells(row) | {"limits": "missed" if is_missed else ""})


def _set(cells: dict[str, str]) -> str:
    """Sets the cells that are shown, numbers to the right."""
    return "  ".join(
        cells[name].rjust(width) if name in NUMBERS else cells[name].ljust(width)
        for name, width in SHOWN.items()
    ).rstrip()


def _cells(row: Row) -> dict[str, str]:
    """Returns all there is to say of a row, by the names of columns."""
    spread = row.low is not None and not (row.rounds and row.rounds < FEW)
    return {
        "what": row.what,
        "tree": row.tree,
        "dtype": row.dtype,
        "peer": row.peer,
        "ours ms": "not run" if row.ours_ms is None else f"{row.ours_ms:.2f}",
        "theirs ms": _number(row.theirs_ms, ".2f"),
        "ratio": _number(row.ratio, ".2f"),
        "quartiles": f"{row.low:.2f}-{row.high:.2f}" if spread else "",
        "stream": _number(row.share, ".2f"),
        "compile ms": _both(row.build_ms, row.peer_build_ms, 1, ".0f"),
        "temp MiB": _both(row.memory, row.peer_memory, MIB, ".1f"),
        "limits": _limits(row),
    }


def write_json(
    path: pathlib.Path, rows: Iterable[Row], machine: dict[str, Any]
) -> None:
    """Writes all rows, and on what and by which command they were measured."""
    entries = []
    for row in rows:
        limits = {k: v for k, v in row.limits._asdict().items() if v is not None}
        failed = [text for text, is_kept in kept(row) if not is_kept]
        entries.append(row._asdict() | {"limits": limits, "missed": failed})
    path.write_text(json.dumps({"machine": machine, "rows": entries}, indent=1) + "\n")


def write_markdown(
    path: pathlib.Path, rows: Iterable[Row], machine: dict[str, Any]
) -> None:
    """Writes a page with a table for each suite."""
    by_suite: dict[str, list[Row]] = {}
    for row in rows:
        by_suite.setdefault(row.suite, []).append(row)
    text = f"# Benchmarks\n\n{described(machine)}\n"
    for suite, own in by_suite.items():
        tables = [_cells(row) for row in own]
        rule = ["---:" if name in NUMBERS else "---" for name in tables[0]]
        lines = [tables[0], rule, *(cells.values() for cells in tables)]
        text += f"\n## {suite}\n\n"
        text += "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    path.write_text(text)


def described(machine: dict[str, Any]) -> str:
    """Returns on what and by which command rows were measured, as a sentence or two."""
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    text = (
        f"{machine['device']} on {machine['processor']}, {machine['cores']} cores;"
        f" {versions}; `{machine['command']}`."
    )
    if machine.get("bandwidth"):
        text += f" A stream reaches {machine['bandwidth'] / 1e9:.1f} GB/s."
    return text


def _measured(row: Row, text: str) -> str:
    match text.split()[0]:
        case "time":
            return f"{row.ratio:.2f} ({row.low:.2f}-{row.high:.2f})"
        case "stream":
            return f"{row.share:.2f}"
        case "memory":
            return f"{_both(row.memory, row.peer_memory, MIB, '.1f')} MiB"
        case "compile":
            return f"{_both(row.build_ms, row.peer_build_ms, 1, '.0f')} ms"
    return f"{row.ours_ms:.1f} ms"


def _limits(row: Row) -> str:
    parts = [text + ("" if is_kept else " missed") for text, is_kept in kept(row)]
    return ", ".join(parts) + (f" ({row.note})" if row.note else "")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _both(ours: float | None, theirs: float | None, unit: float, form: str) -> str:
    if ours is None:
        return ""
    return "/".join(
        "-" if x is None else format(x / unit, form) for x in (ours, theirs)
    )
