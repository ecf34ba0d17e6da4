"""What a run comes to: one sentence, the key figures, and a line for each part."""

import dataclasses

import numpy as np

from gradnorm_jax.monitoring import series
from gradnorm_jax.monitoring.history import History
from gradnorm_jax.monitoring.rows import network_order
from gradnorm_jax.monitoring.series import plain

#: How many norms are in work at one time.
_AT_ONCE = 2**21


@dataclasses.dataclass(frozen=True)
class KeyFigure:
    """A number, what it is, and what to know about it."""

    label: str
    value: str
    note: str = ""
    alarming: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
    """The norms of one part over a whole run.

    `largest` is the largest finite norm; `at_step` is where it first occurred.
    """

    name: str
    median: float
    largest: float
    at_step: int
    zero_steps: int
    nonfinite_steps: int
    ratio: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """A run in a sentence, in figures, and by part."""

    sentence: str
    figures: tuple[KeyFigure, ...]
    parts: tuple[Part, ...]


def summarize(history: History) -> Summary:
    """Computes what stands above and below the pictures of a report."""
    kind = series.main_kind(history)
    name = f"{series.NAMES[kind]} norm"
    parts = _parts(history, kind)
    norms = history.global_norm(kind)
    finite = np.where(np.isfinite(norms), norms, -np.inf)
    peak = int(finite.argmax())
    median = float(series.quantile(norms, 0.5))
    figures = [
        KeyFigure("Steps", f"{len(history):,}", _span(history)),
        KeyFigure(f"Final {name}", plain(norms[-1])),
    ]
    sentence = f"The {name} was never finite"
    if np.isfinite(finite[peak]):
        figures.append(KeyFigure(f"Median {name}", plain(median)))
        sentence = f"The {name} ended at {plain(norms[-1])}, with a median of"
        sentence += f" {plain(median)}"
        largest, step = plain(norms[peak]), f"{history.steps[peak]:,}"
        figures.append(KeyFigure(f"Largest {name}", largest, f"at step {step}"))
        sentence += f" and a peak of {largest} at step {step}"
    clip = _clip(history)
    if clip:
        figures.append(clip)
        sentence += f"; {clip.value} of the steps were clipped"
    noise = _noise_scale(history)
    if noise:
        figures.append(noise)
    nonfinite, where = _nonfinite(history)
    figures.append(
        KeyFigure("Non-finite steps", f"{nonfinite:,}", where, nonfinite > 0)
    )
    if nonfinite:
        sentence += f". {nonfinite:,} {_plural('step', nonfinite)} had a NaN or an inf,"
        sentence += f" {where}"
    late = history.norms(kind)[-series.LATE_STEPS :]
    zero = (late == 0).all(axis=0)
    if history.sizes is not None:  # a part without entries has no other norm
        zero &= history.sizes > 0
    dead = [history.parts[i] for i in np.flatnonzero(zero)]
    if dead:
        named = _and_more(dead)
        figures.append(KeyFigure("Parts at zero", f"{len(dead):,}", named, True))
        last = f"the last {len(late):,} steps" if len(late) > 1 else "the last step"
        sentence += f". The {name} of {named} was zero in {last}"
    if history.dropped:
        note = "overwritten before they were read"
        figures.append(KeyFigure("Dropped rows", f"{history.dropped:,}", note, True))
    return Summary(sentence + ".", tuple(figures), parts)


def _span(history: History) -> str:
    number = len(history.parts)
    span = f"{history.steps[0]:,} to {history.steps[-1]:,}"
    return f"{span}, {number:,} {_plural('part', number)}"


def _clip(history: History) -> KeyFigure | None:
    """Says how often the run was clipped, and at which limit."""
    fractions = history.scalars.get("clip/fraction", np.array([]))
    share = series.share_clipped(fractions)
    if np.isnan(share):
        return None
    limits = history.scalars["clip/limit"]
    limits = limits[~np.isnan(limits)]
    note = ""
    if len(limits):
        low, high = plain(limits.min()), plain(limits.max())
        note = f"limit {low}" if low == high else f"limit {low} to {high}"
    return KeyFigure("Steps clipped", percent(share), note)


def _noise_scale(history: History) -> KeyFigure | None:
    """Says how noisy the gradients were, if that was recorded and is known at all."""
    scales = history.scalars.get("noise_scale/simple", np.array([]))
    known = np.flatnonzero(np.isfinite(scales))
    if not len(known):
        return None
    last = known[-1]
    median = float(series.quantile(scales[known], 0.5))
    note = f"examples, at step {history.steps[last]:,}; median {plain(median)}"
    missing = len(scales) - len(known)
    if missing:
        note += f"; no estimate in {missing:,} {_plural('row', missing)}"
    return KeyFigure("Noise scale", plain(float(scales[last])), note)


def percent(share: float) -> str:
    """Says a share in percent; only none is 0 and only all is 100."""
    if 0 < share < 0.01:
        return "under 1 %"
    return f"{min(round(100 * share), 100 if share == 1 else 99)} %"


def _nonfinite(history: History) -> tuple[int, str]:
    """Counts the steps with a NaN or an inf, and says where the first one was."""
    bad_steps = np.zeros(len(history), bool)
    for kind in history.kinds:
        bad_steps |= ~np.isfinite(history.norms(kind).sum(axis=1, dtype=np.float64))
    number = int(bad_steps.sum())
    if not number:
        return 0, ""
    first = int(bad_steps.argmax())
    kind, bad = next(
        (kind, np.flatnonzero(bad))
        for kind in history.kinds
        if (bad := ~np.isfinite(history.norms(kind)[first])).any()
    )
    where = (
        f"in the {series.NAMES[kind]} of {_and_more([history.parts[i] for i in bad])}"
    )
    first_at = "first at" if number > 1 else "at"
    return number, f"{first_at} step {history.steps[first]:,} {where}"


def _parts(history: History, kind: str) -> tuple[Part, ...]:
    """Summarizes the parts, a few at a time, so that memory stays small."""
    norms, ratios = history.norms(kind), series.late_ratio(history)
    at_once = int(np.clip(_AT_ONCE // len(history), 1, 16))
    found: dict[int, Part] = {}
    for start in range(0, len(history.parts), at_once):
        columns = np.array(norms[:, start : start + at_once].T, order="C")  # a copy
        bad = ~np.isfinite(columns)
        medians = series.quantile(columns, 0.5, axis=1)
        zeros, bads = (columns == 0).sum(axis=1), bad.sum(axis=1)
        columns[bad] = -np.inf
        for k, peak in enumerate(columns.argmax(axis=1).tolist()):
            i = start + k
            found[i] = Part(
                name=history.parts[i],
                median=float(medians[k]),
                largest=float(norms[peak, i]),
                at_step=int(history.steps[peak]),
                zero_steps=int(zeros[k]),
                nonfinite_steps=int(bads[k]),
                ratio=None if ratios is None else float(ratios[i]),
            )
    return tuple(found[i] for i in network_order(history.parts))


def _and_more(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1:,} more" if len(names) > 1 else names[0]


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"
