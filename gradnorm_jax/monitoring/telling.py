"""What the newest rows are told to: trackers get scalars, people get findings."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gradnorm_jax.monitoring.diagnosis import Finding, diagnose
from gradnorm_jax.monitoring.diagnosis.examination import patterns
from gradnorm_jax.monitoring.history import History
from gradnorm_jax.monitoring.writers import Writer, as_writer

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


class Sender:
    """Sends the scalars of the newest row to where they are logged.

    Args:
      log: What `as_writer` takes, or `None`.
      parts: Whether every column goes there too.
    """

    def __init__(self, log: Any, parts: bool):
        self._log, self._parts = log, parts
        self._writer: Writer | None = None if log is None else as_writer(log)
        self._sent: set[str] = set()

    def send(self, new: History) -> None:
        """Sends what the last of some new rows says; not what there never was."""
        if self._log is None:
            return
        metrics = new.metrics() | (new.columns() if self._parts else {})
        self._sent |= {k for k, v in metrics.items() if not np.all(np.isnan(v))}
        scalars = {k: float(v[-1]) for k, v in metrics.items() if k in self._sent}
        if "grad_norm/global_preclip" in metrics:
            largest = metrics["grad_norm/global_preclip"].max()
            scalars["grad_norm/global_preclip_max"] = float(largest)
        self._writer = self._writer or as_writer(self._log)
        self._writer.write(int(new.steps[-1]), scalars)

    def close(self) -> None:
        """Closes a writer that was made here."""
        if self._writer is not None and self._writer is not self._log:
            self._writer.close()
        self._writer = None


class Teller:
    """Tells the findings of level "warning" and "error", each code and place once.

    Where it lasts or comes back, again after 500 steps; also where the run went back to
    a step before it was told.

    Args:
      warn: "log", "raise", "off", or what is called with each finding.
      rules: The rules of `diagnose`.
      ignore: Patterns of the parts that are left out.
    """

    def __init__(
        self,
        warn: str | Callable[[Finding], Any],
        rules: Sequence[Callable],
        ignore: str | Sequence[str],
    ):
        if not callable(warn) and warn not in _WAYS:
            raise ValueError(
                f"`Monitor(warn=...)` must be one of {_WAYS} or a function of a"
                f" finding, got {warn!r}."
            )
        if callable(rules) or not all(map(callable, rules)):
            raise TypeError(
                "`Monitor(rules=...)` must be a list of functions of a `History`, such"
                f" as `(*DEFAULT_RULES, mine)`, got {rules!r}."
            )
        self._warn, self._rules = warn, tuple(rules)
        self._ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        patterns(self._ignore, "Monitor(ignore=...)")
        self._told: dict[tuple, int] = {}

    def look(self, history: History) -> list[Finding]:
        """Returns all that is found in some rows."""
        return diagnose(history, self._rules, ignore=self._ignore)

    def tell(self, recent: History) -> None:
        """Looks through the newest rows and tells what was not told lately."""
        if self._warn == "off":
            return
        now = int(recent.steps[-1])
        errors = []
        for finding in self.look(recent):
            if finding.level == "info" or not self._is_news(finding, now):
                continue
            self._told[finding.code, finding.where] = now
            if callable(self._warn):
                self._warn(finding)
                continue
            level = getattr(logging, finding.level.upper())
            if self._warn == "raise" and finding.level == "error":
                errors.append(finding)
            if len(errors) != 1 or finding is not errors[0]:
                logging.getLogger("gradnorm_jax").log(level, "%s", finding)
        if errors:
            raise FindingError(errors[0])

    def _is_news(self, finding: Finding, now: int) -> bool:
        told = self._told.get((finding.code, finding.where))
        last = finding.step if finding.last_step is None else finding.last_step
        if told is None or now < told:  # a run that went back is another one
            return True
        return now - told >= PAUSE and last > told
