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
    """Times two functions in turn and returns medians in seconds.

    The order alternates, so that what runs second has no advantage. The spread is the
    first and third quartile of the ratios.
    """
    for run in (ours, theirs):
        jax.block_until_ready(run())
    pairs = []
    for repeat in range(repeats):
        arms = (ours, theirs) if repeat % 2 else (theirs, ours)
        seconds = [_seconds(arm, inner) for arm in arms]
        pairs.append(seconds if repeat % 2 else seconds[::-1])
    ratios = [a / b for a, b in pairs]
    quartiles = statistics.quantiles(ratios, n=4)
    return Timing(
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(ratios),
        (quartiles[0], quartiles[2]),
    )


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
