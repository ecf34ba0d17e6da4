"""Layers inside of layers: scans, remat, heads, experts, branches, shared weights."""

import jax
import jax.numpy as jnp
from jax import lax

from .layers import Layer, dense

TIED = 4  # the width of the weight that layers share


def scan_over_time(draw, shape):
    """A recurrent layer: its weights are constants of a scan, or ride in the carry."""
    time, width = shape
    new, carried, reverse = draw.width(), draw.one_of(0, 0, 1), draw.one_of(0, 1)
    params = {"b": draw(new, scale=0.3), "in": draw(width, new), "w": draw(new, new)}

    def apply(params, x, context):
        def step(state, x):
            h, w = state
            weight = w if carried else params["w"]
            h = jnp.tanh(x @ params["in"] + h @ weight + params["b"])
            return (h, 0.8 * w if carried else None), h

        start = (jnp.zeros_like(x, shape=new), params["w"] if carried else None)
        return lax.scan(step, start, x, reverse=bool(reverse))[1]

    return Layer(params, apply, (time, new))


def scan_over_layers(draw, shape):
    """Stacked layers, each with a gain and a norm, that may be computed again."""
    width = shape[1]
    depth, again, unroll = draw.one_of(1, 2, 3), draw.one_of(0, 1), draw.one_of(1, 2)
    params = {"gain": 1 + draw(depth, width, scale=0.2), "w": draw(depth, width, width)}

    def apply(params, x, context):
        def layer(x, own):
            x = x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 0.1)
            return x + jnp.tanh(x @ own["w"]) * own["gain"], None

        layer = jax.checkpoint(layer) if again else layer
        return lax.scan(layer, x, params, unroll=unroll)[0]

    return Layer(params, apply, shape)


def nested_scan(draw, shape):
    """Time inside of layers; one weight belongs to all of them."""
    width = shape[1]
    params = {"all": draw(width, width), "each": draw(2, width, width)}

    def apply(params, x, context):
        def layer(xs, w):
            def step(h, x):
                h = jnp.tanh(x @ w + h @ params["all"])
                return h, h

            return xs + lax.scan(step, jnp.zeros_like(xs[0]), xs)[1], None

        return lax.scan(layer, x, params["each"])[0]

    return Layer(params, apply, shape)


def remat(draw, shape):
    """Two dense layers that are computed again, one of them twice."""
    first = dense(draw, shape)
    second = dense(draw, first.shape)

    def apply(params, x, context):
        def both(params, x):
            x = first.apply(params["first"], x, context)
            return jax.checkpoint(second.apply)(params["second"], x, context)

        return jax.checkpoint(both)(params, x)

    params = {"first": first.params, "second": second.params}
    return Layer(params, apply, second.shape)


def tied(draw, shape):
    """The shared weight is used: as it is, transposed, flipped, squared, in part."""
    use = draw.one_of(
        lambda w: w,
        lambda w: w.T,
        lambda w: 0.5 * w[::-1],
        lambda w: w @ w,
        lambda w: jnp.tril(w),
        lambda w: w[jnp.array([0, 0, 3, 1])],
    )

    def apply(params, x, context):
        own = jnp.tanh(x[:, :TIED] @ use(context.shared)[:TIED, :TIED])
        return jnp.concatenate([own, x[:, TIED:]], 1) * (1 + params["gain"])

    return Layer({"gain": draw(scale=0.2)}, apply, shape)


def sliced(draw, shape):
    """Two weights are joined to one, or one is cut in three."""
    time, width = shape
    joined = draw.one_of(True, False)
    if joined:
        params = {"left": draw(width, 4), "right": draw(width, 6)}
    else:
        params = {"w": draw(width, 24)}

    def apply(params, x, context):
        if joined:
            return jnp.tanh(x @ jnp.concatenate([params["left"], params["right"]], 1))
        w = params["w"]
        gate, value = jax.nn.sigmoid(x @ w[:, :8]), jnp.tanh(x @ w[:, 8:16])
        return gate * value + x @ w[:, 23:15:-1]

    return Layer(params, apply, (time, 10 if joined else 8))


def stacked(draw, shape):
    """A loop reads layer i of stacked weights, the last of them twice."""
    width = shape[1]
    params = {"b": draw(3, width, scale=0.3), "w": draw(3, width, width)}

    def apply(params, x, context):
        for i in (0, 1, 2, 2):
            x = x + 0.5 * jnp.tanh(x @ params["w"][i] + params["b"][i])
        return x

    return Layer(params, apply, shape)


def heads(draw, shape):
    """`vmap` over heads, of which one weight is shared and one is each head's own."""
    width = shape[1]
    params = {"each": draw(3, width, 4), "shared": draw(4, width)}
    over_positions = draw.one_of(True, False)

    def apply(params, x, context):
        def head(x, each):
            return jnp.tanh(x @ each) @ params["shared"]

        if over_positions:
            head = jax.vmap(head, (0, None))
        return jnp.sum(jax.vmap(head, (None, 0))(x, params["each"]), 0)

    return Layer(params, apply, shape)


def experts(draw, shape):
    """Each position, or the example, has its expert; how it gets there differs."""
    time, width = shape
    route = draw.one_of("gather", "one hot", "vmap", "switch", "slice")
    params = {"w": draw(3, width, 6), "b": draw(3, 6)}

    def apply(params, x, context):
        ids = jnp.resize(context.ids, len(x)) % 3
        w, b = params["w"], params["b"]
        if route == "gather":
            return jnp.tanh(jnp.einsum("td,tdf->tf", x, w[ids]) + b[ids])
        if route == "switch":
            choices = [lambda x, i=i: jnp.tanh(x @ w[i] + b[i]) for i in range(3)]
            return lax.switch(ids[0], choices, x)
        if route == "slice":
            own = lax.dynamic_index_in_dim(w, ids[0], keepdims=False)
            return jnp.tanh(x @ own + b[ids[0]])
        chosen = jax.nn.one_hot(ids, 3, dtype=x.dtype)
        if route == "one hot":
            sent = jnp.einsum("te,td->etd", chosen, x)
            out = jnp.tanh(jnp.einsum("etd,edf->etf", sent, w) + b[:, None])
        else:
            out = jax.vmap(lambda w, b: jnp.tanh(x @ w + b))(w, b)
        return jnp.einsum("te,etf->tf", chosen, out)

    return Layer(params, apply, (time, 6))


def branch(draw, shape):
    """One of two layers, by the sign of what comes in."""
    time, width = shape
    params = {"both": draw(width, 6), "left": draw(6), "right": draw(width, 6)}

    def apply(params, x, context):
        def left(x):
            return jnp.tanh(x @ params["both"] + params["left"])

        def right(x):
            return jnp.sin(x @ (params["both"] - params["right"]))

        return lax.cond(jnp.sum(x) > 0, left, right, x)

    return Layer(params, apply, (time, 6))
