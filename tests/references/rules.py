"""The rules that remember, by their formulas, on one norm a step, in float64.

A rule answers four questions: how large this norm may be, what it learns from it, how
it is scaled, and at which level it stands. `run` asks them along a stream.
"""

import dataclasses
import math
import statistics
from dataclasses import KW_ONLY, dataclass

import numpy as np

SHRINKS = {
    "rescale": lambda n, limit, center, floor: min(n, limit),
    "normalize": lambda n, limit, center, floor: limit,
    "reciprocal": lambda n, limit, center, floor: (
        center + (limit - center) ** 2 / (n - center) if n > limit else n
    ),
    "center": lambda n, limit, center, floor: center if n > limit else n,
    "smooth": lambda n, limit, center, floor: n * limit / (n + limit),
    "band": lambda n, limit, center, floor: min(max(n, floor), limit),
    "zero": lambda n, limit, center, floor: 0.0 if n > limit else n,
}


@dataclass(kw_only=True)
class Rule:
    feed: str = "raw"
    warmup_steps: int = 0
    warmup_limit: float = math.inf
    rearm_after: int | None = None


def run(rule, norms, shrink="rescale", *, totals=None, schedules=None):
    """Returns the limit at each step, and the norm that comes out.

    The limit is NaN at steps that leave no trace. `totals` are the norms of all parts
    together; `schedules` is {argument: step -> number}.
    """
    seen, clipped_run, limits, clipped = 0, [], [], []
    totals = [None] * len(norms) if totals is None else totals
    for step, (n, total) in enumerate(zip(norms, totals, strict=True)):
        n, warm = float(n), seen < rule.warmup_steps
        for name, value in (schedules or {}).items():
            setattr(rule, name, value(step))
        if n == 0 or not math.isfinite(n):
            limits.append(math.nan)
            clipped.append(n * 0)
            continue
        limit, center, floor = warm_up(rule, n, total) if warm else rule.bound(n)
        o = n if limit == math.inf else SHRINKS[shrink](n, limit, center, floor)
        x = n if rule.feed == "raw" else o
        if x != 0:
            rule.learn(x, n)
            seen += 1
        clipped_run = [*clipped_run, n] if o < n and not warm else []
        if len(clipped_run) == rule.rearm_after:
            rule.scale(statistics.geometric_mean(clipped_run) / rule.level())
            clipped_run = []
        limits.append(limit)
        clipped.append(o)
    return np.array(limits), np.array(clipped)


def warm_up(rule, n, total):
    if rule.warmup_limit == math.inf:
        return math.inf, math.inf, 0
    alone = total is None
    limit = rule.warmup_limit if alone else n * min(1, rule.warmup_limit / float(total))
    return limit, limit, 0


@dataclass
class constant(Rule):
    limit: float

    def bound(self, n):
        return self.limit, 0, 0

    def learn(self, x, n):
        pass


@dataclass
class percentile(Rule):
    q: float
    _: KW_ONLY
    window: int = 1000
    past: list = dataclasses.field(default_factory=list, init=False)

    def bound(self, n):
        return np.percentile([*self.past, n][-self.window :], self.q), 0, 0

    def learn(self, x, n):
        self.past = [*self.past, x][-self.window :]

    def scale(self, ratio):
        self.past = [x * ratio for x in self.past]

    def level(self):
        return statistics.median_low(self.past)


@dataclass
class rolling_sigma(Rule):
    k: float
    _: KW_ONLY
    window: int = 128
    warmup_steps: int | None = None
    past: list = dataclasses.field(default_factory=list, init=False)

    def __post_init__(self):
        if self.warmup_steps is None:
            self.warmup_steps = max(2, self.window // 2)

    def bound(self, n):
        return np.mean(self.past) + self.k * np.std(self.past, ddof=1), 0, 0

    def learn(self, x, n):
        self.past = [*self.past, x][-self.window :]

    def scale(self, ratio):
        self.past = [x * ratio for x in self.past]

    def level(self):
        return np.mean(self.past)


@dataclass
class z_score(Rule):
    z: float
    _: KW_ONLY
    decay: float = 0.97
    feed: str = "clipped"
    warmup_steps: int = 25
    first: list = dataclasses.field(default_factory=list, init=False)

    def bound(self, n):
        return self.mean + self.z * math.sqrt(self.var), self.mean, 0

    def learn(self, x, n):
        if len(self.first) < self.warmup_steps:
            self.first.append(x)
            self.mean, self.var = np.mean(self.first), np.var(self.first)
        else:
            self.mean = self.decay * self.mean + (1 - self.decay) * x
            self.var = self.decay * self.var + (1 - self.decay) * (x - self.mean) ** 2

    def scale(self, ratio):
        self.mean, self.var = self.mean * ratio, self.var * ratio**2

    def level(self):
        return self.mean


@dataclass
class ema_relative(Rule):
    factor: float
    _: KW_ONLY
    decay: float = 0.98
    feed: str = "clipped"
    warmup_steps: int = 1
    first: list = dataclasses.field(default_factory=list, init=False)

    def bound(self, n):
        return self.factor * self.average, 0, 0

    def learn(self, x, n):
        if len(self.first) < max(1, self.warmup_steps):
            self.first.append(x)
            self.average = min(self.first)
        else:
            self.average = self.decay * self.average + (1 - self.decay) * x

    def scale(self, ratio):
        self.average *= ratio

    def level(self):
        return self.average


class ema_band(ema_relative):
    def __init__(self, low, high, *, feed="raw", **settings):
        super().__init__(high, feed=feed, **settings)
        self.low, self.high = low, high

    def bound(self, n):
        return self.high * self.average, 0, self.low * self.average


@dataclass
class quantile(Rule):
    q: float
    _: KW_ONLY
    rate: float = 0.2
    start: float = 0.1

    def __post_init__(self):
        self.limit = self.start

    def bound(self, n):
        return self.limit, 0, 0

    def learn(self, x, n):
        self.limit *= math.exp(-self.rate * ((n <= self.limit) - self.q))

    def scale(self, ratio):
        self.limit *= ratio

    def level(self):
        return self.limit


class Debiased:
    """A mean whose weights decay into the past, as Adam keeps it."""

    def __init__(self, decay):
        self.decay, self.sum, self.steps = decay, 0.0, 0

    def add(self, x):
        self.sum = self.decay * self.sum + (1 - self.decay) * x
        self.steps += 1

    def value(self):
        return self.sum / (1 - self.decay**self.steps)

    def with_one_more(self, x):
        total = self.decay * self.sum + (1 - self.decay) * x
        return total / (1 - self.decay ** (self.steps + 1))


@dataclass
class max_ema(Rule):
    factor: float = 1.0
    _: KW_ONLY
    decay: float = 0.999

    def __post_init__(self):
        self.average = Debiased(self.decay)

    def bound(self, n):
        return self.factor * self.average.with_one_more(n), 0, 0

    def learn(self, x, n):
        self.average.add(x)

    def scale(self, ratio):
        self.average.sum *= ratio

    def level(self):
        return self.average.value()


@dataclass
class moment_ratio(Rule):
    decay_mean: float = 0.7
    decay_square: float = 0.9

    def __post_init__(self):
        self.mean, self.square = Debiased(self.decay_mean), Debiased(self.decay_square)

    def bound(self, n):
        square = self.square.with_one_more(n**2)
        return self.mean.with_one_more(n) / math.sqrt(square), 0, 0

    def learn(self, x, n):
        self.mean.add(n)
        self.square.add(n**2)


@dataclass
class second_moment(Rule):
    factor: float
    _: KW_ONLY
    decay: float = 0.999
    feed: str = "clipped"
    warmup_steps: int = 1
    square: float = dataclasses.field(default=0.0, init=False)

    def bound(self, n):
        return math.sqrt(self.factor * self.square), 0, 0

    def learn(self, x, n):
        self.square = self.decay * self.square + (1 - self.decay) * x**2

    def scale(self, ratio):
        self.square *= ratio**2

    def level(self):
        return math.sqrt(self.square)
