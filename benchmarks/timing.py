"""Ratios from one run: every arm is timed in turn, again and again."""

import concurrent.futures
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROUNDS = (5, 200)  # at least and at most
LONG_ENOUGH = 0.01  # seconds in which the clock and the wake-up of threads are lost


class Program(NamedTuple):
    """A compiled function, its temporary memory in bytes, and how long building took.

    `build_s` is tracing, lowering and compiling, of which `trace_s` is the first two.
    """

    run: Callable[..., Any]
    memory: int | None
    trace_s: float
    build_s: float


class Arm(NamedTuple):
    """A way to do what is timed.

    Attributes:
      run: What is timed.
      before: Makes the arguments of `run`, and is not timed: for what `run` uses up.
      wait: Waits for a result of `run`.
      program: What `run` was compiled to, if it was.
      repeat: Whether a short call may be repeated before it is waited for.
    """

    run: Callable[..., Any]
    before: Callable[[], tuple[Any, ...]] = tuple
    wait: Callable[[Any], Any] = jax.block_until_ready
    program: Program | None = None
    repeat: bool = True


class Timing(NamedTuple):
    """How long ours and theirs took, and the ratio of each pair of neighbors."""

    ours: float
    theirs: float
    ratio: float
    spread: tuple[float, float]


def build_cold(fun: Callable, *args: Any) -> Program:
    """Compiles a function for these arguments when nothing was traced before."""
    jax.clear_caches()
    return build(jax.jit(fun), *args)


def build(jitted: Any, *args: Any) -> Program:
    """Compiles what is jitted for these arguments."""
    start = time.perf_counter()
    lowered = jitted.lower(*args)
    traced = time.perf_counter()
    program = lowered.compile()
    built = time.perf_counter()
    facts = program.memory_analysis()
    memory = None if facts is None else facts.temp_size_in_bytes
    return Program(program, memory, traced - start, built - start)


def arm(fun: Callable, *args: Any) -> Arm:
    """Returns an arm that calls a function, compiled, with these arguments."""
    program = build(jax.jit(fun), *args)
    return Arm(lambda: program.run(*args), program=program)


def in_turn(
    arms: Mapping[str, Arm], seconds: float, rounds: int | None = None
) -> dict[str, list[float]]:
    """Times arms round by round, and returns the seconds of each call.

    As many rounds as fit into `seconds`, within `ROUNDS`, unless their number is given.
    The order within a round is random, so that no place has an advantage. A short call
    is repeated in its round, and waited for once.
    """
    for each in arms.values():
        _timed(each, 1)  # starts threads, fills caches
    once = {name: _timed(each, 1) for name, each in arms.items()}
    inner = {
        name: _repeats(once[name]) if each.repeat else 1 for name, each in arms.items()
    }
    if rounds is None:
        a_round = sum(inner[name] * once[name] for name in arms)
        rounds = int(np.clip(seconds / a_round, *ROUNDS))
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name in rng.permutation(list(arms)):
            found[name].append(_timed(arms[name], inner[name]))
    return found


def compared(ours: Sequence[float], theirs: Sequence[float]) -> Timing:
    """Returns medians in seconds, and the median and the quartiles of the ratios.

    What counts is the ratio within a round, as the machine drifts.
    """
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, high = np.quantile(ratios, (0.25, 0.75))
    return Timing(
        statistics.median(ours),
        statistics.median(theirs),
        statistics.median(ratios),
        (float(low), float(high)),
    )


def streaming_bandwidth(device: str, *, entries: int = 85_000_000) -> float:
    """Returns the bytes a second that memory gives.

    On a CPU what all cores together can read; elsewhere what a copy under jit reads and
    writes. The best of seven.
    """
    return _reading(entries) if device == "cpu" else _copying(3 * entries)


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _reading(entries: int) -> float:
    threads = min(8, len(jax.devices()) * cores())
    parts = np.array_split(np.ones(entries, np.float32), threads)
    best = float("inf")
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(7):
            start = time.perf_counter()
            list(pool.map(lambda part: part.dot(part), parts))
            best = min(best, time.perf_counter() - start)
    return sum(part.nbytes for part in parts) / best


def _copying(entries: int) -> float:
    x = jnp.ones(entries, jnp.float32)
    copy = arm(jnp.copy, x)
    _timed(copy, 1)
    return 2 * x.nbytes / min(_timed(copy, 10) for _ in range(7))


def _repeats(seconds: float) -> int:
    return int(np.clip(LONG_ENOUGH / seconds, 1, 1000))


def _timed(arm: Arm, inner: int) -> float:
    args = arm.before()
    result = None
    start = time.perf_counter()
    for _ in range(inner):
        result = arm.run(*args)
    arm.wait(result)
    return (time.perf_counter() - start) / inner
