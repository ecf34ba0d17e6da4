"""Haiku: the parameters of a transformed function are a tree like any other."""

from typing import Any

import haiku as hk
import jax
import optax

import gradnorm_jax as gn
from examples.adapters.batches import batches, command
from gradnorm_jax.monitoring import History, Monitor


@hk.without_apply_rng
@hk.transform
def network(images: jax.Array) -> jax.Array:
    """Returns the logits of two dense layers."""
    hidden = jax.nn.relu(hk.Linear(64, name="hidden")(images))
    return hk.Linear(10, name="head")(hidden)


def initial_params() -> Any:
    """Returns the parameters that training starts from."""
    return network.init(jax.random.key(0), jax.numpy.ones((1, 64)))


def main(steps: int = 200, dir: Any = None) -> History:
    """Trains, and returns the record."""
    params = initial_params()
    tx = gn.watch(optax.chain(gn.clip_by_global_norm(1.0), optax.sgd(0.1)))
    opt_state = tx.init(params)

    def loss_fn(params, images, labels):
        logits = network.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, opt_state, images, labels):
        loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return optax.apply_updates(params, updates), opt_state

    with Monitor(params, every=50, dir=dir) as monitor:
        for images, labels in zip(*batches(steps), strict=True):
            params, opt_state = step(params, opt_state, images, labels)
            monitor(opt_state)
    return monitor.history


if __name__ == "__main__":
    command(main)
