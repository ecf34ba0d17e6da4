"""What each of two real processes does; `test_processes.py` starts and compares them.

Run as `python -m tests.two_processes DIRECTORY [arguments of examples.distributed]`.
What it found goes to `DIRECTORY/found-K.json`; floats are in hexadecimal, so that equal
words are equal bits.
"""

import hashlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gradnorm_jax as gn
from examples import distributed

SPECS = {"b": P(), "v": P("d"), "w": P(None, "d")}
MAX_NORM, STEPS, PATIENCE = 2.0, 5, 20.0


def gradients():
    """The same on every process: one leaf is whole everywhere, two are split."""
    rng = np.random.default_rng(0)
    shapes = {"b": (3,), "v": (8,), "w": (2, 4)}
    return {
        name: rng.normal(scale=3, size=shape).astype("f4")
        for name, shape in shapes.items()
    }


def whole(x):
    """A split array of all devices; one that each device holds, as this process does.

    So a copy that differs between the processes is seen.
    """
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    return multihost_utils.process_allgather(x, tiled=True)


def words(tree):
    """The bits of all numbers in a tree."""
    return [float(x).hex() for leaf in jax.tree.leaves(tree) for x in whole(leaf).flat]


def fingerprint(params):
    """What the bits of all parameters come to."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        found.update(whole(leaf).tobytes())
    return found.hexdigest()


def norms(grads, mesh):
    """The global norm and those of leaves, as both ways of programming give them."""

    def measure(grads):
        return gn.global_norm(grads), gn.leaf_norms(grads)

    mapped = jax.shard_map(measure, mesh=mesh, in_specs=(SPECS,), out_specs=P())
    return {
        "norms in jit": words(jax.jit(measure)(grads)),
        "norms in shard_map": words(jax.jit(mapped)(grads)),
    }


def clip(grads, mesh):
    """What a clip inside `shard_map` leaves, and what it says of itself."""
    tx = gn.clip_by_global_norm(MAX_NORM)
    update = jax.shard_map(
        tx.update, mesh=mesh, in_specs=(SPECS, P()), out_specs=(SPECS, P())
    )
    updates, state = jax.jit(update)(grads, tx.init(grads))
    return {
        "clipped": words(updates),
        "scale": words(state.metrics.scales),
        "alone": alone(lambda: gn.scalars(state)["clip/scale"].hex()),
    }


def state(grads, mesh):
    """The arrays of a new state that are not on every device of the mesh."""
    tx = gn.watch(optax.chain(gn.autoclip(), gn.zclip(), optax.sgd(0.1)))
    everywhere = NamedSharding(mesh, P())
    leaves = jax.tree.leaves_with_path(tx.init(grads))
    return {
        "astray": [
            jax.tree_util.keystr(path)
            for path, x in leaves
            if not x.sharding.is_equivalent_to(everywhere, x.ndim)
        ],
        "arrays": len(leaves),
    }


def record(grads, log):
    """Watches a few steps; both processes make a monitor and call it."""
    tx = gn.watch(optax.sgd(0.1))
    update = jax.jit(tx.update)
    state = tx.init(grads)
    with gn.monitoring.Monitor(grads, every=2, dir=log) as monitor:
        for step in range(STEPS):
            _, state = update(grads, state, grads, value=float(step))
            monitor(state)
    monitor.report(log / "report.html")
    return {"ring": words(state.ring[:STEPS])}


def alone(ask):
    """Lets process 0 ask while process 1 is not in JAX at all, but waits for a file."""
    answered = OUT / "answered"
    if jax.process_index() == 0:
        answer = ask()
        answered.touch()
        return answer
    until = time.monotonic() + PATIENCE
    while not answered.exists():
        if time.monotonic() > until:
            return "process 0 was not answered"
        time.sleep(0.05)
    return "process 0 was answered"


def main(argv):
    """Trains as the example does, then looks at norms, clips, states and records."""
    process = argv[argv.index("--process-id") + 1]
    params = distributed.main(["--out", str(OUT / f"example-{process}"), *argv])
    found = {"parameters": fingerprint(params)}

    mesh = jax.make_mesh((4,), ("d",), (jax.sharding.AxisType.Auto,))
    grads = {
        name: distributed.on_the_mesh(mesh, x, SPECS[name])
        for name, x in gradients().items()
    }
    found |= norms(grads, mesh) | clip(grads, mesh) | state(grads, mesh)
    found |= record(grads, OUT / f"record-{process}")
    (OUT / f"found-{process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    OUT = Path(sys.argv[1])
    try:
        main(sys.argv[2:])
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # else JAX waits at the exit for the other process, for minutes
