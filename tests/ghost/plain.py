"""Models of dense layers: plain, by hand, tied, with branches, heads and dropout."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from .oracle import Model

B = 5


def drawn(seed):
    """Returns a function that draws float32 arrays: `scale` is that of the entries."""
    random = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return np.asarray(scale * random.normal(size=shape), np.float32)

    return normal


def matrices(draw, *widths):
    """Returns weights [inputs, outputs] that keep activations at about their size."""
    return [draw(n, m, scale=n**-0.5) for n, m in itertools.pairwise(widths)]


def squared_error(output, target):
    """Half the sum of squares."""
    return 0.5 * jnp.sum(jnp.square(output - target))


def cross_entropy(logits, labels):
    """The mean over all positions but the classes."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)
    return -jnp.mean(chosen)


def mlp():
    """Three dense layers of a vector."""
    draw = drawn(0)
    kernels = matrices(draw, 6, 9, 7, 3)
    params = [{"b": draw(w.shape[1]), "w": w} for w in kernels]

    def loss_fn(params, example):
        x, y = example
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return squared_error(x @ params[-1]["w"] + params[-1]["b"], y)

    return Model(loss_fn, params, (draw(B, 6), draw(B, 3)))


def _over_positions(positions, width, hidden):
    draw = drawn(positions)
    first, second = matrices(draw, width, hidden, 2)
    params = {"b": draw(hidden), "first": first, "second": second, "frozen": None}

    def loss_fn(params, example):
        x, y = example
        h = jax.nn.gelu(x @ params["first"] + params["b"])
        return squared_error(h @ params["second"], y)

    return Model(loss_fn, params, (draw(B, positions, width), draw(B, positions, 2)))


def few_positions_of_wide_layers():
    """Where two small Gram matrices are cheaper than one gradient."""
    return _over_positions(2, 24, 40)


def many_positions_of_narrow_layers():
    """Where one gradient is cheaper than two Gram matrices."""
    return _over_positions(40, 3, 4)


def one_array():
    """The tree of parameters is one array."""
    draw = drawn(1)

    def loss_fn(w, example):
        return squared_error(jnp.sin(example["x"] @ w), example["y"])

    batch = {"x": draw(B, 3, 4), "y": draw(B, 3, 5)}
    return Model(loss_fn, draw(4, 5), batch)


def _custom_dense():
    @jax.custom_vjp
    def dense(x, w, b):
        return x @ w + b

    def backward(kept, dy):
        x, w = kept
        # Not the derivative: whoever differentiates anew gets another norm.
        return dy @ w.T, 3.0 * (x.T @ dy) - jnp.sin(x).T @ dy, jnp.sum(jnp.abs(dy), 0)

    dense.defvjp(lambda x, w, b: (dense(x, w, b), (x, w)), backward)
    return dense


def custom_vjp():
    """A dense layer whose backward pass is written by hand, and not what it should."""
    draw, dense = drawn(2), _custom_dense()
    first, second = matrices(draw, 8, 10, 3)
    params = {"b": draw(10), "c": draw(3), "first": first, "second": second}

    def loss_fn(params, example):
        h = jnp.tanh(dense(example[0], params["first"], params["b"]))
        return squared_error(dense(h, params["second"], params["c"]), example[1])

    return Model(loss_fn, params, (draw(B, 4, 8), draw(B, 4, 3)))


def clipped_backward():
    """A custom backward pass with an argument that is no array."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def clip(x, limit):
        return x

    clip.defvjp(
        lambda x, limit: (x, None),
        lambda limit, kept, dy: (jnp.clip(dy, -limit, limit),),
    )
    draw = drawn(3)
    first, second = matrices(draw, 5, 6, 2)

    def loss_fn(params, example):
        h = clip(jnp.tanh(example[0] @ params["first"]), 0.1)
        return squared_error(h @ clip(params["second"], 0.5), example[1])

    params = {"first": first, "second": second}
    return Model(loss_fn, params, (draw(B, 3, 5), draw(B, 3, 2)))


def tied_three_times():
    """One square weight is used as it is, transposed and scaled, and once more."""
    draw = drawn(4)
    params = {"b": draw(6), "w": draw(6, 6, scale=0.4)}

    def loss_fn(params, example):
        w, (x, y) = params["w"], example
        h = jnp.tanh(x @ w + params["b"])
        h = jnp.tanh(h @ (y[0, 0] * w.T) + params["b"])
        return squared_error(0.5 * h @ (-2.0 * w), y)

    return Model(loss_fn, params, (draw(B, 3, 6), draw(B, 3, 6)))


def tied_many_times():
    """One weight is used twenty times in a row."""
    draw = drawn(5)

    def loss_fn(params, example):
        x, y = example
        for _ in range(20):
            x = x + 0.2 * jnp.tanh(x @ params["w"])
        return squared_error(x, y)

    params = {"w": draw(5, 5, scale=0.4)}
    return Model(loss_fn, params, (draw(B, 2, 5), draw(B, 2, 5)))


def weight_decay():
    """A penalty of the parameters is part of the loss of every example."""
    model = mlp()

    def loss_fn(params, example):
        squares = [jnp.sum(jnp.square(layer["w"])) for layer in params]
        return model.loss_fn(params, example) + 0.1 * sum(squares)

    return model._replace(loss_fn=loss_fn)


def only_weight_decay():
    """No example has a part in the gradient but by the weight that it has."""
    draw = drawn(6)

    def loss_fn(params, example):
        return example * (jnp.sum(jnp.square(params["w"])) + 3 * jnp.sum(params["b"]))

    return Model(loss_fn, {"b": draw(4), "w": draw(3, 4)}, draw(B))


def branches():
    """What an example holds decides which weights it takes."""
    draw = drawn(14)
    params = {"left": draw(4, 5), "right": draw(4, 5), "three": draw(3, 5, 2)}

    def loss_fn(params, example):
        x, y, which = example
        first = (lambda p: jnp.tanh(x @ p["left"]), lambda p: jnp.sin(x @ p["right"]))
        h = jax.lax.cond(jnp.sum(x) > 0, *first, params)
        second = [lambda h, i=i: h @ params["three"][i] for i in range(3)]
        return squared_error(jax.lax.switch(which, second, h), y)

    which = np.arange(B) % 3
    return Model(loss_fn, params, (draw(B, 3, 4), draw(B, 3, 2), which))


def dropout():
    """Each example comes with its key."""
    draw = drawn(15)
    first, second = matrices(draw, 8, 12, 3)

    def loss_fn(params, example):
        x, y, key = example
        kept = jax.random.bits(key, (4, 12), np.uint32) < np.uint32(0.7 * 2**32)
        h = jnp.where(kept, jnp.tanh(x @ params["first"]) / 0.7, 0)
        return squared_error(h @ params["second"], y)

    params = {"first": first, "second": second}
    keys = jax.random.split(jax.random.key(0), B)
    return Model(loss_fn, params, (draw(B, 4, 8), draw(B, 4, 3), keys))


def a_gradient_in_the_loss():
    """The slope of the output in the input is penalized: it is differentiated twice."""
    draw = drawn(16)
    first, second = matrices(draw, 5, 7, 1)

    def loss_fn(params, example):
        x, y = example

        def output(x):
            return jnp.sum(jnp.tanh(x @ params["first"]) @ params["second"])

        value, slope = jax.value_and_grad(output)(x)
        return squared_error(value, y) + jnp.sum(jnp.square(slope))

    params = {"first": first, "second": second}
    return Model(loss_fn, params, (draw(B, 5), draw(B)))


def heads_by_vmap():
    """A weight is shared by heads that `vmap` runs, another is one of each head."""
    draw = drawn(17)
    params = {"each": draw(3, 4, 5, scale=0.5), "shared": draw(5, 4, scale=0.5)}

    def loss_fn(params, example):
        x, y = example

        def head(each, x):
            return jnp.tanh(x @ each) @ params["shared"]

        out = jax.vmap(head, (0, None))(params["each"], x)
        out = out + jax.vmap(head, (None, 1), 1)(params["each"][0], out).swapaxes(0, 1)
        return squared_error(jnp.sum(out, 0), y)

    return Model(loss_fn, params, (draw(B, 3, 4), draw(B, 3, 4)))
