"""Every granularity, threshold, shrink and norm obeys the same few laws."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gradnorm_jax as gn

from .references import clips, parts

pytestmark = pytest.mark.usefixtures("strict")

SHAPES = {"b": (3,), "k": (2, 3), "s": (2, 2, 2), "t": ()}
PARTS = {
    "whole_tree": (gn.whole_tree(), parts.whole_tree(SHAPES)),
    "per_leaf": (gn.per_leaf(), parts.per_leaf(SHAPES)),
    "stacked": (gn.per_leaf(stacked_axes={"s": 0}), parts.per_leaf(SHAPES, "s")),
    "per_group": (
        gn.per_group({"b|t": "x", "k": "y"}),
        parts.per_group(SHAPES, {"b": "x", "t": "x", "k": "y"}),
    ),
    "per_unit": (gn.per_unit(), parts.per_unit(SHAPES)),
}
SHRINKS = {
    "rescale": (gn.shrink.rescale, clips.rescale),
    "normalize": (gn.shrink.normalize, clips.normalize),
}
THRESHOLDS = {
    "constant": gn.thresholds.constant(1.0),
    "schedule": gn.thresholds.schedule(lambda step: 0.5 + step.astype(jnp.float32)),
    "relative_to_params": gn.thresholds.relative_to_params(0.5, floor=0.25),
}
NORMS = {str(n.ord): n for n in (gn.norms.l2, gn.norms.l1, gn.norms.linf, gn.norms.rms)}
NORMS["3"] = gn.norms.lp(3)

granularities = pytest.mark.parametrize("part", PARTS)
shrinks = pytest.mark.parametrize("shrink", SHRINKS)
thresholds = pytest.mark.parametrize("threshold", THRESHOLDS)
all_norms = pytest.mark.parametrize(
    ("part", "norm"),
    [(part, "2") for part in PARTS]
    + [(p, n) for p in ("whole_tree", "per_unit") for n in NORMS if n != "2"],
)


def leaves(**floats):
    real = st.floats(width=32, allow_nan=False, allow_infinity=False, **floats)
    return st.fixed_dictionaries(
        {k: hnp.arrays(np.float32, shape, elements=real) for k, shape in SHAPES.items()}
    )


ordinary = leaves(min_value=-4, max_value=4, allow_subnormal=False)
any_size = leaves(min_value=-(2.0**120), max_value=2.0**120, allow_subnormal=False)
PARAMS = {
    k: jnp.linspace(-2, 2, math.prod(s), dtype=np.float32).reshape(s)
    for k, s in SHAPES.items()
}


@functools.cache  # compile once, not once for each example
def clip_of(part, threshold="constant", shrink="rescale", norm="2"):
    clip = gn.clip_by_norm(
        THRESHOLDS[threshold],
        granularity=PARTS[part][0],
        shrink=SHRINKS[shrink][0],
        norm=NORMS[norm],
    )
    update = jax.jit(clip.update)
    start = clip.init(PARAMS)
    return lambda grads: update(grads, start, PARAMS)


@functools.cache
def clip_at(part, **settings):
    def run(limit, grads):
        clip = gn.clip_by_norm(limit, granularity=PARTS[part][0], **settings)
        return clip.update(grads, clip.init(grads))

    return jax.jit(run)


@functools.cache
def measure_of(part, norm):
    return jax.jit(lambda grads: PARTS[part][0].measure(grads, NORMS[norm]))


def oracle_limits(part, threshold, order=2, step=0):
    if threshold != "relative_to_params":
        return [1.0 if threshold == "constant" else 0.5 + step] * len(PARTS[part][1])
    _, sizes, _ = clips.clip(
        PARAMS, PARTS[part][1], [math.inf] * len(PARTS[part][1]), order=order
    )
    return [0.5 * max(size, 0.25) for size in sizes]


@granularities
@thresholds
@shrinks
@given(grads=ordinary)
def test_a_clip_is_its_formula(part, threshold, shrink, grads):
    clipped, (_, _, metrics) = clip_of(part, threshold, shrink)(grads)
    limits = oracle_limits(part, threshold)
    expected, norms, scales = clips.clip(
        grads, PARTS[part][1], limits, shrink=SHRINKS[shrink][1]
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, grads)
    for name in grads:
        np.testing.assert_allclose(clipped[name], expected[name], rtol=3e-6, atol=1e-37)
    np.testing.assert_allclose(np.ravel(metrics.norms), norms, rtol=1e-6)
    np.testing.assert_allclose(np.ravel(metrics.limits), limits, rtol=1e-6)
    np.testing.assert_allclose(np.ravel(metrics.scales), scales, rtol=3e-6)


@all_norms
@settings(max_examples=20)
@given(grads=any_size)
def test_no_norm_exceeds_its_limit(part, norm, grads):
    clipped, (_, _, metrics) = clip_of(part, norm=norm)(grads)
    norms = measure_of(part, norm)(clipped)
    assert np.all(norms <= 1 + 2e-6)
    large = np.asarray(metrics.norms) > 1
    np.testing.assert_allclose(np.asarray(norms)[large], 1, rtol=2e-6)


@all_norms
@settings(max_examples=20)
@given(grads=any_size)
def test_a_clip_changes_what_it_clipped_only_to_rounding_the_second_time(
    part, norm, grads
):
    once, _ = clip_of(part, norm=norm)(grads)
    again, _ = clip_of(part, norm=norm)(once)
    chex.assert_trees_all_close(once, again, rtol=2e-6, atol=1e-37)


@granularities
@given(grads=any_size)
def test_directions_are_kept_part_by_part(part, grads):
    clipped, (_, _, metrics) = clip_of(part)(grads)
    for k, members in enumerate(PARTS[part][1]):
        scale = min(
            1.0, 1.0 / max(np.ravel(metrics.norms)[k].astype(np.float64), 1e-300)
        )
        for name, index in members:
            np.testing.assert_allclose(
                np.asarray(clipped[name])[index],
                np.asarray(grads[name], np.float64)[index] * scale,
                rtol=1e-5,
                atol=1e-37,
            )


@all_norms
@settings(max_examples=20)
@given(grads=leaves(min_value=-0.03125, max_value=0.03125))
def test_what_is_below_its_limit_comes_out_bit_for_bit(part, norm, grads):
    grads["b"][0], grads["k"][0, 0], grads["s"][1, 1, 1] = -0.0, 1e-40, -2e-44
    clipped, (_, _, metrics) = clip_of(part, norm=norm)(grads)
    assert np.all(np.asarray(metrics.scales) == 1)
    assert metrics.num_clipped == 0
    for name in grads:
        assert np.asarray(clipped[name]).tobytes() == grads[name].tobytes()


@pytest.mark.parametrize("limit", [5.0, math.nextafter(5.0, 6.0)])
def test_a_norm_at_its_limit_is_below_it(limit):
    clip = gn.clip_by_norm(limit)
    grads = jnp.array([3.0, 4.0])
    clipped, state = clip.update(grads, clip.init(grads))
    np.testing.assert_array_equal(clipped, grads)
    assert state.metrics.num_clipped == 0
    assert state.metrics.consecutive_clipped == 0


@all_norms
@settings(max_examples=20)
@given(grads=ordinary, seed=st.integers(0, 9))
def test_a_scale_goes_back_to_the_entries_its_norm_came_from(part, norm, grads, seed):
    shape = () if part == "whole_tree" else (len(PARTS[part][1]),)
    scales = jnp.asarray(np.random.default_rng(seed).uniform(0, 2, shape), np.float32)
    spread = PARTS[part][0].broadcast(scales, grads)
    scaled = {k: np.asarray(spread[k]) * x for k, x in grads.items()}
    measure = measure_of(part, norm)
    np.testing.assert_allclose(
        measure(scaled), scales * measure(grads), rtol=3e-6, atol=1e-37
    )


@granularities
@pytest.mark.parametrize(
    ("entry", "limit"),
    [
        (5e37, 1.0),
        (3e19, 1.0),
        (1e-30, 1e-33),
        (1e37, 1e-20),
        (1e-20, 1e-36),
        (9e37, 5e37),
    ],
)
def test_the_largest_and_the_smallest_norms_are_clipped_to_their_limit(
    part, entry, limit
):
    grads = {k: np.full(s, entry, np.float32) for k, s in SHAPES.items()}
    grads["k"] = grads["k"] * np.float32(0.5)
    members = PARTS[part][1]
    clipped, _ = clip_at(part)(jnp.float32(limit), grads)
    expected, _, _ = clips.clip(grads, members, [limit] * len(members))
    for name in SHAPES:
        np.testing.assert_allclose(clipped[name], expected[name], rtol=2e-6, atol=2e-38)
        assert np.all(np.asarray(clipped[name]) != 0)


@pytest.mark.parametrize(
    ("entry", "limit"), [(1e33, 1e-10), (4e33, 1e9), (1e-33, 1e9), (1e-32, 1e-4)]
)
def test_one_factor_need_not_reach_from_a_norm_to_its_limit(entry, limit):
    run = clip_at("whole_tree", shrink=gn.shrink.normalize)
    grads = {k: np.full(s, entry, np.float32) for k, s in SHAPES.items()}
    clipped, _ = run(jnp.float32(limit), grads)
    expected = np.float64(limit) / np.sqrt(18)
    for x in clipped.values():
        np.testing.assert_allclose(x, np.full(x.shape, expected), rtol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_factor_need_not_fit_into_the_dtype_of_the_gradients(dtype):
    grads = jnp.full(4, 6e4, dtype)
    clip = gn.clip_by_norm(0.004)
    clipped, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_array_equal(clipped, jnp.full(4, 0.002, dtype))


@granularities
@shrinks
def test_a_float16_tree_is_multiplied_in_float32(part, shrink):
    rng = np.random.default_rng(0)
    for dtype, digits in ((jnp.float16, 2e-3), (jnp.bfloat16, 1e-2)):
        grads = {
            k: jnp.asarray(9e3 * rng.normal(size=s), dtype) for k, s in SHAPES.items()
        }
        members = PARTS[part][1]
        run = clip_at(part, shrink=SHRINKS[shrink][0])
        clipped, state = run(jnp.float32(2.0), grads)
        expected, norms, _ = clips.clip(
            grads, members, [2.0] * len(members), shrink=SHRINKS[shrink][1]
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(clipped, grads)
        assert state.metrics.norms.dtype == jnp.float32
        np.testing.assert_allclose(np.ravel(state.metrics.norms), norms, rtol=1e-6)
        for name in grads:
            close = functools.partial(
                np.testing.assert_allclose, rtol=digits, atol=1e-6
            )
            close(np.asarray(clipped[name], np.float64), expected[name])


@granularities
def test_a_mapped_clip_is_a_loop(part):
    clip = gn.clip_by_norm(1.0, granularity=PARTS[part][0], nonfinite="drop")
    rng = np.random.default_rng(0)
    grads = {k: rng.normal(size=(4, *s)).astype(np.float32) for k, s in SHAPES.items()}
    grads["k"][1], grads["k"][2, 0, 0] = 0, np.nan
    grads["b"][3] *= 1e30
    one = lambda g: clip.update(g, clip.init(g))  # noqa: E731
    together = jax.jit(jax.vmap(one))(grads)
    single = jax.jit(one)
    alone = [single({k: x[i] for k, x in grads.items()}) for i in range(4)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *alone)
    chex.assert_trees_all_close(together, stacked, rtol=1e-6)


@granularities
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_eps_is_added_to_the_norm_as_in_torch(part, eps):
    rng = np.random.default_rng(0)
    granularity, members = PARTS[part]
    grads = {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
    clip = gn.clip_by_norm(1.0, granularity=granularity, eps=eps)
    clipped, _ = clip.update(grads, clip.init(grads))
    expected, norms, scales = clips.clip(grads, members, [1.0] * len(members), eps=eps)
    if eps == 1e-6:
        torch = [clips.torch_coefficient(size, 1.0) for size in norms]
        np.testing.assert_allclose(scales, torch, rtol=1e-6)
    for name in grads:
        np.testing.assert_allclose(clipped[name], expected[name], rtol=2e-6)


def test_eps_shrinks_a_norm_that_is_at_its_limit():
    clip = gn.clip_by_norm(1.0, eps=0.25)
    clipped, _ = clip.update(jnp.array([1.0]), clip.init(jnp.array([1.0])))
    np.testing.assert_allclose(clipped, [0.8], rtol=1e-6)


@granularities
def test_norms_computed_elsewhere_are_clipped_by_and_not_measured(part):
    granularity, members = PARTS[part]
    clip = gn.clip_by_norm(3.0, granularity=granularity)
    grads = {k: jnp.ones(s) for k, s in SHAPES.items()}
    state = clip.init(grads)
    norms = jnp.arange(1.0, 1 + len(members)).reshape(state.metrics.norms.shape) * 2
    clipped, after = clip.update(grads, state, norms=norms)
    np.testing.assert_array_equal(after.metrics.norms, norms)
    assert after.metrics.first_nonfinite_leaf == -1
    for k, own in enumerate(members):
        scale = min(1, 3 / np.ravel(norms)[k])
        for name, index in own:
            np.testing.assert_allclose(
                np.asarray(clipped[name])[index], scale, rtol=1e-6
            )


@pytest.mark.parametrize("part", ["whole_tree", "per_group", "per_unit"])
def test_a_clip_can_be_differentiated_also_at_zero(part):
    clip = gn.clip_by_norm(1.0, granularity=PARTS[part][0])

    def loss(grads):
        clipped, _ = clip.update(grads, clip.init(grads))
        return sum(jnp.vdot(clipped[k], PARAMS[k]) for k in SHAPES)

    zeros = {k: jnp.zeros(s) for k, s in SHAPES.items()}
    chex.assert_trees_all_close(jax.jit(jax.grad(loss))(zeros), PARAMS)
    rng = np.random.default_rng(0)
    grads = {k: rng.normal(size=s) for k, s in SHAPES.items()}
    slope = jax.jit(jax.grad(loss))(jax.tree.map(np.float32, grads))
    ones = [1.0] * len(PARTS[part][1])

    def exact(grads):
        clipped, _, _ = clips.clip(grads, PARTS[part][1], ones)
        return sum(
            np.vdot(clipped[k], np.asarray(PARAMS[k], np.float64)) for k in SHAPES
        )

    for name, index in itertools.product(SHAPES, [0, -1]):
        values = []
        for shift in (1e-5, -1e-5):
            moved = {k: np.array(x, np.float64) for k, x in grads.items()}
            moved[name].reshape(-1)[index] += shift
            values.append(exact(moved))
        expected = (values[0] - values[1]) / 2e-5
        own = np.ravel(slope[name])[index]
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)
