"""Flax Linen: the optimizer of a `TrainState` is watched, the monitor takes it."""

from typing import Any

import jax
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import gradnorm_jax as gn
from examples.adapters.batches import batches, command
from gradnorm_jax.monitoring import History, Monitor


class Network(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the logits."""
        return nn.Dense(10, name="head")(nn.relu(nn.Dense(64, name="hidden")(images)))


def initial_params() -> Any:
    """Returns the parameters that training starts from."""
    return Network().init(jax.random.key(0), jax.numpy.ones((1, 64)))["params"]


def main(steps: int = 200, dir: Any = None) -> History:
    """Trains, and returns the record."""
    network, params = Network(), initial_params()
    tx = gn.watch(optax.chain(gn.clip_by_global_norm(1.0), optax.sgd(0.1)))
    state = TrainState.create(apply_fn=network.apply, params=params, tx=tx)

    @jax.jit
    def step(state, images, labels):
        def loss_fn(params):
            logits = state.apply_fn({"params": params}, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))

    with Monitor(params, every=50, dir=dir) as monitor:
        for images, labels in zip(*batches(steps), strict=True):
            state = step(state, images, labels)
            monitor(state)
    return monitor.history


if __name__ == "__main__":
    command(main)
