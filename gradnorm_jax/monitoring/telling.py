"""Teller: hands on what is found in the newest rows, and repeats itself seldom."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from gradnorm_jax.monitoring.diagnosis import Finding, diagnose
from gradnorm_jax.monitoring.history import History

#: After how many steps a finding that lasts is told again.
PAUSE = 500
_WAYS = ("log", "raise", "off")


class FindingError(RuntimeError):
    """A finding of level "error", with `Monitor(warn="raise")`.

    Attributes:
      finding: What was found.
    """

    def __init__(self, finding: Finding):
        """Says what the finding says."""
        super().__init__(str(finding))
        self.finding = finding


class Teller:
    """Tells the findings of level "warning" and "error", each code and place once.

    And again after 500 steps.

    Args:
      warn: "log", "raise", "off", or what is called with each finding.
      rules: The rules of `diagnose`.
      ignore: Patterns of the parts that are left out.
    """

    def __init__(
        self,
        warn: str | Callable[[Finding], Any],
        rules: Sequence[Callable],
        ignore: Sequence[str],
    ):
        if not callable(warn) and warn not in _WAYS:
            raise ValueError(
                f"`Monitor(warn=...)` must be one of {_WAYS} or a function of a"
                f" finding, got {warn!r}."
            )
        self._warn, self._rules, self._ignore = warn, rules, ignore
        self._told: dict[tuple, int] = {}

    def tell(self, recent: History) -> None:
        """Looks through the newest rows and tells what was not told lately."""
        if self._warn == "off":
            return
        now = int(recent.steps[-1])
        errors = []
        for finding in diagnose(recent, self._rules, ignore=self._ignore):
            key = (finding.code, finding.where)
            lately = now - self._told.get(key, now - PAUSE) < PAUSE
            if finding.level == "info" or lately:
                continue
            self._told[key] = now
            if callable(self._warn):
                self._warn(finding)
            elif self._warn == "raise" and finding.level == "error":
                errors.append(finding)
            else:
                level = getattr(logging, finding.level.upper())
                logging.getLogger("gradnorm_jax").log(level, "%s", finding)
        if errors:
            raise FindingError(errors[0])
