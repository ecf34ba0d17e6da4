"""What norms, clips and steps cost on a mesh of eight devices, against Optax's.

A step is a clip and Adam. This is a process of its own: one host plays eight devices
only if it is told so before JAX starts. Every call is jitted and waited for: many
programs that reduce across virtual devices, in flight at once, can leave XLA's CPU
client waiting for ever, as `optax.tree.norm` does without jit. It is given options in
JSON, and prints a row in JSON on each line.
"""

import collections
import functools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import P

import gradnorm_jax as gn
from benchmarks import comparing, timing, trees
from benchmarks.options import Options
from benchmarks.rows import Row

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
FEW = ("mixed",)
COLLECTIVES = re.compile(
    r"= (?P<shape>.+?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute)(?:-start)?\("
)


class Facts(NamedTuple):
    """What a program has: its collectives, the entries they add, and its compile time.

    `in_branches` counts the collectives that a `cond` holds, and `numbers` the entries
    of all arrays that are all-reduced, those in branches included. Each program is
    compiled once, so `seconds` is a single measurement.
    """

    collectives: dict[str, int]
    in_branches: int
    numbers: int
    seconds: float
    memory: int

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.collectives.items())
        if not kinds:
            return "no collective"
        rare = f", {self.in_branches} in branches" if self.in_branches else ""
        return f"{kinds} of {self.numbers} numbers{rare}"


class Arm(NamedTuple):
    """A call that returns a tree of arrays, and how to lower its program."""

    call: Callable[[], Any]
    lower: Callable[[], Any]


def rows(options: Options) -> Iterator[Row]:
    """Compares norms, clips and steps in every layout of a tree of 100 leaves."""
    mesh = jax.make_mesh(
        (4, 2),
        ("d", "t"),
        (jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices("cpu")[:8],
    )
    shapes = options.shapes("matrices")
    for layout, cycle in LAYOUTS.items():
        if layout not in (LAYOUTS if options.whole else FEW):
            continue
        specs = {name: cycle[k % len(cycle)] for k, name in enumerate(shapes)}
        grads = _fill(mesh, shapes, specs)
        kinds = {"norm": _norms, "clip": _clips}
        if options.whole or options.tiny:
            kinds["step"] = _steps
        for what, compared in kinds.items():
            arms = compared(mesh, specs, grads)
            yield from _measure(options, what, layout, arms)


def _norms(mesh: Any, specs: Any, grads: Any) -> dict[str, Arm]:
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


def _clips(mesh: Any, specs: Any, grads: Any) -> dict[str, Arm]:
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


def _steps(mesh: Any, specs: Any, grads: Any) -> dict[str, Arm]:
    adam = optax.adam(1e-3)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), adam)
    ours = optax.chain(gn.clip_by_global_norm(1.0), adam)
    steps = {
        "optax, jit": _Step(theirs, mesh, specs, grads),
        "watch, jit": _Step(gn.watch(ours), mesh, specs, grads),
        "ours, shard_map": _Step(ours, mesh, specs, grads, manual=True),
        "watch, shard_map": _Step(gn.watch(ours), mesh, specs, grads, manual=True),
    }
    return {arm: Arm(step, step.lower) for arm, step in steps.items()}


class _Step:
    """An optimizer step that donates its parameters and state; it returns the state."""

    def __init__(
        self, tx: Any, mesh: Any, specs: Any, grads: Any, *, manual: bool = False
    ) -> None:
        self.grads = grads
        self.params = jax.block_until_ready(jax.tree.map(jnp.copy, grads))
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
        return self.state

    def lower(self) -> Any:
        return self.step.lower(self.params, self.state, self.grads)


def _lower(fun: Any, *args: Any) -> Callable[[], Any]:
    return lambda: fun.lower(*args)


def _measure(
    options: Options, what: str, layout: str, arms: dict[str, Arm]
) -> Iterator[Row]:
    facts = {arm: _facts(each) for arm, each in arms.items()}
    _same({arm: each.call for arm, each in arms.items()})
    calls = {arm: timing.Arm(each.call, repeat=False) for arm, each in arms.items()}
    times = options.in_turn(calls)
    peer, *others = arms
    for arm in others:
        row = Row(
            "sharded",
            f"{what}, {arm.removeprefix('ours, ')}",
            f"matrices {layout}",
            "float32",
            peer,
            build_ms=facts[arm].seconds * 1e3,
            peer_build_ms=facts[peer].seconds * 1e3,
            memory=facts[arm].memory,
            peer_memory=facts[peer].memory,
            note=f"{facts[arm]}; theirs {facts[peer]}",
        )
        yield comparing.timed(row, (times[arm], times[peer]))


def _facts(arm: Arm) -> Facts:
    """Compiles an arm, and reads its program."""
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
    memory = compiled.memory_analysis().temp_size_in_bytes
    return Facts(dict(kinds), in_branches, numbers, seconds, memory)


def _fill(mesh: Any, shapes: trees.Shapes, specs: Any) -> dict[str, jax.Array]:
    places = {k: jax.sharding.NamedSharding(mesh, spec) for k, spec in specs.items()}
    tree = trees.fill(shapes, jnp.float32)
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
    """Refuses to time arms that do not agree: a wrong norm is quick to compute.

    Of a step, Adam's mean of the gradients is compared, which clips change.
    """
    norm = jax.jit(optax.tree.norm)
    norms = {}
    for arm, call in calls.items():
        result = jax.block_until_ready(call())
        norms[arm] = float(norm(optax.tree.get(result, "mu", result)))
    if not np.allclose(list(norms.values()), next(iter(norms.values())), rtol=1e-5):
        raise AssertionError(f"The arms do not agree: their results have norms {norms}")


def main() -> None:
    """Runs the comparisons on eight virtual devices and prints a line for each row."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    for row in rows(Options(**json.loads(sys.argv[1]))):
        print(json.dumps(row._asdict()), flush=True)


if __name__ == "__main__":
    main()
