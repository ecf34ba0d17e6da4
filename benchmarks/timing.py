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


class Stream(NamedTuple):
    """What uses memory as fast as it can be used, and how many bytes it moves."""

    arm: Arm
    moved: int


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
    # A new function: what was compiled of `fun` before would not be compiled again.
    program = build(jax.jit(lambda *args: fun(*args)), *args)
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


def stream(device: str, entries: int) -> Stream:
    """Returns what to hold the use of memory against.

    On a CPU all cores together read; elsewhere a copy under jit reads and writes.
    """
    if device == "cpu":
        return _reading(entries)
    x = jnp.ones(3 * entries, jnp.float32)
    return Stream(arm(jnp.copy, x), 2 * x.nbytes)


def bandwidth(stream: Stream) -> float:
    """Returns the bytes a second that a stream reaches, the best of seven."""
    _timed(stream.arm, 1)
    inner = _repeats(_timed(stream.arm, 1))
    return stream.moved / min(_timed(stream.arm, inner) for _ in range(7))


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _reading(entries: int) -> Stream:
    threads = min(8, cores())
    parts = np.array_split(np.ones(entries, np.float32), threads)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    run = lambda: list(pool.map(lambda part: part.dot(part), parts))  # noqa: E731
    return Stream(Arm(run), sum(part.nbytes for part in parts))


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
