"""What fits on a terminal: findings and texts in its width, small curves, a bar."""

import contextlib
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gradnorm_jax.monitoring import Finding
from gradnorm_jax.monitoring.diagnosis.finding import LEVELS

Update = Callable[[int, int, str], None]

_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_COLORS = {"error": 31, "warning": 33, "info": 36}


def is_there() -> bool:
    """Whether what is printed goes to a terminal."""
    return sys.stdout.isatty()


def width() -> int | None:
    """Returns the columns of the terminal; `None` where there is none."""
    if not is_there():
        return None
    return max(40, shutil.get_terminal_size().columns)


def speaks_unicode() -> bool:
    """Whether what is printed may hold block characters."""
    encoding = sys.stdout.encoding or "ascii"
    return encoding.lower().replace("-", "") == "utf8"


def show_findings(findings: Sequence[Finding], steps: int) -> None:
    """Prints findings: a paragraph each on a terminal, a line each elsewhere."""
    if not findings:
        print(f"no findings in {steps:,} recorded step{'s' * (steps != 1)}")
    columns = width()
    for finding in findings:
        if columns is None:
            print(finding)
        else:
            print("\n" + _paragraph(finding, columns))


def fitted(text: str) -> str:
    """Breaks the lines of an explanation anew, if they are too long for the terminal.

    Example:
      >>> print(fitted("Left as it is where there is no terminal."))
      Left as it is where there is no terminal.
    """
    columns = width()
    if columns is None or columns >= max(map(len, text.splitlines())):
        return text
    items = re.split(r"\n(?=\n|- |[A-Z][\w ]*:)", text)
    return "\n".join(_item(item, columns) for item in items)


def hanging(start: str, text: str) -> str:
    """Puts a text behind a start, and its further lines under its first.

    Example:
      >>> hanging("a  ", "text as long as it is where there is no terminal")
      'a  text as long as it is where there is no terminal'
    """
    columns = width()
    if columns is None:
        return start + text
    return textwrap.fill(
        text,
        columns,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )


def sparkline(values: np.ndarray, size: int, *, unicode: bool) -> str:
    """Draws values as a curve of characters, on a logarithmic scale.

    Each character is the largest of its values, so that no spike is lost. An exact 0 is
    a `0`, and a NaN or an infinity anywhere among them is a `!`. Where any value is
    negative, as a loss may be, the scale is linear.

    Args:
      values: What to draw.
      size: How many characters at most.
      unicode: Whether to draw with blocks, else in ASCII.

    Example:
      >>> norms = np.array([1, 1, 1, 1, 90, 1, 0, np.nan])
      >>> sparkline(norms, 8, unicode=True), sparkline(norms, 4, unicode=False)
      ('▁▁▁▁█▁0!', '__#!')
    """
    values = np.asarray(values, np.float64)
    bins = np.array_split(values, min(size, len(values))) if len(values) else []
    peaks = np.array([x.max() if np.isfinite(x).all() else np.nan for x in bins])
    finite = np.isfinite(peaks)
    letters = _BLOCKS if unicode else _ASCII
    if (peaks[finite] < 0).any():
        shown, heights, least = finite, peaks, 0.0
    else:
        shown, least = finite & (peaks > 0), math.log(2)  # nearly constant looks so
        heights = np.log(peaks, where=shown, out=np.zeros(len(peaks)))
    low, high = heights[shown].min(initial=np.inf), heights[shown].max(initial=-np.inf)
    scale = (len(letters) - 1) / (max(high - low, least) or 1.0)
    return "".join(
        letters[round((height - low) * scale)] if drawn else "0" if peak == 0 else "!"
        for height, drawn, peak in zip(heights, shown, peaks, strict=True)
    )


def cut(line: str, columns: int | None, *, unicode: bool) -> str:
    """Cuts a line that is longer than the terminal is wide.

    Example:
      >>> cut("a long line", 6, unicode=False)
      'a l...'
    """
    if columns is None or len(line) <= columns:
        return line
    end = "…" if unicode else "..."
    return line[: columns - len(end)] + end


def cut_head(name: str, columns: int, *, unicode: bool) -> str:
    """Cuts a name at its beginning, since paths differ at their ends.

    Example:
      >>> cut_head("decoder/block_3/kernel", 12, unicode=False)
      '..._3/kernel'
    """
    if len(name) <= columns:
        return name
    start = "…" if unicode else "..."
    return start + name[len(name) - columns + len(start) :]


@contextlib.contextmanager
def progress() -> Iterator[Update]:
    """A progress bar on a terminal; elsewhere a line now and then."""
    if not is_there():
        yield _line
        return
    try:
        from rich import progress
    except ModuleNotFoundError:
        yield _line
        return
    with progress.Progress(
        progress.BarColumn(bar_width=12),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.description}"),
        progress.TimeRemainingColumn(),
    ) as bar:
        task = bar.add_task("compiling", total=None)
        yield lambda step, steps, text: bar.update(
            task, completed=step, total=steps, description=text
        )


def _line(step: int, steps: int, text: str) -> None:
    if step == steps or step * 10 // steps > (step - 25) * 10 // steps:
        print(f"step {step:5} of {steps}  {text}", flush=True)


def _paragraph(finding: Finding, columns: int) -> str:
    """Breaks the line of a finding before its causes and what to try."""
    line = str(finding)
    cuts = [line.find(mark) for mark in (" Likely: ", " Try: ")]
    starts = [0, *(at for at in cuts if at >= 0)]
    ends = [*starts[1:], len(line)]
    parts = [line[a:b].strip() for a, b in zip(starts, ends, strict=True)]
    inner = "  "
    text = "\n".join(
        textwrap.fill(
            part,
            columns,
            initial_indent=inner * bool(position),
            subsequent_indent=inner * (1 + bool(position)),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for position, part in enumerate(parts)
    )
    word = LEVELS[finding.level]
    if "NO_COLOR" in os.environ:
        return text
    return f"\x1b[1;{_COLORS[finding.level]}m{word}\x1b[0m" + text[len(word) :]


def _item(text: str, columns: int) -> str:
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(
        " ".join(text.split()),
        columns,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


__all__ = [
    "cut",
    "fitted",
    "hanging",
    "is_there",
    "progress",
    "show_findings",
    "sparkline",
    "speaks_unicode",
    "width",
]
