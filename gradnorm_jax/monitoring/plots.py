"""The pictures of a run as matplotlib figures."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradnorm_jax.monitoring import marks, palette, series
from gradnorm_jax.monitoring.archive import write_whole
from gradnorm_jax.monitoring.diagnosis import Finding, diagnose
from gradnorm_jax.monitoring.history import History
from gradnorm_jax.monitoring.rows import Rows
from gradnorm_jax.monitoring.series import plain

_COLORS = {"error": palette.NONFINITE, "warning": palette.LIMIT, "info": "0.3"}
_MOST_LABELS = 40

Findings = Sequence[Finding] | None


def norm_trace(history: History, findings: Findings = None) -> Any:
    """Draws the global norm over time, the limit, and the share of steps clipped.

    A long run is divided into stretches of time: a line for the median of each, a band
    from the 10th to the 90th percentile, and a thin line for the largest. The bars on
    the right say how often the norm was how large.

    Args:
      history: The run, as `load` reads it.
      findings: What is marked; by default what `diagnose` finds.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ImportError: If matplotlib is not installed.
      ValueError: If no norms were recorded.
    """
    picture = series.trace(history)
    bins = picture.bins
    figure = _figure(9, 4.2)
    (above, beside), (strip, corner) = figure.subplots(
        2, 2, sharex="col", sharey="row", height_ratios=(12, 1), width_ratios=(10, 1)
    )
    corner.set_visible(False)
    _draw_norm(above, picture)
    _draw_histogram(beside, picture)
    _mark_steps(above, bins, _found(history, findings))
    if picture.clips:
        _shade(strip, bins, palette.LIMIT, np.nan_to_num(picture.clipped))
        strip.set_ylabel("clipped", rotation=0, ha="right", va="center")
        strip.set(yticks=[], ylim=(0, 1), facecolor="0.97", xlabel="step")
    else:
        strip.set_visible(False)
        above.tick_params(labelbottom=True)
        above.set_xlabel("step")
    _step_axis(above, bins)
    return figure


def heat_map(history: History, findings: Findings = None) -> Any:
    """Draws the norm of every part over time, the first part on top.

    A cell shows the largest of its steps, so that a spike of one step is seen. It is
    gray where every step was exactly zero and red where any was not finite. Above 150
    parts a row is a block of them.

    Args:
      history: The run, as `load` reads it.
      findings: What is marked; by default what `diagnose` finds.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ImportError: If matplotlib is not installed.
      ValueError: If no norms were recorded.
    """
    picture = series.heat(history)
    rows, bins = picture.rows, picture.bins
    figure = _figure(9, _height(len(rows)))
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.ticker import NullLocator

    colors = palette.heat_colors() / 255
    axes = figure.subplots()
    axes.imshow(
        colors[picture.shades()],
        aspect="auto", interpolation="nearest",
        extent=(*_span(bins), len(rows) - 0.5, -0.5),
    )  # fmt: skip
    for _, _, end in () if rows.grouped else rows.blocks()[:-1]:
        axes.axhline(end - 0.5, c="w", lw=0.6)
    found = _found(history, findings)
    _row_axis(axes, rows, marks.of_rows(found, history.parts, rows))
    _mark_steps(axes, bins, found)
    _step_axis(axes, bins)
    axes.set_xlabel("step")
    scale = ScalarMappable(
        LogNorm(picture.axis.low, picture.axis.high),
        ListedColormap(colors[palette.SCALE_START :]),
    )
    bar = figure.colorbar(scale, ax=axes, pad=0.015, aspect=40)
    ticks = picture.axis.ticks()
    bar.set_ticks(ticks, labels=[plain(tick) for tick in ticks])
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_label(f"{series.NAMES[picture.kind]} norm; gray: zero, red: not finite")
    return figure


def flow(history: History, findings: Findings = None) -> Any:
    """Draws the norm of each part beside its relative update, over the last steps.

    The shaded band from 0.0001 to 0.01 is where the update relative to its parameter
    usually lies. What stands out is red.

    Args:
      history: The run, as `load` reads it.
      findings: What is marked; by default what `diagnose` finds.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ImportError: If matplotlib is not installed.
      ValueError: If no norms were recorded.
    """
    picture = series.flow(history)
    rows, panels = picture.rows, picture.panels
    figure = _figure(9, _height(len(rows)))
    size = 30 if len(rows) <= 40 else 12
    of_rows = marks.of_rows(_found(history, findings), history.parts, rows)
    row_of = rows.row_of()
    for axes, dots in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0],
        panels,
        strict=True,
    ):
        at, y = _on_axis(dots.axis, dots.of_parts), row_of + 0.6 * rows.shifts()
        strange = np.isin(np.arange(len(y)), dots.offenders)
        if dots.usual:
            axes.axvspan(*dots.usual, color=palette.UPDATE, alpha=0.15, lw=0)
        usual = {"clip_on": False, "c": palette.GRAD}
        if rows.grouped:
            middle = _on_axis(dots.axis, dots.values)
            axes.scatter(middle, range(len(rows)), size, **usual)
            usual |= {"alpha": 0.55, "lw": 0}
        small = size / 4 if rows.grouped else size
        axes.scatter(at[~strange], y[~strange], small, **usual)
        axes.scatter(at[strange], y[strange], small, palette.NONFINITE, clip_on=False)
        _log_axis(axes.xaxis, dots.axis)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(dots.title, loc="left", fontsize="medium")
        axes.tick_params(left=False)
    _row_axis(figure.axes[0], rows, of_rows)  # all have the same
    first, last = picture.steps
    figure.supxlabel(f"median of the steps {first:,} to {last:,}", fontsize="medium")
    return figure


def save_all(
    history: History, directory: str | os.PathLike, findings: Findings = None
) -> list[Path]:
    """Writes the three pictures as PNG files.

    Args:
      history: The run, as `load` reads it.
      directory: Where to; it is made if it is not there.
      findings: What is marked; by default what `diagnose` finds.

    Returns:
      The paths of `norm_trace.png`, `heat_map.png` and `flow.png`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths, found = [], _found(history, findings)
    for draw in (norm_trace, heat_map, flow):
        paths.append(directory / f"{draw.__name__}.png")
        save = functools.partial(draw(history, found).savefig, format="png", dpi=150)
        write_whole(paths[-1], save)
    return paths


def _figure(width: float, height: float) -> Any:
    """Returns an empty figure that no window manager knows of."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib: `pip install 'gradnorm-jax[plot]'`. The HTML"
            " report does without."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _found(history: History, findings: Findings) -> Sequence[Finding]:
    return diagnose(history) if findings is None else findings


def _on_axis(axis: series.LogAxis, values: np.ndarray) -> np.ndarray:
    """Returns the values with those that lie off the axis moved to its ends."""
    return axis.low * (axis.high / axis.low) ** axis.position(values)


def _height(rows: int) -> float:
    return float(np.clip(1.2 + 0.22 * rows, 2.4, 9))


def _draw_norm(axes: Any, picture: series.Trace) -> None:
    bins, color = picture.bins, palette.GRAD
    center = (bins.edges[:-1] + bins.edges[1:] - bins.stride) / 2
    style = "o-" if len(bins) <= 60 else "-"
    name = "each step" if bins.single else "median"
    axes.plot(center, picture.middle, style, c=color, ms=4, lw=1.4, label=name)
    if not bins.single:
        between = {"color": color, "alpha": 0.24, "lw": 0}
        name = "10th to 90th percentile"
        axes.fill_between(center, picture.low, picture.high, label=name, **between)
        axes.plot(center, picture.top, c=color, lw=0.7, alpha=0.5, label="largest")
    if not np.all(np.isnan(picture.limit)):
        stairs = {"baseline": None, "color": palette.LIMIT, "ls": "--", "lw": 1.4}
        axes.stairs(
            picture.limit, bins.edges - bins.stride / 2, label="limit", **stairs
        )
    _shade(axes, bins, palette.NONFINITE, 0.45 * picture.nonfinite)
    _shade(axes, bins, palette.ZERO, picture.zero, height=0.025)
    _log_axis(axes.yaxis, picture.axis)
    axes.set_ylabel(f"global {series.NAMES[picture.kind]} norm")
    axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.07))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(bottom=False)


def _draw_histogram(axes: Any, picture: series.Trace) -> None:
    number, axis = len(picture.shares), picture.axis
    edges = axis.low * (axis.high / axis.low) ** (np.arange(number + 1) / number)
    style = {"color": palette.GRAD, "alpha": 0.6, "lw": 0}
    axes.barh(edges[:-1], picture.shares, np.diff(edges), align="edge", **style)
    axes.axhline(_on_axis(axis, np.array(picture.usual)), c="0.2", lw=0.8, ls=":")
    title = f"90th pct.\n{plain(picture.usual)}"
    axes.set_title(title, loc="left", fontsize="small")
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelbottom=False)


def _mark_steps(axes: Any, bins: series.Bins, findings: Sequence[Finding]) -> None:
    """Marks the steps of findings above a picture."""
    for one in marks.moments(findings, bins):
        left, right = _span(bins)
        at = left + one.at * (right - left)
        color = _COLORS[one.finding.level]
        style = {"color": color, "fontsize": "small", "clip_on": False}
        axes.text(
            at, 1.01, f"{one.label}\n\u25be", ha="center", va="bottom",
            linespacing=0.8, transform=axes.get_xaxis_transform(), parse_math=False,
            **style,
        )  # fmt: skip


def _shade(axes: Any, bins: series.Bins, color: str, opacity, height=1.0) -> None:
    """Shades the bins in which the opacity is not 0, from the bottom up."""
    for b in np.flatnonzero(opacity):
        left, right = bins.edges[b : b + 2] - bins.stride / 2
        alpha = float(opacity[b])
        axes.axvspan(left, right, ymax=height, color=color, alpha=alpha, lw=0)


def _log_axis(axis: Any, scale: series.LogAxis) -> None:
    from matplotlib.ticker import NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.axes.set(**{f"{axis.axis_name}lim": (scale.low, scale.high)})
    ticks = scale.ticks()
    axis.set_ticks(ticks, [plain(tick) for tick in ticks])
    axis.set_minor_locator(NullLocator())
    axis.axes.grid(axis=axis.axis_name, color="0.9")
    axis.axes.set_axisbelow(True)


def _span(bins: series.Bins) -> tuple[float, float]:
    """Where the axis of steps begins and ends."""
    half = bins.stride / 2
    return float(bins.edges[0] - half), float(bins.edges[-1] - half)


def _step_axis(axes: Any, bins: series.Bins) -> None:
    ticks = series.step_ticks(int(bins.edges[0]), bins.steps(len(bins) - 1)[1])
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlim(*_span(bins))


def _row_axis(axes: Any, rows: Rows, marked: Mapping[int, list[Finding]]) -> None:
    """Names the rows, or their blocks where there are too many."""
    places = {r + 0.0: label for r, label in enumerate(rows.labels)}
    if len(rows) > _MOST_LABELS:
        named = rows.blocks()
        places = {(start + end - 1) / 2: name for name, start, end in named}
        every = -(-len(places) // _MOST_LABELS)
        places = dict(list(places.items())[::every])
        for r in marked:
            near = [at for at in places if abs(at - r) < len(rows) / _MOST_LABELS]
            places = {at: places[at] for at in places if at not in near}
            places[r] = rows.labels[r]
    names = list(places.values())
    axes.set_yticks(list(places), names, fontsize="small", parse_math=False)
    for at, label in zip(places, axes.get_yticklabels(), strict=True):
        if at in marked:
            label.set_color(_COLORS[marks.worst(marked[int(at)])])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(left=False)
