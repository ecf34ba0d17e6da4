"""Layers that random programs are made of, each a use or two of its weights."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ROWS = 7  # of tables

Shape = tuple[int, int]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["shared", "ids"],
    meta_fields=["narrow"],
)
@dataclasses.dataclass(frozen=True)
class Context:
    """What a layer is given beside its parameters and its input [time, width].

    Attributes:
      shared: A square weight that any layer may use.
      ids: One whole number for each position of the example.
      narrow: The dtype to round to, or `None`.
    """

    shared: jax.Array
    ids: jax.Array
    narrow: Any


class Layer(NamedTuple):
    """Parameters, what they do to an input, and the shape of what comes out."""

    params: Any
    apply: Callable[[Any, jax.Array, Context], jax.Array]
    shape: Shape


class Draw:
    """Draws sizes, choices and float32 arrays."""

    def __init__(self, random):
        self.random = random

    def __call__(self, *shape, scale=None):
        """Returns weights that keep activations at about their size."""
        scale = 0.7 * max((1, *shape[-2:-1])) ** -0.5 if scale is None else scale
        return np.asarray(scale * self.random.normal(size=shape), np.float32)

    def one_of(self, *options):
        """Returns one of some things."""
        return options[self.random.integers(len(options))]

    def width(self):
        """Returns an even width of at least 4."""
        return self.one_of(4, 6, 8, 12, 20)


def dense(draw, shape):
    """A matrix that may be stored in another shape than it is used in."""
    time, width = shape
    new, bias = draw.width(), draw.one_of(True, False)
    stored, use = draw.one_of(
        (lambda w: w, lambda w: w),
        (lambda w: w.T, lambda w: w.T),
        (lambda w: w.reshape(-1), lambda w: w.reshape(width, new)),
        (lambda w: w.reshape(width, 2, -1), lambda w: w.reshape(width, new)),
        (lambda w: w[None, ::-1], lambda w: jnp.flip(w[0], 0)),
        (lambda w: 4 * w, lambda w: -0.25 * w),
    )
    params = {"w": np.ascontiguousarray(stored(draw(width, new)))}
    params |= {"b": draw(new, scale=0.3)} if bias else {}

    def apply(params, x, context):
        x = x @ use(params["w"])
        return jnp.tanh(x + params["b"] if bias else x)

    return Layer(params, apply, (time, new))


def einsum(draw, shape):
    """A weight with three or four axes, or one that mixes positions."""
    time, width = shape
    n, m = draw.one_of((2, 3), (3, 2), (4, 1), (1, 8))
    h = 2
    formula, kernel = draw.one_of(
        ("thk,hknm->tnm", (h, width // h, n, m)),
        ("thk,nhkm->tnm", (n, h, width // h, m)),
        ("thk,hkm->thm", (h, width // h, 4)),
        ("thk,kh->thk", (width // h, h)),
        ("thk,ts->shk", (time, time)),
        ("thk,thk->thk", (time, h, width // h)),
    )
    given = jax.ShapeDtypeStruct((time, h, width // h), np.float32)
    weight = jax.ShapeDtypeStruct(kernel, np.float32)
    out = jax.eval_shape(functools.partial(jnp.einsum, formula), given, weight).shape

    def apply(params, x, context):
        out = jnp.einsum(formula, x.reshape(time, h, width // h), params["w"])
        return jnp.tanh(out.reshape(time, -1))

    new = (time, out[1] * out[2])
    return Layer({"w": draw(*kernel, scale=0.6)}, apply, new)


def conv(draw, shape):
    """Over positions, with strides, dilation, groups and a bias."""
    width = shape[1]
    groups, new = draw.one_of(1, 1, 2, width), width * draw.one_of(1, 2)
    window = draw.one_of(1, 2, 3)
    how = {
        "feature_group_count": groups,
        "padding": draw.one_of("SAME", ((window, 1),)),
        "rhs_dilation": (draw.one_of(1, 2),),
        "window_strides": (draw.one_of(1, 2),),
    }

    def convolved(x, w):
        numbers = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(x[None], w, dimension_numbers=numbers, **how)[0]

    params = {"b": draw(new, scale=0.3), "w": draw(window, width // groups, new)}
    given = jax.ShapeDtypeStruct(shape, np.float32)
    out = jax.eval_shape(convolved, given, params["w"]).shape

    def apply(params, x, context):
        return jnp.tanh(convolved(x, params["w"]) + params["b"])

    return Layer(params, apply, out)


def embedding(draw, shape):
    """Rows of a table are added: by their ids, some of which may be beyond it."""
    width = shape[1]
    mode = draw.one_of("clip", "fill", "wrap", "one hot", None)
    shift = draw.one_of(0, -3, 2) if mode else 0

    def apply(params, x, context):
        ids = jnp.resize(context.ids, len(x)) + shift
        if mode == "one hot":
            return x + jax.nn.one_hot(ids, ROWS, dtype=x.dtype) @ params["table"]
        how = {"fill_value": 0.5} if mode == "fill" else {}
        return x + jnp.take(params["table"], ids, axis=0, mode=mode, **how)

    return Layer({"table": draw(ROWS, width, scale=0.5)}, apply, shape)


def attention(draw, shape):
    """On heads; kernels are [width, heads, width of one], or one fused kernel."""
    width = shape[1]
    fused, heads = draw.one_of(True, False), 2
    size = width // heads
    params = {"out": draw(heads, size, width), "query_bias": draw(heads, size)}
    if fused:
        params["qkv"] = draw(width, 3 * width)
    else:
        params |= {k: draw(width, heads, size, scale=width**-0.5) for k in "qkv"}

    def apply(params, x, context):
        if fused:
            parts = jnp.split(x @ params["qkv"], 3, axis=-1)
            q, k, v = (part.reshape(-1, heads, size) for part in parts)
        else:
            q, k, v = (jnp.einsum("td,dhk->thk", x, params[name]) for name in "qkv")
        scores = jnp.einsum("thk,shk->hts", q + params["query_bias"], k)
        mixed = jnp.einsum("hts,shk->thk", jax.nn.softmax(scores), v)
        return x + jnp.einsum("thk,hkd->td", mixed, params["out"])

    return Layer(params, apply, shape)


def norm(draw, shape):
    """Of layers, by the root of the mean square, or of groups."""
    groups, centered = draw.one_of(1, 2), draw.one_of(True, False)
    params = {"gain": 1 + draw(shape[1], scale=0.3)}
    params |= {"shift": draw(shape[1], scale=0.3)} if centered else {}

    def apply(params, x, context):
        h = x.reshape(len(x), groups, -1)
        h = h - jnp.mean(h, -1, keepdims=True) if centered else h
        h = h * lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + 0.1)
        return h.reshape(x.shape) * params["gain"] + params.get("shift", 0.0)

    return Layer(params, apply, shape)


def custom_vjp(draw, shape):
    """A dense layer with a backward pass that is not its derivative."""
    time, width = shape
    new, factor = draw.width(), draw.one_of(0.5, -2.0)

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    def backward(kept, dy):
        x, w = kept
        return dy @ w.T, factor * jnp.einsum("ti,tj->ij", x, dy)

    product.defvjp(lambda x, w: (x @ w, (x, w)), backward)

    def apply(params, x, context):
        return jnp.tanh(product(x, params["w"]))

    return Layer({"w": draw(width, new)}, apply, (time, new))


def cast(draw, shape):
    """A dense layer whose weight, input and product are rounded."""
    time, width = shape
    new = draw.width()

    def apply(params, x, context):
        narrow = x.dtype if context.narrow is None else context.narrow
        h = x.astype(narrow) @ params["w"].astype(narrow) + params["b"].astype(narrow)
        return jnp.tanh(h.astype(x.dtype))

    return Layer({"b": draw(new), "w": draw(width, new)}, apply, (time, new))


def scalar(draw, shape):
    """A parameter without axes, constants, a sign, and a quotient."""
    factor = draw.one_of(-1.0, 2.0, 1 / 3)

    def apply(params, x, context):
        x = -x * params["gain"] / (1 + jnp.square(params["under"]))
        return x + factor * params["shift"]

    params = {"gain": 1 + draw(scale=0.3), "shift": draw(), "under": draw()}
    return Layer(params, apply, shape)


def unused(draw, shape):
    """Parameters that have no part in the loss, or one without a slope."""

    def apply(params, x, context):
        return x + lax.stop_gradient(params["stopped"]) * jnp.sum(params["empty"])

    params = {"empty": draw(0, 2), "stopped": draw(), "unused": draw(3, 2)}
    return Layer(params, apply, shape)


def sums(draw, shape):
    """Sums of prefixes of the input and of a weight; a recurrence of decays."""
    time, width = shape
    associative = draw.one_of(True, False)

    def apply(params, x, context):
        x = x + jnp.cumsum(params["steps"], 0)
        if not associative:
            return jnp.tanh(jnp.cumsum(x, 0))
        decays = jnp.broadcast_to(jax.nn.sigmoid(params["decay"]), x.shape)
        return jnp.tanh(lax.associative_scan(_joined, (decays, x))[1])

    params = {"decay": draw(width, scale=1.0), "steps": draw(time, width, scale=0.3)}
    return Layer(params, apply, shape)


def _joined(left, right):
    return left[0] * right[0], right[0] * left[1] + right[1]
