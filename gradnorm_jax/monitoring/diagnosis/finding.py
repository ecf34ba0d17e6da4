"""Finding: what a rule found in a run: its numbers, its likely causes, a way out."""

import dataclasses
import math
from typing import Any

#: The levels of findings, the worst first, and how a line of text begins with them.
LEVELS = {"error": "ERROR", "warning": "WARN", "info": "INFO"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that a run shows.

    Attributes:
      code: What it is, such as `"spike"`; `explain(code)` says more.
      level: `"error"`, `"warning"` or `"info"`.
      step: The first step that shows it.
      seen: What was seen, in words with numbers.
      value: The number that was measured, and
      limit: the number that it was held against.
      where: The names of the parts that show it; empty if it is of the whole run.
      parts: How many parts were looked at.
      last_step: The last step that shows it, if that is another one.
      count: How many times it was seen: steps, or spikes.
      steps: When it was seen, if that is at some steps far apart; else empty.
      likely: Likely causes.
      tries: What to try.

    Raises:
      ValueError: If `level` is none of the three.

    Example:
      >>> finding = Finding(
      ...     "too-quiet", "warning", step=1200, seen="norm 1e-9 (limit 1e-6)",
      ...     value=1e-9, limit=1e-6, where=("head/kernel",), parts=8,
      ...     likely=("the labels are constant",), tries=("look at a batch",),
      ... )
      >>> print(finding)
      WARN too-quiet @1,200 head/kernel: norm 1e-9 (limit 1e-6).
      Likely: the labels are constant. Try: look at a batch.
    """

    code: str
    level: str
    step: int
    seen: str
    value: float = math.nan
    limit: float = math.nan
    where: tuple[str, ...] = ()
    parts: int = 0
    last_step: int | None = None
    count: int = 1
    steps: tuple[int, ...] = ()
    likely: tuple[str, ...] = ()
    tries: tuple[str, ...] = ()

    def __post_init__(self):
        """Checks the level, by which findings are ordered."""
        if self.level not in LEVELS:
            raise ValueError(
                f"`Finding(level=...)` must be one of {tuple(LEVELS)}, got"
                f" {self.level!r}."
            )

    def __str__(self) -> str:
        """Says it in one line; only the names of parts may be other than ASCII."""
        line = f"{LEVELS[self.level]} {self.code} @{self.step:,} {self.place}: "
        line += f"{self.seen}."
        if self.likely:
            line += f" Likely: {', or '.join(self.likely)}."
        if self.tries:
            line += f" Try: {'; or '.join(self.tries)}."
        return "".join(
            letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line
        )

    @property
    def place(self) -> str:
        """Where it is, in short: `"global"`, a name, a name and how many more."""
        number = len(self.where)
        if not number:
            return "global"
        if number == 1:
            return self.where[0]
        if number == self.parts:
            return f"all {number:,} parts"
        return f"{self.where[0]} (+{number - 1:,} of {self.parts:,} parts)"

    def as_dict(self) -> dict[str, Any]:
        """Returns all of it for strict JSON, which has no NaN and no infinity.

        Example:
          >>> found = Finding("mine", "info", step=3, seen="a thing", value=math.inf)
          >>> found.as_dict()["value"], found.as_dict()["where"]
          ('inf', [])
        """
        return {name: _strict(x) for name, x in dataclasses.asdict(self).items()}


def _strict(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
