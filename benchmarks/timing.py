"""Ratios from one run: every arm is timed in turn, again and again."""

import concurrent.futures
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Timing(NamedTuple):
    """How long ours and theirs took, and the ratio of each pair of neighbors."""

    ours: float
    theirs: float
    ratio: float
    spread: tuple[float, float]


def compare(
    ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int, inner: int = 1
) -> Timing:
    """Times two functions in turn and returns medians in seconds."""
    arms = {"theirs": theirs, "ours": ours}
    return against_the_first(arms, repeats, inner)["ours"]


def against_the_first(
    arms: dict[str, Callable[[], Any]], repeats: int, inner: int = 1
) -> dict[str, Timing]:
    """Times functions round by round, and returns medians in seconds.

    What counts is the ratio to the first in the same round, as the machine drifts; the
    order within a round is random, so that no place has an advantage. The spread is the
    first and third quartile of the ratios.
    """
    for run in arms.values():
        jax.block_until_ready(run())
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name in rng.permutation(list(arms)):
            seconds[name].append(_seconds(arms[name], inner))
    first, *others = seconds
    found = {}
    for name in others:
        pairs = zip(seconds[name], seconds[first], strict=True)
        ratios = [a / b for a, b in pairs]
        quartiles = statistics.quantiles(ratios, n=4)
        found[name] = Timing(
            statistics.median(seconds[name]),
            statistics.median(seconds[first]),
            statistics.median(ratios),
            (quartiles[0], quartiles[2]),
        )
    return found


def compile_seconds(fun: Callable, *args: Any) -> float:
    """Returns how long XLA takes to compile a function, tracing apart."""
    jax.clear_caches()
    lowered = jax.jit(fun).lower(*args)
    start = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - start


def import_seconds() -> float:
    """Returns how long `import gradnorm_jax` takes once jax and optax are there.

    The collector runs first: what it has to do by then is not for this import to pay.
    """
    code = (
        "import gc, time, jax, optax; gc.collect(); start = time.perf_counter();"
        " import gradnorm_jax; print(time.perf_counter() - start)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return float(out.stdout)


def streaming_bandwidth(repeats: int = 7) -> float:
    """Returns the bytes a second that all cores together can read from memory."""
    cores = min(8, len(jax.devices()) * (_cores()))
    parts = np.array_split(np.ones(85_000_000, np.float32), cores)
    best = float("inf")
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(lambda part: part.dot(part), parts))
            best = min(best, time.perf_counter() - start)
    return sum(part.nbytes for part in parts) / best


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2


def _seconds(run: Callable[[], Any], inner: int) -> float:
    start = time.perf_counter()
    for _ in range(inner):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / inner
