"""The noise scale is what the covariance of the gradients says, at any magnitude."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradnorm_jax as gn
from gradnorm_jax.norms.noise_scale import gradient_noise_scale, running_noise_scale

pytestmark = pytest.mark.usefixtures("strict")

#: The true gradient, and the standard deviation of each of its entries.
SIGNAL = np.array([1.0, -1, 2, 0, 1, 0])
SPREAD = np.array([1.0, 2, 3, 4, 2, np.sqrt(8)])
GRAD_SQUARE, NOISE_TRACE = 7.0, 42.0


def gradients(*shape, seed=0):
    """Gradients of single examples, `[*shape, 6]`, in float64."""
    draws = np.random.default_rng(seed).normal(size=(*shape, 6))
    return SIGNAL + SPREAD * draws


def norm(grads):
    """Norms along the last axis, in float32 from float64."""
    return jnp.asarray(np.linalg.norm(grads, axis=-1), jnp.float32)


def direct(grads):
    """Both estimates from the sample covariance itself, in NumPy."""
    mean, covariance = grads.mean(axis=0), np.cov(grads, rowvar=False)
    noise_trace = np.trace(covariance)
    return mean @ mean - noise_trace / len(grads), noise_trace


def of_batch(grads, **how):
    return gradient_noise_scale(norm(grads), norm(grads.mean(axis=0)), **how)


def assert_is(found, expected, rtol=1e-5):
    grad_square, noise_trace = expected
    np.testing.assert_allclose(found.grad_square, grad_square, rtol)
    np.testing.assert_allclose(found.noise_trace, noise_trace, rtol)
    np.testing.assert_allclose(found.noise_scale, noise_trace / grad_square, rtol)
    assert np.all(found.is_valid)


@pytest.mark.parametrize("size", [2, 3, 64, 1000])
def test_per_example_norms_tell_what_the_sample_covariance_does(size):
    grads = gradients(size) + 5
    assert_is(of_batch(grads), direct(grads))


def test_in_float64_they_do_so_to_the_last_digits():
    grads = gradients(100)
    with jax.enable_x64(True):
        norms, mean = np.linalg.norm(grads, axis=1), np.linalg.norm(grads.mean(axis=0))
        found = gradient_noise_scale(jnp.asarray(norms), jnp.asarray(mean))
        assert_is(found, direct(grads), rtol=1e-12)
        chex.assert_type(found[:3], jnp.float64)


def test_the_norms_of_a_model_tell_what_its_gradients_do():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32), "b": jnp.zeros(3)}
    batch = jnp.asarray(rng.normal(size=(16, 5)), jnp.float32)

    def loss_fn(params, x):
        return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]) ** 2)

    norms = gn.per_example_norms(loss_fn)(params, batch)
    grads = jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)
    mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), grads)
    flat = [np.asarray(x, np.float64).reshape(16, -1) for x in jax.tree.leaves(grads)]
    found = gradient_noise_scale(norms, gn.global_norm(mean))
    assert_is(found, direct(np.concatenate(flat, axis=1)), rtol=1e-4)


def estimate(small, large, **how):
    """Estimates from gradients, `[.., 6]`, of small batches and of a large one."""
    norms, mean_norm = (jnp.linalg.norm(x, axis=-1) for x in (small, large))
    return gradient_noise_scale(norms, mean_norm, **how)


def by_examples(grads):
    return estimate(grads, grads.mean(axis=0))


def by_microbatches(grads):
    parts = grads.reshape(4, -1, 6).mean(axis=1)
    return estimate(parts, grads.mean(axis=0), batch_size=len(grads) // 4)


def by_two_batches(grads):
    small, large = grads[:4].mean(axis=0), grads[4:].mean(axis=0)
    return estimate(small, large, batch_size=4, total_batch_size=len(grads) - 4)


def by_two_the_large_one_first(grads):
    small, large = grads[:4].mean(axis=0), grads[4:].mean(axis=0)
    return estimate(large, small, batch_size=len(grads) - 4, total_batch_size=4)


SOURCES = [by_examples, by_microbatches, by_two_batches, by_two_the_large_one_first]
sources = pytest.mark.parametrize("source", SOURCES)


@functools.cache
def many_estimates(source):
    """Both estimates from each of 4000 batches of 32 examples, each of its own."""
    batches = jnp.asarray(gradients(4000, 32, seed=1), jnp.float32)
    found = jax.jit(jax.vmap(source))(batches)
    return np.stack([found.grad_square, found.noise_trace], axis=1).astype(np.float64)


@sources
def test_both_estimates_are_unbiased(source):
    estimates = many_estimates(source)
    error = estimates.std(axis=0) / np.sqrt(len(estimates))
    off = (estimates.mean(axis=0) - [GRAD_SQUARE, NOISE_TRACE]) / error
    assert np.all(np.abs(off) < 4), off
    # And the error bars are tight enough to tell a formula that is off by 1 / B.
    assert np.all(error < [GRAD_SQUARE / 32, NOISE_TRACE / 32])


@sources
def test_the_ratio_of_averages_is_right_where_the_average_of_ratios_is_not(source):
    estimates = many_estimates(source)
    of_averages = estimates[:, 1].mean() / estimates[:, 0].mean()
    average = (estimates[:, 1] / estimates[:, 0]).mean()
    true = NOISE_TRACE / GRAD_SQUARE
    assert abs(of_averages / true - 1) < 0.06
    assert abs(average / true - 1) > 2 * abs(of_averages / true - 1)


def test_the_examples_of_all_microbatches_count_and_not_those_of_the_last():
    grads = gradients(32)
    parts = grads.reshape(4, 8, 6).mean(axis=1)
    large = grads.mean(axis=0)
    g2, large2 = np.mean(np.sum(parts**2, axis=1)), large @ large
    expected = (32 * large2 - 8 * g2) / 24, (g2 - large2) / (1 / 8 - 1 / 32)
    found = by_microbatches(jnp.asarray(grads, jnp.float32))
    assert_is(found, expected)
    last = estimate(parts[-1], large, batch_size=8, total_batch_size=32)
    assert abs(last.noise_trace / found.noise_trace - 1) > 0.05


@pytest.mark.parametrize("fill", [0.0, 1e30, np.nan, np.inf])
def test_padding_does_not_count(fill):
    grads = gradients(10)
    norms = jnp.concatenate([norm(grads), jnp.full(6, fill, jnp.float32)])
    mean = norm(grads.mean(axis=0))
    found = jax.jit(gradient_noise_scale)(norms, mean, mask=jnp.arange(16) < 10)
    chex.assert_trees_all_close(found, of_batch(grads), rtol=1e-6)


def test_each_part_has_a_noise_scale_of_its_own():
    grads = gradients(40)
    parts = np.stack([norm(grads[:, :2]), norm(grads[:, 2:])], axis=1)
    mean = grads.mean(axis=0)
    means = jnp.stack([norm(mean[:2]), norm(mean[2:])])
    mask = jnp.arange(50) < 40
    padded = np.concatenate([parts, np.full((10, 2), np.nan, np.float32)])
    found = gradient_noise_scale(jnp.asarray(padded), means, mask=mask)
    expected = np.array([direct(grads[:, :2]), direct(grads[:, 2:])]).T
    np.testing.assert_allclose(found.grad_square, expected[0], 1e-4)
    np.testing.assert_allclose(found.noise_trace, expected[1], 1e-5)


def test_a_part_that_is_not_finite_spoils_no_other():
    average = running_noise_scale()
    norms = jnp.asarray([[3.0, 3.0], [4.0, jnp.nan], [4.0, 3.0]])
    means = jnp.asarray([3.5, 2.9])
    found = gradient_noise_scale(norms, means)
    state = average.update(average.init(means), norms, means)
    for x in (found, average.read(state)):
        np.testing.assert_array_equal(x.is_valid, [True, False])
        assert np.isnan(x.noise_scale[1])
    np.testing.assert_array_equal(state.total_weight, [1, 0])


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-25, 1e-10, 1.0, 1e18, 1e25, 1e37])
def test_the_ratio_does_not_mind_the_magnitude(size):
    grads = gradients(32)
    norms, mean = norm(size * grads), norm(size * grads.mean(axis=0))
    average = running_noise_scale(0.9)
    state = average.init()
    for _ in range(3):
        state = average.update(state, norms, mean)
    expected = direct(grads)
    for found in (jax.jit(gradient_noise_scale)(norms, mean), average.read(state)):
        assert found.is_valid
        np.testing.assert_allclose(found.noise_scale, expected[1] / expected[0], 2e-5)
        with np.errstate(over="ignore", under="ignore"):
            squares = np.float32(size**2 * np.array(expected))
        squares[squares < np.finfo(np.float32).tiny] = 0
        np.testing.assert_allclose(found[:2], squares, 2e-5)


def test_the_average_forgets_what_was_large_and_what_was_small():
    grads = gradients(32)
    norms, mean = norm(grads), norm(grads.mean(axis=0))
    average = running_noise_scale(0.5)
    for size in (1e-30, 1e-10, 1e5, 1e30):

        def step(state, _, size=size):
            scaled = (jnp.float32(size) * x for x in (norms, mean))
            return average.update(state, *scaled), None

        state = average.update(average.init(), 2 * norms, norms[0])
        state, _ = jax.lax.scan(step, state, length=250)
        found = average.read(state)
        expected = direct(grads)
        np.testing.assert_allclose(found.noise_scale, expected[1] / expected[0], 1e-4)
        assert found.is_valid


def test_an_estimate_that_fits_is_right_where_the_square_of_a_norm_does_not():
    found = gradient_noise_scale(jnp.full(2, 2.5e19), 1.8e19)
    np.testing.assert_allclose(found.grad_square, 2 * 1.8e19**2 - 2.5e19**2, 1e-5)
    assert found.noise_trace == np.inf
    assert found.noise_scale == pytest.approx(26.174, rel=1e-4)


def test_an_average_beyond_all_norms_does_not_stick():
    average = running_noise_scale(0.5)
    norms, mean = jnp.asarray([2e38, 3e38], jnp.float32), jnp.float32(2e38)
    state = average.init()
    for _ in range(3):
        state = average.update(state, norms, mean, batch_size=10**6)
    expected = gradient_noise_scale(norms, mean, batch_size=10**6).noise_scale
    np.testing.assert_allclose(average.read(state).noise_scale, expected, 1e-4)


def ema(values, decay):
    weights = decay ** np.arange(len(values))[::-1]
    return weights @ values / weights.sum()


@pytest.mark.parametrize("decay", [0, 0.5, 0.99, 0.9999])
def test_the_average_is_that_of_both_estimates_from_the_first_step_on(decay):
    batches = gradients(12, 16) + 3
    expected = np.array([direct(grads) for grads in batches])
    average = running_noise_scale(decay)
    state = average.init()
    for k, grads in enumerate(batches):
        state = average.update(state, norm(grads), norm(grads.mean(axis=0)))
        now = expected[: k + 1]
        assert_is(average.read(state), (ema(now[:, 0], decay), ema(now[:, 1], decay)))


def test_the_average_finds_the_noise_scale_that_no_step_can():
    average = running_noise_scale(0.999)

    def step(state, grads):
        norms = jnp.linalg.norm(grads, axis=1)
        mean = jnp.linalg.norm(jnp.mean(grads, axis=0))
        state = average.update(state, norms, mean)
        alone = gradient_noise_scale(norms, mean)
        return state, (average.read(state), alone.is_valid)

    batches = jnp.asarray(gradients(4000, 4), jnp.float32)
    _, (found, alone) = jax.lax.scan(step, average.init(), batches)
    assert 0.1 < np.mean(alone) < 0.95
    assert np.all(found.is_valid[200:])
    assert found.noise_scale[-1] == pytest.approx(NOISE_TRACE / GRAD_SQUARE, rel=0.15)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["norms", "mean", "both"])
@pytest.mark.parametrize("step", [0, 2])
def test_a_step_that_is_not_finite_teaches_nothing(bad, where, step):
    average = running_noise_scale(0.9)
    state = spoiled = average.init()
    for k, grads in enumerate(gradients(5, 8)):
        norms, mean = norm(grads), norm(grads.mean(axis=0))
        if k == step:
            rotten = norms.at[3].set(bad) if where != "mean" else norms
            large = jnp.float32(bad) if where != "norms" else mean
            spoiled = average.update(spoiled, rotten, large)
            assert not gradient_noise_scale(rotten, large).is_valid
        state = average.update(state, norms, mean)
        spoiled = average.update(spoiled, norms, mean)
    chex.assert_trees_all_equal(spoiled, state)


def test_there_is_no_estimate_before_the_first_step():
    average = running_noise_scale()
    found = average.read(average.init())
    assert not found.is_valid
    assert np.isnan(found.noise_scale)
    assert (found.grad_square, found.noise_trace) == (0, 0)


@pytest.mark.parametrize(
    ("norms", "mean", "how"),
    [
        ([5.0, 5.0], 3.0, {}),  # |G|^2 is estimated at -7
        ([2.0, 2.0], np.sqrt(2.0), {}),  # at 0
        ([1.0, 1.0], 1.5, {"batch_size": 8}),  # tr Sigma below 0
        ([0.0, 0.0], 0.0, {}),
        ([3.0, 4.0], np.nan, {}),
        ([3.0, np.inf], 2.0, {}),
        ([3.0, 4.0], 2.0, {"mask": np.array([False, False])}),
        ([3.0, 4.0], 3.0, {"mask": np.array([True, False])}),  # one batch size
    ],
)
def test_an_estimate_that_says_nothing_is_not_valid(norms, mean, how):
    norms, mean = jnp.asarray(norms, jnp.float32), jnp.float32(mean)
    found = gradient_noise_scale(norms, mean, **how)
    assert not found.is_valid
    assert np.isnan(found.noise_scale)


def test_gradients_without_noise_have_a_noise_scale_of_0():
    found = gradient_noise_scale(jnp.full(8, 3.0), 3.0)
    assert found.is_valid
    np.testing.assert_allclose(found, (9, 0, 0, True))


def test_a_noise_that_was_too_large_becomes_valid_when_there_is_more_data():
    average = running_noise_scale()
    state = average.update(average.init(), jnp.asarray([5.0, 5.0]), 3.0)
    assert not average.read(state).is_valid
    state = average.update(state, jnp.asarray([5.0, 5.0]), 4.9)
    assert average.read(state).is_valid


@pytest.mark.parametrize("parts", [(), (3,)])
def test_the_state_rides_in_scan_and_in_donation_and_compiles_once(parts):
    average = running_noise_scale()
    norms, mean = jnp.ones((8, *parts)), jnp.full(parts, 0.5)
    traces = []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        traces.append(None)
        return average.update(state, norms, mean)

    like = average.init(mean)
    chex.assert_shape(list(like), parts)
    jax.lax.scan(lambda state, _: (step(state), None), like, length=3)
    state = average.init(mean)
    for _ in range(3):
        state = step(state)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, average.init(mean))
    assert len(traces) == 1


def test_norms_in_low_precision_are_squared_in_float32():
    norms = jnp.full(64, 300, jnp.float16)
    found = gradient_noise_scale(norms, jnp.float16(100))
    chex.assert_type(found[:3], jnp.float32)
    np.testing.assert_allclose(found.noise_trace, 80_000 * 64 / 63, 1e-5)


def test_many_runs_at_once_are_each_their_own():
    grads = gradients(5, 16)
    norms, means = norm(grads), norm(grads.mean(axis=1))
    found = jax.vmap(gradient_noise_scale)(norms, means)
    for k in range(5):
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, k=k: x[k], found), of_batch(grads[k]), rtol=1e-5
        )


@pytest.mark.parametrize(
    ("arguments", "how", "words"),
    [
        (([3.0], 2.0), {}, r"one norm.*total_batch_size="),
        ((3.0, 2.0), {}, r"one norm.*total_batch_size="),
        ((3.0, 2.0), {"batch_size": 8, "total_batch_size": 8}, r"differ, got 8 twice"),
        (([3.0, 4.0], [2.0, 2.0]), {}, r"\[parts\], got \(2,\) and \(2,\)"),
        ((np.ones((4, 3)), np.ones(2)), {}, r"\[parts\], got \(4, 3\) and \(2,\)"),
        ((np.ones((4, 3, 2)), np.ones((3, 2))), {}, r"got \(4, 3, 2\)"),
        (([3.0, 4.0], 2.0), {"mask": np.ones(1)}, r"mask=.*\(2,\), got \(1,\)"),
    ],
)
def test_what_does_not_fit_or_cannot_be_told_apart_is_refused(arguments, how, words):
    arguments = [jnp.asarray(x, jnp.float32) for x in arguments]
    with pytest.raises(ValueError, match=words):
        gradient_noise_scale(*arguments, **how)
    with pytest.raises(ValueError, match=words):
        running_noise_scale().update(running_noise_scale().init(), *arguments, **how)


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, np.nan])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=r"running_noise_scale\(decay=.*below 1"):
        running_noise_scale(decay)


def test_norms_that_are_whole_numbers_are_norms():
    found = gradient_noise_scale(jnp.arange(3, 7), 4)
    expected = gradient_noise_scale(jnp.arange(3.0, 7.0), 4.0)
    chex.assert_trees_all_equal(found, expected)
