"""Models whose weights go through something before they are used, or are not used."""

import jax
import jax.numpy as jnp
import numpy as np

from .oracle import Model
from .plain import B, drawn, squared_error

#: What each weight goes through before its use, in `parametrizations`.
USES = {
    "as it is": lambda w: w,
    "broken into blocks": lambda w: jnp.block([[w[:2, 3:], w[:2, :3]], [w[2:]]]),
    "exponential": lambda w: jnp.exp(0.1 * w),
    "flipped": lambda w: jnp.flip(w, 0)[:, ::-1],
    "masked": lambda w: w * np.tri(6, dtype=np.float32).astype(w.dtype),
    "negated": lambda w: -w,
    "normalized": lambda w: w / jnp.linalg.norm(w, axis=0, keepdims=True),
    "padded": lambda w: jnp.pad(w[1:5, 1:], ((1, 1), (1, 0))),
    "repeated": lambda w: jnp.repeat(w[:3], 2, axis=0),
    "reshaped": lambda w: w.reshape(3, 12).reshape(2, 3, 6).reshape(6, 6),
    "rolled": lambda w: jnp.roll(w, 2, axis=1),
    "rounded straight through": lambda w: (
        w + jax.lax.stop_gradient(jnp.round(w * 4) / 4 - w)
    ),
    "scaled": lambda w: -0.5 * w / 3,
    "some rows": lambda w: w[jnp.array([0, 0, 5, -1, 2, 2])],
    "split and joined": lambda w: jnp.concatenate(jnp.split(w, 3, axis=1)[::-1], 1),
    "spread from one column": lambda w: jnp.broadcast_to(w[:, :1], w.shape),
    "summed up": lambda w: jnp.cumsum(w, axis=0),
    "symmetric": lambda w: w + w.T,
    "skew": lambda w: w.T - 0.5 * w,
    "taken apart and stacked": lambda w: jnp.stack([w[i] for i in range(6)], 1),
    "transposed": lambda w: w.T,
}


def _side_by_side(seed, positions, apply):
    draw = drawn(seed)
    params = {name: draw(6, 6, scale=0.4) for name in USES}

    def loss_fn(params, example):
        x, y = example
        h = [apply(x, params[name], use) for name, use in USES.items()]
        return squared_error(sum(h), y)

    return Model(loss_fn, params, (draw(B, positions, 6), draw(B, positions, 6)))


def parametrizations():
    """A dense layer for each of `USES`, side by side."""
    return _side_by_side(7, 4, lambda x, w, use: jnp.tanh(x @ use(w)))


def parametrizations_of_tied_weights():
    """Each weight is used in two ways, which must add up entry by entry."""
    return _side_by_side(
        19, 2, lambda x, w, use: jnp.tanh(x @ use(w)) + jnp.sin(x[::-1] @ w)
    )


def low_rank():
    """A weight that is frozen with a product of two that are not added to it."""
    draw = drawn(8)
    frozen = draw(7, 8)
    params = {"down": draw(7, 2), "gain": draw(), "up": draw(2, 8)}

    def loss_fn(params, example):
        w = frozen.astype(params["up"].dtype) + params["down"] @ params["up"]
        return squared_error(params["gain"] * jnp.tanh(example[0] @ w), example[1])

    return Model(loss_fn, params, (draw(B, 3, 7), draw(B, 3, 8)))


def parts_of_a_fused_kernel():
    """Queries, keys and values are slices of one kernel and of one bias."""
    draw = drawn(9)
    params = {"b": draw(24), "w": draw(8, 24, scale=0.3)}

    def loss_fn(params, example):
        x, y = example
        w, b = params["w"], params["b"]
        q, k, v = (
            x @ w[:, 8 * i : 8 * (i + 1)] + b[8 * i : 8 * (i + 1)] for i in range(3)
        )
        return squared_error(jax.nn.softmax(q @ k.T) @ v, y)

    return Model(loss_fn, params, (draw(B, 4, 8), draw(B, 4, 8)))


def a_loop_over_stacked_weights():
    """Layer i takes entry i of weights that are stacked."""
    draw = drawn(10)
    params = {"b": draw(4, 6), "w": draw(4, 6, 6, scale=0.4)}

    def loss_fn(params, example):
        x, y = example
        for i in range(4):
            x = x + jnp.tanh(x @ params["w"][i] + params["b"][i])
        return squared_error(x, y)

    return Model(loss_fn, params, (draw(B, 3, 6), draw(B, 3, 6)))


def scalars_and_what_is_not_used():
    """A parameter without axes, one without entries, one that the loss leaves out."""
    draw = drawn(18)
    params = {
        "empty": draw(0, 3),
        "gain": draw(),
        "stopped": draw(4),
        "unused": draw(2, 2),
        "w": draw(4, 4),
    }

    def loss_fn(params, example):
        x, y = example
        out = params["gain"] * jnp.tanh(x @ params["w"]) + jnp.sum(params["empty"])
        return squared_error(out + jax.lax.stop_gradient(params["stopped"]), y)

    return Model(loss_fn, params, (draw(B, 4), draw(B, 4)))


def the_same_gradient_twice():
    """Two parameters are only ever used as their sum; a third is added to the loss."""
    draw = drawn(12)
    params = {"a": draw(5, 3), "b": draw(5, 3), "linear": draw(4)}

    def loss_fn(params, example):
        x, y, z = example
        out = squared_error(x @ (params["a"] + params["b"]), y)
        return out + jnp.sum(params["linear"] * z)

    return Model(loss_fn, params, (draw(B, 2, 5), draw(B, 2, 3), draw(B, 4)))


def complex_parameters():
    """A filter of frequencies and a dense layer are complex."""
    draw = drawn(13)

    def complex_of(*shape, scale=1.0):
        return draw(*shape, scale=scale) + 1j * draw(*shape, scale=scale)

    params = {"filter": complex_of(9), "w": complex_of(16, 12, scale=0.2)}

    def loss_fn(params, example):
        x, y = example
        x = jnp.fft.irfft(jnp.fft.rfft(x) * params["filter"], n=16)
        return jnp.sum(jnp.square(jnp.abs(x @ params["w"] - y)))

    return Model(loss_fn, params, (draw(B, 2, 16), complex_of(B, 2, 12)))
