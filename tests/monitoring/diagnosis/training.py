"""Small nets on real data, trained inside one compiled scan, with faults on request."""

import dataclasses
import functools
import inspect
import json.decoder
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import gradnorm_jax as gn
from gradnorm_jax import telemetry
from gradnorm_jax.monitoring import History

BATCH = 32


@dataclasses.dataclass(frozen=True)
class Net:
    """Initial parameters from a generator, and a loss of parameters and a batch."""

    init: Callable[[np.random.Generator], Any]
    loss: Callable[[Any, Any], jax.Array]


def matrix(random, *shape, gain=1.0):
    """He initialization, the last axis being the one of the outputs."""
    fan_in = np.prod(shape[:-1])
    return np.float32(np.sqrt(gain * 2 / fan_in) * random.normal(size=shape))


def zeros(*shape):
    """Biases."""
    return np.zeros(shape, np.float32)


def dense(random, *sizes, gain=1.0):
    """Weights and biases of dense layers, named in the order of the network."""
    return {
        f"layer_{i}": {
            "kernel": matrix(random, *sizes[i : i + 2], gain=gain),
            "bias": zeros(sizes[i + 1]),
        }
        for i in range(len(sizes) - 1)
    }


def apply_dense(params, x, activation):
    """Applies dense layers, with an activation between them."""
    for i in range(len(params)):
        x = x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"]
        x = activation(x) if i + 1 < len(params) else x
    return x


def cross_entropy(logits, labels):
    """The mean loss of a classifier."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


@functools.cache
def mlp(activation=jax.nn.gelu, sizes=(64, 48, 48, 10), gain=1.0):
    """A perceptron that reads digits."""
    return Net(
        lambda random: dense(random, *sizes, gain=gain),
        lambda params, batch: cross_entropy(
            apply_dense(params, batch[0], activation), batch[1]
        ),
    )


@functools.cache
def convnet():
    """Two convolutions and a dense layer that read digits."""

    def init(random):
        return {
            "conv_0": {"kernel": matrix(random, 3, 3, 1, 8), "bias": zeros(8)},
            "conv_1": {"kernel": matrix(random, 3, 3, 8, 16), "bias": zeros(16)},
            "head": {
                "kernel": matrix(random, 64, 10, gain=0.5),
                "bias": zeros(10),
            },
        }

    def loss(params, batch):
        x = batch[0].reshape(-1, 8, 8, 1)
        for name in ("conv_0", "conv_1"):
            kernel = params[name]["kernel"]
            x = patches(x) @ kernel.reshape(-1, kernel.shape[-1])
            x = jax.nn.relu(x + params[name]["bias"])
        x = x.reshape(len(x), -1)
        return cross_entropy(
            x @ params["head"]["kernel"] + params["head"]["bias"], batch[1]
        )

    return Net(init, loss)


def patches(x):
    """What a convolution of width 3 and stride 2 multiplies its kernel with."""
    size = x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    shifted = [
        x[:, i : i + size - 1 : 2, j : j + size - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate(shifted, axis=-1)


@functools.cache
def gru(units=32):
    """A recurrent network that reads digits line by line."""

    def init(random):
        return {
            "gates": {
                "kernel": matrix(random, 8 + units, 2 * units, gain=0.5),
                "bias": zeros(2 * units),
            },
            "new": {
                "kernel": matrix(random, 8 + units, units, gain=0.5),
                "bias": zeros(units),
            },
            "out": {
                "kernel": matrix(random, units, 10, gain=0.5),
                "bias": zeros(10),
            },
        }

    def loss(params, batch):
        lines = batch[0].reshape(-1, 8, 8).swapaxes(0, 1)

        def cell(hidden, line):
            both = jnp.concatenate([line, hidden], axis=1)
            gates = both @ params["gates"]["kernel"] + params["gates"]["bias"]
            reset, keep = jnp.split(jax.nn.sigmoid(gates), 2, axis=1)
            both = jnp.concatenate([line, reset * hidden], axis=1)
            new = jnp.tanh(both @ params["new"]["kernel"] + params["new"]["bias"])
            return keep * hidden + (1 - keep) * new, None

        hidden, _ = jax.lax.scan(cell, jnp.zeros((lines.shape[1], units)), lines)
        logits = hidden @ params["out"]["kernel"] + params["out"]["bias"]
        return cross_entropy(logits, batch[1])

    return Net(init, loss)


@functools.cache
def language_model(width=48, blocks=2, length=32):
    """A transformer that writes text letter by letter."""

    def init(random):
        return {
            "embed": matrix(random, 128, width, gain=6.0),
            "position": matrix(random, length, width, gain=0.2),
            "head": matrix(random, width, 128, gain=0.5),
            "norm": np.ones(width, np.float32),
        } | {
            f"block_{i}": {
                "norms": np.ones((2, width), np.float32),
                "qkv": matrix(random, width, 3 * width, gain=0.5),
                "out": matrix(random, width, width, gain=0.1),
                "up": matrix(random, width, 4 * width),
                "down": matrix(random, 4 * width, width, gain=0.1),
            }
            for i in range(blocks)
        }

    def normed(x, scale):
        return scale * x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)

    def loss(params, batch):
        tokens, weight = batch
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = params["embed"][inputs] + params["position"]
        for i in range(blocks):
            block = params[f"block_{i}"]
            y = normed(x, block["norms"][0]) @ block["qkv"]
            q, k, v = jnp.split(y.reshape(*x.shape[:2], 4, -1), 3, axis=-1)
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + y.reshape(x.shape) @ block["out"]
            y = jax.nn.gelu(normed(x, block["norms"][1]) @ block["up"])
            x = x + y @ block["down"]
        logits = normed(x, params["norm"]) @ params["head"]
        return weight * cross_entropy(logits, targets)

    return Net(init, loss)


@functools.cache
def digits():
    """The images and labels that ship with scikit-learn."""
    pixels, labels = load_digits(return_X_y=True)
    return (pixels / 16).astype(np.float32), labels.astype(np.int32)


def digit_batches(steps, seed=0):
    """Batches of digits: arrays with a leading axis of steps, free to be spoilt."""
    pixels, labels = digits()
    random = np.random.default_rng(seed)
    chosen = random.integers(0, len(labels), (steps, BATCH))
    return pixels[chosen], labels[chosen]


def text_batches(steps, length=32, seed=0, batch=16):
    """Pieces of the source of Python's own library, and a weight for each step."""
    text = "".join(inspect.getsource(m) for m in (json.decoder, dataclasses, inspect))
    letters = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    random = np.random.default_rng(seed)
    starts = random.integers(0, len(letters) - length - 1, (steps, batch, 1))
    tokens = letters[starts + np.arange(length + 1)].astype(np.int32)
    return tokens, np.ones(steps, np.float32)


@functools.cache
def _compiled(net: Net, make_tx):
    """A run of several cases at once, compiled once for a net and an optimizer."""

    def run(params, options, batches):
        tx = gn.watch(make_tx(*options), window=len(batches[1]))

        def step(carry, batch):
            params, state = carry
            loss, grads = jax.value_and_grad(net.loss)(params, batch)
            updates, state = tx.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), None

        (_, state), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
        return state.ring

    return jax.jit(
        jax.vmap(run, in_axes=(0, 0, None)),
        compiler_options={"xla_backend_optimization_level": 1},  # compiles faster
    )


def train(net, make_tx, batches, cases=((),)) -> list[History]:
    """Trains a net once for each case, and returns what `watch` recorded.

    Args:
      net: What to train.
      make_tx: Makes the optimizer from the numbers of a case.
      batches: What to train on: one step for each entry of the leading axis.
      cases: The numbers of each case; each has initial parameters of its own.
    """
    steps = len(batches[1])
    starts = [net.init(np.random.default_rng(i)) for i in range(len(cases))]
    params = jax.tree.map(lambda *leaves: np.stack(leaves), *starts)
    options = tuple(np.float32(option) for option in zip(*cases, strict=True))
    rings = _compiled(net, make_tx)(params, options, batches)
    leaves = jax.tree.leaves(starts[0])
    return [
        History.from_rows(
            telemetry.columns(starts[0]),
            np.arange(steps),
            ring,
            sizes=[leaf.size for leaf in leaves],
            dims=[leaf.ndim for leaf in leaves],
        )
        for ring in np.asarray(rings)
    ]
