"""The numbers in the pictures: bins of time, rows of parts, axes, what stands out.

Each picture is drawn twice, by matplotlib and as SVG, and computed once, here. What is
kept is as large as the picture, however long the run was.

Where numbers are ordered, a NaN counts as the largest: it is never passed over.
"""

import dataclasses
import itertools
import math

import numpy as np

from gradnorm_jax.monitoring import palette
from gradnorm_jax.monitoring.history import History, ratio
from gradnorm_jax.monitoring.rows import Rows, arrange

MOST_BINS = 240
LATE_STEPS = 128
MOST_PARTS_IN_FLOW = 40
LEVELS_OF_NORM = 36  # bars of the histogram
_BLOCK = 64  # rows of a history that are in work at one time
USUAL_RATIO = (1e-4, 1e-2)
NAMES = {"grad": "gradient", "update": "update", "param": "parameter"}


# How dense the ticks of a logarithmic axis may be: every n-th decade, with digits.
_TICKS = (
    (1, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)),
    (1, (1, 1.5, 2, 3, 5, 7)),
    (1, (1, 2, 5)),
    (1, (1, 3)),
    *((every, (1,)) for every in range(1, 16)),
)


@dataclasses.dataclass(frozen=True)
class LogAxis:
    """A logarithmic axis from `low` to `high`."""

    low: float
    high: float

    @classmethod
    def around(cls, *values) -> "LogAxis":
        """Returns an axis that shows all positive finite values, with some air."""
        flat = np.concatenate([np.ravel(np.asarray(v, np.float64)) for v in values])
        shown = flat[(flat > 0) & np.isfinite(flat)]
        if not len(shown):
            return cls(0.1, 1.0)
        low, high = np.log10([shown.min(), shown.max()])
        air = max(0.06 * (high - low), 0.1)
        return cls(10.0 ** (low - air), 10.0 ** (high + air))

    def position(self, value):
        """Returns where a value lies from 0 to 1; 0 itself lies at 0 and inf at 1."""
        value = np.where(np.isnan(value), np.inf, value)
        with np.errstate(divide="ignore"):
            at = np.log(value / self.low) / math.log(self.high / self.low)
        return np.clip(at, 0.0, 1.0)

    def ticks(self, most: int = 6) -> list[float]:
        """Returns round numbers on the axis, as many as may be."""
        decades = range(
            math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        )
        ticks: list[float] = []
        for every, digits in _TICKS:
            values = [d * 10.0**e for e in decades if e % every == 0 for d in digits]
            ticks = [value for value in values if self.low <= value <= self.high]
            if len(ticks) <= most:
                return ticks
        return ticks


def step_ticks(first: int, last: int, most: int = 5) -> list[int]:
    """Returns a few round steps from first to last."""
    rough = max(1.0, (last - first) / most)
    decade = 10 ** math.floor(math.log10(rough))
    stride = next(m * decade for m in (1, 2, 5, 10) if m * decade >= rough)
    return list(range(math.ceil(first / stride) * stride, last + 1, stride))


@dataclasses.dataclass(frozen=True)
class Bins:
    """Stretches of time: bin `b` is of the steps `edges[b]` to `edges[b + 1] - 1`.

    `cuts[b]` to `cuts[b + 1]` are the rows of the history that it holds, perhaps none.
    `stride` is how many steps lie from one row to the next.
    """

    edges: np.ndarray
    cuts: np.ndarray
    stride: int = 1

    def __iter__(self):
        """The rows of each bin, as a slice of the history."""
        return itertools.starmap(slice, itertools.pairwise(self.cuts.tolist()))

    def __len__(self) -> int:
        """The number of bins."""
        return len(self.edges) - 1

    @property
    def single(self) -> bool:
        """Whether no bin is longer than from one row to the next."""
        return bool(np.all(np.diff(self.edges) == self.stride))

    def position(self, steps) -> np.ndarray:
        """Where steps are on the axis of time, from 0 to 1."""
        middle = np.asarray(steps) + self.stride / 2
        return (middle - self.edges[0]) / (self.edges[-1] - self.edges[0])

    def steps(self, b: int) -> tuple[int, int]:
        """The first and the last step that may have a row in a bin."""
        return int(self.edges[b]), int(self.edges[b + 1]) - self.stride


def time_bins(history: History) -> Bins:
    """Divides the steps of a run into at most 240 bins of nearly equal length."""
    first, stride = int(history.steps[0]), history.stride
    span = (int(history.steps[-1]) - first) // stride + 1
    number = min(span, MOST_BINS)
    rows = span * np.arange(number + 1, dtype=np.int64) // number
    edges = first + stride * rows
    return Bins(edges, np.searchsorted(history.steps, edges), stride)


@dataclasses.dataclass(frozen=True)
class Trace:
    """The global norm, the limit and the share of steps clipped, bin by bin.

    `low`, `middle` and `high` are the 10th, 50th and 90th percentile, `top` is the
    largest finite norm: NaN where there is none. `shares` says how many of all steps
    have a norm in each stretch of the axis, 0 counted to the lowest and what is not
    finite to the highest; `usual` is the 90th percentile of them all.
    """

    kind: str
    bins: Bins
    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray
    top: np.ndarray
    nonfinite: np.ndarray
    zero: np.ndarray
    limit: np.ndarray
    clipped: np.ndarray
    axis: LogAxis
    shares: np.ndarray
    usual: float

    @property
    def clips(self) -> bool:
        """Whether any clip was recorded."""
        return not np.all(np.isnan(self.clipped))


def trace(history: History) -> Trace:
    """Computes the picture of the global norm over time."""
    bins, kind = time_bins(history), main_kind(history)
    norms = history.global_norm(kind)
    limits = history.scalars.get("clip/limit", np.full(len(norms), np.nan))
    fractions = history.scalars.get("clip/fraction", np.full(len(norms), np.nan))
    low, middle, high, top, limit, clipped = np.full((6, len(bins)), np.nan)
    nonfinite, zero = np.zeros((2, len(bins)), bool)
    for b, rows in enumerate(bins):
        inside = norms[rows]
        if not len(inside):
            continue
        finite = inside[np.isfinite(inside)]
        nonfinite[b], zero[b] = len(finite) < len(inside), np.any(inside == 0)
        low[b], middle[b], high[b] = (quantile(inside, q) for q in (0.1, 0.5, 0.9))
        top[b] = finite.max(initial=-np.inf)
        limit[b] = quantile(limits[rows], 0.5)
        clipped[b] = share_clipped(fractions[rows])
    low, middle, high, top, limit = (
        np.where(np.isfinite(line), line, np.nan)
        for line in (low, middle, high, top, limit)
    )
    axis = LogAxis.around(low, top, limit)
    levels = np.minimum(axis.position(norms) * LEVELS_OF_NORM, LEVELS_OF_NORM - 1)
    shares = np.bincount(levels.astype(int), minlength=LEVELS_OF_NORM) / len(norms)
    usual = float(quantile(norms, 0.9))
    return Trace(
        kind, bins, low, middle, high, top, nonfinite, zero, limit, clipped, axis,
        shares, usual,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Heat:
    """The largest norm of each row of parts in each bin of time."""

    kind: str
    bins: Bins
    rows: Rows
    largest: np.ndarray  # [rows, bins]: NaN or inf if any step was
    recorded: np.ndarray  # [bins]
    axis: LogAxis

    def shades(self) -> np.ndarray:
        """Returns the picture as indices into `palette.heat_colors()`: uint8."""
        scaled = self.axis.position(self.largest) * (255 - palette.SCALE_START)
        shades = (palette.SCALE_START + np.round(scaled)).astype(np.uint8)
        shades[self.largest == 0] = palette.IS_ZERO
        shades[~np.isfinite(self.largest)] = palette.IS_NONFINITE
        shades[:, ~self.recorded] = palette.NO_ROW
        return shades


def heat(history: History) -> Heat:
    """Computes the picture of every part over time."""
    bins, kind = time_bins(history), main_kind(history)
    norms, rows = history.norms(kind), arrange(history.parts)
    largest = np.zeros((len(rows), len(bins)))
    recorded = np.zeros(len(bins), bool)
    for b, inside in enumerate(bins):
        for start in range(inside.start, inside.stop, _BLOCK):
            block = norms[start : min(start + _BLOCK, inside.stop)]
            largest[:, b] = np.maximum(largest[:, b], rows.largest(block))
            recorded[b] = True
    shown = largest[(largest > 0) & np.isfinite(largest)]
    ends = np.quantile(shown, [0.01, 0.995]) if len(shown) else np.ones(2)
    wide = ends[1] > 2 * ends[0]
    axis = LogAxis(*ends.tolist()) if wide else LogAxis.around(ends)
    return Heat(kind, bins, rows, largest, recorded, axis)


@dataclasses.dataclass(frozen=True)
class Dots:
    """One number for each row, one for each part in it, those that stand out.

    `of_parts` and `offenders` are of parts in the order of the rows.
    """

    title: str
    values: np.ndarray
    of_parts: np.ndarray
    offenders: tuple[int, ...]  # the most striking first
    axis: LogAxis
    usual: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Flow:
    """How norm and relative update go through the network in the last steps."""

    rows: Rows
    steps: tuple[int, int]
    panels: tuple[Dots, ...]


def flow(history: History) -> Flow:
    """Computes the picture of the norms by depth, over the last 128 steps."""
    kind, rows = main_kind(history), arrange(history.parts, MOST_PARTS_IN_FLOW)
    late = history.norms(kind)[-LATE_STEPS:]
    norms = quantile(rows.combine(late), 0.5)
    of_parts = quantile(late[:, rows.order], 0.5)
    strange = np.flatnonzero((of_parts == 0) | np.isinf(of_parts))
    title = f"{NAMES[kind]} norm".capitalize()
    axis = LogAxis.around(norms, of_parts)
    panels = [Dots(title, norms, of_parts, tuple(strange.tolist()), axis)]
    ratios = late_ratio(history, rows)
    of_parts = late_ratio(history)
    if ratios is not None and of_parts is not None:
        of_parts = of_parts[rows.order]
        axis = LogAxis.around(ratios, of_parts, USUAL_RATIO)
        low, high = axis.position(np.array(USUAL_RATIO))
        at = axis.position(of_parts)
        outside = np.maximum(low - at, at - high)
        order = np.argsort(-outside, kind="stable")
        offenders = tuple(order[outside[order] > 0].tolist())
        title = "Update / parameter"
        panels.append(Dots(title, ratios, of_parts, offenders, axis, USUAL_RATIO))
    steps = history.steps[-LATE_STEPS:]
    return Flow(rows, (int(steps[0]), int(steps[-1])), tuple(panels))


def main_kind(history: History) -> str:
    """Returns which norms the pictures show: of gradients, if they were recorded."""
    if not history.kinds or not len(history):
        raise ValueError(
            f"There is nothing to draw in {history!r}. Record at least one kind of"
            " norm, by `record=` of `watch` and `Monitor`."
        )
    return history.kinds[0]


def late_ratio(history: History, rows: Rows | None = None) -> np.ndarray | None:
    """Returns the median of update over parameter in the last steps, by part or row."""
    if not {"update", "param"} <= set(history.kinds):
        return None
    late = [history.norms(kind)[-LATE_STEPS:] for kind in ("update", "param")]
    if rows is not None:
        late = [rows.combine(norms) for norms in late]
    return quantile(ratio(*late), 0.5)


def quantile(values: np.ndarray, q: float, axis: int = 0) -> np.ndarray:
    """Returns a value that is there, not one between two; a NaN counts as inf."""
    at = int(np.rint(q * (values.shape[axis] - 1)))
    found = np.partition(values, at, axis=axis).take(at, axis=axis)  # NaNs come last
    return np.where(np.isnan(found), np.inf, found).astype(np.float64)


def share_clipped(fractions: np.ndarray) -> float:
    """Returns the share of steps in which anything was clipped; NaN if unknown."""
    known = fractions[~np.isnan(fractions)]
    return float(np.mean(known > 0)) if len(known) else np.nan


def plain(value: float) -> str:
    """Says a number as people write it, to three digits.

    Example:
      >>> [plain(value) for value in (0.2, 1234.5, 2e-9, 0, float("nan"))]
      ['0.2', '1,234', '2e-9', '0', 'nan']
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)))
    if -3 <= exponent < 6:
        text = f"{value:,.{max(0, 2 - exponent)}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
