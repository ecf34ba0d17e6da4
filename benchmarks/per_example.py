"""What per-example norms and clipped sums cost, against the plain gradient.

Plain is the gradient of the mean loss of the batch, under jit like everything here.
`python -m benchmarks --only examples --model mlp --batch 64` runs one model alone.
"""

import functools
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradnorm_jax as gn
from benchmarks import models, timing

MIB = 2**20
GRACE = 3 * MIB  # of temporary memory: small programs hold a few buffers of any kind
LARGEST = 8192 * MIB  # programs that need more temporary memory are built, not run
ROUNDS = (3, 7)  # of timing, at least and at most
TYPICAL = 8  # plain gradients take about as long as one round of all arms
MAX_NORM = 1.0
HEADER = (
    "| model    | params |   B | arm         |       ms |  time | quartiles   | limit"
    "          | MiB temp |  memory | limit          | build s | build | limit"
    "          |\n"
    "|----------|-------:|----:|-------------|---------:|------:|-------------|------"
    "----------|---------:|--------:|----------------|--------:|------:|------"
    "----------|"
)


class Row(NamedTuple):
    """One arm beside the plain gradient of the same model and batch.

    `build_s` is tracing, lowering and compiling, of which `trace_s` is the first two.
    The times are `None` where the program needs more memory than `LARGEST`. `memory` is
    temporary, in bytes: what is returned is not in it.
    """

    model: str
    params: int
    batch: int
    arm: str
    ours_ms: float | None
    theirs_ms: float | None
    ratio: float | None
    low: float | None
    high: float | None
    limit: float | None
    memory: int
    plain_memory: int
    memory_limit: float | None
    trace_s: float
    build_s: float
    plain_build_s: float
    build_limit: float | None


class Limits(NamedTuple):
    """What an arm may cost at most, in costs of the plain gradient."""

    time: float
    memory: float
    build: float = 3.0


class Arm(NamedTuple):
    """A way to norms or to a clipped sum, and how to read its result.

    `make` returns `None` where a package is missing. `read` takes a result and returns
    what all arms of a kind must agree on.
    """

    make: Callable[[Callable], Callable[[Any, Any], Any] | None]
    kind: str
    read: Callable[[Any], Any]
    limits: Limits | None = None


class Program(NamedTuple):
    """A compiled function, its temporary memory, and how long building it took."""

    run: Callable[..., Any]
    memory: int
    trace_s: float
    build_s: float


def _norms(loss_fn: Callable, implementation: str | None) -> Callable:
    return gn.per_example_norms(loss_fn, implementation=implementation)


def _clip(loss_fn: Callable, implementation: str | None) -> Callable:
    return gn.clipped_grad(loss_fn, MAX_NORM, implementation=implementation)


def _jax_privacy(loss_fn: Callable) -> Callable | None:
    """On a CPU one example at a time, which is its fastest way there by far."""
    try:
        clipping = importlib.import_module("jax_privacy.clipping")
    except ImportError:
        return None
    return clipping.clipped_grad(
        loss_fn,
        l2_clip_norm=MAX_NORM,
        keep_batch_dim=False,
        return_values=True,
        return_grad_norms=True,
        microbatch_size=1 if jax.default_backend() == "cpu" else None,
    )


def _arms() -> dict[str, Arm]:
    def norms(implementation: str | None, limits: Limits | None = None) -> Arm:
        make = functools.partial(_norms, implementation=implementation)
        return Arm(make, "norms", lambda result: result, limits)

    def clip(implementation: str | None, limits: Limits | None = None) -> Arm:
        make = functools.partial(_clip, implementation=implementation)
        return Arm(make, "clip", lambda result: result.grads, limits)

    return {
        "norms": norms(None, Limits(time=1.0, memory=1.1)),
        "norms, vmap": norms("vmap"),
        "clip": clip(None, Limits(time=1.25, memory=1.2)),
        "clip, vmap": clip("vmap"),
        "jax-privacy": Arm(_jax_privacy, "clip", lambda result: result[0]),
    }


ARMS = _arms()
QUICK = ("gpt_scan", "mlp", "cnn")  # one model of each kind
TIME_LIMITS = {("cnn", "norms"): 1.15}


def rows(
    names: Sequence[str],
    sizes: Sequence[int],
    arms: Sequence[str],
    seconds: float,
) -> Iterator[Row]:
    """Compares the arms with the plain gradient, for each model and batch size.

    About as many rounds of timing are run as fit into `seconds`, within `ROUNDS`.
    """
    for name in names:
        model = models.MODELS[name]
        params = jax.jit(model.init)(jax.random.key(0))
        for size in sizes:
            batch = model.examples(jax.random.key(1), size)
            yield from _measure(name, params, batch, size, arms, seconds)


def missing() -> list[str]:
    """Returns the arms whose package is not installed."""
    return [
        name
        for name, arm in ARMS.items()
        if arm.make(models.MODELS["mlp"].loss_fn) is None
    ]


def _measure(
    name: str,
    params: Any,
    batch: Any,
    size: int,
    arms: Sequence[str],
    seconds: float,
) -> Iterator[Row]:
    loss_fn = models.MODELS[name].loss_fn

    def mean_loss(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(jax.vmap(loss_fn, (None, 0))(params, batch))

    funs = {"plain": jax.grad(mean_loss)} | {
        arm: ARMS[arm].make(loss_fn) for arm in arms
    }
    programs = {arm: _program(fun, (params, batch)) for arm, fun in funs.items() if fun}
    plain = programs["plain"]
    calls = {
        arm: _Call(program.run, params, batch)
        for arm, program in programs.items()
        if arm == "plain" or program.memory <= LARGEST
    }
    rounds = int(seconds / (TYPICAL * calls["plain"].seconds()))
    found = timing.against_the_first(calls, int(np.clip(rounds, *ROUNDS)))
    _same({arm: call.result for arm, call in calls.items() if arm != "plain"})
    for arm, program in programs.items():
        if arm == "plain":
            continue
        got = found.get(arm)
        limits = ARMS[arm].limits
        limit = limits and TIME_LIMITS.get((name, arm), limits.time)
        yield Row(
            name,
            models.num_params(params),
            size,
            arm,
            *((got.ours * 1e3, got.theirs * 1e3) if got else (None, None)),
            *((got.ratio, *got.spread) if got else (None, None, None)),
            limit,
            program.memory,
            plain.memory,
            limits and limits.memory,
            program.trace_s,
            program.build_s,
            plain.build_s,
            limits and limits.build,
        )


def _program(fun: Callable, args: tuple[Any, ...]) -> Program:
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(fun).lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    built = time.perf_counter()
    memory = compiled.memory_analysis().temp_size_in_bytes
    return Program(compiled, memory, traced - start, built - start)


class _Call:
    """A call of a program, whose last result can be looked at."""

    def __init__(self, run: Callable[..., Any], *args: Any) -> None:
        self.run = run
        self.args = args
        self.result: Any = None

    def __call__(self) -> Any:
        self.result = None  # so that two results are never held
        self.result = self.run(*self.args)
        return self.result

    def seconds(self) -> float:
        jax.block_until_ready(self())
        start = time.perf_counter()
        jax.block_until_ready(self())
        return time.perf_counter() - start


def _same(results: dict[str, Any]) -> None:
    """Refuses to report arms that do not agree: a wrong norm is quick to compute."""
    norm = jax.jit(optax.tree.norm)
    first: dict[str, Any] = {}
    for name, result in results.items():
        arm = ARMS[name]
        got = arm.read(result)
        truth = first.setdefault(arm.kind, got)
        off = float(norm(jax.tree.map(jnp.subtract, got, truth)) / norm(truth))
        if not off < 1e-4:
            raise AssertionError(f"The arms do not agree: {name!r} is off by {off:.1e}")


def show(row: Row) -> None:
    """Prints a row, with `missed` beside each limit that it does not keep."""
    memory = row.memory / max(row.plain_memory, 1)
    build = row.build_s / row.plain_build_s
    if row.ratio is None:
        timed = f"{'not run':>8} | {'':5} | {'':11} | {'':14}"
    else:
        limit = _limit(row.limit, row.ratio > (row.limit or np.inf))
        timed = (
            f"{row.ours_ms:8.1f} | {row.ratio:5.2f} "
            f"| {f'{row.low:.2f}-{row.high:.2f}':11} | {limit}"
        )
    allowed = (row.memory_limit or np.inf) * row.plain_memory + GRACE
    within = _limit(row.memory_limit, row.memory > allowed)
    waited = _limit(row.build_limit, build > (row.build_limit or np.inf))
    print(
        f"| {row.model:8} | {row.params / 1e6:5.1f}M | {row.batch:3} | {row.arm:11} "
        f"| {timed} | {row.memory / MIB:8.1f} | {memory:7.2f} "
        f"| {within} | {row.build_s:7.2f} | {build:5.2f} | {waited} |",
        flush=True,
    )


def _limit(limit: float | None, missed: bool) -> str:
    text = "" if limit is None else f"<= {limit:.2f}" + (" missed" if missed else "")
    return f"{text:14}"
