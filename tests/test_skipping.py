"""A skipped step never was; a reset starts anew; a residual is not lost."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradnorm_jax as gn
from gradnorm_jax.thresholds import percentile, rolling_sigma, z_score

PARAMS = {
    "w": np.float32([[0.0, -0.0, 1.5], [-2.0, 3e-20, 7.0]]),
    "b": np.float32([-0.0, 1.0]),
}
RNG = np.random.default_rng(0)
GRADS = [
    {k: RNG.normal(size=x.shape).astype(np.float32) for k, x in PARAMS.items()}
    for _ in range(12)
]


def adamw():
    return optax.chain(gn.zclip(warmup_steps=2), optax.adamw(0.1))


def spoilt(grads, factor):
    return grads | {"b": grads["b"] * np.float32([1, factor])}


@functools.cache
def trained(tx_of, *settings):
    tx = tx_of(*settings)

    @jax.jit
    def step(params, state, grads, value):
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, updates

    return tx, step


def run(tx_of, stream, *settings, values=None):
    tx, step = trained(tx_of, *settings)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = tx.init(params)
    history = []
    for k, grads in enumerate(stream):
        value = np.float32(1.0 if values is None else values[k])
        params, state, updates = step(params, state, grads, value)
        history.append((params, state, updates))
    return history


def bits(tree):
    return [(x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def skip_above(limit, max_consecutive=10):
    return gn.skip_step(adamw(), limit, max_consecutive=max_consecutive)


@pytest.mark.parametrize("factor", [np.nan, np.inf, -np.inf, 1e6, 1e38])
def test_a_skipped_step_leaves_parameters_and_inner_state_bit_for_bit(factor):
    stream = [*GRADS[:3], spoilt(GRADS[3], factor), *GRADS[4:6]]
    history = run(skip_above, stream, 100.0)
    before, after = history[2], history[3]
    assert bits(before[0]) == bits(after[0])
    assert bits(before[1].inner_state) == bits(after[1].inner_state)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(after[2]))
    assert bool(after[1].metrics.skipped)
    never = run(skip_above, [*GRADS[:3], *GRADS[4:6]], 100.0)
    assert bits(never[-1][0]) == bits(history[-1][0])
    assert bits(never[-1][1].inner_state) == bits(history[-1][1].inner_state)
    assert not history[-1][1].metrics.skipped


def test_a_zero_of_either_sign_survives_a_skipped_step():
    params = run(skip_above, [spoilt(GRADS[0], np.nan)], 100.0)[0][0]
    assert bits(params) == bits(PARAMS)


def test_a_step_that_is_not_skipped_has_the_updates_of_the_inner_one():
    held = run(skip_above, GRADS, np.inf)
    plain = run(adamw, GRADS)
    for (params, state, updates), expected in zip(held, plain, strict=True):
        ours = (params, state.inner_state, updates)
        chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-9)


def by_rolling_sigma():
    rule = rolling_sigma(6.0, window=8, warmup_steps=4)
    return gn.skip_step(adamw(), rule, max_consecutive=3)


def test_what_is_not_finite_leaves_the_memory_of_the_rule_as_it_was():
    factors = [1, 1, np.nan, 1, 1, np.inf, 1e4, np.nan, 1]
    stream = [spoilt(g, f) for g, f in zip(GRADS, factors, strict=False)]
    finite = [g for g, f in zip(stream, factors, strict=False) if np.isfinite(f)]
    history, never = run(by_rolling_sigma, stream), run(by_rolling_sigma, finite)
    assert [bool(s.metrics.skipped) for _, s, _ in history] == [
        *(False, False, True, False, False, True),
        *(True, True, False),
    ]
    assert bits(history[-1][1].memory) == bits(never[-1][1].memory)
    assert bits(history[-1][0]) == bits(never[-1][0])
    metrics = history[-1][1].metrics
    assert (int(metrics.nonfinite_count), int(metrics.num_skipped)) == (3, 4)
    assert int(history[-2][1].metrics.consecutive_skipped) == 3
    assert int(metrics.consecutive_skipped) == 0


def test_nothing_is_skipped_before_the_rule_has_warmed_up():
    stream = [spoilt(g, f) for g, f in zip(GRADS, [1, 1e4, 1, 1e5], strict=False)]
    history = run(by_rolling_sigma, [*stream, spoilt(GRADS[4], 1e9)])
    assert [bool(s.metrics.skipped) for _, s, _ in history] == [False] * 4 + [True]


def test_after_so_many_skipped_in_a_row_a_step_is_let_through_and_counted():
    large = [spoilt(g, 1e4) for g in GRADS[:5]]
    history = run(skip_above, [GRADS[0], *large, GRADS[1]], 100.0, 2)
    skipped = [bool(s.metrics.skipped) for _, s, _ in history]
    assert skipped == [False, True, True, False, True, True, False]
    assert [int(s.metrics.let_through) for _, s, _ in history] == [0, 0, 0, 1, 1, 1, 1]
    assert [int(s.metrics.num_skipped) for _, s, _ in history][-1] == 4
    through = run(adamw, [GRADS[0], large[2], GRADS[1]])
    assert bits(through[-1]) == bits(
        (history[-1][0], history[-1][1].inner_state, history[-1][2])
    )


@pytest.mark.parametrize("factor", [np.nan, np.inf])
def test_what_is_not_finite_is_never_let_through(factor):
    history = run(skip_above, [spoilt(g, factor) for g in GRADS[:5]], 100.0, 2)
    assert all(bool(s.metrics.skipped) for _, s, _ in history)
    assert bits(history[-1][0]) == bits(PARAMS)
    assert int(history[-1][1].metrics.consecutive_skipped) == 5
    assert int(history[-1][1].metrics.let_through) == 0


def on_the_loss():
    return gn.skip_step(
        adamw(), value_rule=rolling_sigma(3.0, window=4, warmup_steps=2)
    )


@pytest.mark.parametrize("bad", [9.0, np.nan, np.inf])
@pytest.mark.parametrize("offset", [0.0, -2.0])
def test_a_step_is_skipped_for_its_loss_too_which_may_be_negative(bad, offset):
    values = np.array([1.0, 1.1, 1.2, bad, 1.1]) + offset
    history = run(on_the_loss, GRADS[:5], values=values)
    assert [bool(s.metrics.skipped) for _, s, _ in history] == [
        *(False, False, False, True, False)
    ]
    assert bits(history[2][0]) == bits(history[3][0])


@pytest.mark.parametrize(
    "rule",
    [
        gn.thresholds.relative_to_params(1.0),
        z_score(2.0, warmup_steps=2),
        percentile(90, window=4, warmup_steps=2),
        lambda step: 3.0,
    ],
)
def test_any_rule_may_say_what_is_skipped_inside_scan(rule):
    tx = gn.skip_step(optax.sgd(0.1), rule)
    stacked = jax.tree.map(
        lambda *x: jnp.stack(x), *GRADS[:6], spoilt(GRADS[6], 1e3), GRADS[7]
    )

    def step(state, grads):
        _, state = tx.update(grads, state, PARAMS)
        return state, state.metrics

    _, metrics = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(
        tx.init(PARAMS), stacked
    )
    np.testing.assert_array_equal(metrics.skipped, metrics.norm > metrics.limit)
    assert metrics.skipped[6]


def test_the_record_of_a_skip_is_found_from_the_outside():
    tx = optax.chain(optax.identity(), skip_above(100.0))
    _, state = tx.update(spoilt(GRADS[0], np.nan), tx.init(PARAMS), PARAMS)
    record = gn.scalars(state)
    assert record["skip/total"] == record["skip/nonfinite"] == 1
    assert record["skip/skipped"] is True
    assert record["clip/scale"] == 1
    [found] = gn.find(state, gn.SkipState)
    assert optax.tree.get(state, "SkipMetrics") is found.metrics


@pytest.mark.parametrize("every", [1, 3])
def test_a_reset_starts_the_inner_state_anew(every):
    tx = gn.reset_state_every(optax.scale_by_adam(), every)
    adam = optax.scale_by_adam()
    state, own = tx.init(PARAMS), adam.init(PARAMS)
    for k, grads in enumerate(GRADS[:8]):
        if k % every == 0:
            own = adam.init(PARAMS)
        expected, own = adam.update(grads, own)
        updates, state = tx.update(grads, state, PARAMS)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)
        chex.assert_trees_all_close(state.inner_state, own, rtol=1e-6)


def test_after_a_reset_the_updates_grow_along_half_a_cosine():
    tx = gn.reset_state_every(optax.identity(), 6, warmup_steps=4)
    state, factors = tx.init(PARAMS), []
    for _ in range(12):
        updates, state = tx.update({k: x * 0 + 1 for k, x in PARAMS.items()}, state, 0)
        factors.append(float(updates["b"][0]))
    grown = [(1 - np.cos(np.pi * k / 4)) / 2 for k in (1, 2, 3)]
    np.testing.assert_allclose(factors, [1] * 6 + grown + [1] * 3, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_what_a_clip_takes_away_is_given_back(dtype):
    tx = gn.with_residual(gn.clip_by_global_norm(0.75))
    grads = [jax.tree.map(lambda x: jnp.asarray(x, dtype), g) for g in GRADS]
    state, given = tx.init(grads[0]), []
    for g in grads:
        updates, state = jax.jit(tx.update)(g, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, g)
        given.append(updates)
        assert float(gn.global_norm(updates)) <= 0.75 * (1 + 4e-3)
    for name in PARAMS:
        wide = [sum(np.asarray(t[name], np.float64) for t in x) for x in (grads, given)]
        rest = np.asarray(state.residual[name])
        assert rest.dtype == np.float32
        np.testing.assert_allclose(wide[0], wide[1] + rest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["propagate", "zero", "drop"])
@pytest.mark.parametrize("clip", [gn.clip_by_global_norm, gn.clip_by_leaf_norm])
def test_a_residual_takes_in_nothing_that_is_not_finite(policy, clip):
    tx = gn.with_residual(clip(0.75, nonfinite=policy))
    _, state = tx.update(GRADS[0], tx.init(PARAMS))
    bad = spoilt(GRADS[1], np.nan)
    updates, after = tx.update(bad, state)
    later, _ = tx.update(GRADS[2], after)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(later))
    assert np.isnan(updates["b"][1]) == (policy == "propagate")
    np.testing.assert_array_equal(after.residual["b"], state.residual["b"])
    # A leaf that got an update has paid: what went in is what came out, and the rest.
    given = np.any(np.isfinite(updates["w"]) & (updates["w"] != 0))
    assert given == (clip is gn.clip_by_leaf_norm and policy != "zero")
    paid = bad["w"] - updates["w"] if given else np.zeros_like(bad["w"])
    np.testing.assert_allclose(
        after.residual["w"], state.residual["w"] + paid, atol=1e-6
    )


def test_what_is_owed_need_not_fit_into_the_dtype_of_the_gradients():
    tx = gn.with_residual(gn.clip_by_global_norm(1.0))
    grads = jnp.array([6e4], jnp.float16)
    state = tx.init(grads)
    for k in range(1, 4):
        updates, state = tx.update(grads, state)
        np.testing.assert_allclose(updates, np.float16([1.0]), rtol=1e-3)
        np.testing.assert_allclose(state.residual, [k * 59999.0], rtol=1e-4)


def test_a_loss_below_zero_does_not_turn_a_memory_around():
    rule = rolling_sigma(1.0, window=8, warmup_steps=4, rearm_after=2)
    tx = gn.skip_step(optax.sgd(0.1), value_rule=rule)
    state, skipped = tx.init(PARAMS), []
    values = [-10.0, -10.1, -9.9, -10.0, 5.0, 5.0, 5.0, *[-10.0, -10.1] * 2]
    for value in values:
        _, state = tx.update(GRADS[0], state, PARAMS, value=value)
        skipped.append(bool(state.metrics.skipped))
    assert float(state.value_memory.run[2]) == 1
    assert all(skipped[4:7])
    assert not any(skipped[7:])


def test_a_number_may_be_the_limit_of_a_loss_below_zero():
    tx = gn.skip_step(optax.sgd(0.1), value_rule=-1.0)
    for value, skipped in ((-2.0, False), (-0.5, True)):
        _, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS, value=value)
        assert bool(state.metrics.skipped) == skipped


def test_a_watched_row_says_nothing_of_the_clip_in_a_step_that_was_skipped():
    tx = gn.watch(skip_above(100.0), record=("grad",), window=3)
    state = tx.init(PARAMS)
    for grads in (GRADS[0], spoilt(GRADS[1], 1e6), GRADS[2]):
        _, state = tx.update(grads, state, PARAMS)
    np.testing.assert_array_equal(
        np.isnan(state.ring[:, -3:]).all(axis=1), [False, True, False]
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: gn.skip_step(0.1), TypeError, r"skip_step\(inner=...\)` must be an O"),
        (
            lambda: gn.skip_step(optax.sgd(1.0), -1.0),
            ValueError,
            r"skip_step\(rule=...\)` must not be negative or NaN, got -1",
        ),
        (
            lambda: gn.skip_step(optax.sgd(1.0), max_consecutive=0),
            ValueError,
            r"max_consecutive=...\)` must be at least 1, got 0",
        ),
        (
            lambda: gn.skip_step(
                optax.sgd(1.0), value_rule=gn.thresholds.relative_to_params(1.0)
            ),
            ValueError,
            r"value_rule=...\)` cannot be relative to the parameters",
        ),
        (
            lambda: gn.skip_step(optax.sgd(1.0), norm=2),
            TypeError,
            r"skip_step\(norm=...\)` must be a Norm such as .*got 2",
        ),
        (
            lambda: gn.reset_state_every(optax.sgd(1.0), 0),
            ValueError,
            r"every=...\)` must be at least 1, got 0",
        ),
        (
            lambda: gn.reset_state_every(optax.sgd(1.0), 5, warmup_steps=6),
            ValueError,
            r"warmup_steps=...\)` must be at most `every`, got 6 and 5",
        ),
        (
            lambda: gn.with_residual(1.0),
            TypeError,
            r"with_residual\(clip=...\)` must be an Optax transformation",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_an_update_lacks_is_asked_for_by_name():
    tx = on_the_loss()
    with pytest.raises(ValueError, match=r"update\(value=...\)` must be the loss"):
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    skip = gn.skip_step(optax.sgd(1.0), gn.thresholds.relative_to_params(1.0))
    with pytest.raises(ValueError, match=r"skip_step.*params=...\)` must be given"):
        skip.update(GRADS[0], skip.init(PARAMS))
    with pytest.raises(ValueError, match=r"value=...\)` must be one number, the loss"):
        on_the_loss().update(GRADS[0], tx.init(PARAMS), PARAMS, value=np.ones(2))
    for wrapped in (on_the_loss(), gn.with_residual(gn.clip(1.0))):
        with pytest.raises(
            TypeError, match=r"must be the `\w+State` that .*EmptyState"
        ):
            wrapped.update(GRADS[0], optax.EmptyState(), PARAMS)
    tx = gn.reset_state_every(optax.scale_by_adam(), 2)
    with pytest.raises(ValueError, match=r"reset_state_every.*params=...\)` must be"):
        tx.update(GRADS[0], tx.init(PARAMS))
