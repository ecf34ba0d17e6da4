"""Rules for training that breaks: what is not finite, explodes, or spikes."""

# ruff: noqa: D417 - `rule` takes the first argument away

import dataclasses
from collections.abc import Iterator

import numpy as np

from gradnorm_jax.monitoring.diagnosis.evidence import (
    FEWEST_ROWS,
    LATE_ROWS,
    Evidence,
    rule,
    runs_of,
    several,
)
from gradnorm_jax.monitoring.diagnosis.finding import Finding
from gradnorm_jax.monitoring.series import NAMES, plain
from gradnorm_jax.monitoring.summary import percent

#: Where both are flagged, a row is told by its gradient.
SPIKING = ("grad", "update")
#: Spikes with fewer rows between them are one, and its aftershocks.
APART = 16
#: What stays up for longer is no spike.
LONGEST = 10
#: That many rows before a NaN belong to it.
BEFORE_IT = 6
#: More spikes than that are told as one finding.
MOST_SPIKES = 5
#: A part is named if it has at least this share of the square of the norm.
LEAST_SHARE = 0.1
#: The smallest standard deviation of the logarithm of a norm that a spike is held
#: against, so that a run of almost equal norms has no spikes for that alone.
LEAST_SIGMA = 0.05


@rule
def nonfinite(run: Evidence, *, tolerated: float = 0.0) -> Iterator[Finding]:
    """Finds norms that are NaN or infinite: `non-finite`.

    An error; a warning where every update stayed finite, since something zeroed or
    skipped these steps.

    Args:
      tolerated: The share of steps that may be so without a word if their updates
        stayed finite, such as 0.01 where a dynamic loss scale probes for its limit.
    """
    bad = np.flatnonzero(~run.finite)
    if not len(bad):
        return
    first, count = int(bad[0]), len(bad)
    held = "update" in run.kinds and all(
        np.isfinite(run.totals[kind][bad]).all() for kind in run.kinds if kind != "grad"
    )
    if held and count <= tolerated * len(run):
        return
    order = [kind for kind in ("param", "grad", "update") if kind in run.kinds]
    kind = next(k for k in order if not np.isfinite(run.totals[k][first]))
    norms = run.at(kind, first)
    where = run.named(~np.isfinite(norms))
    value = norms[~np.isfinite(norms)][0]
    loss = run.scalars.get("loss", np.full(len(run), np.nan))
    known = not np.isnan(loss).all()
    bad_loss = known and not np.isfinite(loss[first])
    growth = _growth(run.totals[run.kinds[0]], first)
    seen = f"{NAMES[kind]} norm is {value:g}"
    if known:
        seen += f"; the loss was {plain(loss[first]) if bad_loss else 'finite'}"
    if len(growth) > 1:
        chain = " -> ".join(
            [*map(plain, growth), plain(run.totals[run.kinds[0]][first])]
        )
        seen += f"; the {NAMES[run.kinds[0]]} norm went {chain}"
    elif first:
        before = plain(run.totals[kind][first - 1])
        seen += f"; the norm of all was {before} at step {run.step(first - 1):,}"
    if len(run) - first > 1:
        since = several(len(run) - first, "recorded step")
        seen += f"; so in {count:,} of {since} from there on"
    if held:
        seen += ", and every update stayed finite"
    likely, tries = _causes_of_nonfinite(kind, len(growth) > 1, bad_loss)
    yield Finding(
        "non-finite",
        "warning" if held else "error",
        step=run.step(first),
        last_step=run.step(bad[-1]),
        count=count,
        where=where,
        parts=len(run.names),
        value=float(value),
        seen=seen,
        likely=likely,
        tries=tries,
    )


def _growth(total: np.ndarray, end: int) -> list[float]:
    """Returns the last norms before a row, from where they began to grow tenfold.

    A single one if they did not.
    """
    last = total[max(0, end - BEFORE_IT) : end]
    before = total[max(0, end - BEFORE_IT - LATE_ROWS) : max(0, end - BEFORE_IT)]
    usual = np.median(before) if len(before) else last[0] if len(last) else np.nan
    if not len(last) or not last[-3:].max() > 10 * usual:
        return last[-1:].tolist()
    calm = np.flatnonzero(last <= 2 * usual)
    return last[calm[-1] if len(calm) else 0 :].tolist()[-4:]


def _causes_of_nonfinite(kind: str, grew: bool, bad_loss: bool) -> tuple:
    if grew:
        return ("the learning rate is too high",), (
            "a tenth of the learning rate, or a warm-up",
            "a clip, which delays this but does not mend it",
        )
    if kind == "param":
        return ("the parameters were not finite before this step",), (
            "go back to a checkpoint from before it",
        )
    if kind == "update":
        return ("the optimizer divides by 0 or overflows",), (
            "a larger eps, or its state in float32",
        )
    if bad_loss:
        return ("a NaN or an inf in the batch", "an overflow in the forward pass"), (
            "look at the batch of this step",
            'run it again with jax.config.update("jax_debug_nans", True)',
        )
    return (
        "an overflow or 0/0 in the backward pass (softmax, sqrt, log, norm at 0)",
    ), ('run this batch again with jax.config.update("jax_debug_nans", True)',)


@rule
def exploding(
    run: Evidence, *, factor: float = 10.0, growth: float = 1.5
) -> Iterator[Finding]:
    """Finds a gradient norm that has grown for long and still grows: `exploding`.

    Args:
      factor: How far the median of the last quarter is above that of the first.
      growth: How far it is above that of the quarter before.
    """
    if run.grad is None:
        return
    block = max(FEWEST_ROWS, len(run.rows) // 4)
    if len(run.rows) < 2 * block:
        return
    norms = run.totals["grad"][run.rows]
    first, previous, last = (
        np.median(part)
        for part in (norms[:block], norms[-2 * block : -block], norms[-block:])
    )
    if not (last > factor * first and last > growth * previous):
        return
    ratio = last / first if first else np.inf
    still = last / previous if previous else np.inf
    start, end = run.step(run.rows[0]), run.step(run.rows[block - 1])
    yield Finding(
        "exploding",
        "error",
        step=run.step(run.rows[-block]),
        last_step=run.step(run.rows[-1]),
        value=float(ratio),
        limit=factor,
        seen=(
            f"the median gradient norm is {plain(ratio)}x its level at steps"
            f" {start:,} to {end:,} (limit {plain(factor)}x), and still grew"
            f" {plain(still)}x over the last {run.counted(block)}"
        ),
        likely=("divergence", "a recurrent gain above 1"),
        tries=(
            "a lower learning rate",
            "a clip at what was usual before, about"
            f" {plain(float(np.quantile(norms[:block], 0.9)))}",
        ),
    )


@dataclasses.dataclass(frozen=True)
class _Spike:
    """Some rows in which a norm stands out."""

    kind: str
    rows: np.ndarray
    peak: int
    factor: float
    sigmas: float
    update_factor: float | None


@rule
def spike(
    run: Evidence, *, sigmas: float = 6.0, factor: float = 3.0
) -> Iterator[Finding]:
    """Finds short peaks of the norm of all gradients or of all updates: `spike`.

    Args:
      sigmas: By how many standard deviations the logarithm is above its median.
      factor: How far the norm is above its running median.
    """
    spikes = _spikes(run, sigmas, factor)
    if len(spikes) > MOST_SPIKES:
        largest = max(spikes, key=lambda one: one.factor)
        steps = tuple(run.step(one.rows[0]) for one in spikes)
        first = ", ".join(f"{step:,}" for step in steps[:3])
        of_all = f"{len(steps):,} spikes, at steps {first}, ..., {steps[-1]:,}; the"
        of_all += f" largest is at step {run.step(largest.rows[0]):,}: "
        yield dataclasses.replace(
            _told(run, largest, sigmas, factor, of_all),
            step=steps[0],
            last_step=run.step(spikes[-1].rows[-1]),
            count=len(spikes),
            steps=steps,
        )
        return
    for one in spikes:
        yield _told(run, one, sigmas, factor)


def _spikes(run: Evidence, sigmas: float, factor: float) -> list[_Spike]:
    found = {
        kind: _outliers(run, kind, sigmas, factor)
        for kind in SPIKING
        if kind in run.kinds
    }
    standing_out = np.zeros(len(run), bool)
    for factors, _ in found.values():
        standing_out |= factors > 0
    flagged = np.flatnonzero(standing_out)
    cuts = np.flatnonzero(np.diff(flagged) >= APART) + 1
    spikes = []
    for event in np.split(flagged, cuts) if len(flagged) else ():
        span = slice(event[0], event[-1] + 1)
        peaks = {kind: f[span] for kind, (f, _) in found.items() if f[span].any()}
        lasting = any(
            end - start > LONGEST
            for factors in peaks.values()
            for start, end in runs_of(factors > 0)
        )
        ends_badly = not run.finite[span.stop : span.stop + BEFORE_IT].all()
        if lasting or ends_badly:  # the beginning of something else
            continue
        kind = next(iter(peaks))
        rows = event[peaks[kind][event - event[0]] > 0]
        peak = int(event[0] + peaks[kind].argmax())
        factors, z = found[kind]
        also = float(peaks["update"].max()) if len(peaks) == 2 else None
        spikes.append(
            _Spike(kind, rows, peak, float(factors[peak]), float(z[peak]), also)
        )
    return spikes


def _outliers(
    run: Evidence, kind: str, sigmas: float, factor: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns by what factor and by how many sigmas a row stands out; 0 if it does not.

    A step of norm 0, such as one that only accumulates, is passed over.
    """
    total = run.totals[kind]
    rows = run.rows[total[run.rows] > 0]
    logs = np.log(total[rows])
    above = np.nan_to_num(logs - _medians_before(logs), nan=0)
    factors, z = np.zeros((2, len(run)))
    for at in np.flatnonzero(above > np.log(factor)):
        window = logs[max(0, at - LATE_ROWS) : at]
        deviation = _median(np.abs(window - _median(window)))
        sigma = max(1.4826 * deviation, LEAST_SIGMA)
        if above[at] > sigmas * sigma:
            factors[rows[at]], z[rows[at]] = np.exp(above[at]), above[at] / sigma
    return factors, z


def _medians_before(values: np.ndarray) -> np.ndarray:
    """Returns for each value the median of the 128 before it, or of those there are.

    NaN where these are fewer than 20.
    """
    medians = np.full(len(values), np.nan)
    few = np.arange(FEWEST_ROWS, min(LATE_ROWS, len(values)))
    before = np.where(np.arange(LATE_ROWS) < few[:, None], _first(values), np.inf)
    ranked, rows = np.sort(before, axis=1), np.arange(len(few))
    medians[few] = (ranked[rows, (few - 1) // 2] + ranked[rows, few // 2]) / 2
    if len(values) > LATE_ROWS:
        windows = np.lib.stride_tricks.sliding_window_view(values[:-1], LATE_ROWS)
        for start in range(0, len(windows), 4096):
            found = _median(windows[start : start + 4096])
            medians[LATE_ROWS + start :][: len(found)] = found
    return medians


def _first(values: np.ndarray) -> np.ndarray:
    """Returns the first 128 values, filled up if they are fewer."""
    return np.pad(values[:LATE_ROWS], (0, max(0, LATE_ROWS - len(values))))


def _median(windows: np.ndarray) -> np.ndarray:
    """Returns the median along the last axis; `np.median` is slower, for its NaNs."""
    size = windows.shape[-1]
    middle = [(size - 1) // 2, size // 2]
    return np.partition(windows, middle, axis=-1)[..., middle].mean(axis=-1)


def _told(
    run: Evidence, one: _Spike, sigmas: float, factor: float, of_all: str = ""
) -> Finding:
    squares = np.square(run.at(one.kind, one.peak))
    share = squares / squares.sum()
    leader = int(share.argmax())
    name = NAMES[one.kind]
    last = int(one.rows[-1])
    leads = share[leader] >= LEAST_SHARE
    seen = (
        f"the {name} norm of all is {plain(run.totals[one.kind][one.peak])},"
        f" {plain(one.factor)}x its running median (limit {plain(factor)}x and"
        f" {plain(sigmas)} sigma, this is {plain(one.sigmas)}), for"
        f" {run.counted(len(one.rows))};"
        f" {'' if leads else 'at most '}{percent(share[leader])} of its square is in"
        f" {'this' if leads else 'any one'} part"
    )
    if one.update_factor is not None:
        seen += f"; the update norm was up to {plain(one.update_factor)}x its own"
    scale = run.scalars.get("clip/scale", np.full(len(run), np.nan))[one.peak]
    if scale < 1:
        seen += f"; clipped by a factor of {plain(scale)}"
    ended = last + 1 < len(run)
    seen += f"; over at step {run.step(last + 1):,}" if ended else "; not over yet"
    step = f"{run.step(one.rows[0]):,}"
    if one.kind == "grad":
        likely = ("an unusual batch", "a sharp place of the loss")
        tries = (
            f"look at the batch of step {step}",
            "if it comes back, skip such steps (skip_step) or clip",
            "if the loss does not recover, restart about 100 steps back and pass over"
            " these batches",
        )
    else:
        likely = ("the optimizer's second moments had become too small",)
        tries = ("a lower b2 of Adam", "a lower learning rate, or a longer warm-up")
    return Finding(
        "spike",
        "warning",
        step=run.step(one.rows[0]),
        last_step=run.step(last),
        count=len(one.rows),
        where=(run.names[leader],) if leads else (),
        parts=len(run.names),
        value=float(one.factor),
        limit=factor,
        seen=of_all + seen,
        likely=likely,
        tries=tries,
    )


__all__ = ["exploding", "nonfinite", "spike"]
