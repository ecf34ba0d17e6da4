"""Norms of each example are right where squares of numbers, and products, are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradnorm_jax as gn

from .agreement import WAYS, measure
from .models import MODELS
from .oracle import in_float64
from .plain import B, drawn, matrices, squared_error

FACTORS = np.array([1e-25, 1e25, 0.0, 1.0, -1e-30], np.float32)
MODELS_OF_ALL_USES = (
    "a_counted_loop",
    "a_kernel_of_two_convolutions",
    "complex_parameters",
    "convolutions",
    "custom_vjp",
    "dispatched_by_one_hot",
    "embeddings",
    "few_positions_of_wide_layers",
    "heads_by_vmap",
    "layers_by_scan_with_checkpoint",
    "lstm",
    "many_positions_of_narrow_layers",
    "parametrizations",
    "short_tied_by_list",
    "tied_many_times",
    "time_inside_layers",
    "weights_looked_up_by_expert",
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS_OF_ALL_USES)
def test_losses_of_all_magnitudes_ride_in_one_batch(name, way):
    model = MODELS[name]()

    def loss_fn(params, example):
        factor, example = example
        return factor * model.loss_fn(params, example)

    factors = FACTORS[: model.size]
    got = jax.device_get(measure(loss_fn, way)(model.params, (factors, model.batch)))
    truth, size = in_float64(model), np.abs(factors.astype(np.float64))
    np.testing.assert_allclose(got.whole, truth.whole * size, rtol=1e-5, atol=0)
    want, whole = truth.leaves * size[:, None], (truth.whole * size)[:, None]
    assert np.all(np.abs(got.leaves - want) <= 1e-4 * np.maximum(want, 0.02 * whole))
    np.testing.assert_array_equal(got.whole[2], 0)
    np.testing.assert_array_equal(got.leaves[2], 0)
    assert np.all(got.whole[[0, 1, 3, 4]] > 0)


#: How large activations are, and the weights that they meet.
PAIRS = [(1e20, 1e-20), (1e-20, 1e20), (1e-15, 1e-15), (1e18, 1e15), (3e19, 1e-25)]


@pytest.mark.parametrize("positions", [1, 2, 40])
@pytest.mark.parametrize(("activation", "weight"), PAIRS)
def test_large_activations_meet_small_weights(activation, weight, positions):
    draw = drawn(90)
    w = draw(6, 8, scale=weight)
    params = {"b": draw(8), "conv": draw(1, 6, 8, scale=weight), "w": w}
    x = draw(B, positions, 6, scale=activation)
    slope = draw(B, positions, 8)

    def loss_fn(params, example):
        x, slope = example
        conv = jax.lax.conv_general_dilated(
            x[None],
            params["conv"],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        return jnp.sum(slope * (x @ params["w"] + conv[0] + params["b"]))

    got = measure(loss_fn)(params, (x, slope)).leaves
    by_hand = np.einsum("bti,btj->bij", np.float64(x), np.float64(slope))
    size = np.linalg.norm(by_hand, axis=(1, 2))
    bias = np.linalg.norm(np.float64(slope).sum(1), axis=1)
    np.testing.assert_allclose(got, np.stack([bias, size, size], 1), rtol=1e-4)


def test_two_uses_of_a_weight_that_are_far_apart_add_up():
    draw = drawn(91)
    x, y = draw(B, 3, 5), draw(B, 3, 4)

    def loss_fn(params, example):
        x, y, factors = example
        first = jnp.sum((x @ params["w"]) * y)
        second = jnp.sum((jnp.sin(x) @ params["w"]) * jnp.cos(y))
        return factors[0] * first + factors[1] * second

    factors = np.array([[1e25, 1e-25], [1e-25, 1e25], [1e25, -1e25], [1e-25, 2e-25]])
    factors = np.concatenate([factors, [[0, 0]]]).astype(np.float32)
    params = {"w": draw(5, 4)}
    got = measure(loss_fn)(params, (x, y, factors)).whole
    each = [
        np.einsum("bti,btj->bij", np.float64(a), np.float64(b))
        for a, b in ((x, y), (np.sin(x), np.cos(y)))
    ]
    joined = sum(factors[:, k, None, None] * grad for k, grad in enumerate(each))
    np.testing.assert_allclose(got, np.linalg.norm(joined, axis=(1, 2)), rtol=1e-4)


@pytest.mark.parametrize("rest", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("positions", [2, 16])
def test_what_cancels_costs_digits_by_how_much_cancels(positions, rest):
    draw = drawn(92)
    x = np.repeat(draw(B, 1, 8), positions, axis=1)
    slope = draw(B, positions, 12)
    slope -= np.mean(slope, axis=1, keepdims=True)
    slope += rest * draw(B, 1, 12)

    def loss_fn(params, example):
        return jnp.sum((example[0] @ params) * example[1])

    got = measure(loss_fn)(draw(8, 12), (x, slope)).whole
    x, slope = np.float64(x), np.float64(slope)
    want = np.linalg.norm(np.einsum("bti,btj->bij", x, slope), axis=(1, 2))
    sizes = [np.linalg.norm(factor, axis=(1, 2)) for factor in (x, slope)]
    lost = (sizes[0] * sizes[1] / want) ** 2
    assert np.all(np.abs(got / want - 1) <= 1e-6 + 2**-23 * lost)


def test_float16_numbers_whose_squares_overflow_are_measured():
    draw = drawn(93)
    params = {"b": draw(4), "w": draw(6, 4, scale=0.01), "table": draw(5, 6)}
    params = {name: p.astype(np.float16) for name, p in params.items()}
    x = draw(B, 3, 6, scale=2000).astype(np.float16)
    ids = np.arange(3 * B).reshape(B, 3) % 5
    slope = draw(B, 3, 4).astype(np.float16)

    def loss_fn(params, example):
        ids, x, slope = example
        h = (x + params["table"][ids]) @ params["w"] + params["b"]
        return jnp.sum(slope * h) / 8

    got = measure(loss_fn)(params, (ids, x, slope)).leaves
    x, slope = np.float64(x + params["table"][ids]), np.float64(slope) / 8
    b = np.linalg.norm(slope.sum(1), axis=1)
    w = np.linalg.norm(np.einsum("bti,btj->bij", x, slope), axis=(1, 2))
    table = np.zeros((B, 5, 6))
    for i in range(B):
        np.add.at(table[i], ids[i], slope[i] @ np.float64(params["w"]).T)
    table = np.linalg.norm(table, axis=(1, 2))
    assert np.all(w > 256)  # whose square is beyond float16
    np.testing.assert_allclose(got, np.stack([b, table, w], 1), rtol=3e-3)


def test_an_exact_zero_has_the_norm_zero_in_each_implementation():
    draw = drawn(94)
    first, second = matrices(draw, 5, 6, 3)
    params = {"b": draw(6), "first": first, "second": second}

    def loss_fn(params, example):
        x, y = example
        h = jax.nn.relu(x @ params["first"] + params["b"] - 1e6)
        return squared_error(h @ params["second"], y)

    batch = (draw(B, 4, 5), draw(B, 4, 3))
    for implementation in ("ghost", "vmap"):
        got = measure(loss_fn, implementation=implementation)(params, batch)
        np.testing.assert_array_equal(got.leaves, np.zeros((B, 3)))
        np.testing.assert_array_equal(got.whole, np.zeros(B))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_in_a_gradient_is_so_in_its_norm(bad):
    draw = drawn(95)

    def loss_fn(params, example):
        x, slope = example
        return jnp.sum(jnp.sum(x @ params["w"], 0) * slope) + jnp.sum(params["b"])

    slope = draw(B, 7)
    slope[3, 2] = bad
    params = {"b": draw(2), "w": draw(5, 7)}
    got = measure(loss_fn)(params, (draw(B, 2, 5), slope))
    assert np.array_equal(np.isfinite(got.whole), np.arange(B) != 3)
    np.testing.assert_allclose(got.leaves[:, 0], np.sqrt(2), rtol=1e-6)


def test_a_norm_that_float32_cannot_hold_is_infinite():
    norms = gn.per_example_norms(lambda w, x: jnp.sum(w * x) * 1e30)
    got = norms(jnp.ones(4), jnp.full((2, 4), 3e8, jnp.float32))
    np.testing.assert_array_equal(got, [np.inf, np.inf])
