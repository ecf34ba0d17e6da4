"""The digits that ship with scikit-learn, as streams of batches, and how to train."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

PIXELS, WIDTH, CLASSES, BATCH = 64, 64, 10, 64


@functools.cache
def load() -> list[np.ndarray]:
    """Returns images and labels to train on, then images and labels to test with."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16, labels, test_size=0.2, random_state=0)
    return [parts[0].astype("f4"), parts[2], parts[1].astype("f4"), parts[3]]


class Stream(NamedTuple):
    """The batches of a run, the first dimension being the step."""

    images: np.ndarray  # which ones: [steps, batch]
    labels: np.ndarray  # [steps, batch]
    brightness: np.ndarray  # what the images are multiplied by: [steps]
    weights: np.ndarray  # what the loss is multiplied by: [steps]

    @classmethod
    def clean(cls, rng: np.random.Generator, steps: int) -> "Stream":
        """Returns batches of images drawn at random."""
        labels = load()[1]
        images = rng.integers(0, len(labels), (steps, BATCH))
        return cls(images, labels[images], np.ones(steps), np.ones(steps))

    def corrupted(self, rng: np.random.Generator, at: np.ndarray) -> "Stream":
        """Returns the same batches, at some steps x100 and with labels at random."""
        noise = rng.integers(0, CLASSES, self.labels.shape)
        return self._replace(
            labels=np.where(at[:, None], noise, self.labels),
            brightness=np.where(at, 100.0, self.brightness),
        )


def dense(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Returns kernels [..., inputs, outputs] with the variance of He et al."""
    return rng.normal(scale=np.sqrt(2 / shape[-2]), size=shape)


def two_layers(rng: np.random.Generator) -> dict[str, dict[str, np.ndarray]]:
    """Returns the parameters of `perceptron`."""
    return {
        "hidden": {"kernel": dense(rng, PIXELS, WIDTH), "bias": np.zeros(WIDTH)},
        "head": {"kernel": dense(rng, WIDTH, CLASSES), "bias": np.zeros(CLASSES)},
    }


def perceptron(params: Any, images: jax.Array) -> jax.Array:
    """Returns the logits of a network with one hidden layer."""
    hidden, head = params["hidden"], params["head"]
    x = jax.nn.relu(images @ hidden["kernel"] + hidden["bias"])
    return x @ head["kernel"] + head["bias"]


def train(
    network: Callable[[Any, jax.Array], jax.Array],
    tx: optax.GradientTransformation,
    params: Any,
    stream: Stream,
) -> dict[str, jax.Array]:
    """Trains a network, and returns how it went.

    Args:
      network: Logits from parameters and images.
      tx: The clip and the optimizer.
      params: Where training starts.
      stream: The batches.

    Returns:
      The "accuracy" on the test set at the end; step by step the "norms" of gradients
      and of "updates", and which share of the batch was right before the step: "right".
    """
    images, _, test_images, test_labels = map(jnp.asarray, load())
    tx = optax.with_extra_args_support(tx)

    def loss_fn(params: Any, batch: Stream) -> tuple[jax.Array, jax.Array]:
        logits = network(params, batch.brightness * images[batch.images])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        right = jnp.mean(jnp.argmax(logits, axis=-1) == batch.labels)
        return batch.weights * jnp.mean(losses), right

    def step(carry: tuple, batch: Stream) -> tuple[tuple, dict]:
        params, state = carry
        (loss, right), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        updates, state = tx.update(grads, state, params, value=loss)
        norms, sizes = optax.tree.norm(grads), optax.tree.norm(updates)
        record = {"norms": norms, "updates": sizes, "right": right}
        return (optax.apply_updates(params, updates), state), record

    (params, _), record = jax.lax.scan(step, (params, tx.init(params)), stream)
    guesses = jnp.argmax(network(params, test_images), axis=-1)
    return {"accuracy": jnp.mean(guesses == test_labels), **record}
