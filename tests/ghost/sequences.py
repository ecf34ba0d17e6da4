"""Models of sequences: scans over time and layers, embeddings, sums of prefixes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .oracle import Model
from .plain import B, cross_entropy, drawn, matrices, squared_error

TIME, WIDTH = 6, 5


def _series(draw, inputs=3, outputs=WIDTH):
    return draw(B, TIME, inputs), draw(B, TIME, outputs)


def rnn():
    """A recurrent network: all of its weights are constants of a scan over time."""
    draw = drawn(30)
    params = {
        "b": draw(WIDTH),
        "in": draw(3, WIDTH),
        "w": draw(WIDTH, WIDTH, scale=0.4),
    }

    def loss_fn(params, example):
        def step(h, x):
            h = jnp.tanh(x @ params["in"] + h @ params["w"] + params["b"])
            return h, h

        x, y = example
        return squared_error(lax.scan(step, jnp.zeros_like(y[0]), x)[1], y)

    return Model(loss_fn, params, _series(draw))


def lstm():
    """Four gates of one scaled kernel, the last state alone is used, time runs back."""
    draw = drawn(31)
    params = {"b": draw(4 * WIDTH), "w": draw(3 + WIDTH, 4 * WIDTH, scale=0.4)}

    def loss_fn(params, example):
        def step(state, x):
            h, c = state
            weight = (1 + 0.3 * x[0]) * params["w"]
            gates = jnp.concatenate([x, h]) @ weight + params["b"]
            i, f, g, o = jnp.split(gates, 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        x, y = example
        start = (jnp.zeros_like(y[0]), jnp.zeros_like(y[0]))
        return squared_error(lax.scan(step, start, x, reverse=True)[0][0], y[0])

    return Model(loss_fn, params, _series(draw))


@functools.cache
def _stack():
    draw = drawn(32)
    params = {
        "b": draw(4, WIDTH),
        "head": draw(WIDTH, 2),
        "w": draw(4, WIDTH, WIDTH, scale=0.4),
    }
    batch = (draw(B, 3, WIDTH), draw(B, 3, 2))
    return Model(functools.partial(_loss_of_layers, run=lax.scan), params, batch)


def _loss_of_layers(params, example, *, run):
    layers = {"b": params["b"], "w": params["w"]}
    x, _ = run(_layer, example[0], layers)
    return squared_error(x @ params["head"], example[1])


def _layer(x, own):
    return x + jnp.tanh(x @ own["w"] + own["b"]), None


def _layers(run):
    """A model whose truth is that of a plain scan."""
    plain = _stack()
    loss_fn = functools.partial(_loss_of_layers, run=run)
    return plain._replace(loss_fn=loss_fn, exact=plain.loss_fn)


def layers_by_scan():
    """Weights of layers are stacked, and a scan goes through them."""
    return _stack()


def layers_by_scan_in_pairs():
    """The scan takes two steps at a time."""
    return _layers(functools.partial(lax.scan, unroll=2))


def layers_by_scan_with_checkpoint():
    """What is inside of the scan is computed again."""
    return _layers(lambda layer, *args: lax.scan(jax.checkpoint(layer), *args))


def layers_by_scan_that_keep_products():
    """The products of each layer are kept, the rest is computed again."""
    policy = jax.checkpoint_policies.dots_saveable
    again = functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    return _layers(lambda layer, *args: lax.scan(again(layer), *args))


def a_scan_that_is_computed_again():
    """Checkpoint is around the scan, and once more around its body."""

    def run(layer, *args):
        return jax.checkpoint(lambda *args: lax.scan(jax.checkpoint(layer), *args))(
            *args
        )

    return _layers(run)


def _time_inside_layers(draw):
    params = {
        "in": draw(2, WIDTH, WIDTH, scale=0.5),
        "mix": draw(WIDTH, WIDTH, scale=0.5),
        "w": draw(2, WIDTH, WIDTH, scale=0.4),
    }

    def loss_fn(params, example):
        def layer(xs, own):
            def step(h, x):
                h = jnp.tanh(x @ own["in"] + h @ own["w"])
                return h, h @ params["mix"]

            _, hs = lax.scan(step, jnp.zeros_like(xs[0]), xs)
            return xs + hs, None

        xs, _ = lax.scan(layer, example[0], {k: params[k] for k in ("in", "w")})
        return squared_error(xs, example[1])

    return loss_fn, params


def time_inside_layers():
    """A scan over time in one over layers; one weight is a constant of both."""
    draw = drawn(33)
    loss_fn, params = _time_inside_layers(draw)
    return Model(loss_fn, params, _series(draw, WIDTH))


def layers_inside_time():
    """All layers take one step before the next step; each has a state."""
    draw = drawn(34)
    params = {
        "in": draw(3, WIDTH, WIDTH, scale=0.5),
        "w": draw(3, WIDTH, WIDTH, scale=0.4),
    }

    def loss_fn(params, example):
        def step(states, x):
            def layer(x, own):
                h = jnp.tanh(x @ own["in"] + own["h"] @ own["w"])
                return h, h

            out, states = lax.scan(layer, x, params | {"h": states})
            return states, out

        xs, ys = example
        _, out = lax.scan(step, jnp.zeros((3, WIDTH), xs.dtype), xs)
        return squared_error(out, ys)

    return Model(loss_fn, params, _series(draw, WIDTH))


def weights_in_the_carry():
    """A weight rides along in the state, and is a little smaller at each step."""
    draw = drawn(35)
    params = {"start": draw(WIDTH), "w": draw(WIDTH, WIDTH, scale=0.5)}

    def loss_fn(params, example):
        def step(state, x):
            h, w = state
            h = jnp.tanh((x + h) @ w)
            return (h, 0.9 * w), h

        xs, ys = example
        _, out = lax.scan(step, (params["start"], params["w"]), xs)
        return squared_error(out, ys)

    return Model(loss_fn, params, _series(draw, WIDTH))


def a_counted_loop():
    """`fori_loop` reads layer i by its number."""
    draw = drawn(36)
    params = {"w": draw(3, WIDTH, WIDTH, scale=0.4)}

    def loss_fn(params, example):
        def body(i, x):
            return x + jnp.tanh(x @ params["w"][i])

        return squared_error(lax.fori_loop(0, 3, body, example[0]), example[1])

    return Model(loss_fn, params, (draw(B, 2, WIDTH), draw(B, 2, WIDTH)))


def linear_recurrence():
    """A state space of decays: an associative scan, and a sum of prefixes."""
    draw = drawn(37)
    params = {
        "decay": draw(WIDTH),
        "in": draw(3, WIDTH),
        "out": draw(WIDTH, WIDTH),
        "positions": draw(TIME, WIDTH),
    }

    def loss_fn(params, example):
        def joined(left, right):
            return left[0] * right[0], right[0] * left[1] + right[1]

        xs, ys = example
        inputs = xs @ params["in"] + jnp.cumsum(params["positions"], axis=0)
        decays = jnp.broadcast_to(jax.nn.sigmoid(params["decay"]), inputs.shape)
        _, states = lax.associative_scan(joined, (decays, inputs))
        return squared_error(jnp.tanh(states) @ params["out"], ys)

    return Model(loss_fn, params, _series(draw))


def one_step_at_a_time():
    """`lax.map` goes over positions."""
    draw = drawn(38)
    first, second = matrices(draw, 3, 7, WIDTH)

    def loss_fn(params, example):
        out = lax.map(
            lambda x: jnp.tanh(x @ params["first"]) @ params["second"], example[0]
        )
        return squared_error(out, example[1])

    return Model(loss_fn, {"first": first, "second": second}, _series(draw))


#: The rows that are looked up, among 7, and how.
LOOKUPS = {
    "clip": ([0, 9, -9, 6, 6, -1], {"mode": "clip"}),
    "drop": ([3, 9, -9, 3, -2, 7], {"mode": "drop", "fill_value": 0.25}),
    "fill": ([5, 7, -8, 5, -7, 0], {"mode": "fill", "fill_value": 0.5}),
    "negative": ([-1, 6, -7, 0, -1, 3], {}),
    "promised": ([2, 2, 5, 0, 2, 5], {"mode": "promise_in_bounds"}),
    "repeated": ([4, 4, 4, 4, 1, 4], {}),
    "wrap": ([1, 8, -6, 15, 2, 0], {"mode": "wrap"}),
}


def embeddings():
    """Ids that repeat, are negative, and are beyond the table, in all modes."""
    draw = drawn(39)
    params = {name: draw(7, 3) for name in LOOKUPS} | {"one hot": draw(7, 3)}
    shifts = np.arange(B)[:, None] % 2  # two kinds of examples
    ids = {name: np.asarray(rows)[None] - shifts for name, (rows, _) in LOOKUPS.items()}
    ids["promised"] = np.abs(ids["promised"])

    def loss_fn(params, example):
        ids, scale = example
        found = {
            name: jnp.take(params[name], ids[name], axis=0, **how)
            if how.get("mode") in ("clip", "fill", "wrap")
            else params[name].at[ids[name]].get(**how)
            for name, (_, how) in LOOKUPS.items()
        }
        found["one hot"] = jax.nn.one_hot(ids["wrap"], 7) @ params["one hot"]
        return sum(scale * jnp.sum(jnp.tanh(0.3 * x) ** 2) for x in found.values())

    return Model(loss_fn, params, (ids, draw(B)))


def language_model():
    """Embedded tokens, learned positions, and a head over all tokens."""
    draw = drawn(40)
    params = {
        "head": draw(8, 11, scale=0.4),
        "positions": draw(9, 8),
        "table": draw(11, 8),
    }

    def loss_fn(params, example):
        ids, labels, weight = example
        x = params["table"][ids] + params["positions"][: len(ids)]
        x = jnp.cumsum(jnp.tanh(x), axis=0)
        return weight * cross_entropy(x @ params["head"], labels)

    random = np.random.default_rng(40)
    ids, labels = random.integers(0, 11, size=(2, B, TIME))
    return Model(loss_fn, params, (ids, labels, 1 + draw(B)))


def a_bag_of_words():
    """Rows of a table are added up by segment, and the same table scores them."""
    draw = drawn(41)
    params = {"table": draw(10, 4)}

    def loss_fn(params, example):
        ids, y = example
        bags = jax.ops.segment_sum(
            params["table"][ids], np.array([0, 1, 0, 1, 1, 0]), 2
        )
        return squared_error(jnp.tanh(bags) @ params["table"].T, y)

    ids = np.random.default_rng(41).integers(0, 10, size=(B, 6))
    return Model(loss_fn, params, (ids, draw(B, 2, 10)))
