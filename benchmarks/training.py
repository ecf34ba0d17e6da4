"""Steps that own what they train: of an optimizer alone, and with a net."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import trees
from benchmarks.timing import Arm, build


class Step:
    """An optimizer step that donates its parameters and state."""

    def __init__(self, tx: Any, grads: Any) -> None:
        self.grads = grads
        self.params = jax.block_until_ready(jax.tree.map(jnp.copy, grads))
        self.state = tx.init(self.params)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.program = build(step, self.params, self.state, grads)

    def take(self) -> Any:
        """Takes a step, and returns the parameters after it."""
        self.params, self.state = self.program.run(self.params, self.state, self.grads)
        return self.params

    def arm(self) -> Arm:
        """Returns what can be timed."""
        return Arm(self.take, program=self.program)


class Training:
    """A training step of a dense net: forward, backward, optimizer."""

    def __init__(self, tx: Any, shapes: trees.Shapes) -> None:
        self.params = trees.fill(shapes, jnp.float32, seed=1)
        self.state = tx.init(self.params)
        width = shapes["dense00/bias"][0]
        self.batch = jax.random.normal(jax.random.key(2), (128, width))

        def loss_fn(params: Any, x: jax.Array) -> jax.Array:
            for layer in range(len(shapes) // 2):
                dense = params[f"dense{layer:02}/kernel"]
                x = x + jnp.tanh(x @ dense + params[f"dense{layer:02}/bias"])
            return jnp.mean(x**2)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any]:
            grads = jax.grad(loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.program = build(step, self.params, self.state, self.batch)

    def take(self) -> Any:
        """Takes a step, and returns the parameters after it."""
        self.params, self.state = self.program.run(self.params, self.state, self.batch)
        return self.params

    def arm(self) -> Arm:
        """Returns what can be timed."""
        return Arm(self.take, program=self.program)
