"""Small models in plain JAX, each with the loss of one example."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = Any


class Model(NamedTuple):
    """A model: its parameters, its examples and its loss of one example."""

    init: Callable[[jax.Array], Params]
    examples: Callable[[jax.Array, int], Any]
    loss_fn: Callable[[Params, Any], jax.Array]


class GPT(NamedTuple):
    """The sizes of a GPT whose head is its embedding, and how its layers are run."""

    vocabulary: int
    length: int
    width: int
    layers: int
    heads: int
    scan: bool = True
    remat: bool = False


def gpt(sizes: GPT) -> Model:
    """A decoder that predicts each next token of one text."""

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, sizes.layers + 2)
        blocks = [_block(k, sizes.width) for k in keys[2:]]
        if sizes.scan:
            blocks = jax.tree.map(lambda *each: jnp.stack(each), *blocks)
        return {
            "embedding": 0.02
            * jax.random.normal(keys[0], (sizes.vocabulary, sizes.width)),
            "positions": 0.02 * jax.random.normal(keys[1], (sizes.length, sizes.width)),
            "blocks": blocks,
            "norm": _norm(sizes.width),
        }

    def examples(key: jax.Array, size: int) -> jax.Array:
        return jax.random.randint(key, (size, sizes.length + 1), 0, sizes.vocabulary)

    def loss_fn(params: Params, tokens: jax.Array) -> jax.Array:
        run = functools.partial(_run_block, heads=sizes.heads)
        if sizes.remat:
            run = jax.checkpoint(run)
        x = params["embedding"][tokens[:-1]] + params["positions"]
        if sizes.scan:
            x, _ = jax.lax.scan(lambda x, own: (run(own, x), None), x, params["blocks"])
        else:
            for own in params["blocks"]:
                x = run(own, x)
        logits = _normalize(params["norm"], x) @ params["embedding"].T
        return jnp.mean(_cross_entropy(logits, tokens[1:]))

    return Model(init, examples, loss_fn)


def mlp(widths: tuple[int, ...]) -> Model:
    """A dense net with ReLU that tells classes apart."""

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(widths) - 1)
        sizes = zip(keys, widths[:-1], widths[1:], strict=True)
        return [_dense(k, *size) for k, *size in sizes]

    def examples(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        return (
            jax.random.normal(key, (size, widths[0])),
            jax.random.randint(key, (size,), 0, widths[-1]),
        )

    def loss_fn(params: Params, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, label = example
        for own in params[:-1]:
            x = jax.nn.relu(_apply(own, x))
        return _cross_entropy(_apply(params[-1], x), label)

    return Model(init, examples, loss_fn)


def cnn(channels: tuple[int, ...], hidden: int = 64, classes: int = 10) -> Model:
    """Convolutions of 3 x 3, each but the first pooled, on images of 32 x 32 x 3."""

    def init(key: jax.Array) -> Params:
        *keys, before, last = jax.random.split(key, len(channels) + 2)
        sizes = zip(keys, (3, *channels[:-1]), channels, strict=True)
        edge = 32 >> (len(channels) - 1)
        return {
            "convolutions": [
                {
                    "kernel": jax.random.normal(k, (3, 3, depth, wide))
                    * math.sqrt(2 / (9 * depth)),
                    "bias": jnp.zeros(wide),
                }
                for k, depth, wide in sizes
            ],
            "hidden": _dense(before, edge * edge * channels[-1], hidden),
            "head": _dense(last, hidden, classes),
        }

    def examples(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        return (
            jax.random.normal(key, (size, 32, 32, 3)),
            jax.random.randint(key, (size,), 0, classes),
        )

    def loss_fn(params: Params, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        image, label = example
        x = image[None]
        for layer, own in enumerate(params["convolutions"]):
            x = jax.lax.conv_general_dilated(
                x,
                own["kernel"],
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(x + own["bias"])
            if layer:
                x = jax.lax.reduce_window(
                    x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
                )
        x = jax.nn.relu(_apply(params["hidden"], x.reshape(-1)))
        return _cross_entropy(_apply(params["head"], x), label)

    return Model(init, examples, loss_fn)


MODELS = {
    "gpt_scan": gpt(GPT(4096, 64, 256, 4, 4)),
    "gpt_loop": gpt(GPT(4096, 64, 256, 4, 4, scan=False)),
    "gpt_wide": gpt(GPT(4096, 32, 768, 2, 12, remat=True)),
    "gpt_long": gpt(GPT(512, 512, 192, 2, 2)),
    "mlp": mlp((1024, 2048, 2048, 128)),
    "cnn": cnn((32, 64, 128, 128)),
}

TINY = {
    "gpt_scan": gpt(GPT(16, 8, 8, 2, 2)),
    "gpt_loop": gpt(GPT(16, 8, 8, 2, 2, scan=False)),
    "gpt_wide": gpt(GPT(16, 8, 16, 2, 2, remat=True)),
    "gpt_long": gpt(GPT(16, 16, 8, 2, 2)),
    "mlp": mlp((8, 16, 4)),
    "cnn": cnn((2, 4)),
}


def num_params(params: Params) -> int:
    """Returns how many numbers a model has."""
    return sum(x.size for x in jax.tree.leaves(params))


def _block(key: jax.Array, width: int) -> Params:
    keys = jax.random.split(key, 4)
    return {
        "before": _norm(width),
        "qkv": _dense(keys[0], width, 3 * width),
        "out": _dense(keys[1], width, width),
        "between": _norm(width),
        "up": _dense(keys[2], width, 4 * width),
        "down": _dense(keys[3], 4 * width, width),
    }


def _run_block(own: Params, x: jax.Array, heads: int) -> jax.Array:
    length, width = x.shape
    qkv = _apply(own["qkv"], _normalize(own["before"], x))
    q, k, v = jnp.moveaxis(qkv.reshape(length, 3, heads, width // heads), 1, 0)
    scores = jnp.einsum("thd,shd->hts", q, k) / math.sqrt(width // heads)
    past = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(past, scores, -jnp.inf))
    heard = jnp.einsum("hts,shd->thd", weights, v).reshape(length, width)
    x = x + _apply(own["out"], heard)
    up = jax.nn.gelu(_apply(own["up"], _normalize(own["between"], x)))
    return x + _apply(own["down"], up)


def _dense(key: jax.Array, before: int, after: int) -> Params:
    kernel = jax.random.normal(key, (before, after)) / math.sqrt(before)
    return {"kernel": kernel, "bias": jnp.zeros(after)}


def _apply(own: Params, x: jax.Array) -> jax.Array:
    return x @ own["kernel"] + own["bias"]


def _norm(width: int) -> Params:
    return {"gain": jnp.ones(width), "bias": jnp.zeros(width)}


def _normalize(own: Params, x: jax.Array) -> jax.Array:
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    spread = jnp.mean(centered**2, axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(spread + 1e-5) * own["gain"] + own["bias"]


def _cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    right = jnp.take_along_axis(logits, label[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - right
