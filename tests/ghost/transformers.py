"""Small transformers: tied and untied, by loop and by scan, with and without remat."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .oracle import Model
from .plain import B, cross_entropy, drawn

LAYERS, VOCABULARY = 2, 9


class Shape(NamedTuple):
    """How long an example is, how wide it gets, and on how many heads."""

    time: int
    width: int
    heads: int
    hidden: int


SHORT = Shape(time=3, width=16, heads=2, hidden=24)
LONG = Shape(time=12, width=4, heads=2, hidden=6)


def initial(draw, shape, *, tied):
    """The parameters of stacked layers, of embeddings and of a head."""
    width, each = shape.width, shape.width // shape.heads
    kernel = (LAYERS, width, shape.heads, each)
    scale = width**-0.5
    layers = {
        "down": draw(LAYERS, shape.hidden, width, scale=shape.hidden**-0.5),
        "gain": 1 + draw(LAYERS, 2, width, scale=0.1),
        "key": draw(*kernel, scale=scale),
        "out": draw(LAYERS, shape.heads, each, width, scale=scale),
        "query": draw(*kernel, scale=scale),
        "query_bias": draw(LAYERS, shape.heads, each),
        "shift": draw(LAYERS, width, scale=0.1),
        "up": draw(LAYERS, width, shape.hidden, scale=scale),
        "up_bias": draw(LAYERS, shape.hidden, scale=0.1),
        "value": draw(*kernel, scale=scale),
    }
    params = {
        "gain": 1 + draw(width, scale=0.1),
        "layers": layers,
        "positions": draw(shape.time, width, scale=0.3),
        "table": draw(VOCABULARY, width),
    }
    return params if tied else params | {"head": draw(width, VOCABULARY, scale=scale)}


def rms_norm(x, gain):
    """Divides by the root of the mean square."""
    return x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5) * gain


def layer_norm(x, gain, shift):
    """Subtracts the mean, divides by the deviation."""
    x = x - jnp.mean(x, -1, keepdims=True)
    return rms_norm(x, gain) + shift


def attention(x, p):
    """Causal, on heads; kernels are [width, heads, width of one]."""
    query = jnp.einsum("td,dhk->thk", x, p["query"]) + p["query_bias"]
    key = jnp.einsum("td,dhk->thk", x, p["key"])
    value = jnp.einsum("td,dhk->thk", x, p["value"])
    scores = jnp.einsum("thk,shk->hts", query, key) * key.shape[-1] ** -0.5
    scores = jnp.where(np.tri(len(x), dtype=bool), scores, -1e30)
    mixed = jnp.einsum("hts,shk->thk", jax.nn.softmax(scores), value)
    return jnp.einsum("thk,hkd->td", mixed, p["out"])


def layer(x, p):
    """One pre-norm block."""
    x = x + attention(rms_norm(x, p["gain"][0]), p)
    h = jax.nn.silu(layer_norm(x, p["gain"][1], p["shift"]) @ p["up"] + p["up_bias"])
    return x + h @ p["down"]


def _by_loop(x, layers, wrap):
    for i in range(LAYERS):
        x = wrap(layer)(x, jax.tree.map(lambda p, i=i: p[i], layers))
    return x


def _by_scan(x, layers, wrap):
    return lax.scan(lambda x, p: (wrap(layer)(x, p), None), x, layers)[0]


@functools.cache
def _plain(shape, tied):
    """A loop over layers, of which the leaves of the parameters are stacks."""
    draw = drawn(shape.time)
    params = initial(draw, shape, tied=tied)
    ids, labels = np.random.default_rng(0).integers(
        0, VOCABULARY, size=(2, B, shape.time)
    )
    batch = (ids, labels, 1 + draw(B, scale=0.1))
    return Model(functools.partial(_loss, run=_by_loop), params, batch)


def _loss(params, example, *, run, dtype=None):
    ids, labels, weight = example
    wide = params["table"].dtype
    if dtype is not None:
        params = jax.tree.map(lambda p: p.astype(dtype), params)
    x = params["table"][ids] + params["positions"]
    x = rms_norm(run(x, params["layers"]), params["gain"])
    head = params["table"].T if "head" not in params else params["head"]
    return weight * cross_entropy((x @ head).astype(wide), labels)


def _stacked(shape, run, *, tied, dtype=None):
    """A model whose truth is that of a loop over layers."""
    plain = _plain(shape, tied)
    loss_fn = functools.partial(_loss, run=run, dtype=dtype)
    return plain._replace(
        loss_fn=loss_fn, exact=plain.loss_fn, rounds=dtype is not None
    )


@functools.cache
def _listed(shape, tied):
    plain = _plain(shape, tied)
    own = dict(plain.params)
    stacks = own.pop("layers")
    own["layers"] = [jax.tree.map(lambda p, i=i: p[i], stacks) for i in range(LAYERS)]
    return plain._replace(params=own, loss_fn=functools.partial(_loss, run=_by_list))


def _list(shape, run, *, tied, dtype=None):
    """A model of which layers are a list, not slices of stacked leaves."""
    plain = _listed(shape, tied)
    loss_fn = functools.partial(_loss, run=run, dtype=dtype)
    return plain._replace(
        loss_fn=loss_fn, exact=plain.loss_fn, rounds=dtype is not None
    )


def _by_loop(x, layers):
    for i in range(LAYERS):
        x = layer(x, jax.tree.map(lambda p, i=i: p[i], layers))
    return x


def _by_list(x, layers, wrap=lambda layer: layer):
    for own in layers:
        x = wrap(layer)(x, own)
    return x


def _by_scan(x, layers, wrap=lambda layer: layer):
    return lax.scan(lambda x, p: (wrap(layer)(x, p), None), x, layers)[0]


_LIST_WITH_REMAT = functools.partial(_by_list, wrap=jax.checkpoint)
_SCAN_WITH_REMAT = functools.partial(_by_scan, wrap=jax.checkpoint)


def short_tied_by_list():
    """Wide and short, a list of layers; the table is the head."""
    return _list(SHORT, _by_list, tied=True)


def long_untied_by_list():
    """Narrow and long, a list of layers, a head of its own."""
    return _list(LONG, _by_list, tied=False)


def tied_by_list_with_remat():
    """Each layer is computed again."""
    return _list(SHORT, _LIST_WITH_REMAT, tied=True)


def untied_by_loop():
    """A loop takes each layer from stacked weights."""
    return _stacked(SHORT, _by_loop, tied=False)


def short_untied_by_scan():
    """Wide and short, a scan over stacked layers."""
    return _stacked(SHORT, _by_scan, tied=False)


def long_tied_by_scan():
    """Narrow and long, a scan over stacked layers; the table is the head."""
    return _stacked(LONG, _by_scan, tied=True)


def tied_by_scan_with_remat():
    """Checkpoint is inside of the scan."""
    return _stacked(LONG, _SCAN_WITH_REMAT, tied=True)


def remat_around_the_scan():
    """All layers are computed again at once."""
    return _stacked(SHORT, jax.checkpoint(_by_scan), tied=False)


def untied_by_scan_in_bfloat16():
    """Parameters in float32, products in bfloat16."""
    return _stacked(SHORT, _by_scan, tied=False, dtype=jnp.bfloat16)


def tied_by_list_in_bfloat16_with_remat():
    """Parameters in float32, products in bfloat16, computed again."""
    return _list(SHORT, _LIST_WITH_REMAT, tied=True, dtype=jnp.bfloat16)
