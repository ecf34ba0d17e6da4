"""The signal-to-noise ratio is the mean over the spread of gradients, without bias."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradnorm_jax as gn
from gradnorm_jax.norms.noise_scale import gradient_noise_scale
from gradnorm_jax.norms.snr import gradient_snr, running_snr

pytestmark = pytest.mark.usefixtures("strict")


def gradients(number, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    draws = {"b": rng.normal(1, 2, (number, 3)), "w": rng.normal(2, 1, (number, 4, 2))}
    return {name: jnp.asarray(x, dtype) for name, x in draws.items()}


def direct(x, weights=None):
    """The ratio of each entry and of all, by the formulas, in float64."""
    x = np.asarray(x, np.float64)
    weights = np.full(len(x), 1 / len(x)) if weights is None else weights
    mean = np.tensordot(weights, x, 1)
    few = np.sum(weights**2)
    variance = np.tensordot(weights, (x - mean) ** 2, 1) / (1 - few)
    square = mean**2 - few * variance
    return square / variance, square.sum() / variance.sum()


def steps_of(grads):
    number = len(jax.tree.leaves(grads)[0])
    return [jax.tree.map(lambda x, k=k: x[k], grads) for k in range(number)]


@pytest.mark.parametrize("number", [2, 3, 50])
def test_it_is_its_formula_entry_by_entry_and_leaf_by_leaf(number):
    grads = gradients(number)
    found = gradient_snr(grads)
    leaves = gradient_snr(grads, granularity=gn.per_leaf())
    for k, (name, x) in enumerate(grads.items()):
        entries, leaf = direct(x)
        np.testing.assert_allclose(found.snr[name], entries, 1e-4, 1e-5)
        np.testing.assert_allclose(leaves.snr[k], leaf, 1e-4, 1e-5)
        assert np.all(found.is_valid[name])
    assert np.all(leaves.is_valid)


def test_of_a_part_it_is_one_over_the_noise_scale():
    grads = gradients(40)
    norms = jax.vmap(gn.per_leaf().measure)(grads)
    means = gn.per_leaf().measure(jax.tree.map(lambda x: jnp.mean(x, axis=0), grads))
    noise = gradient_noise_scale(norms, means)
    found = gradient_snr(grads, granularity=gn.per_leaf())
    np.testing.assert_allclose(found.snr, 1 / noise.noise_scale, 1e-4)
    whole = gradient_snr(grads, granularity=gn.whole_tree())
    both = noise.grad_square.sum() / noise.noise_trace.sum()
    np.testing.assert_allclose(whole.snr, both, 1e-4)


@functools.cache
def many_ratios():
    rng = np.random.default_rng(2)
    draws = jnp.asarray(rng.normal(0.5, 1, (500, 8, 400)), jnp.float32)
    found = jax.jit(
        jax.vmap(functools.partial(gradient_snr, granularity=gn.per_leaf()))
    )(draws)
    return np.asarray(found.snr, np.float64)[:, 0]


def test_the_ratio_of_a_large_part_has_no_bias_and_that_of_the_paper_has():
    ratios = many_ratios()
    error = ratios.std() / np.sqrt(len(ratios))
    assert abs(ratios.mean() - 0.25) < 5 * error + 0.25 / 400
    assert error < 1 / 8 / 20  # the paper's is 1 / 8 too high


@pytest.mark.parametrize("fill", [0.0, 1e30, np.nan, np.inf])
def test_padding_does_not_count(fill):
    grads = gradients(10)
    padded = jax.tree.map(
        lambda x: jnp.concatenate([x, jnp.full_like(x[:3], fill)]), grads
    )
    found = jax.jit(gradient_snr)(padded, mask=jnp.arange(13) < 10)
    chex.assert_trees_all_close(found, gradient_snr(grads), rtol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-25, 1.0, 1e25, 1e37])
def test_it_does_not_mind_the_magnitude(size):
    grads = jax.tree.map(lambda x: jnp.float32(size) * x, gradients(20))
    average = running_snr(0.9)
    state = functools.reduce(average.update, steps_of(grads), average.init(grads_0()))
    weights = 0.9 ** np.arange(20)[::-1]
    for name, x in gradients(20).items():
        entries, _ = direct(x)
        np.testing.assert_allclose(gradient_snr(grads).snr[name], entries, 1e-3)
        entries, _ = direct(x, weights / weights.sum())
        np.testing.assert_allclose(average.read(state).snr[name], entries, 1e-3)


def grads_0():
    return jax.tree.map(lambda x: x[0], gradients(1))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_running_ratio_is_that_of_the_weighted_steps_from_the_second_on(decay):
    grads = gradients(12, seed=1)
    average = running_snr(decay)
    state = average.init(grads_0())
    for k, step in enumerate(steps_of(grads)):
        state = average.update(state, step)
        weights = decay ** np.arange(k + 1)[::-1]
        found, leaves = average.read(state), average.read(state, gn.per_leaf())
        for i, (name, x) in enumerate(grads.items()):
            if not k:
                assert not np.any(found.is_valid[name])
                continue
            entries, leaf = direct(x[: k + 1], weights / weights.sum())
            np.testing.assert_allclose(found.snr[name], entries, 1e-3, 1e-4)
            np.testing.assert_allclose(leaves.snr[i], leaf, 1e-3, 1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 3])
def test_a_step_that_is_not_finite_teaches_nothing(bad, at):
    average = running_snr()
    state = spoiled = average.init(grads_0())
    update = jax.jit(average.update)
    for k, step in enumerate(steps_of(gradients(6))):
        if k == at:
            spoiled = update(spoiled, step | {"b": step["b"].at[1].set(bad)})
        state, spoiled = update(state, step), update(spoiled, step)
    chex.assert_trees_all_equal(spoiled, state)


def test_the_state_rides_in_scan_in_any_dtype_and_past_empty_places():
    params = {
        "half": jnp.ones(3, jnp.bfloat16),
        "complex": jnp.ones(2, jnp.complex64),
        "frozen": None,
    }
    average = running_snr()
    state = average.init(params)
    after, _ = jax.lax.scan(
        lambda s, _: (average.update(s, params), None), state, length=2
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert {x.dtype for x in jax.tree.leaves(state.deviation)} == {np.dtype("f4")}
    shapes = jax.eval_shape(lambda: params)
    chex.assert_trees_all_equal(average.init(shapes), state)
    donated = jax.jit(average.update, donate_argnums=0)(state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(donated, after)


def test_complex_gradients_count_by_their_absolute_values():
    rng = np.random.default_rng(0)
    parts = rng.normal(1, 1, (2, 30, 4)).astype(np.float32)
    found = gradient_snr(jnp.asarray(parts[0] + 1j * parts[1]))
    mean = parts.mean(axis=1)
    variance = parts.var(axis=1, ddof=1).sum(axis=0)
    expected = (np.sum(mean**2, axis=0) - variance / 30) / variance
    np.testing.assert_allclose(found.snr, expected, 1e-4)


@pytest.mark.parametrize(
    ("entries", "mask"),
    [
        ([5.0, 5.0, 5.0], [True] * 3),  # no variance
        ([0.0, 0.0, 0.0], [True] * 3),
        ([1.0, np.nan, 2.0], [True] * 3),
        ([1.0, np.inf, 2.0], [True] * 3),
        ([1.0, 2.0, 3.0], [True, False, False]),  # one gradient
        ([1.0, 2.0, 3.0], [False] * 3),
    ],
)
def test_a_ratio_that_says_nothing_is_not_valid(entries, mask):
    grads = jnp.asarray(entries, jnp.float32)[:, None]
    for how in ({}, {"granularity": gn.whole_tree()}):
        found = gradient_snr(grads, mask=jnp.asarray(mask), **how)
        assert not np.any(found.is_valid)
        assert np.all(np.isnan(found.snr))


def test_a_running_ratio_of_no_step_is_not_valid():
    average = running_snr()
    found = average.read(average.init(jnp.ones(3)))
    assert not np.any(found.is_valid)
    assert np.all(np.isnan(found.snr))


def test_a_gradient_that_never_changes_is_kept_to_the_last_bit():
    average = running_snr(0.97)
    params = jnp.asarray([0.1, 1e-30, 3e37, -7.7], jnp.float32)
    state = average.init(params)
    for _ in range(20):
        state = average.update(state, params)
    np.testing.assert_array_equal(state.mean, params)
    np.testing.assert_array_equal(state.deviation, np.zeros(4))


def test_what_has_no_examples_or_is_no_gradient_is_refused():
    with pytest.raises(ValueError, match=r"gradient_snr\(grads\).*axis 0"):
        gradient_snr({"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))})
    with pytest.raises(ValueError, match=r"gradient_snr\(mask=.*got \(2,\)"):
        gradient_snr(jnp.ones((3, 2)), mask=jnp.ones(2, bool))
    with pytest.raises(TypeError, match=r"gradient_snr\(grads\).*int32"):
        gradient_snr(jnp.ones((3, 2), jnp.int32))
    with pytest.raises(TypeError, match=r"running_snr\(...\).init\(params\).*int32"):
        running_snr().init(jnp.ones(3, jnp.int32))
    with pytest.raises(ValueError, match=r"running_snr\(decay=.*below 1, got 1"):
        running_snr(1)
