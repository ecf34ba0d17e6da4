"""Rules with memory do the same inside the wrappers of Optax."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradnorm_jax as gn

RNG = np.random.default_rng(0)
SIZES = RNG.lognormal(sigma=0.3, size=8).astype(np.float32)
SIZES[5] *= 30
METHODS = {
    "autoclip": functools.partial(gn.autoclip, 50.0, window=4),
    "zclip": functools.partial(gn.zclip, 1.5, warmup_steps=3),
    "adagc": functools.partial(gn.adagc, warmup_steps=3, warmup_limit=np.inf),
    "clip_by_rolling_sigma": functools.partial(gn.clip_by_rolling_sigma, 1.0, window=4),
    "adaclip": functools.partial(gn.adaclip, decay=0.9),
}
methods = pytest.mark.parametrize("name", METHODS)
some = pytest.mark.parametrize("name", ["autoclip", "zclip", "adagc"])


def tree(size, extra=1.0):
    a, b = np.float32([[3, 4], [0, 12]]), np.float32([5, 1])
    return {"a": size * a, "b": size * extra * b}


GRADS = [tree(size) for size in SIZES]


def run(tx, stream, params=None):
    params = stream[0] if params is None else params
    state, update, history = tx.init(params), jax.jit(tx.update), []
    for grads in stream:
        updates, state = update(grads, state, params)
        history.append(updates)
    return history, state


def memory_of(state):
    [found] = gn.find(state, gn.ClipState)
    return found.memory


@some
def test_multi_steps_shows_the_rule_one_norm_for_every_real_step(name):
    tx = optax.MultiSteps(METHODS[name](), 2).gradient_transformation()
    doubled = [g for grads in GRADS for g in (grads, grads)]
    history, state = run(tx, doubled)
    expected, own = run(METHODS[name](), GRADS)
    chex.assert_trees_all_close(history[1::2], expected, rtol=1e-5)
    chex.assert_trees_all_close(memory_of(state), own.memory, rtol=1e-5)


@some
def test_a_masked_rule_never_hears_of_what_is_masked(name):
    tx = optax.masked(METHODS[name](), {"a": True, "b": False})
    noisy = [tree(x, extra=100.0 * k) for k, x in enumerate(SIZES)]
    history, state = run(tx, noisy)
    expected, own = run(METHODS[name](), [{"a": g["a"]} for g in noisy])
    for updates, wanted, grads in zip(history, expected, noisy, strict=True):
        chex.assert_trees_all_close(updates["a"], wanted["a"], rtol=1e-6)
        np.testing.assert_array_equal(updates["b"], grads["b"])
    chex.assert_trees_all_close(memory_of(state), own.memory, rtol=1e-6)


@some
def test_partitions_have_a_memory_each(name):
    make = METHODS[name]
    tx = optax.partition({"x": make(), "y": make()}, {"a": "x", "b": "y"})
    history, state = run(tx, GRADS)
    apart = [run(make(), [{k: g[k]} for g in GRADS]) for k in "ab"]
    for k, updates in enumerate(history):
        chex.assert_trees_all_close(updates, apart[0][0][k] | apart[1][0][k], rtol=1e-6)
    for found, (_, own) in zip(gn.find(state, gn.ClipState), apart, strict=True):
        chex.assert_trees_all_close(found.memory, own.memory, rtol=1e-6)


@some
@pytest.mark.parametrize("policy", ["propagate", "zero"])
def test_apply_if_finite_and_the_policies_leave_the_memory_alone(name, policy):
    spoilt = [*GRADS[:4], GRADS[4] | {"b": np.float32([np.nan, 1])}, *GRADS[4:]]
    tx = optax.apply_if_finite(METHODS[name](nonfinite=policy), 3)
    history, state = run(tx, spoilt)
    expected, own = run(METHODS[name](), GRADS)
    chex.assert_trees_all_equal(history[:4] + history[5:], expected)
    chex.assert_trees_all_equal(memory_of(state), own.memory)
    assert not any(np.any(x) for x in jax.tree.leaves(history[4]))


@pytest.mark.parametrize(
    ("make", "argument", "static"),
    [
        (gn.autoclip, "q", ("window",)),
        (gn.zclip, "z", ()),
        (gn.adagc, "factor", ()),
        (gn.clip_by_quantile, "q", ()),
        (gn.clip_by_rolling_sigma, "k", ("window",)),
        (gn.clip_by_second_moment, "factor", ()),
        (gn.smooth_clip, "max_norm", ()),
        (gn.normalize_by_norm, "norm", ()),
    ],
)
def test_numbers_may_be_injected_or_be_schedules(make, argument, static):
    value = lambda step: 0.25 + 0.125 * step  # noqa: E731
    injected = optax.inject_hyperparams(make, static_args=static)(**{argument: value})
    history, state = run(injected, GRADS)
    expected, own = run(make(**{argument: value}), GRADS)
    chex.assert_trees_all_close(history, expected, rtol=1e-4)
    chex.assert_trees_all_close(memory_of(state), own.memory, rtol=1e-4)


def test_a_window_that_is_injected_is_refused_with_the_way_out():
    tx = optax.inject_hyperparams(gn.autoclip)()
    with pytest.raises(
        TypeError, match=r"window=...\)` must be .*static_args='window'"
    ):
        tx.init(GRADS[0])


@methods
@pytest.mark.parametrize("scale", [2.0**12, 2.0**-12])
def test_scaled_losses_are_clipped_as_unscaled_ones(name, scale):
    history, state = run(METHODS[name](), GRADS)
    scaled, after = run(METHODS[name](), jax.tree.map(lambda x: scale * x, GRADS))
    chex.assert_trees_all_close(
        scaled, jax.tree.map(lambda x: scale * x, history), rtol=1e-6
    )
    np.testing.assert_allclose(
        after.metrics.limits, scale * state.metrics.limits, rtol=1e-6
    )


@methods
def test_an_overflow_of_a_scaled_loss_is_no_norm(name):
    """As with dynamic loss scaling: unscale, clip, and skip what has overflowed."""

    def unscaled(scale):
        return optax.chain(optax.scale(1 / scale), METHODS[name](nonfinite="zero"))

    scale = 2.0**4
    half = [jax.tree.map(lambda x: np.float16(scale * x), g) for g in GRADS]
    burst = half[0] | {"b": np.float16([np.inf, -1])}
    history, state = run(unscaled(scale), [*half[:4], burst, *half[4:]])
    _, never = run(unscaled(scale), half)
    chex.assert_trees_all_equal(memory_of(state), memory_of(never))
    assert not any(np.any(x) for x in jax.tree.leaves(history[4]))


def test_a_reset_may_be_injected():
    make = functools.partial(gn.reset_state_every, METHODS["zclip"]())
    injected = optax.inject_hyperparams(make)(every=3, warmup_steps=2)
    history, _ = run(injected, GRADS)
    expected, _ = run(make(every=3, warmup_steps=2), GRADS)
    chex.assert_trees_all_close(history, expected, rtol=1e-6)


@pytest.mark.parametrize("wrapper", [gn.watch, gn.skip_step])
def test_what_is_measured_once_is_no_argument_of_other_transformations(wrapper):
    def loss(x):
        return jnp.sum(x**2)

    x = jnp.ones(3)
    value, grad = jax.value_and_grad(loss)(x)
    tx = wrapper(optax.chain(gn.clip_by_global_norm(1.0), optax.lbfgs()))
    state = tx.init(x)
    updates, _ = tx.update(grad, state, x, value=value, grad=grad, value_fn=loss)
    assert jnp.all(updates < 0)
