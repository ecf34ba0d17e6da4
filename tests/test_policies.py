"""What is not finite is never hidden, and the record says what a clip did."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradnorm_jax as gn

pytestmark = pytest.mark.usefixtures("strict")

GRADS = {"a": np.float32([3, 4]), "b": np.float32([[0.3], [0.4]]), "c": np.float32([6])}
policies = pytest.mark.parametrize("policy", ["propagate", "zero", "drop"])


def spoilt(name, value=np.nan):
    grads = {k: x.copy() for k, x in GRADS.items()}
    grads[name].reshape(-1)[-1] = value
    return grads


def observed_sum():
    """A rule with memory: the sums of the norms it saw, before and after the clip."""
    return gn.Threshold(
        init=lambda norms: (norms, norms, jnp.zeros((), jnp.int32)),
        decide=lambda memory, norms, context: gn.thresholds.Bound(jnp.ones_like(norms)),
        observe=lambda memory, norms, clipped, context: (
            memory[0] + norms,
            memory[1] + clipped,
            memory[2] + 1,
        ),
    )


@functools.cache
def clip_of(policy, part):
    granularity = {"whole": gn.whole_tree(), "leaf": gn.per_leaf()}[part]
    clip = gn.clip_by_norm(observed_sum(), granularity=granularity, nonfinite=policy)
    return clip.init(GRADS), jax.jit(clip.update)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@policies
def test_a_bad_leaf_becomes_what_the_policy_says_and_no_other_does(policy, bad):
    state, update = clip_of(policy, "leaf")
    clipped, after = update(spoilt("b", bad), state)
    b = {"propagate": [[np.nan]] * 2, "zero": [[0]] * 2, "drop": [[0]] * 2}[policy]
    others = (
        {"a": [0, 0], "c": [0]} if policy == "zero" else {"a": [0.6, 0.8], "c": [1]}
    )
    for name, expected in (others | {"b": b}).items():
        np.testing.assert_allclose(clipped[name], expected, rtol=1e-6)
    scales = {
        "propagate": [0.2, np.nan, 1 / 6],
        "zero": [0, 0, 0],
        "drop": [0.2, 0, 1 / 6],
    }
    np.testing.assert_allclose(after.metrics.scales, scales[policy], rtol=1e-6)
    np.testing.assert_array_equal(np.isfinite(after.metrics.norms), [1, 0, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@policies
def test_one_bad_entry_spoils_the_whole_tree(policy, bad):
    state, update = clip_of(policy, "whole")
    clipped, after = update(spoilt("c", bad), state)
    expected = np.nan if policy == "propagate" else 0
    for x in jax.tree.leaves((clipped, after.metrics.scales)):
        np.testing.assert_array_equal(x, np.full(x.shape, expected))
    assert after.metrics.num_clipped == 0


@policies
@pytest.mark.parametrize("part", ["whole", "leaf"])
def test_the_memory_of_a_rule_never_takes_in_what_is_not_finite(policy, part):
    state, update = clip_of(policy, part)
    _, once = update(GRADS, state)
    _, spoiled = update(spoilt("a"), once)
    _, infinite = update(spoilt("b", np.inf), spoiled)
    _, twice = update(GRADS, infinite)
    assert [int(s.memory[2]) for s in (once, infinite, twice)] == [1, 1, 2]
    norms = np.array([5, 0.5, 6]) if part == "leaf" else np.sqrt(61.25)
    # "drop" goes on with the parts that are finite, and so does their memory.
    times = np.array([3, 3, 4]) if (part, policy) == ("leaf", "drop") else 2
    if np.ndim(times) == 0:
        chex.assert_trees_all_equal(once.memory, spoiled.memory, infinite.memory)
    np.testing.assert_allclose(twice.memory[0], times * norms, rtol=1e-6)
    np.testing.assert_allclose(twice.memory[1], times * np.minimum(norms, 1), rtol=1e-6)
    assert int(twice.step) == 4


@policies
def test_bad_steps_are_counted_and_the_first_bad_leaf_is_named(policy):
    state, update = clip_of(policy, "leaf")
    seen = []
    two = spoilt("b") | {"c": np.float32([np.inf])}
    for grads in (GRADS, spoilt("c"), GRADS, two, spoilt("a", np.inf)):
        _, state = update(grads, state)
        first = int(state.metrics.first_nonfinite_leaf)
        name = None if first < 0 else gn.leaf_names(GRADS)[first]
        seen.append((name, int(state.metrics.nonfinite_count)))
    assert seen == [(None, 0), ("c", 1), (None, 1), ("b", 2), ("a", 3)]


@pytest.mark.parametrize(
    ("granularity", "tree", "expected"),
    [
        (gn.whole_tree(), {"u": [1.0], "v": [[1.0, np.nan]], "w": [np.nan]}, "v"),
        (gn.per_unit(), {"u": [[1.0, 1.0]] * 2, "v": [[1.0, np.nan]] * 2}, "v"),
        (
            gn.per_leaf(stacked_axes={"u": 0}),
            {"u": [[1.0], [2.0], [3.0]], "v": [np.inf]},
            "v",
        ),
        (
            gn.per_group({"v": "x", "w": "y"}),
            {"u": [np.nan], "v": [1.0], "w": [np.nan]},
            "w",
        ),
    ],
)
def test_the_first_bad_leaf_is_named_whatever_has_one_norm(granularity, tree, expected):
    clip = gn.clip_by_norm(1.0, granularity=granularity)
    grads = {k: jnp.asarray(x, np.float32) for k, x in tree.items()}
    _, state = clip.update(grads, clip.init(grads))
    first = int(state.metrics.first_nonfinite_leaf)
    assert gn.leaf_names(grads)[first] == expected


# Each row of the table in the docstring of `clip_by_norm`.
@pytest.mark.parametrize(
    ("grad", "limit", "policy", "clipped", "scale"),
    [
        ([0.0, -0.0], 1.0, "propagate", [0.0, -0.0], 1),
        ([0.0, -0.0], 0.0, "propagate", [0.0, -0.0], 1),
        ([3e38, 3e38], math.inf, "propagate", [3e38, 3e38], 1),
        ([1.0, np.inf], math.inf, "propagate", [1.0, np.inf], 1),
        ([1.0, np.inf], math.inf, "drop", [0.0, 0.0], 0),
        ([3.0, 4.0], 0.0, "propagate", [0.0, 0.0], 0),
        ([3e38, 1e38], 0.0, "propagate", [0.0, 0.0], 0),
        ([1.0, np.nan], 1.0, "propagate", [np.nan, np.nan], np.nan),
        ([1.0, np.inf], 1.0, "propagate", [np.nan, np.nan], np.nan),
        ([1.0, np.nan], 1.0, "zero", [0.0, 0.0], 0),
        ([1.0, np.nan], 1.0, "drop", [0.0, 0.0], 0),
        ([1.0, np.inf], 0.0, "propagate", [np.nan, np.nan], np.nan),
    ],
)
@pytest.mark.parametrize("shrink", [gn.shrink.rescale, gn.shrink.normalize])
def test_the_edge_cases_are_as_documented(grad, limit, policy, clipped, scale, shrink):
    clip = gn.clip_by_norm(limit, nonfinite=policy, shrink=shrink)
    grad = np.float32(grad)
    out, state = clip.update(grad, clip.init(grad))
    np.testing.assert_array_equal(out, np.float32(clipped))
    np.testing.assert_array_equal(np.signbit(out), np.signbit(np.float32(clipped)))
    np.testing.assert_array_equal(state.metrics.scales, scale)


def test_zero_stops_the_leaves_without_a_norm_too():
    granularity = gn.per_group({"a": "x", "b": "y"})
    for policy, c in (("zero", 0), ("drop", 6), ("propagate", 6)):
        clip = gn.clip_by_norm(1.0, granularity=granularity, nonfinite=policy)
        clipped, _ = clip.update(spoilt("b"), clip.init(GRADS))
        np.testing.assert_array_equal(clipped["c"], [c])


def test_a_nan_in_a_part_without_a_limit_zeroes_the_step_too():
    rule = gn.thresholds.each([gn.thresholds.constant(c) for c in (1.0, math.inf, 1.0)])
    clip = gn.clip_by_norm(rule, granularity=gn.per_leaf(), nonfinite="zero")
    clipped, state = clip.update(spoilt("b"), clip.init(GRADS))
    for x in jax.tree.leaves(clipped):
        np.testing.assert_array_equal(x, np.zeros_like(x))
    assert state.metrics.nonfinite_count == 1


@pytest.mark.parametrize("limit", [-1.0, -np.inf])
def test_a_traced_negative_limit_counts_as_zero_and_flips_no_sign(limit):
    def run(limit, grads):
        clip = gn.clip_by_norm(limit)
        return clip.update(grads, clip.init(grads))

    clipped, state = jax.jit(run)(jnp.float32(limit), GRADS)
    chex.assert_trees_all_equal(clipped, jax.tree.map(np.zeros_like, GRADS))
    assert state.metrics.limits == 0


def test_the_record_of_a_stream_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(size=(40, 3)) * 1.2
    sizes[13] = 0.1
    sizes[17, 1] = np.nan
    sizes[25, 2] = np.inf
    clip = gn.clip_by_norm(1.0, granularity=gn.per_leaf(), nonfinite="drop")
    grads = {k: jnp.asarray(sizes[:, [i]], np.float32) for i, k in enumerate("abc")}

    def step(state, grad):
        _, state = clip.update(grad, state)
        return state, state.metrics

    _, stream = jax.jit(lambda state: jax.lax.scan(step, state, grads))(
        clip.init({k: x[0] for k, x in grads.items()})
    )
    rates, streak, bad_steps = [], np.zeros(3, int), 0
    for k, row in enumerate(sizes):
        clipped = np.isfinite(row) & (row > 1)
        streak = np.where(clipped, streak + 1, 0)
        bad_steps += not np.isfinite(row).all()
        rates.append(np.mean(clipped))
        assert stream.num_clipped[k] == clipped.sum()
        np.testing.assert_array_equal(stream.consecutive_clipped[k], streak)
        np.testing.assert_allclose(stream.clip_rate[k], np.mean(rates), rtol=1e-5)
        assert stream.nonfinite_count[k] == bad_steps


def test_a_rule_for_each_part_sees_its_own_norm_and_parameters():
    rules = [
        gn.thresholds.relative_to_params(0.5),
        gn.thresholds.schedule(lambda step: 1.0 + step.astype(jnp.float32)),
        observed_sum(),
    ]
    clip = gn.clip_by_norm(gn.thresholds.each(rules), granularity=gn.per_leaf())
    params = {k: 2 * x for k, x in GRADS.items()}
    _, state = clip.update(GRADS, clip.init(params), params)
    _, state = clip.update(GRADS, state, params)
    np.testing.assert_allclose(state.metrics.limits, [5, 2, 1], rtol=1e-6)
    np.testing.assert_allclose(state.memory.parts[2][0], 12, rtol=1e-6)


@pytest.mark.parametrize("shrink", [gn.shrink.rescale, gn.shrink.normalize])
@pytest.mark.parametrize(
    ("norm", "limit"),
    [(1e10, 1e-30), (3e38, 1.0), (3e38, 1e-10), (1e-25, 1e30), (1e-30, 1.0)],
)
def test_a_norm_reaches_its_limit_from_however_far(norm, limit, shrink):
    clip = gn.clip_by_norm(limit, shrink=shrink)
    grad = np.float32([norm, 0])
    clipped, _ = jax.jit(clip.update)(grad, clip.init(grad))
    moves = shrink is gn.shrink.normalize or norm > limit
    wanted = [limit if moves else norm, 0]
    np.testing.assert_allclose(clipped, np.float32(wanted), rtol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [
        gn.thresholds.percentile(90.0),
        gn.thresholds.max_ema(),
        gn.thresholds.ema_relative(1.05, warmup_steps=9, warmup_limit=1.0),
    ],
)
@pytest.mark.parametrize("granularity", [gn.whole_tree(), gn.per_leaf()])
def test_an_infinite_norm_is_no_part_of_its_own_limit(rule, granularity):
    clip = gn.clip_by_norm(rule, granularity=granularity)
    _, state = clip.update(GRADS, clip.init(GRADS))
    clipped, state = clip.update(spoilt("a", np.inf), state)
    assert np.isnan(clipped["a"]).any()
    assert np.all(np.isfinite(state.metrics.limits))


def test_a_memory_may_hold_a_number_for_all_parts():
    rule = gn.thresholds.remembering(
        start=lambda norms: (norms, jnp.zeros((), norms.dtype)),
        bound=lambda own, seen, norms, context: gn.thresholds.Bound(own[0]),
        learn=lambda own, seen, norms, context: (norms, own[1] + jnp.sum(norms)),
        level=lambda own, seen: own[0],
        warmup_steps=1,
    )
    clip = gn.clip_by_norm(rule, granularity=gn.per_leaf())
    step = lambda state, _: (clip.update(GRADS, state)[1], None)  # noqa: E731
    state, _ = jax.lax.scan(step, clip.init(GRADS), length=2)
    np.testing.assert_allclose(state.memory.own[1], 2 * 11.5, rtol=1e-6)
