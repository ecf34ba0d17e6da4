"""One script for one process and for many: digits, a split model, a clip, a record.

The parameters and the moments of AdamW are split over all devices (FSDP), the batch is
too. The step is written for whole arrays; JAX splits it. Norms need no argument: they
are of the whole gradients, and the same on every process. Every process takes every
step; process 0 alone prints and writes.

One process, on all of its devices::

    python -m examples.distributed

Two processes on this machine, each with two devices of the CPU::

    export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2
    all="--coordinator localhost:12345 --num-processes 2"
    python -m examples.distributed $all --process-id 1 &
    python -m examples.distributed $all --process-id 0
    wait

Slurm, one process for each task; JAX finds the others by itself::

    srun python -m examples.distributed --distributed

Kubernetes: an indexed Job is in ``docs/distributed.md``.
"""

import argparse
import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gradnorm_jax as gn
from examples import digits, experiment

WIDTH, MAX_NORM, RATE = 256, 1.0, 3e-3


class Network(nn.Module):
    """Two hidden layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits."""
        x = nn.relu(nn.Dense(WIDTH)(x))
        x = nn.relu(nn.Dense(WIDTH)(x))
        return nn.Dense(digits.CLASSES)(x)


def split(mesh: jax.sharding.Mesh, array: jax.ShapeDtypeStruct) -> NamedSharding:
    """Splits the longest dimension of an array over all devices, if it divides."""
    longest = int(np.argmax(array.shape))
    if array.shape[longest] % mesh.size:
        return NamedSharding(mesh, P())
    return NamedSharding(mesh, P(*[None] * longest, "data"))


def on_the_mesh(mesh: jax.sharding.Mesh, array: np.ndarray, spec: P) -> jax.Array:
    """Makes an array of all processes: each one copies what its devices hold."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])


def batches(mesh: jax.sharding.Mesh, steps: int) -> Iterator[tuple]:
    """Yields images and labels, split over all devices.

    Every process draws the numbers of all images from the same seed, and copies only
    its own. So a run does not depend on how many processes there are.
    """
    images, labels = digits.load()[:2]
    rng = np.random.default_rng(0)
    size = -(-digits.BATCH // mesh.size) * mesh.size
    for _ in range(steps):
        chosen = rng.integers(0, len(labels), size)
        yield tuple(on_the_mesh(mesh, x[chosen], P("data")) for x in (images, labels))


def train(mesh: jax.sharding.Mesh, steps: int, log: Path) -> tuple[Any, float]:
    """Trains on every process; writes the record on process 0.

    Returns:
      The parameters, on their devices, and the accuracy on the test set.
    """
    network = Network()
    tx = gn.watch(optax.chain(gn.clip_by_global_norm(MAX_NORM), optax.adamw(RATE)))

    def initial_params() -> Any:
        images = jnp.zeros((1, digits.PIXELS))
        return network.init(jax.random.key(0), images)["params"]

    def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = network.apply({"params": params}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, images: jax.Array, labels: jax.Array):
        loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def accuracy(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = network.apply({"params": params}, images)
        return jnp.mean(jnp.argmax(logits, axis=-1) == labels)

    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(initial_params)
        shardings = jax.tree.map(functools.partial(split, mesh), shapes)
        params = jax.jit(initial_params, out_shardings=shardings)()
        opt_state = tx.init(params)  # not in `jit`, so that the moments are split too
        with gn.monitoring.Monitor(params, dir=log) as monitor:
            for images, labels in batches(mesh, steps):
                params, opt_state = step(params, opt_state, images, labels)
                monitor(opt_state)  # on every process; it writes on process 0
        test_set = (on_the_mesh(mesh, x, P()) for x in digits.load()[2:])
        return params, float(accuracy(params, *test_set))


def run(quick: bool, out: Path) -> Any:
    """Trains; on process 0 prints a table and saves the figures.

    Args:
      quick: Whether to take 20 steps only.
      out: Where process 0 puts the record and the figures; it may not hold a run.

    Returns:
      The parameters at the end, on their devices.
    """
    kinds = (AxisType.Auto,)  # the compiler gathers the parameters that a layer needs
    mesh = jax.make_mesh((jax.device_count(),), ("data",), kinds)
    params, accuracy = train(mesh, 20 if quick else 400, out)
    if jax.process_index() == 0:  # from here on files only: no norm, no device
        save(gn.monitoring.load(out), accuracy, out / "figures.json")
    return params


def save(history: gn.monitoring.History, accuracy: float, path: Path) -> None:
    """Prints a few steps of a run, and saves the figures of all steps."""
    columns = {
        "step": history.steps,
        "loss": history.scalars["loss"],
        "global norm": history.global_norm("grad"),
        "scale": history.scalars["clip/scale"],
    }
    few = np.unique(np.geomspace(1, len(history), 10).astype(int)) - 1
    rows = [{name: values[at] for name, values in columns.items()} for at in few]
    print(experiment.markdown(rows), end="\n\n")
    processes, devices = jax.process_count(), jax.device_count()
    print(f"Accuracy {accuracy:.3f}; processes: {processes}, devices: {devices}.")
    figures = {name: values.tolist() for name, values in columns.items()}
    figures |= {"accuracy": accuracy, "processes": processes, "devices": devices}
    path.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"The figures are {path}; `gradnorm report {path.parent}` draws the record.")


def main(argv: Sequence[str] | None = None) -> Any:
    """Joins the others, if there are any, trains, and returns the parameters."""
    parser = argparse.ArgumentParser(prog="python -m examples.distributed")
    parser.add_argument("--quick", action="store_true", help="20 steps")
    own = Path(f"runs/examples/distributed-{time.strftime('%Y%m%d-%H%M%S')}")
    parser.add_argument("--out", type=Path, default=own, help="of process 0")
    parser.add_argument(
        "--distributed", action="store_true", help="let JAX find the other processes"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    given = parser.parse_args(argv)
    if given.distributed or given.coordinator:  # before anything touches a device
        jax.distributed.initialize(
            given.coordinator, given.num_processes, given.process_id
        )
    return run(given.quick, given.out)


if __name__ == "__main__":
    main()
