"""What norms, clips and records cost on a mesh of eight devices, against Optax's.

`python -m benchmarks.sharded [--quick] [--json FILE]` is a process of its own: one
host plays eight devices only if it is told so before JAX starts. Every call is jitted
and waited for: many programs that reduce across virtual devices, in flight at once, can
leave XLA's CPU client waiting for ever, as `optax.tree.norm` does without jit.
"""

import argparse
import collections
import functools
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import P

import gradnorm_jax as gn
from benchmarks import timing, trees

LAYOUTS = {
    "replicated": (P(),),
    "P('d')": (P("d"),),
    "P('d', 't')": (P("d", "t"),),
    "mixed": (
        P(),
        P("d"),
        P(None, "t"),
        P("d", "t"),
        P("t", "d"),
        P(("d", "t")),
    ),
}
COLLECTIVES = re.compile(
    r"= (?P<shape>.+?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute)(?:-start)?\("
)
HEADER = (
    "| what          | layout      | arm              | collectives   | in branches "
    "| numbers | compile s |      ms | ratio | quartiles |\n"
    "|---------------|-------------|------------------|---------------|------------:"
    "|--------:|----------:|--------:|------:|-----------|"
)


class Row(NamedTuple):
    """One arm: the collectives of its program, and its time beside Optax's under jit.

    `in_branches` counts the collectives that a `cond` holds, and `numbers` the entries
    of all arrays that are all-reduced, those in branches included. Each program is
    compiled once, so `compile_s` is a single measurement.
    """

    what: str
    tree: str
    layout: str
    dtype: str
    arm: str
    collectives: dict[str, int]
    in_branches: int
    numbers: int
    compile_s: float
    ours_ms: float
    theirs_ms: float
    ratio: float
    low: float
    high: float


class Arm(NamedTuple):
    """A call that returns a tree of arrays, and how to lower its program."""

    call: Callable[[], Any]
    lower: Callable[[], Any]


def rows(repeats: int) -> Iterator[Row]:
    """Compares norms, clips and steps in every layout of a tree of 100 leaves."""
    mesh = jax.make_mesh(
        (4, 2),
        ("d", "t"),
        (jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices("cpu")[:8],
    )
    for layout, cycle in LAYOUTS.items():
        names = trees.matrices()
        specs = {name: cycle[k % len(cycle)] for k, name in enumerate(names)}
        for what, compared in (
            ("norm", _norms),
            ("clip", _clips),
            ("clip and Adam", _steps),
        ):
            yield from _measure(what, layout, compared(mesh, specs), repeats)


def _norms(mesh: Any, specs: Any) -> dict[str, Arm]:
    grads = _fill(mesh, specs)
    ours = jax.shard_map(gn.global_norm, mesh=mesh, in_specs=(specs,), out_specs=P())
    found = {
        "optax, jit": jax.jit(optax.tree.norm),
        "ours, jit": jax.jit(gn.global_norm),
        "ours, shard_map": jax.jit(ours),
    }
    return {
        arm: Arm(functools.partial(fun, grads), _lower(fun, grads))
        for arm, fun in found.items()
    }


def _clips(mesh: Any, specs: Any) -> dict[str, Arm]:
    grads = _fill(mesh, specs)
    theirs, ours = optax.clip_by_global_norm(1.0), gn.clip_by_global_norm(1.0)
    state = _placed(ours.init(grads), mesh)
    manual = jax.shard_map(
        ours.update,
        mesh=mesh,
        in_specs=(specs, _specs(state)),
        out_specs=(specs, _specs(state)),
    )
    found = {
        "optax, jit": (jax.jit(theirs.update), theirs.init(grads)),
        "ours, jit": (jax.jit(ours.update), state),
        "ours, shard_map": (jax.jit(manual), state),
    }
    return {
        arm: Arm(lambda fun=fun, own=own: fun(grads, own)[0], _lower(fun, grads, own))
        for arm, (fun, own) in found.items()
    }


def _steps(mesh: Any, specs: Any) -> dict[str, Arm]:
    adam = optax.adam(1e-3)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), adam)
    ours = optax.chain(gn.clip_by_global_norm(1.0), adam)
    grads = _fill(mesh, specs)
    steps = {
        "optax, jit": _Step(theirs, mesh, specs, grads),
        "watch, jit": _Step(gn.watch(ours), mesh, specs, grads),
        "ours, shard_map": _Step(ours, mesh, specs, grads, manual=True),
        "watch, shard_map": _Step(gn.watch(ours), mesh, specs, grads, manual=True),
    }
    return {arm: Arm(step, step.lower) for arm, step in steps.items()}


class _Step:
    """An optimizer step that donates its parameters and state.

    A call returns Adam's mean of the gradients, by which clips can be told apart.
    """

    def __init__(
        self, tx: Any, mesh: Any, specs: Any, grads: Any, *, manual: bool = False
    ) -> None:
        self.grads = grads
        self.params = _fill(mesh, specs, seed=1)
        self.state = _placed(tx.init(self.params), mesh)

        def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        if manual:
            kept = (specs, _specs(self.state))
            step = jax.shard_map(
                step, mesh=mesh, in_specs=(*kept, specs), out_specs=kept
            )
        self.step = jax.jit(step, donate_argnums=(0, 1))

    def __call__(self) -> Any:
        self.params, self.state = self.step(self.params, self.state, self.grads)
        return optax.tree.get(self.state, "mu")

    def lower(self) -> Any:
        return self.step.lower(self.params, self.state, self.grads)


def _lower(fun: Any, *args: Any) -> Callable[[], Any]:
    return lambda: fun.lower(*args)


def _measure(
    what: str, layout: str, arms: dict[str, Arm], repeats: int
) -> Iterator[Row]:
    programs = {arm: _program(each) for arm, each in arms.items()}
    calls = {arm: each.call for arm, each in arms.items()}
    _same(calls)
    found = timing.against_the_first(calls, 6 * repeats)
    first, *others = arms
    theirs = found[others[0]].theirs
    itself = timing.Timing(theirs, theirs, 1.0, (1.0, 1.0))
    for arm in (first, *others):
        got = found.get(arm, itself)
        yield Row(
            what,
            "matrices 2.1M/100",
            layout,
            "float32",
            arm,
            *programs[arm],
            got.ours * 1e3,
            got.theirs * 1e3,
            got.ratio,
            *got.spread,
        )


def _program(arm: Arm) -> tuple[dict[str, int], int, int, float]:
    """Returns the collectives of a compiled arm, what they add, and its seconds."""
    lowered = arm.lower()
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    entry = text[text.index("\nENTRY ") :].split("\n}")[0]
    kinds = collections.Counter(m["kind"] for m in COLLECTIVES.finditer(text))
    in_branches = kinds.total() - len(COLLECTIVES.findall(entry))
    numbers = 0
    for match in COLLECTIVES.finditer(text):
        if match["kind"] == "all-reduce":
            for shape in re.findall(r"\w\[([\d,]*)\]", match["shape"]):
                numbers += math.prod(int(n) for n in shape.split(",") if n)
    return dict(kinds), in_branches, numbers, seconds


def _fill(mesh: Any, specs: Any, seed: int = 0) -> dict[str, jax.Array]:
    places = {k: jax.sharding.NamedSharding(mesh, spec) for k, spec in specs.items()}
    tree = trees.fill(trees.matrices(), jnp.float32, seed)
    return jax.block_until_ready(jax.device_put(tree, places))


def _placed(state: Any, mesh: Any) -> Any:
    """Puts on the mesh what `init` left on one device, so that all arms start alike."""
    whole = jax.sharding.NamedSharding(mesh, P())
    return jax.tree.map(
        lambda x: x if x.sharding.num_devices > 1 else jax.device_put(x, whole), state
    )


def _specs(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding.spec, tree)


def _same(calls: dict[str, Callable[[], Any]]) -> None:
    """Refuses to time arms that do not agree: a wrong norm is quick to compute."""
    norm = jax.jit(optax.tree.norm)
    norms = {
        arm: float(norm(jax.block_until_ready(call()))) for arm, call in calls.items()
    }
    if not np.allclose(list(norms.values()), next(iter(norms.values())), rtol=1e-5):
        raise AssertionError(f"The arms do not agree: their results have norms {norms}")


def _print(row: Row) -> None:
    kinds = ", ".join(f"{n} {kind}" for kind, n in row.collectives.items()) or "0"
    print(
        f"| {row.what:13} | {row.layout:11} | {row.arm:16} | {kinds:13} "
        f"| {row.in_branches:11} | {row.numbers:7} | {row.compile_s:9.2f} "
        f"| {row.ours_ms:7.2f} | {row.ratio:5.2f} | {row.low:.2f}-{row.high:.2f} |",
        flush=True,
    )


def in_a_process(*, quick: bool) -> list[dict[str, Any]]:
    """Runs this file beside a process with one device, and returns its rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.sharded", "--json", str(path)]
        subprocess.run([*command, *(["--quick"] if quick else [])], check=True)
        return json.loads(path.read_text())


def main() -> None:
    """Runs the comparisons on eight virtual devices and prints a line for each arm."""
    parser = argparse.ArgumentParser(prog="benchmarks.sharded", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a third of the repeats")
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows here")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)

    print("Eight virtual devices, mesh (4, 2); ratios to Optax under jit\n")
    print(HEADER)
    found = []
    for row in rows(7 if options.quick else 21):
        _print(row)
        found.append(row._asdict())
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
