"""Rules for how far the parameters move: dead, frozen, too far, not far enough."""

# ruff: noqa: D417 - `rule` takes the first argument away

import collections
import re
from collections.abc import Iterator

import numpy as np

from gradnorm_jax.monitoring.diagnosis.evidence import (
    RATIO_ROWS,
    Evidence,
    rule,
    runs_of,
    several,
)
from gradnorm_jax.monitoring.diagnosis.finding import Finding
from gradnorm_jax.monitoring.series import USUAL_RATIO, plain

#: Parts that died within so many steps of one another died of one cause.
TOGETHER = 16

_USUAL = f"usual is {plain(USUAL_RATIO[0])} to {plain(USUAL_RATIO[1])}"


@rule
def dead(run: Evidence, *, rows: int = 50, at_start: int = 10) -> Iterator[Finding]:
    """Finds parts whose gradient is exactly 0, step after step: `dead`.

    Only steps count in which some part has a gradient; if none has for as long, that is
    told instead. Parts that died together are one finding.

    Args:
      rows: How many recorded steps in a row.
      at_start: How many are enough for a part that never had a gradient.
    """
    if run.grad is None or not run.names:
        return
    total = run.totals["grad"]
    yield from _nothing(run, np.flatnonzero(np.isfinite(total)), rows)
    live = np.flatnonzero(np.isfinite(total) & (total > 0))
    spans: dict[int, tuple[int, int]] = {}
    for part, zero in _often_zero(run, live, min(rows, at_start)):
        start, end = max(runs_of(zero), key=lambda span: span[1] - span[0])
        never = end - start == len(live)
        if end - start >= (at_start if never else rows):
            spans[part] = (start, end)
    for group in _together(spans):
        yield _dead_group(run, live, group, spans, rows)


def _nothing(run: Evidence, finite: np.ndarray, rows: int) -> Iterator[Finding]:
    """Finds steps in which no part at all had a gradient."""
    silent = run.totals["grad"][finite] == 0
    start, end = max(runs_of(silent), key=lambda s: s[1] - s[0], default=(0, 0))
    if end - start >= rows:
        yield Finding(
            "dead",
            "warning",
            step=run.step(finite[start]),
            last_step=run.step(finite[end - 1]),
            count=end - start,
            where=run.names,
            parts=len(run.names),
            value=float(end - start),
            limit=float(rows),
            seen=f"no part has a gradient, for {run.counted(end - start)}"
            f" (limit {rows})",
            likely=("the loss does not depend on the parameters", "it is constant"),
            tries=("look for a stop_gradient, a dead ReLU, or a mask of all zeros",),
        )


def _often_zero(run: Evidence, live: np.ndarray, rows: int) -> Iterator[tuple]:
    """Returns the parts that are 0 in so many live rows, and in which they are."""
    if not len(live):
        return
    is_live = np.zeros(len(run), bool)
    is_live[live] = True
    zeros = np.zeros(len(run.parts), np.int64)
    for block in run.blocks():
        zero = run.norms("grad")[block] == 0
        zeros += (zero & is_live[block, None]).sum(axis=0)
    often = np.flatnonzero(zeros[run.kept] >= rows)
    for start in range(0, len(often), 32):  # few columns at one time
        parts = often[start : start + 32]
        zero = run.norms("grad")[:, run.kept[parts]] == 0
        yield from zip(parts.tolist(), zero[live].T, strict=True)


def _together(spans: dict[int, tuple[int, int]]) -> list[list[int]]:
    """Groups parts that died, and revived, at about the same time."""
    groups: list[list[int]] = []
    for part in sorted(spans, key=lambda part: spans[part]):
        near = groups and all(
            abs(mine - theirs) < TOGETHER
            for mine, theirs in zip(spans[part], spans[groups[-1][0]], strict=True)
        )
        if near:
            groups[-1].append(part)
        else:
            groups.append([part])
    return [sorted(group) for group in groups]


def _dead_group(run: Evidence, live, group, spans, rows: int) -> Finding:
    start = min(spans[part][0] for part in group)
    end = max(spans[part][1] for part in group)
    count = end - start
    never, over = count == len(live), end < len(live)
    if never:
        seen = f"gradient exactly 0 in all {several(count, 'recorded step')}"
    elif over:
        seen = f"gradient exactly 0 until step {run.step(live[end - 1]):,}"
        seen += f", for {run.counted(count)} (limit {rows})"
    else:
        seen = f"gradient exactly 0 since then, for {run.counted(count)}"
        seen += f" (limit {rows})"
    alive = next((i for i in range(len(run.names)) if i not in group), 0)
    if alive > 1:
        seen += f"; with everything before {run.names[alive]}"
    if run.update is not None:
        updates = run.at("update", live[start:end][-RATIO_ROWS:], group)
        moves = np.flatnonzero((updates > 0).any(axis=0))
        if len(moves):
            whose = "it is" if len(group) == 1 else f"{len(moves):,} of them are"
            seen += f"; yet {whose} still moved, by weight decay or momentum"
    unused = ("the loss does not use it", "it is behind a stop_gradient")
    died = ("dead ReLUs", "an expert that is not chosen", "underflow in float16")
    first = run.names[group[0]]
    return Finding(
        "dead",
        "warning",
        step=run.step(live[start]),
        last_step=run.step(live[end - 1]),
        count=count,
        where=tuple(run.names[part] for part in group),
        parts=len(run.names),
        value=float(count),
        limit=float(rows),
        seen=seen,
        likely=(*unused, *died[:1]) if start == 0 else died,
        tries=(
            "check that it is called, and what its activations are",
            f"if it is meant to be so: ignore={re.escape(first)!r}",
        ),
    )


@rule
def frozen(run: Evidence) -> Iterator[Finding]:
    """Finds parts with a gradient that do not move: `frozen`."""
    if run.grad is None or run.update is None or not len(run.late):
        return
    still = (run.at("update", run.late) == 0).all(axis=0)
    still &= (run.at("grad", run.late) > 0).any(axis=0)
    if not still.any():
        return
    names = run.named(still)
    everything = still.all()
    yield Finding(
        "frozen",
        "info",
        step=run.step(run.late[0]),
        last_step=run.step(run.late[-1]),
        count=len(run.late),
        where=names,
        parts=len(run.names),
        value=0.0,
        limit=0.0,
        seen="there is a gradient, but the update is exactly 0 in the last"
        f" {run.counted(len(run.late))}",
        likely=(
            ("the learning rate is 0", "gradients are being accumulated")
            if everything
            else ("a mask", "a label with set_to_zero or a learning rate of 0")
        ),
        tries=(f"nothing, if it is meant so: ignore={re.escape(names[0])!r}",),
    )


@rule
def ratio_high(
    run: Evidence, *, warn: float = 0.1, info: float = 0.03
) -> Iterator[Finding]:
    """Finds updates that are large beside the parameters: `ratio-high`.

    Args:
      warn: From what relative update on it is a warning,
      info: and from what on it is told at all.
    """
    if not run.relative_updates:
        return
    window, value = max(run.relative_updates, key=lambda found: found[1])
    if not value > info:
        return
    limit = warn if value > warn else info
    yield Finding(
        "ratio-high",
        "warning" if value > warn else "info",
        step=run.step(window[0]),
        last_step=run.step(window[-1]),
        count=len(window),
        value=value,
        limit=limit,
        seen=(
            f"the median matrix changes by {plain(value)} of its norm in a step (limit"
            f" {plain(limit)}, {_USUAL}), over {run.counted(len(window))}"
        ),
        likely=("the learning rate is too high", "a very small initialization"),
        tries=("a third of the learning rate", "a longer warm-up"),
    )


@rule
def ratio_low(run: Evidence, *, limit: float = 1e-5) -> Iterator[Finding]:
    """Finds updates that are nothing beside the parameters: `ratio-low`.

    Where they were larger earlier in the run, a schedule has come to its end, and
    nothing is told.

    Args:
      limit: From what relative update on a matrix does move.
    """
    if not run.relative_updates:
        return
    if max(value for _, value in run.relative_updates) >= limit:
        return
    late = run.late[run.totals["update"][run.late] > 0]
    ratios = run.ratios(late)
    names = run.named(run.matrices)
    moving = (ratios > 0).any(axis=0)
    middle = np.median(ratios, axis=0)
    low = np.flatnonzero(moving & (middle < limit))
    if not len(low) or 2 * len(low) < moving.sum():
        return
    value = float(np.median(middle[low]))
    yield Finding(
        "ratio-low",
        "warning",
        step=run.step(late[0]),
        last_step=run.step(late[-1]),
        count=len(late),
        where=tuple(names[i] for i in low),
        parts=len(run.names),
        value=value,
        limit=limit,
        seen=(
            f"update / parameter is {plain(value)} and was never above {plain(limit)}"
            f" ({_USUAL}), in {len(low):,} of {int(moving.sum()):,} matrices that move"
        ),
        likely=("the learning rate is too low", "it is still in its warm-up"),
        tries=("a higher learning rate, so that this comes to about 1e-3",),
    )


@rule
def param_growth(
    run: Evidence, *, factor: float = 3.0, warn: float = 100.0, steps: int = 300
) -> Iterator[Finding]:
    """Finds parameters that grow fast, as they do before a divergence: `param-growth`.

    The warm-up counts here: weights that inflate do so at once.

    Args:
      factor: How many times the norm of all parameters grows to be told,
      warn: and to be a warning: a run that diverged and stayed finite shows only here,
      steps: within how many steps.
    """
    if run.param is None:
        return
    rows = np.flatnonzero(run.finite)
    norms = run.totals["param"][rows]
    if len(rows) < 2 or not norms[0] > 0 or not len(run.rows):
        return
    numbers = run.steps[rows]
    begins = np.searchsorted(numbers, numbers - steps)
    least = _minima(norms, begins)
    growth = np.divide(norms, least, out=np.zeros(len(norms)), where=least > 0)
    at = int(growth.argmax())
    if not growth[at] > factor:
        return
    begin = int(begins[at])
    low = begin + int(norms[begin : at + 1].argmin())
    span = run.step(rows[at]) - run.step(rows[low])
    limit = warn if growth[at] > warn else factor
    yield Finding(
        "param-growth",
        "warning" if growth[at] > warn else "info",
        step=run.step(rows[low]),
        last_step=run.step(rows[at]),
        count=at - low,
        value=float(growth[at]),
        limit=limit,
        seen=(
            f"the norm of all parameters went from {plain(norms[low])} to"
            f" {plain(norms[at])}, {plain(growth[at])}x (limit {plain(limit)}x) in"
            f" {several(span, 'step')}"
        ),
        likely=("the learning rate is too high", "a very small initialization"),
        tries=("a lower learning rate", "weight decay"),
    )


def _minima(values: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Returns the smallest of each value and those before it, from `begins` on."""
    least, candidates = np.empty_like(values), collections.deque[int]()
    for at, begin in enumerate(begins.tolist()):
        while candidates and values[candidates[-1]] >= values[at]:
            candidates.pop()
        candidates.append(at)
        while candidates[0] < begin:
            candidates.popleft()
        least[at] = values[candidates[0]]
    return least


__all__ = ["dead", "frozen", "param_growth", "ratio_high", "ratio_low"]
