"""Random programs: a few random layers each, the same ones for the same seed."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import layers, nestings
from .layers import Context, Draw
from .oracle import Model
from .plain import cross_entropy, squared_error

SEEDS = 300
IN_THE_GATE = (0, 1, 16, 22, 32, 143)  # these have layers of every kind
B = 4

KINDS = {
    make.__name__: make
    for make in (
        layers.attention,
        layers.cast,
        layers.conv,
        layers.custom_vjp,
        layers.dense,
        layers.einsum,
        layers.embedding,
        layers.norm,
        layers.scalar,
        layers.sums,
        layers.unused,
        nestings.branch,
        nestings.experts,
        nestings.heads,
        nestings.nested_scan,
        nestings.remat,
        nestings.scan_over_layers,
        nestings.scan_over_time,
        nestings.sliced,
        nestings.stacked,
        nestings.tied,
    )
}
#: What is put around a layer, and how often.
WRAPS = {
    "nothing": (0.6, lambda apply: apply),
    "checkpoint": (0.2, jax.checkpoint),
    "jit": (0.1, jax.jit),
    "half of it": (0.1, lambda apply: lambda *args: 0.5 * apply(*args)),
}


def _dense_head(draw, shape):
    """Squared errors, of positions or of their mean."""
    averaged, target = draw.one_of(True, False), draw(B, shape[1], scale=1.0)

    def loss(x, y):
        return squared_error(jnp.mean(x, 0) if averaged else x, y)

    return loss, target


def _label_head(draw, shape):
    """Cross-entropy of a class for each position."""
    return cross_entropy, draw.random.integers(0, shape[1], (B, shape[0]))


def _linear_head(draw, shape):
    """The output with weights."""
    return lambda x, y: jnp.sum(x * y), draw(B, *shape, scale=1.0)


class Program(NamedTuple):
    """What a seed stands for.

    Attributes:
      kinds: Of which kind each layer is.
      model: The loss, its parameters, its examples.
    """

    kinds: tuple[str, ...]
    model: Model


def program(seed: int) -> Program:
    """Returns the program of a seed: two to five layers, a loss, four examples."""
    random = np.random.default_rng(seed)
    draw, names = Draw(random), list(KINDS)
    # Each kind has its turn, so that few seeds in a row have them all.
    kinds = [names[seed % len(names)], *random.choice(names, random.integers(1, 5))]
    kinds = [str(kind) for kind in random.permutation(kinds)]
    time, width = draw.one_of(1, 2, 3, 5, 8), draw.width()
    params, applied, shape = {"shared": draw(4, 4)}, [], (time, width)
    for i, kind in enumerate(kinds):
        name = f"{i} {kind}"
        layer = KINDS[kind](draw, shape)
        wrap = random.choice(list(WRAPS), p=[share for share, _ in WRAPS.values()])
        applied.append((name, WRAPS[str(wrap)][1](layer.apply)))
        params[name], shape = layer.params, layer.shape
    head, y = draw.one_of(_dense_head, _label_head, _linear_head)(draw, shape)
    decay = draw.one_of(0.0, 0.0, 0.05)

    def loss_of(params, example, narrow):
        x, ids = example["x"], example["ids"]
        for name, apply in applied:
            x = apply(params[name], x, Context(params["shared"], ids, narrow))
        penalty = sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))
        return example["scale"] * (head(x, example["y"]) + decay * penalty)

    batch = {
        "ids": random.integers(0, layers.ROWS, (B, time)),
        "scale": random.choice([0.1, 1.0, 3.0], B).astype(np.float32),
        "x": draw(B, time, width, scale=1.0),
        "y": y,
    }
    loss_fn, exact, rounds = functools.partial(loss_of, narrow=None), None, False
    if "cast" in kinds:
        exact, rounds = loss_fn, True
        loss_fn = functools.partial(loss_of, narrow=jnp.bfloat16)
    return Program(tuple(kinds), Model(loss_fn, params, batch, exact, rounds))
