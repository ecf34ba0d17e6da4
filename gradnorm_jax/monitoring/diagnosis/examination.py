"""Diagnose: all rules over one run, and what they found, the worst first."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from gradnorm_jax.monitoring.diagnosis.breakdown import exploding, nonfinite, spike
from gradnorm_jax.monitoring.diagnosis.clips import clip_always, clip_never
from gradnorm_jax.monitoring.diagnosis.depth import imbalance, vanishing
from gradnorm_jax.monitoring.diagnosis.evidence import WARMUP, Evidence, Rule
from gradnorm_jax.monitoring.diagnosis.finding import LEVELS, Finding
from gradnorm_jax.monitoring.diagnosis.motion import (
    dead,
    frozen,
    param_growth,
    ratio_high,
    ratio_low,
)
from gradnorm_jax.monitoring.history import History

#: What `diagnose` looks for if it is not told otherwise.
DEFAULT_RULES: tuple[Rule, ...] = (
    nonfinite(),
    exploding(),
    spike(),
    vanishing(),
    dead(),
    frozen(),
    imbalance(),
    ratio_high(),
    ratio_low(),
    clip_always(),
    clip_never(),
    param_growth(),
)


def diagnose(
    history: History,
    rules: Iterable[Rule] = DEFAULT_RULES,
    *,
    ignore: str | Sequence[str] = (),
    warmup: int = WARMUP,
) -> list[Finding]:
    """Looks through a run for what goes wrong in training, and says what to do.

    A rule is any function that takes a `History` and returns findings. To change the
    numbers of one, or to add your own, give another tuple of rules.

    Args:
      history: A run, as `load` returns it.
      rules: What to look for.
      ignore: Regular expressions for the whole names of parts that are left out, such
        as those that are frozen on purpose. The global norms are then of the others.
      warmup: Steps before this one count for no verdict that rests on statistics.

    Returns:
      The findings: errors, then warnings, then infos, each in the order of their steps.

    Raises:
      TypeError: If a rule is not a function of a history that returns findings.
      ValueError: If `ignore` holds what is no regular expression, or `warmup` is
        negative.

    Example:
      >>> rows = [[1.0, 2.0], [1.0, float("nan")]]
      >>> history = History.from_rows(("grad/a", "grad/b"), [0, 1], rows)
      >>> for finding in diagnose(history):
      ...     print(finding.level, finding.code, finding.step, finding.where)
      error non-finite 1 ('b',)
      >>> def too_quiet(history):
      ...     for step, norm in zip(history.steps, history.global_norm()):
      ...         if norm < 3:
      ...             yield Finding("quiet", "info", int(step), f"a norm of {norm:.2f}")
      >>> print(*diagnose(history, [too_quiet]))
      INFO quiet @0 global: a norm of 2.24.
    """
    if warmup < 0:
        raise ValueError(
            f"`diagnose(warmup=...)` must not be negative, got {warmup!r}. It is the"
            " first step that counts."
        )
    left_out = [ignore] if isinstance(ignore, str) else ignore
    compiled = patterns(left_out, "diagnose(ignore=...)")
    ignored = {
        position: name
        for position, name in enumerate(history.parts)
        if any(pattern.fullmatch(name) for pattern in compiled)
    }
    evidence = Evidence.of(history, warmup=warmup, ignored=ignored)
    names = set(ignored.values())
    found = [
        finding
        for rule in rules
        for finding in _findings(rule, evidence)
        if not finding.where or not names.issuperset(finding.where)
    ]
    ranks = list(LEVELS)
    return sorted(found, key=lambda one: (ranks.index(one.level), one.step))


def patterns(given: Sequence[str], argument: str) -> list[re.Pattern]:
    """Compiles what an argument gives, or says which of it is no pattern."""
    compiled = []
    for pattern in given:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ValueError(
                f"`{argument}`: {pattern!r} is no regular expression:"
                f" {error}. Give patterns for whole names of parts; `re.escape(name)`"
                " makes one of a name."
            ) from error
    return compiled


def _findings(rule: Rule, evidence: Evidence) -> list[Finding]:
    name = getattr(rule, "__name__", repr(rule))
    if not callable(rule):
        raise TypeError(
            f"`diagnose(rules=...)`: {name} is no function. A rule takes a `History`"
            " and returns findings."
        )
    returned: Any = rule(evidence)
    found = list(returned) if isinstance(returned, Iterable) else [returned]
    wrong = [one for one in found if not isinstance(one, Finding)]
    if wrong:
        raise TypeError(
            f"`diagnose(rules=...)`: the rule {name} returned {wrong[0]!r}, which is no"
            " `Finding`. A rule takes a `History` and returns findings, perhaps none."
        )
    return found


__all__ = ["DEFAULT_RULES", "diagnose", "patterns"]
