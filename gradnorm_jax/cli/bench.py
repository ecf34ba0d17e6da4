"""The command `bench`: times what a record costs in each step, on this machine.

With `--all` it hands over to the benchmarks of a source checkout.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradnorm_jax
from gradnorm_jax import monitoring
from gradnorm_jax.watching import measure, watch

_PARAMETERS = 1.7e6
_BATCH = 128
_EVERY = 100  # steps from one drain to the next
_AT_A_TIME = 10
_ROUNDS = 5

Arm = Callable[[], Any]


def run(options: argparse.Namespace) -> int:
    """Times a training step without a record and with each of its two carriers."""
    if options.all is not None:
        return _run_all(options.all)
    params, batch = _network(options.leaves)
    leaves = jax.tree.leaves(params)
    number = sum(x.size for x in leaves)
    device, noun = jax.devices()[0], "leaf" if len(leaves) == 1 else "leaves"
    print(
        f"AdamW on {number / 1e6:.1f} M parameters in {len(leaves):,} {noun}, on"
        f" {device.device_kind} ({os.cpu_count()} cores), jax {jax.__version__};\n"
        f"rows are drained to files every {_EVERY} steps and looked through.\n"
        f"{_ROUNDS} rounds of {_EVERY} steps each; a ratio is the median of theirs."
    )
    with tempfile.TemporaryDirectory() as directory:
        arms = {
            "no record": _plain(params, batch),
            "returned: measure": _returned(params, batch, Path(directory, "vector")),
            "in state: watch": _ring(params, batch, Path(directory, "ring")),
        }
        seconds = _in_turn(arms)
    first = seconds["no record"]
    print(f"\n{'':17}  ms per step  times no record  quartiles")
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, first, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        rest = f"  {statistics.median(ratios):15.2f}  {low:.2f} to {high:.2f}"
        print(
            f"{name:17}  {1e3 * statistics.median(times):11.2f}"
            f"{'' if times is first else rest}"
        )
    return 0


def _run_all(words: Sequence[str]) -> int:
    """Runs the benchmarks that lie beside the package in a source checkout."""
    root = Path(gradnorm_jax.__file__).parents[1]
    if not (root / "pyproject.toml").exists() or not (root / "benchmarks").is_dir():
        raise FileNotFoundError(
            "the benchmarks are not in an installed package, but in the folder"
            " `benchmarks` of the repository and of the source archive: run"
            " `python -m benchmarks` there, or install it with `pip install -e .`"
        )
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.call(
        [sys.executable, "-m", "benchmarks", *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )


def _in_turn(arms: dict[str, Arm]) -> dict[str, list[float]]:
    """Times the arms in turn, again and again, as machines drift: seconds a step.

    A round takes as many steps of each arm as lie between two drains, so that each has
    one, a few steps at a time.
    """
    for name, step in arms.items():
        _say(f"compiling: {name}")
        jax.block_until_ready(step())
    seconds = {name: [0.0] * _ROUNDS for name in arms}
    rng = np.random.default_rng(0)
    for turn in range(_ROUNDS):
        _say(f"round {turn + 1} of {_ROUNDS}")
        for _ in range(_EVERY // _AT_A_TIME):
            for name in rng.permutation(list(arms)):
                seconds[name][turn] += _seconds(arms[name]) / _EVERY
    _say("")
    return seconds


def _seconds(arm: Arm) -> float:
    start = time.perf_counter()
    results = [arm() for _ in range(_AT_A_TIME)]
    jax.block_until_ready(results[-1])
    return time.perf_counter() - start


def _plain(params: Any, batch: jax.Array) -> Arm:
    return _training(optax.adamw(1e-3), params, batch)


def _ring(params: Any, batch: jax.Array, directory: Path) -> Arm:
    monitor = _monitor(directory, params)
    tx = watch(optax.adamw(1e-3), window=_EVERY)
    return _training(tx, params, batch, after=lambda state, _: monitor(state))


def _returned(params: Any, batch: jax.Array, directory: Path) -> Arm:
    monitor = _monitor(directory, None)
    return _training(
        optax.adamw(1e-3),
        params,
        batch,
        extra=lambda *trees: measure(*trees),
        after=lambda _, stats: monitor.append(stats),
    )


def _monitor(directory: Path, params: Any) -> monitoring.Monitor:
    return monitoring.Monitor(
        params, every=_EVERY, dir=directory, warn=lambda finding: None
    )


def _training(
    tx: optax.GradientTransformation,
    params: Any,
    batch: jax.Array,
    *,
    extra: Callable = lambda *trees: None,
    after: Callable = lambda state, returned: None,
) -> Arm:
    """Returns a step of training that keeps its own parameters and state."""

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        for layer in params.values():
            x = x + jnp.tanh(x @ layer["kernel"] + layer.get("bias", 0.0))
        return jnp.mean(x**2)

    @jax.jit(donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: jax.Array) -> tuple:
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        returned = extra(grads, updates, params)
        return optax.apply_updates(params, updates), state, returned

    own = jax.tree.map(jnp.copy, params)
    held = [own, jax.jit(tx.init)(own)]

    def take() -> Any:
        *held[:], returned = step(*held, batch)
        after(held[1], returned)
        return held[0]

    return take


def _network(leaves: int) -> tuple[dict, jax.Array]:
    """Returns dense layers of 1.7 M parameters in so many leaves, and a batch."""
    kernels = -(-leaves // 2)
    width = max(1, round((_PARAMETERS / kernels) ** 0.5))
    rng = np.random.default_rng(0)
    params = {}
    for number in range(kernels):
        kernel = rng.normal(scale=0.3 * width**-0.5, size=(width, width))
        layer = {"kernel": jnp.asarray(kernel, jnp.float32)}
        if 2 * number + 1 < leaves:
            layer["bias"] = jnp.zeros(width)
        params[f"dense{number:04}"] = layer
    return params, jnp.asarray(rng.normal(size=(_BATCH, width)), jnp.float32)


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


__all__ = ["run"]
