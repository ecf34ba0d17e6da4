"""Models of convolutions in one, two and three dimensions."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from .oracle import Model
from .plain import B, drawn, squared_error

LAYOUTS = {3: ("NWC", "WIO", "NWC"), 4: ("NHWC", "HWIO", "NHWC")}
LAYOUTS[5] = ("NHWDC", "HWDIO", "NHWDC")


def conv(x, kernel, strides=1, padding="SAME", **how):
    """Convolves one example, the channels last."""
    strides = (strides,) * (x.ndim - 1) if isinstance(strides, int) else strides
    numbers = LAYOUTS[x.ndim + 1]
    out = lax.conv_general_dilated(
        x[None], kernel, strides, padding, dimension_numbers=numbers, **how
    )
    return out[0]


def pooled(x, window, reduce, start):
    """Reduces windows of a picture that lie side by side."""
    shape = (window, window, 1)
    return lax.reduce_window(x, start, reduce, shape, shape, "VALID")


def network(params, x):
    """Strides, a dilation, groups and both kinds of pooling."""
    h = jax.nn.relu(conv(x, params["first"], 2) + params["b"])
    h = pooled(h, 2, lax.max, -jnp.inf)
    h = conv(jnp.tanh(h), params["dilated"], padding="VALID", rhs_dilation=(2, 1))
    h = conv(jnp.tanh(h), params["groups"], feature_group_count=2)
    h = pooled(h, 2, lax.add, 0.0) / 4
    return h.reshape(-1) @ params["head"]


def cnn():
    """A small network of pictures."""
    draw = drawn(20)
    params = {
        "b": draw(4),
        "dilated": draw(3, 1, 4, 6, scale=0.3),
        "first": draw(3, 3, 2, 4, scale=0.3),
        "groups": draw(2, 2, 3, 4, scale=0.3),
        "head": draw(4, 3),
    }

    def loss_fn(params, example):
        return squared_error(network(params, example[0]), example[1])

    x, y = draw(B, 24, 10, 2), draw(B, 3)
    return Model(loss_fn, params, (x[:, :, :10], y))


#: The kernel's shape, the picture's, and how the one goes over the other.
CONVOLUTIONS = {
    "asymmetric padding": ((3, 2, 3, 4), (7, 6, 3), {"padding": ((2, 0), (1, 3))}),
    "causal in one dimension": ((3, 4, 5), (9, 4), {"padding": ((2, 0),)}),
    "depthwise": ((3, 3, 1, 6), (6, 5, 3), {"feature_group_count": 3}),
    "groups of many": ((2, 2, 2, 6), (5, 5, 4), {"feature_group_count": 2}),
    "in three dimensions": ((2, 2, 2, 3, 2), (4, 3, 5, 3), {"strides": (1, 2, 2)}),
    "negative padding": ((2, 2, 3, 4), (7, 6, 3), {"padding": ((-1, 0), (1, -2))}),
    "one by one": ((1, 1, 5, 4), (4, 4, 5), {}),
    "patches": ((3, 3, 2, 5), (9, 6, 2), {"strides": 3, "padding": "VALID"}),
    "strides that leave a rest": ((3, 3, 2, 4), (8, 9, 2), {"strides": (3, 2)}),
    "strides with dilation": (
        (3, 2, 3, 4),
        (9, 8, 3),
        {"strides": (2, 1), "rhs_dilation": (2, 3)},
    ),
    "the input is dilated": (
        (3, 3, 2, 3),
        (4, 5, 2),
        {"lhs_dilation": (2, 3), "padding": ((1, 2), (2, 2))},
    ),
    "wide channels of few places": ((2, 2, 9, 16), (3, 2, 9), {"padding": "VALID"}),
}


def convolutions():
    """A convolution of each kind, side by side."""
    draw = drawn(21)
    params = {name: draw(*kernel) for name, (kernel, _, _) in CONVOLUTIONS.items()}

    def loss_fn(params, example):
        pictures, scale = example
        return scale * sum(
            jnp.sum(jnp.square(jnp.tanh(conv(pictures[name], params[name], **how))))
            for name, (_, _, how) in CONVOLUTIONS.items()
        )

    pictures = {
        name: draw(B, *shape, scale=0.3) for name, (_, shape, _) in CONVOLUTIONS.items()
    }
    return Model(loss_fn, params, (pictures, draw(B)))


def transposed_convolutions():
    """Kernels that make pictures larger, one of them with its axes swapped."""
    draw = drawn(22)
    params = {"first": draw(3, 3, 2, 4, scale=0.4), "second": draw(2, 3, 3, 4)}
    grow = functools.partial(
        lax.conv_transpose, strides=(2, 2), dimension_numbers=LAYOUTS[4]
    )

    def loss_fn(params, example):
        x, y = example
        h = jnp.tanh(grow(x[None], params["first"], padding="SAME"))
        h = grow(h, params["second"], padding="VALID", transpose_kernel=True)
        return squared_error(h[0], y)

    return Model(loss_fn, params, (draw(B, 3, 3, 2), draw(B, 12, 13, 3)))


def a_kernel_of_two_convolutions():
    """One kernel goes over the picture and over what came out, and a part of it too."""
    draw = drawn(23)
    params = {"b": draw(3), "kernel": draw(3, 3, 3, 3, scale=0.2)}

    def loss_fn(params, example):
        x, y = example
        h = jnp.tanh(conv(x, params["kernel"]) + params["b"])
        h = jnp.tanh(conv(h, params["kernel"], 2))
        return squared_error(conv(h, params["kernel"][1:2, :, ::-1]), y)

    return Model(loss_fn, params, (draw(B, 6, 6, 3), draw(B, 3, 3, 3)))


def residual_blocks_by_scan():
    """Convolutions with group norms, stacked and run by a scan."""
    draw = drawn(24)
    params = {
        "gain": 1 + draw(3, 4, scale=0.1),
        "kernels": draw(3, 3, 3, 4, 4, scale=0.2),
        "shift": draw(3, 4, scale=0.1),
    }

    def block(x, layer):
        h = x.reshape(5, 5, 2, 2)
        h = h - jnp.mean(h, (0, 1, 3), keepdims=True)
        h = h / jnp.sqrt(jnp.mean(jnp.square(h), (0, 1, 3), keepdims=True) + 1e-3)
        h = jnp.tanh(h.reshape(x.shape) * layer["gain"] + layer["shift"])
        return x + conv(h, layer["kernels"]), None

    def loss_fn(params, example):
        h, _ = lax.scan(jax.checkpoint(block), example[0], params)
        return squared_error(jnp.mean(h, (0, 1)), example[1])

    return Model(loss_fn, params, (draw(B, 5, 5, 4), draw(B, 4)))
