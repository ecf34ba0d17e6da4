"""Rules for what a clip does: it is always on, or never.

A clip goes by the norms of all parts, whatever parts the diagnosis ignores.
"""

# ruff: noqa: D417 - `rule` takes the first argument away

from collections.abc import Iterator

import numpy as np

from gradnorm_jax.monitoring.diagnosis.evidence import (
    FEWEST_ROWS,
    Evidence,
    rule,
)
from gradnorm_jax.monitoring.diagnosis.finding import Finding
from gradnorm_jax.monitoring.series import plain
from gradnorm_jax.monitoring.summary import percent


def _limited(run: Evidence) -> np.ndarray:
    """Returns the rows that count in which a clip had a finite limit."""
    if "clip/fraction" not in run.scalars or "clip/limit" not in run.scalars:
        return run.rows[:0]
    limits = np.isfinite(run.scalars["clip/limit"])
    known = limits & ~np.isnan(run.scalars["clip/fraction"])
    return run.rows[known[run.rows]]


@rule
def clip_always(
    run: Evidence, *, share: float = 0.5, steps: int = 100
) -> Iterator[Finding]:
    """Finds a clip that is on in most steps, early and late: `clip-always`.

    A warning; only told as info where the limit moves, since it may follow the norms so
    closely on purpose. Where a clip has many parts, their shares are averaged. A clip
    that comes on late is no finding: what makes it do so is one.

    Args:
      share: The share of steps that may be clipped.
      steps: For how many recorded steps at least.
    """
    rows = _limited(run)
    if len(rows) < max(steps, FEWEST_ROWS):
        return
    fractions, limits, scales = (
        run.scalars[name][rows].astype(np.float64)
        for name in ("clip/fraction", "clip/limit", "clip/scale")
    )
    clipped = float(fractions.mean())
    halves = np.array_split(fractions, 2)
    if not min(half.mean() for half in halves) > share:
        return
    if (scales > 1).any():  # it also enlarges: it normalizes
        return
    low, high = limits.min(), limits.max()
    moves = high > 1.01 * low
    limit = f"limit {plain(low)}" + (f" to {plain(high)}" if moves else "")
    what = "steps" if np.isin(fractions, (0, 1)).all() else "norms"
    seen = f"{percent(clipped)} of {what} were clipped (limit {percent(share)}),"
    seen += f" at a {limit}, in {run.counted(len(rows))}"
    tries: tuple[str, ...] = ("raise the limits until about 1 in 10 is clipped",)
    if run.grad is not None and _is_global(run, rows, limits, scales):
        middle, most = np.quantile(run.global_norm("grad")[rows], [0.5, 0.9])
        seen += f"; the norm has median {plain(middle)} and 90th percentile"
        seen += f" {plain(most)}"
        tries = (f"a limit of {plain(most)}",)
    seen += "; so each step has about one length, and learning rate and limit are one"
    seen += " knob"
    yield Finding(
        "clip-always",
        "info" if moves else "warning",
        step=run.step(rows[0]),
        last_step=run.step(rows[-1]),
        count=int((fractions > 0).sum()),
        value=clipped,
        limit=share,
        seen=seen,
        likely=(
            "the rule keeps its limit below most norms, as a low percentile does"
            if moves
            else "the limit is too low",
        ),
        tries=(*tries, "a lower learning rate instead; Adam takes out most of a scale"),
    )


def _is_global(run: Evidence, rows, limits, scales) -> bool:
    """Whether the scales are those of a clip of the norm of all parts together."""
    clipped = (scales > 0) & (scales < 1)
    if not clipped.any():
        return False
    reached = run.global_norm("grad")[rows][clipped] * scales[clipped]
    return bool(np.median(np.abs(reached / limits[clipped] - 1)) < 0.01)


@rule
def clip_never(
    run: Evidence, *, steps: int = 200, margin: float = 2.0
) -> Iterator[Finding]:
    """Finds a clip that never did anything: `clip-never`.

    Args:
      steps: For how many recorded steps at least.
      margin: How far the limit stays above the largest norm.
    """
    rows = _limited(run)
    if run.grad is None or len(rows) < steps:
        return
    if (run.scalars["clip/fraction"][rows] > 0).any():
        return
    norms, limits = run.global_norm("grad")[rows], run.scalars["clip/limit"][rows]
    if not (norms * margin < limits).all():
        return
    yield Finding(
        "clip-never",
        "info",
        step=run.step(rows[0]),
        last_step=run.step(rows[-1]),
        count=len(rows),
        value=float(norms.max()),
        limit=float(limits.min()),
        seen=(
            f"none of {run.counted(len(rows))} was clipped; the largest norm is"
            f" {plain(norms.max())}, the limit {plain(limits.min())}, the 99.9th"
            f" percentile {plain(float(np.quantile(norms, 0.999)))}"
        ),
        likely=("it is a safety net only",),
        tries=("nothing", "drop it, and save the norm"),
    )


__all__ = ["clip_always", "clip_never"]
