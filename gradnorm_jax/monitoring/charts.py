"""The three pictures of a report: HTML around SVG, so that text keeps its size."""

import itertools
from collections.abc import Iterable
from html import escape

import numpy as np

from gradnorm_jax.monitoring import palette, series, svg
from gradnorm_jax.monitoring.rows import Rows
from gradnorm_jax.monitoring.series import plain

ROWS_HEIGHT = 560  # pixels that the rows of parts share
LABEL_HEIGHT = 13
LABEL_LENGTH = 32


def trace(history) -> str:
    """Draws the global norm over time, the limit, and the share of steps clipped."""
    picture = series.trace(history)
    bins, axis = picture.bins, picture.axis
    edges = _scaled(bins.edges, bins)
    sides = list(itertools.pairwise(edges))
    center = (edges[:-1] + edges[1:]) / 2
    low, middle, high, top, limit = (
        np.where(np.isnan(values), np.nan, axis.position(values))
        for values in (picture.low, picture.middle, picture.high, picture.top,
                       picture.limit)
    )  # fmt: skip
    ticks = axis.ticks()
    marks = [svg.line((0, 1), (at, at), "grid") for at in axis.position(ticks)]
    marks += [svg.bar(*sides[b], css="bad") for b in np.flatnonzero(picture.nonfinite)]
    marks += [
        svg.bar(*sides[b], 0, 0.025, css="zero") for b in np.flatnonzero(picture.zero)
    ]
    keys = []
    if not bins.single:
        marks += [svg.band(center, low, high, "band"), svg.line(center, top, "top")]
        keys += [("band", "10th to 90th percentile"), ("top", "largest")]
    marks.append(svg.line(center, middle, "middle"))
    keys.insert(0, ("middle", "each step" if bins.single else "median"))
    if len(bins) <= 60:
        marks.append(svg.dots(center, middle, "dot"))
    if not np.all(np.isnan(limit)):
        marks.append(svg.line(np.repeat(edges, 2)[1:-1], np.repeat(limit, 2), "limit"))
        keys.append(("limit", "limit"))
    titles = _titles(picture)
    marks += [
        svg.bar(*side, css="hover", title=title)
        for side, title in zip(sides, titles, strict=True)
    ]
    y_labels = _y_labels(ticks, axis)
    body = f'<div class="y">{y_labels}</div><div class="plot">'
    body += svg.box(*marks, label="Global norm over time") + "</div>"
    if picture.clips:
        strip = [
            svg.bar(*side, css="clipped", opacity=share, title=title)
            for side, share, title in zip(sides, picture.clipped, titles, strict=True)
            if share > 0
        ]
        body += (
            '<div class="y strip"><span>clipped</span></div><div class="plot strip">'
        )
        body += svg.box(*strip, label="Share of steps clipped") + "</div>"
        keys.append(("clipped", "share of steps clipped"))
    keys += [("bad", "non-finite")] * bool(picture.nonfinite.any())
    keys += [("zero", "zero")] * bool(picture.zero.any())
    body += f'<div></div><div class="x">{_step_labels(bins)}</div>'
    return f'<div class="chart trace">{body}</div>{_legend(keys)}'


def heat(history) -> str:
    """Draws each row of parts over time, as an image with a scale."""
    picture = series.heat(history)
    rows, bins = picture.rows, picture.bins
    image = svg.png(picture.shades(), palette.heat_colors(), palette.NO_ROW)
    overlay = [
        svg.bar(0, 1, *_row_span(r, len(rows)), css="hover", title=title)
        for r, title in enumerate(_row_titles(picture))
    ]
    name = f"Norm of each {_row_word(rows)} over time"
    body = _row_labels(rows)
    body += f'<div class="plot"><img alt="" src="{image}">'
    body += svg.box(*overlay, label=name) + "</div>"
    body += f'<div></div><div class="x">{_step_labels(bins)}</div>'
    ticks = picture.axis.ticks(5)
    keys = [("zero", "exactly zero")] * bool((picture.largest == 0).any())
    keys += [("nonfinite", "NaN or inf")] * bool((~np.isfinite(picture.largest)).any())
    points = ",".join(
        f"rgb({red},{green},{blue})"
        for red, green, blue in palette.heat_colors()[palette.SCALE_START :: 28]
    )
    scale = (
        f'<div class="scale"><div style="background:linear-gradient(90deg,{points})">'
        f'</div><div class="x">{_x_labels(ticks, picture.axis)}</div></div>'
    )
    return f"{_rows_chart(rows, body)}{scale}{_legend(keys)}"


def flow(history) -> str:
    """Draws norm and relative update of each row of parts, input on top."""
    picture = series.flow(history)
    charts = [_dot_chart(picture.rows, panel) for panel in picture.panels]
    return f'<div class="pair">{"".join(charts)}</div>'


def _dot_chart(rows: Rows, dots: series.Dots) -> str:
    axis, number = dots.axis, len(rows)
    x = axis.position(dots.values)
    y = 1 - (np.arange(number) + 0.5) / number
    strange = np.isin(np.arange(number), dots.offenders)
    ticks = axis.ticks(5)
    marks = []
    if dots.usual:
        marks.append(svg.bar(*axis.position(np.array(dots.usual)), css="usual"))
    marks += [svg.line((at, at), (0, 1), "grid") for at in axis.position(ticks)]
    size = "" if number <= 40 else " small"
    marks += [
        svg.dots(x[~strange], y[~strange], f"dot{size}"),
        svg.dots(x[strange], y[strange], f"dot strange{size}"),
    ]
    for r, (label, value) in enumerate(zip(rows.labels, dots.values, strict=True)):
        title = f"{label}: {plain(value)}"
        marks.append(svg.bar(0, 1, *_row_span(r, number), css="hover", title=title))
    body = _row_labels(rows, dots.offenders)
    body += f'<div class="plot">{svg.box(*marks, label=dots.title)}</div>'
    body += f'<div></div><div class="x">{_x_labels(ticks, axis)}</div>'
    return f"<div><h3>{dots.title}</h3>{_rows_chart(rows, body)}</div>"


def _rows_chart(rows: Rows, body: str) -> str:
    height = _row_height(rows) * len(rows)
    return f'<div class="chart rows" style="--height:{height}px">{body}</div>'


def _row_height(rows: Rows) -> int:
    return int(np.clip(ROWS_HEIGHT // len(rows), 4, 22))


def _row_span(row: int, number: int) -> tuple[float, float]:
    return 1 - (row + 1) / number, 1 - row / number


def _row_word(rows: Rows) -> str:
    return "block" if rows.grouped else "part"


def _row_labels(rows: Rows, first: Iterable[int] = ()) -> str:
    """Names as many rows as there is room for, `first` those that stand out."""
    room = -(-LABEL_HEIGHT // _row_height(rows))
    shown: dict[int, str] = {}
    strange = set(first)
    for r in [*first, *range(len(rows))]:
        if all(abs(r - other) >= room for other in shown):
            css = ' class="strange"' if r in strange else ""
            name, top = escape(rows.labels[r]), 100 * (r + 0.5) / len(rows)
            shown[r] = (
                f'<span{css} style="top:{top:.4g}%" title="{name}">'
                f"{escape(elide(rows.labels[r]))}</span>"
            )
    return f'<div class="y">{"".join(shown.values())}</div>'


def elide(name: str) -> str:
    """Shortens a long name in the middle: both its ends tell parts apart.

    Example:
      >>> elide("encoder/transformer/block_3/attention/kernel")
      'encoder/transf…/attention/kernel'
    """
    if len(name) <= LABEL_LENGTH:
        return name
    head = LABEL_LENGTH * 4 // 9
    return f"{name[:head]}\N{HORIZONTAL ELLIPSIS}{name[head + 1 - LABEL_LENGTH :]}"


def _row_titles(picture: series.Heat) -> list[str]:
    titles = []
    for label, row in zip(picture.rows.labels, picture.largest, strict=True):
        finite = np.where(np.isfinite(row), row, -np.inf)
        peak = int(finite.argmax())
        words = [f"{label}: NaN or inf throughout"]
        if np.isfinite(finite[peak]):
            words = [
                f"{label}: largest {plain(row[peak])}, {_when(picture.bins, peak)}"
            ]
            if not np.isfinite(row).all():
                bad = int((~np.isfinite(row)).argmax())
                words.append(f"first not finite {_when(picture.bins, bad)}")
        titles.append("; ".join(words))
    return titles


def _titles(picture: series.Trace) -> list[str]:
    titles = []
    for b in range(len(picture.bins)):
        words = [f"no row {_when(picture.bins, b)}"]
        if picture.bins.cuts[b] < picture.bins.cuts[b + 1]:
            words = [f"{_when(picture.bins, b)}: {plain(picture.middle[b])}"]
            if not picture.bins.single:
                words[0] = words[0].replace(": ", ": median ")
                words.append(f"largest {plain(picture.top[b])}")
            if picture.clipped[b] > 0:
                words.append(f"clipped {picture.clipped[b]:.0%}")
            words += ["not finite"] * bool(picture.nonfinite[b])
        titles.append(", ".join(words))
    return titles


def _when(bins: series.Bins, b: int) -> str:
    first, last = bins.edges[b], bins.edges[b + 1] - 1
    if first == last:
        return f"step {first:,}"
    return f"steps {first:,} to {last:,}"


def _scaled(steps, bins: series.Bins) -> np.ndarray:
    first, last = bins.edges[0], bins.edges[-1]
    return (np.asarray(steps, np.float64) - first) / (last - first)


def _y_labels(ticks: list[float], axis: series.LogAxis) -> str:
    return "".join(
        f'<span style="top:{100 * (1 - at):.4g}%">{plain(tick)}</span>'
        for tick, at in zip(ticks, axis.position(ticks), strict=True)
    )


def _x_labels(ticks: list[float], axis: series.LogAxis) -> str:
    return "".join(
        f'<span style="left:{100 * at:.4g}%">{plain(tick)}</span>'
        for tick, at in zip(ticks, axis.position(ticks), strict=True)
    )


def _step_labels(bins: series.Bins) -> str:
    ticks = series.step_ticks(int(bins.edges[0]), int(bins.edges[-1]) - 1)
    return "".join(
        f'<span style="left:{100 * at:.4g}%">{tick:,}</span>'
        for tick, at in zip(ticks, _scaled(np.add(ticks, 0.5), bins), strict=True)
    )


def _legend(keys: list[tuple[str, str]]) -> str:
    items = "".join(f'<li><i class="{css}"></i>{words}</li>' for css, words in keys)
    return f'<ul class="legend">{items}</ul>' if keys else ""
