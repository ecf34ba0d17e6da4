"""Norms of each example are those that Opacus found for the same weights.

`references/opacus_values.py` says how; it ran with torch 2.13.0 and Opacus 1.6.0.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from .agreement import measure
from .plain import cross_entropy

FILE = Path(__file__).parent / "references" / "opacus_values.npz"


@functools.cache
def stored():
    """Returns {path: array}."""
    with np.load(FILE) as file:
        return dict(file)


def under(path):
    """Returns {rest of the path: array} for all paths that begin so."""
    return {k.removeprefix(path): x for k, x in stored().items() if k.startswith(path)}


def dense(params, name, x):
    return x @ params[f"{name}.weight"].T + params.get(f"{name}.bias", 0.0)


def norm(params, name, x, eps=1e-5):
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)
    return x * params[f"{name}.weight"] + params[f"{name}.bias"]


def conv(params, name, x, **how):
    out = lax.conv_general_dilated(x[None], params[f"{name}.weight"], **how)[0]
    return out + params[f"{name}.bias"][:, None, None]


def perceptron(params, x):
    return dense(params, "2", jnp.tanh(dense(params, "0", x)))


def positions(params, x):
    h = norm(params, "1", dense(params, "0", x))
    return dense(params, "3", jax.nn.gelu(h))


def convolutions(params, x):
    x = conv(params, "0", x, window_strides=(2, 2), padding=((1, 1), (1, 1)))
    x = conv(
        params,
        "2",
        jnp.tanh(x),
        window_strides=(1, 1),
        padding=((1, 1), (0, 0)),
        rhs_dilation=(1, 2),
        feature_group_count=2,
    )
    groups = x.reshape(2, 3, *x.shape[1:])
    groups = groups - jnp.mean(groups, (1, 2, 3), keepdims=True)
    square = jnp.mean(jnp.square(groups), (1, 2, 3), keepdims=True)
    x = (groups / jnp.sqrt(square + 1e-5)).reshape(x.shape)
    gain, shift = params["3.weight"], params["3.bias"]
    x = jnp.tanh(x * gain[:, None, None] + shift[:, None, None])
    x = lax.reduce_window(x, 0.0, lax.add, (1, 2, 1), (1, 2, 1), "VALID") / 2
    return dense(params, "7", x.reshape(-1))


def attention(params, ids):
    x = params["embed.weight"][ids]
    h = norm(params, "norm", x)
    scores = dense(params, "query", h) @ dense(params, "key", h).T / 8**0.5
    mixed = jax.nn.softmax(scores) @ dense(params, "value", h)
    return dense(params, "head", x + mixed)


def recurrent(params, ids):
    def step(state, x):
        h, c = state
        gates = sum(
            y @ params[f"lstm.weight_{way}_l0"].T + params[f"lstm.bias_{way}_l0"]
            for way, y in (("ih", x), ("hh", h))
        )
        i, f, g, o = jnp.split(gates, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    x = params["embed.weight"][ids]
    _, states = lax.scan(step, (jnp.zeros(6), jnp.zeros(6)), x)
    return dense(params, "head", norm(params, "norm", states))


NETWORKS = {
    "attention": attention,
    "convolutions": convolutions,
    "dense": perceptron,
    "positions": positions,
    "recurrent": recurrent,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_and_norms_are_those_of_opacus(name):
    params, inputs = under(f"{name}/param/"), under(f"{name}/input/")

    def loss_fn(params, example):
        return cross_entropy(NETWORKS[name](params, example["x"]), example["labels"])

    values, leaves, whole = jax.device_get(measure(loss_fn)(params, inputs))
    want = under(f"{name}/norm/")
    assert sorted(want) == sorted(params)
    np.testing.assert_allclose(whole, stored()[f"{name}/norm"], rtol=5e-6)
    np.testing.assert_allclose(values, stored()[f"{name}/loss"], rtol=1e-5)
    for k, path in enumerate(sorted(params)):
        off = np.abs(leaves[:, k] - want[path])
        assert np.all(off <= 1e-5 * np.maximum(want[path], 0.02 * whole)), path
