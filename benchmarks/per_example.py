"""What per-example norms and clipped sums cost, against the plain gradient.

Here what a program took to compile has tracing in it, when nothing was traced before.
Plain is the gradient of the mean loss of the batch, under jit like everything here.
`python -m benchmarks --only examples --model mlp --batch 64` runs one model alone.
"""

import functools
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradnorm_jax as gn
from benchmarks import comparing, limits, models, timing
from benchmarks.options import Options
from benchmarks.rows import Row

LARGEST = 2**33  # programs that need more temporary memory are built, not run
ROUNDS = (3, 7)  # of timing, at least and at most
TYPICAL = 8  # plain gradients take about as long as one round of all arms
SECONDS = 30.0  # for the rounds of one model, where these rows were asked for
QUICK_SECONDS = 4.0
MAX_NORM = 1.0
PLAIN = "plain gradient"


class Arm(NamedTuple):
    """A way to norms or to a clipped sum, and how to read its result.

    `make` returns `None` where a package is missing. `read` takes a result and returns
    what all arms of a kind must agree on.
    """

    make: Callable[[Callable], Callable[[Any, Any], Any] | None]
    kind: str
    read: Callable[[Any], Any]


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
    def norms(implementation: str | None) -> Arm:
        make = functools.partial(_norms, implementation=implementation)
        return Arm(make, "norms", lambda result: result)

    def clip(implementation: str | None) -> Arm:
        make = functools.partial(_clip, implementation=implementation)
        return Arm(make, "clip", lambda result: result.grads)

    return {
        "norms": norms(None),
        "norms, vmap": norms("vmap"),
        "clip": clip(None),
        "clip, vmap": clip("vmap"),
        "jax-privacy": Arm(_jax_privacy, "clip", lambda result: result[0]),
    }


ARMS = _arms()
QUICK = ("mlp", "gpt_scan", "cnn")  # one model of each kind


def rows(options: Options) -> Iterator[Row]:
    """Compares the arms with the plain gradient, for each model and batch size.

    In a run of all suites a few models have to do. About as many rounds of timing are
    run as fit into the time of a model, within `ROUNDS`.
    """
    few = QUICK
    if options.tiny or not options.alone:
        few = QUICK[:1] if options.quick else QUICK[1:2]
    known = models.TINY if options.tiny else models.MODELS
    for name in options.models or (tuple(known) if options.whole else few):
        model = known[name]
        params = jax.jit(model.init)(jax.random.key(0))
        for size in options.batches or (
            4 if options.tiny else 64 if options.whole else 16,
        ):
            batch = model.examples(jax.random.key(1), size)
            yield from _measure(options, name, model, params, batch, size)


def missing() -> list[str]:
    """Returns the arms whose package is not installed."""
    return [
        name
        for name, arm in ARMS.items()
        if arm.make(models.MODELS["mlp"].loss_fn) is None
    ]


def _measure(
    options: Options, name: str, model: models.Model, params: Any, batch: Any, size: int
) -> Iterator[Row]:
    def mean_loss(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(jax.vmap(model.loss_fn, (None, 0))(params, batch))

    brief = not options.alone
    asked = [arm for arm in ARMS if not (brief and arm.endswith("vmap"))]
    funs = {PLAIN: jax.grad(mean_loss)} | {
        arm: ARMS[arm].make(model.loss_fn) for arm in options.arms or asked
    }
    _check(model.loss_fn, params, batch)
    programs = {
        arm: timing.build_cold(fun, params, batch) for arm, fun in funs.items() if fun
    }
    calls = {
        arm: _Call(program.run, params, batch)
        for arm, program in programs.items()
        if arm == PLAIN or (program.memory or 0) <= LARGEST
    }
    rounds = options.rounds
    if rounds is None:
        seconds = SECONDS if options.whole else QUICK_SECONDS
        rounds = int(seconds / (TYPICAL * calls[PLAIN].seconds()))
        rounds = int(np.clip(rounds, *ROUNDS))
    times = timing.in_turn(
        {arm: timing.Arm(call, repeat=False) for arm, call in calls.items()}, 0, rounds
    )
    _same({arm: call.result for arm, call in calls.items() if arm != PLAIN})
    count = models.num_params(params)
    for arm, program in programs.items():
        if arm == PLAIN:
            continue
        row = Row(
            "examples",
            arm,
            f"{name} {count / 1e6:.1f}M, B {size}",
            "float32",
            PLAIN,
            limits=limits.examples(name, arm),
        )
        row = comparing.built(row, (program, programs[PLAIN]))._replace(
            build_ms=program.build_s * 1e3,
            peer_build_ms=programs[PLAIN].build_s * 1e3,
        )
        if arm in times:
            yield comparing.timed(row, (times[arm], times[PLAIN]))
        else:
            yield row._replace(note="needs too much memory")


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


def _check(loss_fn: Callable, params: Any, batch: Any) -> None:
    """Refuses to time what is wrong of the first two examples, by `vmap`."""
    few = jax.tree.map(lambda x: x[:2], batch)
    for kind in ("norms", "clip"):
        arms = (f"{kind}, vmap", kind)
        _same({arm: jax.jit(ARMS[arm].make(loss_fn))(params, few) for arm in arms})


def _same(results: dict[str, Any]) -> None:
    """Refuses arms that do not agree: a wrong norm is quick to compute."""
    norm = jax.jit(optax.tree.norm)
    first: dict[str, Any] = {}
    for name, result in results.items():
        arm = ARMS[name]
        got = arm.read(result)
        truth = first.setdefault(arm.kind, got)
        off = float(norm(jax.tree.map(jnp.subtract, got, truth)) / norm(truth))
        if not off < 1e-4:
            raise AssertionError(f"The arms do not agree: {name!r} is off by {off:.1e}")
