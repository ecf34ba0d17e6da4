"""Marks: where in the pictures of a run its findings are."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from gradnorm_jax.monitoring.diagnosis import CODES, LEVELS, Finding
from gradnorm_jax.monitoring.rows import Rows
from gradnorm_jax.monitoring.series import Bins, plain

#: The codes of what happens at one step. A code of a user's own counts as one.
_MOMENTS = ("non-finite", "exploding", "spike")
#: How many marks of one finding may stand side by side.
_MARKS = 400
#: How many characters fit side by side above a picture on a phone, and on a screen.
_PHONE, _SCREEN = 28, 60


@dataclasses.dataclass(frozen=True)
class Moment:
    """A step that a finding names, from 0 to 1 on the axis of time.

    `label` is empty where another one has taken the room; `fits_phone` says whether it
    has room on a phone too.
    """

    finding: Finding
    at: float
    label: str
    fits_phone: bool


def moments(findings: Iterable[Finding], bins: Bins) -> list[Moment]:
    """Returns the steps to mark, the worst first; these have their labels first."""
    found: list[Moment] = []
    for finding in findings:
        if finding.code in CODES and finding.code not in _MOMENTS:
            continue
        taken = set()
        for step in finding.steps or (finding.step,):
            at = float(bins.position(step))
            place = int(at * _MARKS)
            if not 0 < at < 1 or place in taken:
                continue
            label = "" if taken else _label(finding)
            taken.add(place)
            fits = [_has_room(at, label, found, room) for room in (_SCREEN, _PHONE)]
            found.append(Moment(finding, at, label if fits[0] else "", fits[1]))
    return found


def of_rows(
    findings: Iterable[Finding], parts: Sequence[str], rows: Rows
) -> dict[int, list[Finding]]:
    """Returns the findings of each row that has any, the worst first.

    A finding of more than half of the parts is one of the whole network.
    """
    row_of = dict(zip((parts[i] for i in rows.order), rows.row_of(), strict=True))
    found: dict[int, list[Finding]] = {}
    for finding in findings:
        if len(finding.where) <= max(1, len(parts) // 2):
            for row in dict.fromkeys(row_of.get(name) for name in finding.where):
                if row is not None:
                    found.setdefault(int(row), []).append(finding)
    return found


def worst(findings: Sequence[Finding]) -> str:
    """Returns the worst level of some findings."""
    return min((finding.level for finding in findings), key=list(LEVELS).index)


def brief(finding: Finding) -> str:
    """Says a finding without its causes and remedies."""
    return f"{finding.code} @{finding.step:,} {finding.place}: {finding.seen}"


def _has_room(at: float, label: str, others: Iterable[Moment], room: int) -> bool:
    return all(
        abs(at - other.at) * room > (len(label) + len(other.label)) / 2 + 1
        for other in others
        if other.label and (other.fits_phone or room > _PHONE)
    )


def _label(finding: Finding) -> str:
    if finding.steps:
        return f"{len(finding.steps):,} {finding.code}s"
    if finding.code == "spike":
        return f"{plain(finding.value)}\N{MULTIPLICATION SIGN}"
    if finding.code == "non-finite" and not math.isfinite(finding.value):
        return "NaN" if np.isnan(finding.value) else "inf"
    return finding.code
