"""Models as libraries write them: Flax linen and nnx, Equinox, Haiku."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .oracle import Model
from .plain import B, cross_entropy, drawn, squared_error

TIME, WIDTH = 4, 6


def _tokens(draw, vocabulary=8):
    random = np.random.default_rng(60)
    ids, labels = random.integers(0, vocabulary, size=(2, B, TIME))
    return ids, labels, 1 + draw(B, scale=0.3)


def _filled(shapes):
    """Returns parameters of these shapes, none of them 0 or 1 as they start out."""
    draw = drawn(61)
    return jax.tree.map(lambda x: draw(*x.shape, scale=0.4), shapes)


def _linen(module, batch, loss):
    variables = jax.eval_shape(module.init, jax.random.key(0), batch[0][0])

    def loss_fn(params, example):
        return loss(module.apply({"params": params}, example[0]), *example[1:])

    return Model(loss_fn, _filled(variables["params"]), batch)


def _weighted(logits, labels, weight):
    return weight * cross_entropy(logits, labels)


def linen_transformer():
    """Attention, a gated layer, a norm; the embedding is the head."""
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(2)(
                h, mask=nn.make_causal_mask(h[:, 0])
            )
            h = nn.RMSNorm()(x)
            return x + nn.Dense(WIDTH)(nn.silu(nn.Dense(7)(h)) * nn.Dense(7)(h))

    class Network(nn.Module):
        @nn.compact
        def __call__(self, ids):
            table = nn.Embed(8, WIDTH)
            x = nn.remat(Block)()(table(ids))
            return table.attend(Block()(x))

    return _linen(Network(), _tokens(drawn(62)), _weighted)


def linen_layers_by_scan():
    """`nn.scan` over blocks with `nn.remat`, and a recurrent layer before."""
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(WIDTH)(jnp.tanh(nn.LayerNorm()(x))), None

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.GRUCell(WIDTH))(
                x, initial_carry=jnp.zeros_like(x, shape=WIDTH)
            )
            blocks = nn.scan(
                nn.remat(Block), {"params": 0}, split_rngs={"params": True}, length=3
            )
            return blocks()(x, None)[0]

    draw = drawn(63)
    batch = (draw(B, TIME, 3), draw(B, TIME, WIDTH))
    return _linen(Network(), batch, squared_error)


def linen_cnn():
    """Convolutions with group norms and pooling."""
    nn = pytest.importorskip("flax.linen")

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.GroupNorm(2)(nn.Conv(4, (3, 3), strides=2)(x)))
            x = nn.Conv(6, (2, 2), feature_group_count=2, padding="VALID")(x)
            x = nn.avg_pool(nn.ConvTranspose(4, (2, 2), strides=(2, 2))(x), (2, 2))
            return nn.DenseGeneral(3, axis=(0, 1, 2))(jnp.tanh(x))

    draw = drawn(64)
    return _linen(Network(), (draw(B, 8, 8, 2), draw(B, 3)), squared_error)


def _nnx(make, batch, loss):
    nnx = pytest.importorskip("flax.nnx")
    network = nnx.eval_shape(lambda: make(nnx))
    graph, shapes, rest = nnx.split(network, nnx.Param, ...)

    def loss_fn(params, example):
        model = nnx.merge(graph, params, rest)
        return loss(model(example[0]), *example[1:])

    return Model(loss_fn, _filled(nnx.as_pure(shapes)), batch)


def nnx_transformer():
    """Embedding, attention and a head."""

    def make(nnx):
        class Network(nnx.Module):
            def __init__(self, rngs):
                self.embed = nnx.Embed(8, WIDTH, rngs=rngs)
                self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
                self.attention = nnx.MultiHeadAttention(
                    2, WIDTH, decode=False, rngs=rngs
                )
                self.head = nnx.LinearGeneral(WIDTH, 8, rngs=rngs)

            def __call__(self, ids):
                x = self.embed(ids)
                return self.head(jnp.tanh(x + self.attention(self.norm(x))))

        return Network(nnx.Rngs(0))

    return _nnx(make, _tokens(drawn(66)), _weighted)


def nnx_cnn():
    """A convolution, a norm, a dense layer."""

    def make(nnx):
        return nnx.Sequential(
            nnx.Conv(2, 4, (3, 3), strides=2, rngs=nnx.Rngs(0)),
            nnx.RMSNorm(4, rngs=nnx.Rngs(1)),
            jnp.tanh,
            jnp.ravel,
            nnx.Linear(36, 3, rngs=nnx.Rngs(2)),
        )

    draw = drawn(67)
    return _nnx(make, (draw(B, 6, 6, 2), draw(B, 3)), squared_error)


def _equinox(make, batch, loss):
    eqx = pytest.importorskip("equinox")
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)  # noqa: E731
    shapes, static = eqx.partition(eqx.filter_eval_shape(make), is_shape)

    def loss_fn(params, example):
        return loss(eqx.combine(params, static)(example[0]), *example[1:])

    return Model(loss_fn, _filled(shapes), batch)


def equinox_mlp():
    """Dense layers whose weights are [outputs, inputs]."""
    eqx = pytest.importorskip("equinox")

    def make():
        return eqx.nn.MLP(4, 3, width_size=6, depth=2, key=jax.random.key(0))

    draw = drawn(69)
    return _equinox(make, (draw(B, 4), draw(B, 3)), squared_error)


def equinox_recurrent():
    """A GRU over embedded tokens, a norm and attention, by vmap over positions."""
    eqx = pytest.importorskip("equinox")

    class Network(eqx.Module):
        embed: eqx.nn.Embedding
        cell: eqx.nn.GRUCell
        norm: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        head: eqx.nn.Linear

        def __call__(self, ids):
            def step(h, x):
                h = self.cell(x, h)
                return h, h

            x = jax.vmap(self.embed)(ids)
            _, x = jax.lax.scan(step, jnp.zeros_like(x[0]), x)
            x = jax.vmap(self.norm)(x)
            return jax.vmap(self.head)(x + self.attention(x, x, x))

    def make():
        key = jax.random.key(0)
        return Network(
            eqx.nn.Embedding(8, WIDTH, key=key),
            eqx.nn.GRUCell(WIDTH, WIDTH, key=key),
            eqx.nn.LayerNorm(WIDTH),
            eqx.nn.MultiheadAttention(2, WIDTH, key=key),
            eqx.nn.Linear(WIDTH, 8, key=key),
        )

    return _equinox(make, _tokens(drawn(70)), _weighted)


def equinox_cnn():
    """Convolutions with the channels first."""
    eqx = pytest.importorskip("equinox")

    def make():
        key = jax.random.key(0)
        return eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(2, 4, 3, stride=2, padding=1, key=key),
                eqx.nn.GroupNorm(2, 4),
                eqx.nn.Lambda(jnp.tanh),
                eqx.nn.Conv2d(4, 4, 2, groups=2, key=key),
                eqx.nn.Lambda(jnp.ravel),
                eqx.nn.Linear(16, 3, key=key),
            ]
        )

    draw = drawn(71)
    return _equinox(make, (draw(B, 2, 6, 6), draw(B, 3)), squared_error)


def _haiku(network, batch, loss):
    hk = pytest.importorskip("haiku")
    pure = hk.without_apply_rng(hk.transform(network))
    shapes = jax.eval_shape(pure.init, jax.random.key(0), batch[0][0])

    def loss_fn(params, example):
        return loss(pure.apply(params, example[0]), *example[1:])

    return Model(loss_fn, _filled(shapes), batch)


def haiku_lstm():
    """An LSTM over embedded tokens, unrolled by a scan."""
    hk = pytest.importorskip("haiku")

    def network(ids):
        x = hk.Embed(8, WIDTH)(ids)
        cell = hk.LSTM(WIDTH)
        x, _ = hk.dynamic_unroll(cell, x, cell.initial_state(None))
        return hk.Linear(8)(hk.LayerNorm(-1, True, True)(x))

    return _haiku(network, _tokens(drawn(73)), _weighted)


def haiku_cnn():
    """Convolutions of one example without an axis for others."""
    hk = pytest.importorskip("haiku")

    def network(x):
        x = jnp.tanh(hk.Conv2D(4, 3, stride=2)(x))
        x = jnp.tanh(hk.DepthwiseConv2D(2, 2)(x[None])[0])
        return hk.Linear(3)(jnp.ravel(x))

    draw = drawn(74)
    return _haiku(network, (draw(B, 6, 6, 2), draw(B, 3)), squared_error)
