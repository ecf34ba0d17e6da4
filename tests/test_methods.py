"""Calls that Optax has give its values, and are right where it is wrong."""

import inspect
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradnorm_jax as gn

from .references import clips, parts
from .references.norms import norm

SHAPES = {"b": (4,), "conv": (2, 2, 1, 3), "k3": (2, 3, 2)}
CALLS = {
    "clip": {"max_delta": 0.5},
    "clip_by_block_rms": {"threshold": 0.5},
    "clip_by_global_norm": {"max_norm": 1.0},
    "adaptive_grad_clip": {"clipping": 0.1, "eps": 0.01},
}


def random_tree(scale, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda s: jnp.asarray(scale * rng.normal(size=s), np.float32)  # noqa: E731
    return {k: draw(s) for k, s in SHAPES.items()}


def run(tx, grads, params=None):
    return tx.update(grads, tx.init(grads if params is None else params), params)[0]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_ordinary_gradients_are_clipped_as_optax_does(name, scale):
    grads, params = random_tree(scale), random_tree(1.0, seed=1)
    ours = run(getattr(gn, name)(**CALLS[name]), grads, params)
    theirs = run(getattr(optax, name)(**CALLS[name]), grads, params)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        *CALLS,
        "unitwise_norm",
        "per_example_global_norm_clip",
        "per_example_layer_norm_clip",
    ],
)
def test_a_call_of_optax_is_a_call_of_ours(name):
    module = optax.transforms if name == "unitwise_norm" else optax
    own = inspect.signature(getattr(gn, name)).parameters
    theirs = inspect.signature(getattr(module, name)).parameters
    assert list(own)[: len(theirs)] == list(theirs)
    for argument, parameter in theirs.items():
        assert own[argument].kind == parameter.kind
        assert own[argument].default == parameter.default


@pytest.mark.parametrize("shape", [(), (4,), (1, 4), (5, 3), (2, 3, 4), (2, 2, 3, 4)])
@pytest.mark.parametrize("axis", [None, 0])
def test_unitwise_norms_are_those_of_optax(shape, axis):
    if axis is not None and not shape:
        return
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), np.float32)
    ours, theirs = gn.unitwise_norm(x, axis), optax.transforms.unitwise_norm(x, axis)
    np.testing.assert_allclose(ours, jnp.broadcast_to(theirs, shape), rtol=1e-5)


EXAMPLES = [
    np.random.default_rng(k).normal(size=(6, *s)).astype(np.float32) * (1 + k)
    for k, s in enumerate([(3,), (2, 2), ()])
]


@pytest.mark.parametrize("limit", [0.1, 2.0, 100.0])
def test_per_example_clips_are_those_of_optax_and_of_a_loop(limit):
    ours, clipped = gn.per_example_global_norm_clip(EXAMPLES, limit)
    theirs, their_clipped = optax.per_example_global_norm_clip(EXAMPLES, limit)
    sums, mask = clips.per_example(EXAMPLES, [limit])
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        ours, [np.float32(x) for x in sums], rtol=1e-5, atol=1e-6
    )
    assert clipped == their_clipped == mask.sum()


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("limit", [0.5, 4.0, 100.0])
def test_per_layer_clips_are_those_of_optax_and_of_a_loop(uniform, limit):
    ours, clipped = gn.per_example_layer_norm_clip(EXAMPLES, limit, uniform)
    theirs, their_clipped = optax.per_example_layer_norm_clip(EXAMPLES, limit, uniform)
    shares = [1 / 3] * 3 if uniform else [3 / 8, 4 / 8, 1 / 8]
    sums, mask = clips.per_example(EXAMPLES, [limit * math.sqrt(s) for s in shares])
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        ours, [np.float32(x) for x in sums], rtol=1e-5, atol=1e-6
    )
    assert list(map(int, clipped)) == list(map(int, their_clipped)) == list(mask.sum(1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_example_adds_nothing_and_counts_as_clipped(bad):
    examples = [x.copy() for x in EXAMPLES]
    examples[1][2, 0, 1] = bad
    without = [np.delete(x, 2, axis=0) for x in examples]
    ours, clipped = gn.per_example_global_norm_clip(examples, 2.0)
    rest, rest_clipped = gn.per_example_global_norm_clip(without, 2.0)
    chex.assert_trees_all_close(ours, rest, rtol=1e-5, atol=1e-6)
    assert clipped == rest_clipped + 1
    by_layer, counts = gn.per_example_layer_norm_clip(examples, 2.0)
    assert all(np.isfinite(x).all() for x in by_layer)
    layer_rest, rest_counts = gn.per_example_layer_norm_clip(without, 2.0)
    chex.assert_trees_all_close(by_layer[1], layer_rest[1], rtol=1e-5, atol=1e-6)
    assert counts[1] == rest_counts[1] + 1


def test_examples_in_bfloat16_are_summed_in_float32():
    total, _ = gn.per_example_global_norm_clip(jnp.ones((512, 1), jnp.bfloat16), 1.0)
    assert total.dtype == jnp.float32
    assert total == 512


@pytest.mark.parametrize("entry", [3e19, 1e-30])
def test_an_example_of_any_magnitude_is_bounded(entry):
    x = np.full((1, 4), entry, np.float32)
    total, clipped = gn.per_example_global_norm_clip(x, entry)
    np.testing.assert_allclose(norm([total]), entry, rtol=1e-6)
    assert clipped == 1


def test_units_are_clipped_by_the_norm_of_their_weights():
    grads, params = random_tree(1.0), random_tree(1.0, seed=1)
    params["b"] = jnp.zeros(4)
    clipped = run(gn.adaptive_grad_clip(0.05, eps=0.01), grads, params)
    expected = clips.agc(grads, params, parts.per_unit(SHAPES), 0.05, 0.01)
    for name in grads:
        np.testing.assert_allclose(clipped[name], expected[name], rtol=1e-5)


def test_agc_takes_axes_by_pattern():
    grads, params = random_tree(1.0), random_tree(1.0, seed=1)
    axes = {"k3": (0, 1), "b": 0, "conv": -1}
    clipped = run(gn.adaptive_grad_clip(0.05, axis=axes), grads, params)
    units = parts.per_unit(SHAPES, {"k3": (0, 1), "b": (0,), "conv": (3,)})
    expected = clips.agc(grads, params, units, 0.05, 1e-3)
    for name in grads:
        np.testing.assert_allclose(clipped[name], expected[name], rtol=1e-5)


def test_the_block_rms_of_each_leaf_and_layer_is_bounded():
    grads = random_tree(2.0)
    plain = run(gn.clip_by_block_rms(0.5), grads)
    layered = run(gn.clip_by_block_rms(0.5, stacked_axes={"k3": 0}), grads)
    for name in grads:
        expected = clips.block_rms(grads[name], 0.5)
        np.testing.assert_allclose(plain[name], expected, rtol=1e-5)
    for k in range(2):
        expected = clips.block_rms(grads["k3"][k], 0.5)
        np.testing.assert_allclose(layered["k3"][k], expected, rtol=1e-5)


def test_a_group_may_scale_other_leaves_than_it_measures():
    grads = {
        "bias": jnp.array([1.0]),
        "free": jnp.array([7.0]),
        "w": jnp.array([3.0, 4.0]),
    }
    grads["x"] = jnp.array([6.0, 8.0])
    scaled = {"w|bias": "w", "x": "x"}
    clip = gn.clip_by_group_norm({"w": 2.5, "x": 1.0}, scaled=scaled)
    clipped, state = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(clipped["w"], [1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["bias"], [0.5], rtol=1e-6)
    np.testing.assert_array_equal(clipped["free"], [7.0])
    np.testing.assert_allclose(clipped["x"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(state.metrics.norms, [5.0, 10.0], rtol=1e-6)


def test_each_group_has_its_own_rule():
    clip = gn.clip_by_group_norm(
        {"a": 1.0, "b": lambda step: 2.0 + step, ".*": math.inf}
    )
    grads = {k: jnp.array([3.0, 4.0]) for k in "abc"}
    state = clip.init(grads)
    for limit in (2.0, 3.0):
        clipped, state = clip.update(grads, state)
        np.testing.assert_allclose(state.metrics.limits, [1, limit, np.inf])
        sizes = [norm([clipped[k]]) for k in "abc"]
        np.testing.assert_allclose(sizes, [1, limit, 5], rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "max_norm"), [(10.0, 1.0), (1.0, 1.0), (0.5, 1.0), (1e-7, 1e-7)]
)
def test_eps_gives_the_coefficient_of_torch(size, max_norm):
    clip = gn.clip_by_global_norm(max_norm, eps=1e-6)
    grads = jnp.array([size])
    clipped, state = clip.update(grads, clip.init(grads))
    coefficient = clips.torch_coefficient(size, max_norm)
    np.testing.assert_allclose(state.metrics.scales, coefficient, rtol=1e-6)
    np.testing.assert_allclose(clipped, [size * coefficient], rtol=1e-6)


@pytest.mark.parametrize(
    ("grads", "max_norm", "expected"),
    [
        (np.full(4, 3e38, np.float32) / 4, 1.0, np.full(4, 0.5)),
        (np.full(9, 100, np.float16), 1.0, np.full(9, 1 / 3)),
        (np.full(4, 1e-30, np.float32), 1e-30, np.full(4, 5e-31)),
        (np.zeros(3, np.float32), 0.0, np.zeros(3)),
    ],
    ids=["huge", "float16", "tiny", "zero"],
)
def test_ours_is_right_where_optax_is_not(grads, max_norm, expected):
    ours = run(gn.clip_by_global_norm(max_norm), jnp.asarray(grads))
    theirs = run(optax.clip_by_global_norm(max_norm), jnp.asarray(grads))
    digits = 1e-3 if grads.dtype == np.float16 else 1e-5
    np.testing.assert_allclose(ours, expected, rtol=digits)
    assert not np.allclose(theirs, expected, rtol=digits, atol=0)


def test_many_bfloat16_leaves_are_clipped_to_the_limit():
    grads = [jnp.ones(4096, jnp.bfloat16)] * 400
    clipped = jax.jit(lambda g: run(gn.clip_by_global_norm(1.0), g))(grads)
    np.testing.assert_allclose(norm(clipped), 1, rtol=5e-3)


def test_a_float32_limit_meets_bfloat16_gradients():
    clip = gn.clip_by_global_norm(jnp.float32(1.0))
    clipped = run(clip, jnp.array([3.0, 4.0], jnp.bfloat16))
    assert clipped.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(clipped), [0.6, 0.8], rtol=4e-3)
