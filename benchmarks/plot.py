"""The ratios of a run as one picture, grouped by suite."""

import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks.rows import Row, described

COLORS = ("#2868a8", "#b8690b", "#00876c", "#8a4fa3", "#d02f3e", "#b39b00")
MORE = "#9a9a9a"  # of the peers that few rows have
MISSED = "#e0002a"
ROW_HEIGHT = 0.2  # inches


def can_draw(path: pathlib.Path) -> bool:
    """Whether matplotlib is there, and knows the kind of file."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    return path.suffix[1:] in Figure().canvas.get_supported_filetypes()


def draw(path: pathlib.Path, rows: Sequence[Row], machine: dict[str, Any]) -> None:
    """Draws each ratio with its quartiles on a log axis, colored by peer."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.ratio is not None]
    colors = _colors(rows)
    places, titles = _places(rows)
    lines = (places[-1] if places else 0) + 2
    figure = Figure((10, ROW_HEIGHT * lines + 1.6), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color="0.3", linewidth=1, zorder=1)
    named = set()
    for row, place in zip(rows, places, strict=True):
        name = row.peer if row.peer in colors else "another (see the table)"
        axes.plot([row.low, row.high], [place] * 2, color=_of(row, colors), lw=1.6)
        axes.plot(
            row.ratio,
            place,
            "o",
            markersize=4.5,
            color=_of(row, colors),
            label=None if name in named else name,
        )
        named.add(name)
        if row.limits.at_most is not None:
            is_kept = round(row.ratio, 2) <= row.limits.at_most
            color = "0.2" if is_kept else MISSED
            style = {"markersize": 9, "markeredgewidth": 1 + is_kept, "zorder": 3}
            axes.plot(row.limits.at_most, place, "|", color=color, **style)
    _label(axes, rows, places, titles)
    _scale(axes, rows)
    figure.text(0.01, -0.01, described(machine), fontsize=6.5, color="0.35", va="top")
    figure.legend(
        loc="outside upper center",
        ncols=min(5, max(1, len(named))),
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path, dpi=130, bbox_inches="tight")


def _colors(rows: Sequence[Row]) -> dict[str, str]:
    """Gives a color to the peers that most rows have."""
    count: dict[str, int] = {}
    for row in rows:
        count[row.peer] = count.get(row.peer, 0) + 1
    often = sorted(count, key=lambda peer: -count[peer])
    return dict(zip(often, COLORS, strict=False))


def _of(row: Row, colors: dict[str, str]) -> str:
    return colors.get(row.peer, MORE)


def _places(rows: Sequence[Row]) -> tuple[list[float], dict[str, float]]:
    """Returns the place of each row from the top, and of the title of each suite."""
    places: list[float] = []
    titles: dict[str, float] = {}
    at = 0.0
    before = None
    for row in rows:
        if row.suite not in titles:
            at += 0.6 if titles else 0
            titles[row.suite] = at
            at += 1
        at -= 0.5 if _label_of(row) == before else 0
        before = _label_of(row)
        places.append(at)
        at += 1
    return places, titles


def _label_of(row: Row) -> str:
    return ", ".join(filter(None, (row.what, row.tree, row.dtype)))


def _label(
    axes: Any, rows: Sequence[Row], places: list[float], titles: dict[str, float]
) -> None:
    labels = [_label_of(row) for row in rows]
    pairs = zip(labels, ["", *labels], strict=False)
    names = ["" if label == before else label for label, before in pairs]
    axes.set_yticks([*places], names, fontsize=7)
    axes.tick_params(axis="y", length=0)
    for suite, place in titles.items():
        axes.axhspan(place - 0.5, place + 0.5, color="0.93", zorder=0)
        axes.text(
            0.006,
            place,
            suite,
            transform=axes.get_yaxis_transform(),
            fontsize=8,
            fontweight="bold",
            va="center",
        )
    axes.set_ylim((places[-1] if places else 0) + 0.8, -0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", which="major", color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)


def _scale(axes: Any, rows: Sequence[Row]) -> None:
    ends = [x for r in rows for x in (r.low, r.high, r.limits.at_most) if x]
    axes.set_xscale("log")
    axes.set_xlim(min([0.5, *ends]) / 1.15, max([2.0, *ends]) * 1.15)
    ticks = [a * 10.0**k for k in range(-4, 4) for a in (1, 2, 5)]
    low, high = axes.get_xlim()
    shown = [x for x in ticks if low <= x <= high]
    axes.set_xticks(shown, [f"{x:g}" for x in shown], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_xlabel(
        "time of ours / time of the peer, from the first to the third quartile;"
        " a short stroke is a limit, red where it is missed",
        fontsize=8,
    )
