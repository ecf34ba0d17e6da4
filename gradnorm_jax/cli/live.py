"""The command `watch`: looks on while another process writes a run."""

import argparse
import dataclasses
import sys
import textwrap
import time
from typing import Any

import numpy as np

from gradnorm_jax import monitoring
from gradnorm_jax.cli import terminal
from gradnorm_jax.cli.following import Follower
from gradnorm_jax.monitoring.diagnosis.evidence import several
from gradnorm_jax.monitoring.diagnosis.finding import LEVELS
from gradnorm_jax.monitoring.rows import network_order, tell_apart
from gradnorm_jax.monitoring.series import NAMES, main_kind, plain, share_clipped
from gradnorm_jax.monitoring.summary import percent

_PAUSE = 0.5  # seconds from one look at the directory to the next
_LATE_ROWS = 128  # what the curves show


@dataclasses.dataclass(frozen=True)
class Look:
    """The newest rows of a run, and what was found in them."""

    run: str
    history: monitoring.History
    findings: tuple[monitoring.Finding, ...]

    @classmethod
    def of(cls, run: str, history: monitoring.History) -> "Look":
        """Diagnoses the newest rows."""
        return cls(run, history, tuple(monitoring.diagnose(history)))

    @property
    def clipped(self) -> str | None:
        """The share of the last steps that was clipped, if any clip was at work."""
        fractions = self.history.scalars.get("clip/fraction", np.zeros(0))
        share = share_clipped(fractions[-_LATE_ROWS:])
        return None if np.isnan(share) else percent(share)

    @property
    def loss(self) -> np.ndarray | None:
        """The loss of each of the last steps, if it was recorded."""
        loss = self.history.scalars.get("loss", np.zeros(0))[-_LATE_ROWS:]
        known = not np.isnan(self.history.scalars.get("loss", np.nan)).all()
        return loss if known else None


def watch(options: argparse.Namespace) -> int:
    """Shows a run while it grows: a table on a terminal, else a line for each drain."""
    follower = Follower(options.directory)
    name = str(options.directory)
    if options.once:
        newest = follower.next()
        if newest is None:
            raise ValueError(
                f"{name!r} has no rows yet: they are written by the second drain, so"
                " after 2 * `every` calls of the monitor. Without --once, `gradnorm"
                " watch` waits for them."
            )
        _show_once(Look.of(name, newest))
        return 0
    try:
        if _table_is_possible():
            _follow_in_a_table(name, follower)
        else:
            _follow_in_lines(name, follower)
    except KeyboardInterrupt:
        print(file=sys.stderr)
    return 0


def line(look: Look, *, unicode: bool) -> str:
    """Says in one line how a run stands."""
    history = look.history
    norms = history.global_norm(main_kind(history))[-_LATE_ROWS:]
    curve = terminal.sparkline(norms, 16, unicode=unicode)
    words = [f"step {history.steps[-1]:>7,}", f"norm {plain(norms[-1]):>6} {curve}"]
    if look.loss is not None:
        words.append(f"loss {plain(float(look.loss[-1])):>6}")
    if look.clipped:
        words.append(f"clip {look.clipped:>5}")
    if look.findings:
        worst = look.findings[0]
        words.append(f"{LEVELS[worst.level]} {worst.code} {worst.place}")
    return "  ".join(words)


def _show_once(look: Look) -> None:
    if not _table_is_possible():
        _print(look)
        return
    from rich.console import Console

    console = Console()
    unicode = terminal.speaks_unicode()
    console.print(_table(look, "", console.size, unicode=unicode))


def _follow_in_lines(name: str, follower: Follower) -> None:
    waited = False
    while True:
        history = follower.next()
        if history is not None:
            _print(Look.of(name, history))
            continue
        if follower.is_empty and not waited:
            print(f"waiting for the first rows of {name}", file=sys.stderr)
            waited = True
        time.sleep(_PAUSE)


def _follow_in_a_table(name: str, follower: Follower) -> None:
    from rich.live import Live
    from rich.text import Text

    look, since = None, time.monotonic()
    unicode = terminal.speaks_unicode()  # asked before `Live` takes stdout over
    waiting = Text(f"waiting for the first rows of {name}")
    with Live(waiting, auto_refresh=False) as screen:
        while True:
            history = follower.catch_up()
            if history is not None:
                look, since = Look.of(name, history), time.monotonic()
            if look is not None:
                age = _age(time.monotonic() - since)
                table = _table(look, age, screen.console.size, unicode=unicode)
                screen.update(table, refresh=True)
            time.sleep(_PAUSE)


def _table(look: Look, age: str, size: Any, *, unicode: bool) -> Any:
    """Makes a table of how a run stands, no larger than the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    history, kind = look.history, main_kind(look.history)
    width = max(8, min(48, size.width - 48))

    def curve(values: np.ndarray, width: int) -> Text:
        return Text(terminal.sparkline(values, width, unicode=unicode), style="blue")

    title = Text.assemble(
        (look.run, "bold"), f"  step {history.steps[-1]:,}", (f"  {age}", "dim")
    )
    title.no_wrap, title.overflow = True, "ellipsis"
    whole = Table.grid(padding=(0, 2))
    for each in history.kinds:
        norms = history.global_norm(each)[-_LATE_ROWS:]
        whole.add_row(
            f"{NAMES[each]} norm", plain(norms[-1]), curve(norms, width), _span(norms)
        )
    if look.loss is not None:
        loss = look.loss
        whole.add_row("loss", plain(float(loss[-1])), curve(loss, width), _span(loss))
    if look.clipped:
        whole.add_row("clipped", look.clipped, Text("of the last steps", style="dim"))

    told = [_told(finding) for finding in look.findings[:3]]
    if len(look.findings) > 3:
        told.append(
            Text(f"and {several(len(look.findings) - 3, 'finding')} more", style="dim")
        )
    lines = sum(len(textwrap.wrap(text.plain, size.width)) for text in told)
    used = 7 + whole.row_count + lines
    chosen = _foremost(look, kind, max(3, size.height - used))
    ratio = {"update", "param"} <= set(history.kinds) and size.width >= 72
    found = [", ".join(_codes(look, history.parts[i])) for i in chosen]
    names = [tell_apart(history.parts)[history.parts[i]] for i in chosen]
    # What is left beside norm, update/param and findings, with the space between them.
    room = size.width - 13 - 14 * ratio - max(7, *map(len, found)) - 2
    drawn = min(16, max(6, room - min(max(map(len, names)), 40)))
    parts = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    parts.add_column("part", no_wrap=True)
    parts.add_column("norm", justify="right", no_wrap=True)
    parts.add_column(f"last {min(_LATE_ROWS, len(history))}", no_wrap=True)
    if ratio:
        parts.add_column("update/param", justify="right", no_wrap=True)
    parts.add_column("found", no_wrap=True)
    for i, name, codes in zip(chosen, names, found, strict=True):
        norms = history.norms(kind)[-_LATE_ROWS:, i]
        short = terminal.cut_head(name, max(8, room - drawn), unicode=unicode)
        cells: list[Any] = [Text(short), plain(norms[-1]), curve(norms, drawn)]
        if ratio:
            cells.append(plain(history.update_ratio[-1, i]))
        cells.append(Text(codes))
        parts.add_row(*cells)
    rest = len(history.parts) - len(chosen)
    more = [Text(f"and {several(rest, 'part')} more", style="dim")] if rest else []
    return Group(title, "", whole, "", parts, *more, "", *told)


def _span(values: np.ndarray) -> str:
    """Says from where to where values go, and how many are not finite."""
    finite = values[np.isfinite(values)]
    bad = len(values) - len(finite)
    words = [f"{plain(finite.min())} to {plain(finite.max())}"] if len(finite) else []
    return ", ".join(words + [f"{bad} not finite"] * (bad > 0))


def _told(finding: monitoring.Finding) -> Any:
    from rich.text import Text

    styles = {"error": "bold red", "warning": "yellow", "info": "cyan"}
    line = str(finding).partition(" Likely: ")[0]
    word, _, rest = line.partition(" ")
    return Text.assemble((word, styles[finding.level]), " ", rest)


def _foremost(look: Look, kind: str, number: int) -> list[int]:
    """Chooses the parts to show: those with findings, then those of largest norm."""
    history = look.history
    last = np.nan_to_num(history.norms(kind)[-1], nan=np.inf)
    flagged = np.array([bool(_codes(look, part)) for part in history.parts])
    order = np.lexsort((-last, ~flagged))[:number].tolist()
    places = {i: place for place, i in enumerate(network_order(history.parts))}
    return sorted(order, key=places.__getitem__)


def _codes(look: Look, part: str) -> list[str]:
    return list(dict.fromkeys(f.code for f in look.findings if part in f.where))


def _age(seconds: float) -> str:
    return f"last rows {seconds:,.0f} s ago" if seconds >= 2 else "new rows"


def _print(look: Look) -> None:
    unicode = terminal.speaks_unicode()
    text = line(look, unicode=unicode)
    print(terminal.cut(text, terminal.width(), unicode=unicode), flush=True)


def _table_is_possible() -> bool:
    if not terminal.is_there():
        return False
    try:
        import rich  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


__all__ = ["Look", "line", "watch"]
