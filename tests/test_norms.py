"""Every norm of every part is right, in any dtype and at any magnitude."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gradnorm_jax as gn

from .references import norms as reference
from .references import parts

pytestmark = pytest.mark.usefixtures("strict")

ORDERS = (1, 1.5, 2, 3, 7, math.inf, "rms")
SHAPES = {"a": (3, 4), "b": (2, 3, 2), "c": (5,), "d": ()}
LABELS = {"b": "x", "a": "y", "d": "y"}
MEASURES = {
    "whole_tree": (
        lambda tree, order: gn.global_norm(tree, ord=order),
        parts.whole_tree(SHAPES),
    ),
    "per_leaf": (
        lambda tree, order: gn.leaf_norms(tree, ord=order),
        parts.per_leaf(SHAPES),
    ),
    "stacked": (
        lambda tree, order: gn.leaf_norms(tree, ord=order, stacked_axes={"[ab]": 0}),
        parts.per_leaf(SHAPES, "ab"),
    ),
    "per_group": (
        lambda tree, order: tuple(
            gn.group_norms(tree, {"b": "x", "[ad]": "y"}, ord=order).values()
        ),
        parts.per_group(SHAPES, LABELS),
    ),
    "per_unit": (
        lambda tree, order: gn.unit_norms(tree, ord=order),
        parts.per_unit(SHAPES),
    ),
}
orders = pytest.mark.parametrize("order", ORDERS)
measures = pytest.mark.parametrize("measure", MEASURES)


@functools.cache  # compile once, not once for each example
def norms_of(measure, order):
    return jax.jit(
        lambda tree: jnp.concatenate(
            [x.reshape(-1) for x in jax.tree.leaves(MEASURES[measure][0](tree, order))]
        )
    )


def oracle(measure, order, tree):
    return np.array(
        [
            reference.norm([np.asarray(tree[n])[i] for n, i in part], order)
            for part in MEASURES[measure][1]
        ]
    )


def random_tree(scale=1.0, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    tree = {}
    for name, shape in SHAPES.items():
        x = rng.normal(size=shape)
        if np.issubdtype(dtype, np.complexfloating):
            x = x + 1j * rng.normal(size=shape)
        tree[name] = jnp.asarray(scale * x, dtype)
    return tree


def mixed_tree(*magnitudes):
    """Entries of several magnitudes beside one another, in every leaf."""
    rng = np.random.default_rng(1)
    return {
        name: jnp.asarray(rng.choice(magnitudes, shape), np.float32)
        for name, shape in SHAPES.items()
    }


def spread_tree(*magnitudes):
    """One magnitude for each leaf."""
    return {
        name: jnp.full(SHAPES[name], magnitude, np.float32)
        for name, magnitude in zip(SHAPES, magnitudes, strict=True)
    }


MAGNITUDES = {
    "ordinary": random_tree(),
    "squares overflow": random_tree(3e19),
    "squares underflow": random_tree(1e-30),
    "close to the largest float": random_tree(2e36),
    "close to the smallest float": spread_tree(1e-36, 2e-37, 3e-37, 1e-37),
    "mixed in a leaf, far apart": mixed_tree(3e19, 1e-30, 1.0),
    "mixed in a leaf, all small": mixed_tree(1e-30, 1e-22, 1e-19, 1e-26),
    "mixed in a leaf, around the edge": mixed_tree(1e-19, 3e-19, 1e19, 2e19),
    "mixed across leaves": spread_tree(3e19, 1e-30, 1.0, 1e-22),
    "small across leaves": spread_tree(1e-30, 1e-22, 1e-26, 3e-19),
    "large across leaves": spread_tree(1e19, 4e19, 1.0, 3e30),
    "mostly zero": spread_tree(0.0, 0.0, 1e-30, 0.0),
}


@orders
@measures
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_float32_norms_are_right_to_the_last_digits(measure, order, magnitude):
    tree = MAGNITUDES[magnitude]
    norms = norms_of(measure, order)(tree)
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, oracle(measure, order, tree), rtol=1e-6)


exponents = st.integers(-119, 124)
entries = st.builds(
    lambda sign, fraction, e: sign * fraction * 2.0**e,
    st.sampled_from([-1, 0, 1]),
    st.floats(1, 2, exclude_max=True, width=16),
    exponents,
)
trees = st.fixed_dictionaries(
    {k: hnp.arrays(np.float32, shape, elements=entries) for k, shape in SHAPES.items()}
)


@orders
@measures
@given(tree=trees)
def test_entries_of_any_magnitude_may_mix(measure, order, tree):
    expected = oracle(measure, order, tree)
    fits = expected < 3.4e38
    norms = np.asarray(norms_of(measure, order)(tree))
    np.testing.assert_allclose(norms[fits], expected[fits], rtol=2e-6)


@orders
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.complex64])
def test_low_precision_and_complex_leaves_have_float32_norms(dtype, order):
    tree = random_tree(30.0, dtype)
    norms = norms_of("per_leaf", order)(tree)
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, oracle("per_leaf", order, tree), rtol=2e-6)


@orders
@pytest.mark.parametrize("scale", [1.0, 1e200, 1e-200, 1e300])
def test_float64_leaves_have_float64_norms(order, scale):
    with jax.enable_x64(True):
        tree = random_tree(scale, np.float64)
        norms = norms_of("per_leaf", order)(tree)
        assert norms.dtype == jnp.float64
        np.testing.assert_allclose(norms, oracle("per_leaf", order, tree), rtol=1e-13)


def test_one_float64_leaf_makes_the_global_norm_float64():
    with jax.enable_x64(True):
        tree = {"a": jnp.ones(9, jnp.float64), "b": jnp.full(4, 2, jnp.bfloat16)}
        norm = np.asarray(gn.global_norm(tree))
    assert norm.dtype == np.float64
    assert norm == 5


@orders
@pytest.mark.parametrize("scale", [3e19, 1e-30, 2e37])
def test_complex_norms_are_right_at_any_magnitude(order, scale):
    tree = random_tree(scale, np.complex64)
    norms = norms_of("per_unit", order)(tree)
    np.testing.assert_allclose(norms, oracle("per_unit", order, tree), rtol=2e-6)


@pytest.mark.parametrize(
    ("leaf", "norm"),
    [
        (jnp.full(4, 300, jnp.float16), 600),
        (jnp.full((9, 100), 1, jnp.float16), 30),
        (jnp.full(9, 100, jnp.float16), 300),
        (jnp.full(4, 6e4, jnp.float16), 2 * float(np.float16(6e4))),
        (jnp.full(4, 6e-8, jnp.float16), 2 * float(np.float16(6e-8))),
        (jnp.full(4, 3e19), 6e19),
        (jnp.full(4, 1e-30), 2e-30),
        (jnp.full(1, 3e38), 3e38),
        (jnp.array([1.8e38, -2.4e38]), 3e38),
        (jnp.full(4, 3e19, jnp.bfloat16), 2 * float(jnp.bfloat16(3e19))),
        (jnp.float32(-3), 3),
        (-3.5, 3.5),
        (jnp.complex64(3 - 4j), 5),
    ],
)
def test_norms_that_fit_are_right_though_their_squares_do_not_fit(leaf, norm):
    np.testing.assert_allclose(jax.jit(gn.global_norm)({"w": leaf}), norm, rtol=1e-6)


def test_the_rms_fits_where_the_root_of_the_sum_does_not():
    np.testing.assert_allclose(
        gn.global_norm(jnp.full(400, 3e38), ord="rms"), 3e38, rtol=1e-6
    )


def test_many_bfloat16_leaves_are_not_added_in_bfloat16():
    tree = [jnp.ones(4096, jnp.bfloat16)] * 400  # in bfloat16 the sum stops at 256
    assert gn.global_norm(tree) == 1280


@pytest.fixture(scope="module")
def large():
    x = np.random.default_rng(0).normal(size=2**18 + 5) * 30
    x[-5:] = [2e4, -3e4, 1e4, 5e4, 6e4]  # what no whole chunk holds
    return jnp.asarray(x, jnp.float16)


def test_a_large_float16_leaf_is_right(large):
    expected = reference.norm([large])
    np.testing.assert_allclose(gn.global_norm(large), expected, rtol=1e-6)
    both = jnp.stack([large, large / 2])
    np.testing.assert_allclose(
        jax.vmap(gn.global_norm)(both), [expected, expected / 2], rtol=1e-6
    )


def test_the_gradient_of_a_large_float16_leaf_is_right(large):
    slope = jax.grad(gn.global_norm)(large)
    assert slope.dtype == jnp.float16
    expected = reference.wide(large) / reference.norm([large])
    np.testing.assert_allclose(slope, expected, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_large_float16_leaf_may_be_sharded(large, kind):
    mesh = jax.make_mesh((8,), ("x",), (getattr(jax.sharding.AxisType, kind),))
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, jax.P("x"))
        spread = jax.device_put(large[: 2**18], sharding)
        norm = jax.jit(gn.global_norm)(spread)
    np.testing.assert_allclose(norm, reference.norm([large[: 2**18]]), rtol=1e-6)


@orders
@pytest.mark.parametrize("measure", ["per_group", "per_unit"])
def test_zero_size_leaves_and_absent_leaves_add_nothing(measure, order):
    shapes = {"a": (0, 3), "b": (2, 0, 2), "c": (0,), "d": ()}
    tree = {k: jnp.full(shape, 2.0) for k, shape in shapes.items()}
    tree |= {"e": None, "f": optax.MaskedNode()}
    norms = norms_of(measure, order)(tree)
    assert jnp.max(norms) == 2
    assert jnp.isin(norms, jnp.array([0.0, 2.0])).all()


@orders
@pytest.mark.parametrize("tree", [{}, None, {"a": None}, optax.MaskedNode(), [()]])
def test_an_empty_tree_has_norm_zero(tree, order):
    norm = gn.global_norm(tree, ord=order)
    assert norm == 0
    assert norm.dtype == jnp.float32
    assert jax.tree.leaves(gn.leaf_norms(tree, ord=order)) == []


@orders
@measures
def test_a_nan_and_an_infinity_show(measure, order):
    for bad, seen in (
        (np.nan, np.isnan),
        (np.inf, np.isposinf),
        (-np.inf, np.isposinf),
    ):
        tree = random_tree()
        tree["a"] = tree["a"].at[1, 2].set(bad)
        norms = np.asarray(norms_of(measure, order)(tree))
        hit = [
            any(not np.isfinite(np.asarray(tree[n])[i]).all() for n, i in part)
            for part in MEASURES[measure][1]
        ]
        np.testing.assert_array_equal(seen(norms), hit)


@orders
def test_a_nan_wins_over_an_infinity(order):
    tree = random_tree()
    tree["a"] = tree["a"].at[0, 0].set(np.inf).at[2, 2].set(np.nan)
    assert jnp.isnan(norms_of("whole_tree", order)(tree))
    tree["b"], tree["a"] = tree["b"].at[0].set(np.nan), tree["a"].at[2, 2].set(np.inf)
    assert jnp.isnan(norms_of("whole_tree", order)(tree))


@pytest.mark.parametrize("order", [2, 3, math.inf])
@measures
def test_vmap_is_a_loop(measure, order):
    chosen = [MAGNITUDES[k] for k in ("ordinary", "squares overflow", "mostly zero")]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *chosen)
    together = jax.jit(jax.vmap(norms_of(measure, order)))(stacked)
    alone = jnp.stack([norms_of(measure, order)(tree) for tree in chosen])
    np.testing.assert_allclose(together, alone, rtol=1e-6)


@pytest.mark.parametrize("measure", ["whole_tree", "per_unit"])
def test_eager_is_jit(measure):
    for tree in (random_tree(), random_tree(3e19)):
        eager = jax.tree.leaves(MEASURES[measure][0](tree, 2))
        flat = jnp.concatenate([x.reshape(-1) for x in eager])
        np.testing.assert_allclose(flat, norms_of(measure, 2)(tree), rtol=1e-6)


def test_norms_keep_the_structure_of_the_tree():
    tree = {"a": jnp.ones((2, 3)), "b": (None, jnp.ones((4, 3, 5, 6)), jnp.ones(7))}
    units = gn.unit_norms(tree)
    chex.assert_trees_all_equal_structs(tree, units, gn.leaf_norms(tree))
    shapes = [x.shape for x in jax.tree.leaves(units)]
    assert shapes == [(1, 3), (1, 1, 1, 6), (1,)]
    layers = gn.leaf_norms(tree, stacked_axes={"b/1": (0, -1)})
    assert [x.shape for x in jax.tree.leaves(layers)] == [(), (4, 6), ()]
    chex.assert_shape(gn.unitwise_norm(jnp.ones((2, 3))), (2, 3))


def test_units_follow_the_axes_that_a_pattern_names():
    tree = {"conv": jnp.arange(24.0).reshape(2, 3, 4), "w": jnp.ones((4, 9))}
    units = gn.unit_norms(tree, axes={"w": 1, "conv": (0, -1)})
    shapes = {name: x.shape for name, x in tree.items()}
    expected = parts.per_unit(shapes, {"w": (1,), "conv": (0, 2)})
    flat = np.concatenate([units[name].ravel() for name in ("conv", "w")])
    np.testing.assert_allclose(
        flat,
        [reference.norm([tree[n][i] for n, i in part]) for part in expected],
        rtol=1e-6,
    )


def test_groups_may_be_patterns_a_function_or_a_tree_of_labels():
    tree = {"a": jnp.full(4, 1.0), "b": jnp.full(9, 1.0), "c": jnp.full(1, 5.0)}
    patterns = {"a|b": "x", ".*": "z"}  # the first that matches counts
    by_pattern = gn.group_norms(tree, patterns)
    by_name = gn.group_norms(tree, lambda name: "z" if name == "c" else "x")
    by_tree = gn.group_norms(tree, {"a": "x", "b": "x", "c": "z"})
    for norms in (by_pattern, by_name, by_tree):
        assert list(norms) == ["x", "z"]
        chex.assert_trees_all_close(norms, {"x": math.sqrt(13), "z": 5.0})
    assert list(gn.group_norms(tree, lambda name: "b" if name == "b" else None)) == [
        "b"
    ]


def test_compiled_norms_copy_no_leaf():
    tree = [jnp.ones((512, 256))] * 24 + [jnp.ones(256)] * 24
    for measure in (gn.global_norm, gn.leaf_norms):
        memory = jax.jit(measure).lower(tree).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.05 * 24 * 512 * 256 * 4


def test_a_large_leaf_that_is_lost_is_read_again_and_no_other_need_be():
    draw = np.random.default_rng(1).normal(size=(2**9, 2**8)).astype(np.float32)
    tree = {
        "dead": np.zeros_like(draw),
        "huge": draw * np.float32(3e18),
        "plain": draw,
        "tiny": draw * np.float32(1e-30),
    }
    norms = jax.jit(gn.leaf_norms)(tree)
    units = jax.jit(gn.unit_norms)(tree)
    for name, x in tree.items():
        np.testing.assert_allclose(norms[name], reference.norm([x]), rtol=1e-6)
        wanted = [reference.norm([column]) for column in x.T]
        np.testing.assert_allclose(units[name][0], wanted, rtol=1e-6)
    assert np.isnan(gn.global_norm(tree | {"bad": tree["plain"] * np.float32(np.nan)}))


@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0, 3e19])
@pytest.mark.parametrize("size", [4, 2**17])
def test_a_leaf_that_the_compiler_knows_has_its_norm(value, size):
    def norms(x):
        return gn.leaf_norms({"known": jnp.full(size, jnp.float32(value)), "x": x})

    found = jax.jit(norms)(jnp.array([3.0, 4.0], jnp.float32))
    expected = {"known": np.float32(value * math.sqrt(size)), "x": np.float32(5)}
    chex.assert_trees_all_close(found, expected, rtol=2e-6)
