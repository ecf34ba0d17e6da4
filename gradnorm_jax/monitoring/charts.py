"""The three pictures of a report: HTML around SVG, so that text keeps its size."""

import itertools
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from gradnorm_jax.monitoring import marks, palette, series, svg
from gradnorm_jax.monitoring.diagnosis import Finding
from gradnorm_jax.monitoring.history import History
from gradnorm_jax.monitoring.rows import Rows, tell_apart
from gradnorm_jax.monitoring.series import plain
from gradnorm_jax.monitoring.summary import percent

ROWS_HEIGHT = 560  # pixels that the rows of parts share
LABEL_HEIGHT = 13
TAIL_LENGTH = 12  # characters that are never left out of a label
MOST_LINES = 12  # of words under the pointer
JITTER = 0.6  # of the height of a row


def trace(history: History, findings: Sequence[Finding] = ()) -> str:
    """Draws the global norm over time, the limit, and the share of steps clipped."""
    picture = series.trace(history)
    bins, axis = picture.bins, picture.axis
    edges = bins.position(bins.edges - bins.stride / 2)
    sides = list(itertools.pairwise(edges))
    center = (edges[:-1] + edges[1:]) / 2
    low, middle, high, top, limit = (
        np.where(np.isnan(values), np.nan, axis.position(values))
        for values in (picture.low, picture.middle, picture.high, picture.top,
                       picture.limit)
    )  # fmt: skip
    ticks = axis.ticks()
    drawn = [svg.line((0, 1), (at, at), "grid") for at in axis.position(ticks)]
    drawn += [svg.bar(*sides[b], css="bad") for b in np.flatnonzero(picture.nonfinite)]
    drawn += [
        svg.bar(*sides[b], 0, 0.025, css="zero") for b in np.flatnonzero(picture.zero)
    ]
    keys = [("middle", "each step" if bins.single else "median")]
    if not bins.single:
        drawn += [svg.band(center, low, high, "band"), svg.line(center, top, "top")]
        keys += [("band", "10th to 90th percentile"), ("top", "largest")]
    drawn.append(svg.line(center, middle, "middle"))
    if len(bins) <= 60:
        drawn.append(svg.dots(center, middle, "dot"))
    if not np.all(np.isnan(limit)):
        drawn.append(svg.line(np.repeat(edges, 2)[1:-1], np.repeat(limit, 2), "limit"))
        keys.append(("limit", "limit"))
    titles = _titles(picture)
    drawn += [
        svg.bar(*side, css="hover", title=title)
        for side, title in zip(sides, titles, strict=True)
    ]
    body = _moments(findings, bins)
    body += f'<div class="y">{_y_labels(ticks, axis)}</div><div class="plot">'
    body += svg.box(*drawn, label="Global norm over time") + "</div>"
    body += _histogram(picture)
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
    keys.append(("share", "share of all steps, by norm"))
    keys.append(("usual", f"90th percentile, {plain(picture.usual)}"))
    keys += [("bad", "non-finite")] * bool(picture.nonfinite.any())
    keys += [("zero", "zero")] * bool(picture.zero.any())
    body += f'<div class="x">{_step_labels(bins)}</div>'
    return f'<div class="chart trace">{body}</div>{_legend(keys)}'


def _histogram(picture: series.Trace) -> str:
    """Draws how often the norm was how large, beside it and on the same axis."""
    number, axis = len(picture.shares), picture.axis
    edges = axis.low * (axis.high / axis.low) ** (np.arange(number + 1) / number)
    drawn = []
    for level in np.flatnonzero(picture.shares):
        span, share = (level / number, (level + 1) / number), picture.shares[level]
        low, high = map(plain, edges[level : level + 2])
        words = f"{low} to {high}"
        words = f"up to {high}" if level == 0 else words
        words = f"{low} and more, or not finite" if level == number - 1 else words
        width = max(0.03, share / picture.shares.max())  # one step is seen, too
        title = f"{words}: {percent(share)} of the steps"
        drawn.append(svg.bar(0, width, *span, css="share"))
        drawn.append(svg.bar(0, 1, *span, css="hover", title=title))
    usual = float(axis.position(picture.usual))
    drawn.append(svg.line((0, 1), (usual, usual), "usual"))
    name = "Share of the steps by norm"
    return f'<div class="plot histogram">{svg.box(*drawn, label=name)}</div>'


def _moments(findings: Sequence[Finding], bins: series.Bins) -> str:
    """Marks the steps of findings, in a line above a picture."""
    found = marks.moments(findings, bins)
    if not found:
        return ""
    spans = "".join(
        f'<span class="{one.finding.level}" style="left:{100 * one.at:.4g}%"'
        f' title="{escape(marks.brief(one.finding))}">'
        f"<b{' class=wide' * (not one.fits_phone)}>{escape(one.label)}</b></span>"
        for one in reversed(found)
    )
    return f'<div class="x moments">{spans}</div>'


def heat(history: History, findings: Sequence[Finding] = ()) -> str:
    """Draws each row of parts over time, as an image with a scale."""
    picture = series.heat(history)
    rows, bins = picture.rows, picture.bins
    of_rows = marks.of_rows(findings, history.parts, rows)
    image = svg.png(picture.shades(), palette.heat_colors(), palette.NO_ROW)
    ends = [end for _, _, end in rows.blocks()[:-1]] if not rows.grouped else []
    overlay = [
        svg.line((0, 1), (1 - end / len(rows),) * 2, "block")
        for end in (ends if 2 * len(ends) < len(rows) else [])
    ]
    for r, title in enumerate(_row_titles(picture)):
        span, found = _row_span(r, len(rows)), of_rows.get(r, [])
        title = "\n".join([title, *map(marks.brief, found)])
        overlay.append(svg.bar(0, 1, *span, css="hover", title=title))
        if found:
            css = f"mark {marks.worst(found)}"
            overlay.append(svg.bar(1.006, 1.016, *span, css=css, title=title))
    name = f"Norm of each {_row_word(rows)} over time"
    body = _moments(findings, bins)
    body += _row_labels(rows, {r: marks.worst(found) for r, found in of_rows.items()})
    body += f'<div class="plot"><img alt="" src="{image}">'
    body += svg.box(*overlay, label=name) + "</div>"
    body += f'<div class="x">{_step_labels(bins)}</div>'
    ticks = picture.axis.ticks(5)
    keys = [("zero", "exactly zero")] * bool((picture.largest == 0).any())
    keys += [("nonfinite", "NaN or inf")] * bool((~np.isfinite(picture.largest)).any())
    largest = np.max(picture.largest, initial=0, where=np.isfinite(picture.largest))
    if largest > picture.axis.high:
        keys += [("beyond", f"beyond the scale, up to {plain(largest)}")]
    keys += [("mark", "named by a finding")] * bool(of_rows)
    points = ",".join(
        f"rgb({red},{green},{blue})"
        for red, green, blue in palette.heat_colors()[palette.SCALE_START :: 28]
    )
    scale = (
        f'<div class="scale"><div style="background:linear-gradient(90deg,{points})">'
        f'</div><div class="x">{_x_labels(ticks, picture.axis)}</div></div>'
    )
    return f"{_rows_chart(rows, body)}{scale}{_legend(keys)}"


def flow(history: History, findings: Sequence[Finding] = ()) -> str:
    """Draws norm and relative update of each row of parts, input on top."""
    picture = series.flow(history)
    of_rows = marks.of_rows(findings, history.parts, picture.rows)
    names = [history.parts[i] for i in picture.rows.order]
    charts = [
        _dot_chart(picture.rows, names, panel, of_rows) for panel in picture.panels
    ]
    keys = [("dots", "block"), ("parts", "its parts")] * picture.rows.grouped
    keys += [("strange", "stands out")] * any(dots.offenders for dots in picture.panels)
    keys += [("band usual", "usual")] * (len(picture.panels) > 1)
    return f'<div class="pair">{"".join(charts)}</div>{_legend(keys)}'


def _dot_chart(
    rows: Rows,
    names: list[str],
    dots: series.Dots,
    of_rows: Mapping[int, list[Finding]],
) -> str:
    axis, number = dots.axis, len(rows)
    row_of = rows.row_of()
    strange = np.isin(np.arange(len(names)), dots.offenders)
    ticks = axis.ticks(5)
    drawn = []
    if dots.usual:
        drawn.append(svg.bar(*axis.position(np.array(dots.usual)), css="usual"))
    drawn += [svg.line((at, at), (0, 1), "grid") for at in axis.position(ticks)]
    size = "" if number <= 40 else " small"
    x = axis.position(dots.of_parts)
    y = 1 - (row_of + 0.5 + JITTER * rows.shifts()) / number
    if rows.grouped:
        middle = 1 - (np.arange(number) + 0.5) / number
        drawn.append(svg.dots(axis.position(dots.values), middle, f"dot{size}"))
        size += " part"
    drawn += [
        svg.dots(x[~strange], y[~strange], f"dot{size}"),
        svg.dots(x[strange], y[strange], f"dot strange{size}"),
    ]
    for r, (label, value) in enumerate(zip(rows.labels, dots.values, strict=True)):
        lines = [f"{label}: {plain(value)}"]
        if rows.grouped:
            inside = np.flatnonzero(row_of == r).tolist()
            lines += [
                f"{names[i]}: {plain(dots.of_parts[i])}" for i in inside[:MOST_LINES]
            ]
            more = len(inside) - MOST_LINES
            lines += [f"and {more:,} more"] * (more > 0)
        lines += map(marks.brief, of_rows.get(r, []))
        title = "\n".join(lines)
        drawn.append(svg.bar(0, 1, *_row_span(r, number), css="hover", title=title))
    levels = {int(row_of[i]): "error" for i in dots.offenders}
    shown = {int(row_of[i]): names[i] for i in reversed(dots.offenders)}
    levels |= {r: marks.worst(found) for r, found in of_rows.items() if r not in levels}
    body = _row_labels(rows, levels, shown)
    body += f'<div class="plot">{svg.box(*drawn, label=dots.title)}</div>'
    body += f'<div class="x">{_x_labels(ticks, axis)}</div>'
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


def _row_labels(
    rows: Rows, levels: Mapping[int, str], names: Mapping[int, str] | None = None
) -> str:
    """Names as many rows as there is room for, first those that have a level.

    Where rows are too narrow for a name of each, it is the blocks that are named.
    """
    height = _row_height(rows)
    labels = dict(enumerate(rows.labels)) | dict(names or {})
    short = tell_apart(labels.values())
    places = [(labels[r], r + 0.5, levels[r]) for r in levels]
    if height >= LABEL_HEIGHT:
        others = [(labels[r], r + 0.5) for r in range(len(rows)) if r not in levels]
    else:
        others = [(name, (start + end) / 2) for name, start, end in rows.blocks()]
    places += [(name, at, "") for name, at in others]
    shown: list[tuple[str, float, str]] = []
    for name, at, level in places:
        if all(abs(at - other) * height >= LABEL_HEIGHT for _, other, _ in shown):
            shown.append((name, at, level))
    spans = "".join(
        f"<span{f' class={level}' * bool(level)}"
        f' style="top:{100 * at / len(rows):.4g}%"'
        f' title="{escape(name)}">{_elidable(short.get(name, name))}</span>'
        for name, at, level in sorted(shown, key=lambda place: place[1])
    )
    return f'<div class="y">{spans}</div>'


def _elidable(name: str) -> str:
    """Sets a name so that it is cut short before its end, which tells parts apart."""
    head, tail = name[:-TAIL_LENGTH], name[-TAIL_LENGTH:]
    return f"<i>{escape(head)}</i>{escape(tail)}" if head else escape(tail)


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
    first, last = bins.steps(b)
    if first == last:
        return f"step {first:,}"
    return f"steps {first:,} to {last:,}"


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
    ticks = series.step_ticks(int(bins.edges[0]), bins.steps(len(bins) - 1)[1])
    return "".join(
        f'<span style="left:{100 * at:.4g}%">{tick:,}</span>'
        for tick, at in zip(ticks, bins.position(ticks), strict=True)
    )


def _legend(keys: list[tuple[str, str]]) -> str:
    items = "".join(f'<li><i class="{css}"></i>{words}</li>' for css, words in keys)
    return f'<ul class="legend">{items}</ul>' if keys else ""
