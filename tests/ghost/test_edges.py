"""Shapes and dtypes at their edges: one row, no entries, narrow indices, 16 bits."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradnorm_jax as gn

from .agreement import taking
from .oracle import QUICKLY
from .plain import B, drawn

draw = drawn(90)
IDS = np.random.default_rng(90).integers(0, 255, (B, 5))


def one_layer_by_scan_and_by_name(params, x):
    h = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, params)[0]
    return jnp.sum(jnp.tanh(h @ params[0]))


def a_table_of_one_row(params, x):
    rows = params[jnp.zeros(3, int)] * x
    return jnp.sum(jnp.tanh(rows)) + jnp.sum(jnp.sin(x @ params.T))


def one_of_many_columns(params, x):
    return jnp.sum(jnp.tanh(x @ params)) + jnp.sum(
        jnp.sin(x @ (params @ params)[:, :1])
    )


def no_entries(params, x):
    nothing = jnp.sum(jnp.tanh(x[:, :0] @ params["z"]))
    return jnp.sum(jnp.tanh(x @ params["w"])) + nothing


def clipped_ids(params, ids):
    return jnp.sum(jnp.tanh(jnp.take(params, ids, axis=0, mode="clip")))


def one_clipped_row(params, ids):
    return jnp.sum(jnp.tanh(jax.lax.dynamic_index_in_dim(params, ids[0])))


def dropped_ids(params, ids):
    return jnp.sum(jnp.tanh(params.at[ids].get(mode="fill", fill_value=0)))


def a_constant(params, x):
    return jnp.sum(x @ params["w"]) + params["b"] @ jnp.arange(float(B))


def one_number(params, x):
    return jnp.square(params * jnp.sum(x))


def divided_by_inputs(params, example):
    x, divisor = example
    return jnp.sum(jnp.tanh(x @ (params / divisor)))


def with_wide_ids(batch):
    """XLA's older emitters add to wrong rows where indices have eight bits."""

    def widened(x):
        return x.astype(np.int32) if jnp.issubdtype(x.dtype, jnp.integer) else x

    return jax.tree.map(widened, batch)


CASES = {
    "one_layer": (one_layer_by_scan_and_by_name, draw(1, 7, 7), draw(B, 3, 7)),
    "one_row": (a_table_of_one_row, draw(1, 7), draw(B, 3, 7)),
    "one_column": (one_of_many_columns, draw(6, 6), draw(B, 3, 6)),
    "no_entries": (no_entries, {"w": draw(5, 3), "z": np.zeros((0, 4))}, draw(B, 3, 5)),
    "uint8_clipped": (clipped_ids, draw(300, 4), np.uint8(IDS)),
    "int8_clipped": (clipped_ids, draw(300, 4), np.int8(IDS - 128)),
    "uint8_row": (one_clipped_row, draw(300, 4), np.uint8(IDS)),
    "uint8_filled": (dropped_ids, draw(300, 4), np.uint8(IDS)),
    "constant": (a_constant, {"b": draw(B), "w": draw(5)}, draw(B, 3, 5)),
    "number": (one_number, 1.5, draw(B, 3)),
    "divided": (divided_by_inputs, draw(5, 4), (draw(B, 3, 5), 2 + draw(B, 5, 1))),
}


@pytest.mark.parametrize("rule", ["by shape", "gram", "product in turn"])
@pytest.mark.parametrize("case", CASES)
def test_norms_and_sums_at_an_edge_are_those_of_formed_gradients(case, rule):
    loss_fn, *arrays = CASES[case]
    params, batch = jax.tree.map(jnp.asarray, arrays)
    mask = np.arange(B) != 1

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(params, batch):
        truth = jax.vmap(jax.grad(loss_fn), (None, 0))(params, with_wide_ids(batch))
        leaves = [x.reshape(B, -1) for x in jax.tree.leaves(truth)]
        norms = jnp.sqrt(sum(jnp.sum(x**2, axis=1) for x in leaves))
        limit = jnp.median(norms)
        with taking(rule):
            found = gn.clipped_grad(loss_fn, limit)(params, batch, example_mask=mask)
            measured = gn.per_example_norms(loss_fn, microbatch_size=2)(params, batch)
        return leaves, norms, limit, found, measured

    leaves, norms, limit, found, measured = jax.device_get(run(params, batch))
    np.testing.assert_allclose(measured, norms, rtol=5e-6)
    np.testing.assert_allclose(found.norms, norms, rtol=5e-6)
    scales = mask * np.minimum(1, limit / np.where(norms > 0, norms, 1))
    for ours, x, own in zip(
        jax.tree.leaves(found.grads), leaves, jax.tree.leaves(params), strict=True
    ):
        assert ours.shape == jnp.shape(own)
        want = (scales @ x).reshape(ours.shape)
        largest = np.max(np.abs(want), initial=0)
        np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("scalar", [1e-8, 1 / 3, 3.1e5])
def test_a_scalar_that_16_bits_do_not_hold_is_not_lost(scalar):
    def loss_fn(params, x):
        half = (params * scalar).astype(jnp.float16)
        return jnp.sum((x @ half).astype(jnp.float32) ** 2)

    params, x = draw(64, 80) / scalar / 50, np.float16(draw(B, 3, 64))
    truth = gn.per_example_norms(loss_fn, implementation="vmap")(params, x)
    assert np.all(truth > 0)
    found = gn.per_example_norms(loss_fn)(params, x)
    np.testing.assert_allclose(found, truth, rtol=1e-3)


@pytest.mark.parametrize("max_norm", [1e-5, 1.0])
@pytest.mark.parametrize("way", ["one_pass", "two_pass"])
def test_a_scale_that_float16_does_not_hold_is_not_lost(way, max_norm):
    def loss_fn(params, x):
        return jnp.sum((x @ params.astype(jnp.float16)).astype(jnp.float32) ** 2)

    params, x = 0.1 * draw(64, 80), np.float16(draw(B, 3, 64))
    truth = gn.clipped_grad(loss_fn, max_norm, implementation="vmap")(params, x)
    found = gn.clipped_grad(loss_fn, max_norm, implementation=way)(params, x)
    largest = np.max(np.abs(truth.grads))
    np.testing.assert_allclose(found.grads, truth.grads, atol=1e-3 * largest)


@jax.custom_vjp
def rounded(x):
    return jnp.round(x)


rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, slope: (slope,))


@jax.custom_jvp
def root(x):
    return jnp.sqrt(x)


@root.defjvp
def _(primals, tangents):
    [x], [slope] = primals, tangents
    return root(x), jnp.where(x == 0, 0.0, slope / (2 * root(jnp.where(x == 0, 1, x))))


@pytest.mark.parametrize("fun", [rounded, lambda x: root(jnp.maximum(x, 0))])
def test_norms_are_differentiated_by_the_rules_of_the_loss(fun):
    def loss_fn(w, x):
        return jnp.sum(jnp.tanh(fun(x) @ w))

    w, x = draw(5, 3), 3 * draw(B, 2, 5)

    def slope(implementation):
        norms = gn.per_example_norms(loss_fn, implementation=implementation)
        run = jax.grad(lambda w, x: jnp.mean(norms(w, x)), (0, 1))
        return jax.jit(run, compiler_options=QUICKLY)(w, x)

    ours, theirs = slope("ghost"), slope("vmap")
    chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(np.any(x != 0) for x in theirs)
