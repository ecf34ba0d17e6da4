"""Flax NNX: an `nnx.Optimizer` is watched, and the monitor takes it as it is."""

from typing import Any

import jax
import optax
from flax import nnx

import gradnorm_jax as gn
from examples.adapters.batches import batches, command
from gradnorm_jax.monitoring import History, Monitor


class Network(nnx.Module):
    """Two dense layers."""

    def __init__(self, rngs: nnx.Rngs):
        """Makes the layers."""
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the logits."""
        return self.head(nnx.relu(self.hidden(images)))


def main(steps: int = 200, dir: Any = None) -> History:
    """Trains, and returns the record."""
    model = Network(nnx.Rngs(0))
    tx = gn.watch(optax.chain(gn.clip_by_global_norm(1.0), optax.sgd(0.1)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, images, labels):
        def loss_fn(model):
            losses = optax.softmax_cross_entropy_with_integer_labels(
                model(images), labels
            )
            return losses.mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads, value=loss)

    params = nnx.as_pure(nnx.state(model, nnx.Param))
    with Monitor(params, every=50, dir=dir) as monitor:
        for images, labels in zip(*batches(steps), strict=True):
            step(model, optimizer, images, labels)
            monitor(optimizer)
    return monitor.history


if __name__ == "__main__":
    command(main)
