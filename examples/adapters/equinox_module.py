"""Equinox: the arrays of a module are the parameters, and `filter_jit` may donate."""

from typing import Any

import equinox as eqx
import jax
import optax

import gradnorm_jax as gn
from examples.adapters.batches import batches, command
from gradnorm_jax.monitoring import History, Monitor


def network() -> eqx.nn.MLP:
    """Returns two dense layers."""
    return eqx.nn.MLP(64, 10, width_size=64, depth=1, key=jax.random.key(0))


def loss_fn(net: eqx.nn.MLP, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of a batch."""
    logits = jax.vmap(net)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main(steps: int = 200, dir: Any = None) -> History:
    """Trains, and returns the record."""
    net = network()
    params = eqx.filter(net, eqx.is_inexact_array)
    tx = gn.watch(optax.chain(gn.clip_by_global_norm(1.0), optax.sgd(0.1)))
    opt_state = tx.init(params)

    @eqx.filter_jit(donate="all")
    def step(net, opt_state, images, labels):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(net, images, labels)
        arrays = eqx.filter(net, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, arrays, value=loss)
        return eqx.apply_updates(net, updates), opt_state

    with Monitor(params, every=50, dir=dir) as monitor:
        for images, labels in zip(*batches(steps), strict=True):
            net, opt_state = step(net, opt_state, images, labels)
            monitor(opt_state)
    return monitor.history


if __name__ == "__main__":
    command(main)
