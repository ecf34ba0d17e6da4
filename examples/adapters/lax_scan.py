"""A `lax.scan` with `measure`: rows are outputs, and the state stays as it is."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradnorm_jax as gn
from examples.adapters.batches import batches, command
from examples.adapters.optax_loop import initial_params, loss_fn
from gradnorm_jax.monitoring import History, Monitor


def main(steps: int = 200, dir: Any = None) -> History:
    """Trains, and returns the record."""
    params = initial_params()
    tx = optax.chain(gn.clip_by_global_norm(1.0), optax.sgd(0.1))
    opt_state = tx.init(params)

    def step(carry, batch):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        stats = gn.measure(grads, updates, params, value=loss, state=opt_state)
        return (optax.apply_updates(params, updates), opt_state), stats

    run = jax.jit(lambda carry, some: jax.lax.scan(step, carry, some))
    images, labels = batches(steps)
    carry = params, opt_state
    with Monitor(every=1, dir=dir) as monitor:
        for first in range(0, steps, 50):
            block = jnp.asarray(images[first:][:50]), jnp.asarray(labels[first:][:50])
            carry, stats = run(carry, block)
            monitor.append(stats)
    return monitor.history


if __name__ == "__main__":
    command(main)
