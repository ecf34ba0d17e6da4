"""A Python loop with Optax: the record rides in the optimizer's state."""

from typing import Any

import jax
import numpy as np
import optax

import gradnorm_jax as gn
from examples import digits
from examples.adapters.batches import batches, command
from gradnorm_jax.monitoring import History, Monitor


def initial_params() -> Any:
    """Returns the parameters that training starts from."""
    params = digits.two_layers(np.random.default_rng(0))
    return jax.tree.map(lambda x: jax.numpy.asarray(x, "float32"), params)


def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of a batch."""
    logits = digits.perceptron(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main(steps: int = 200, dir: Any = None) -> History:
    """Trains, and returns the record."""
    params = initial_params()
    tx = gn.watch(optax.chain(gn.clip_by_global_norm(1.0), optax.sgd(0.1)))
    opt_state = tx.init(params)

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
