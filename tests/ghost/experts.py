"""Models in which a position or an example chooses its weights."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .oracle import Model
from .plain import B, drawn, squared_error

EXPERTS, TIME, WIDTH = 3, 4, 6


def _of_experts(seed):
    draw = drawn(seed)
    params = {
        "b": draw(EXPERTS, 8),
        "down": draw(EXPERTS, 8, WIDTH, scale=0.4),
        "router": draw(WIDTH, EXPERTS),
        "up": draw(EXPERTS, WIDTH, 8, scale=0.4),
    }
    return params, (draw(B, TIME, WIDTH), draw(B, TIME, WIDTH))


def _shares(params, x):
    """The share of the best expert of each position, and which it is."""
    shares = jax.nn.softmax(x @ params["router"])
    best = jnp.argmax(shares, -1)
    return jnp.take_along_axis(shares, best[:, None], -1), best


def dispatched_by_one_hot():
    """Positions are sent to slots of experts by an einsum, and back."""
    params, batch = _of_experts(50)

    def loss_fn(params, example):
        x, y = example
        share, best = _shares(params, x)
        chosen = jax.nn.one_hot(best, EXPERTS, dtype=x.dtype)
        slot = jnp.sum((jnp.cumsum(chosen, 0) - 1) * chosen, -1).astype(int)
        send = chosen[..., None] * jax.nn.one_hot(slot, 2, dtype=x.dtype)[:, None]
        taken = jnp.einsum("tec,td->ecd", send, x)
        h = jnp.tanh(
            jnp.einsum("ecd,edf->ecf", taken, params["up"]) + params["b"][:, None]
        )
        out = jnp.einsum("ecf,efd->ecd", h, params["down"])
        return squared_error(share * jnp.einsum("tec,ecd->td", send, out), y)

    return Model(loss_fn, params, batch)


def weights_looked_up_by_expert():
    """Each position gathers the weights of its expert; one is never chosen."""
    params, batch = _of_experts(51)

    def loss_fn(params, example):
        x, y = example
        share, best = _shares(params, x)
        best = jnp.minimum(best, EXPERTS - 2)
        h = jnp.einsum("td,tdf->tf", x, params["up"][best]) + params["b"][best]
        out = jnp.einsum("tf,tfd->td", jnp.tanh(h), params["down"][best])
        return squared_error(share * out, y)

    return Model(loss_fn, params, batch)


def one_expert_of_the_example():
    """The example as a whole has one expert, whose weights are sliced out."""
    params, (x, y) = _of_experts(52)

    def loss_fn(params, example):
        x, y, expert = example
        up = lax.dynamic_index_in_dim(params["up"], expert, keepdims=False)
        h = jnp.tanh(x @ up + params["b"][expert])
        out = h @ params["down"][expert]
        return squared_error(jnp.sum(x @ params["router"]) * out, y)

    return Model(loss_fn, params, (x, y, np.arange(B) % EXPERTS))


def experts_by_vmap():
    """All experts look at all positions."""
    params, batch = _of_experts(53)

    def loss_fn(params, example):
        x, y = example

        def expert(up, b, down):
            return jnp.tanh(x @ up + b) @ down

        outs = jax.vmap(expert)(params["up"], params["b"], params["down"])
        shares = jax.nn.softmax(x @ params["router"])
        return squared_error(jnp.einsum("te,etd->td", shares, outs), y)

    return Model(loss_fn, params, batch)


def experts_by_turns():
    """Scan goes over experts, a mask picks the positions of each."""
    params, batch = _of_experts(54)

    def loss_fn(params, example):
        x, y = example
        share, best = _shares(params, x)

        def turn(total, own):
            number, up, b, down = own
            out = jnp.tanh(x @ up + b) @ down
            return total + jnp.where((best == number)[:, None], out, 0), None

        own = (jnp.arange(EXPERTS), params["up"], params["b"], params["down"])
        total, _ = lax.scan(turn, jnp.zeros_like(x), own)
        return squared_error(share * total, y)

    return Model(loss_fn, params, batch)
