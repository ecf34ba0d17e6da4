"""Keras 3 on JAX, experimental: the optimizer is watched, a callback reads it."""

import os
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras

from examples.adapters.batches import batches, command
from gradnorm_jax.keras import GradNormCallback, watch
from gradnorm_jax.monitoring import History


def network() -> Any:
    """Returns two dense layers."""
    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(64, activation="relu", name="hidden")
    head = keras.layers.Dense(10, name="head")
    return keras.Sequential([keras.Input((64,)), hidden, head], name="net")


def main(steps: int = 200, dir: Any = None) -> History:
    """Trains, and returns the record."""
    model = network()
    optimizer = watch(keras.optimizers.SGD(0.1, global_clipnorm=1.0))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    images, labels = batches(steps)
    callback = GradNormCallback(every=50, dir=dir)
    model.fit(
        images.reshape(-1, 64),
        labels.reshape(-1),
        batch_size=64,
        shuffle=False,
        callbacks=[callback],
        verbose=0,
    )
    return callback.monitor.history


if __name__ == "__main__":
    command(main)
