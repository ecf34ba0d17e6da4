"""A norm can be differentiated anywhere, also at 0 and at the ends of its range."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradnorm_jax as gn

from .references import norms as reference

pytestmark = pytest.mark.usefixtures("strict")

ORDERS = (1, 1.5, 2, 3, 7, math.inf, "rms")
orders = pytest.mark.parametrize("order", ORDERS)
VECTOR = np.array([0.5, -1.25, 2.0, 0.75], np.float32)


def leaf_sum(tree, order):
    return sum(jax.tree.leaves(gn.leaf_norms(tree, ord=order)))


@orders
def test_the_slope_at_zero_is_zero(order):
    slope = jax.jit(jax.grad(lambda x: gn.global_norm(x, ord=order)))
    tree = {
        "w": jnp.zeros((2, 3)),
        "b": jnp.zeros(()),
        "half": jnp.zeros(2, "bfloat16"),
    }
    for x in jax.tree.leaves(slope(tree)):
        np.testing.assert_array_equal(x, np.zeros(x.shape))


@orders
def test_a_zero_part_beside_another_has_slope_zero(order):
    x = jnp.stack([jnp.zeros(4), VECTOR], axis=1)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(gn.unit_norms(x, ord=order))))(x)
    np.testing.assert_array_equal(slope[:, 0], np.zeros(4))
    np.testing.assert_allclose(
        slope[:, 1], reference.slope(VECTOR, order), rtol=1e-5, atol=1e-6
    )


@orders
@pytest.mark.parametrize("scale", [2.0**-110, 2.0**-60, 1.0, 2.0**60, 2.0**120])
def test_slopes_are_right_at_any_magnitude(order, scale):
    slope = jax.jit(jax.grad(lambda x: gn.global_norm(x, ord=order)))
    for vector in (VECTOR, np.abs(VECTOR)):
        np.testing.assert_allclose(
            slope(jnp.float32(scale) * vector),
            reference.slope(vector, order),
            rtol=1e-5,
            atol=1e-6,
        )


@orders
def test_slopes_reach_every_leaf_and_layer(order):
    tree = {"a": jnp.stack([VECTOR, 3 * VECTOR[::-1]]), "b": jnp.asarray(VECTOR) + 3}

    def total(tree):
        norms = gn.leaf_norms(tree, ord=order, stacked_axes={"a": 0})
        return norms["a"][0] + 2 * norms["a"][1] + 4 * norms["b"]

    slope = jax.jit(jax.grad(total))(tree)
    rows = (1, tree["a"][0], slope["a"][0]), (2, tree["a"][1], slope["a"][1])
    for weight, x, own in (*rows, (4, tree["b"], slope["b"])):
        expected = weight * reference.slope(x, order)
        np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-5)


@orders
def test_groups_have_slopes_of_their_own(order):
    tree = {"a": VECTOR, "b": 2 * VECTOR + 1, "c": VECTOR}
    groups = {"[ab]": "x"}
    slope = jax.jit(jax.grad(lambda t: gn.group_norms(t, groups, ord=order)["x"]))(tree)
    both = reference.slope(np.concatenate([tree["a"], tree["b"]]), order)
    flat = np.concatenate([slope["a"], slope["b"]])
    np.testing.assert_allclose(flat, both, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(slope["c"], np.zeros(4))


def test_the_slope_of_a_norm_is_in_the_leaves_it_measures_not_those_it_scales():
    groups = gn.per_group({"a": "x", "b": "y"}, scaled={"a": "y", "b": "x"})
    tree = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([6.0, 8.0, 24.0])}
    slope = jax.grad(lambda t: jnp.sum(groups.measure(t)))(tree)
    np.testing.assert_allclose(slope["a"], tree["a"] / 5, rtol=1e-6)
    np.testing.assert_allclose(slope["b"], tree["b"] / 26, rtol=1e-6)


@orders
def test_forward_and_reverse_mode_agree(order):
    rng = np.random.default_rng(0)
    x, dx = (
        {
            "w": jnp.asarray(rng.normal(size=(3, 2)), np.float32),
            "c": jnp.asarray(rng.normal(size=2) + 1j * rng.normal(size=2), "complex64"),
        }
        for _ in range(2)
    )
    value, forward = jax.jvp(lambda t: leaf_sum(t, order), (x,), (dx,))
    again, pull = jax.vjp(lambda t: leaf_sum(t, order), x)
    (slope,) = pull(jnp.ones_like(again))
    reverse = jnp.sum(slope["w"] * dx["w"]) + jnp.sum(jnp.real(slope["c"] * dx["c"]))
    np.testing.assert_allclose(value, again, rtol=1e-6)
    np.testing.assert_allclose(forward, reverse, rtol=1e-5)


@orders
@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e30])
def test_slopes_of_complex_leaves_are_right_at_any_magnitude(order, scale):
    # At a + bi the slope is that of the pair (a, b), conjugated as JAX has it.
    x = np.array([0.3 - 0.4j, 1.2 + 0.5j, -2.0 + 1.5j])
    slope = jax.grad(lambda x: gn.global_norm(x, ord=order))(
        jnp.asarray(scale * x, "complex64")
    )
    modulus = reference.slope(np.abs(x), order)
    np.testing.assert_allclose(
        slope, np.conj(x) / np.abs(x) * modulus, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("order", [1, 1.5, 2, 3, "rms"])
@pytest.mark.parametrize("mode", [jax.hessian, lambda f: jax.jacrev(jax.grad(f))])
def test_second_derivatives_are_right(order, mode):
    second = jax.jit(mode(lambda x: gn.global_norm(x, ord=order)))(jnp.asarray(VECTOR))
    expected = reference.curvature(VECTOR.astype(np.float64), order)
    np.testing.assert_allclose(second, expected, rtol=1e-4, atol=1e-5)


def test_slopes_may_be_mapped():
    x = jnp.stack([VECTOR, 1e30 * VECTOR, 0 * VECTOR])
    slope = jax.vmap(jax.grad(gn.global_norm))(x)
    unit = VECTOR / np.linalg.norm(VECTOR)
    np.testing.assert_allclose(slope, [unit, unit, 0 * unit], rtol=1e-5)


def test_float64_slopes_are_right():
    with jax.enable_x64(True):
        x = jnp.asarray(VECTOR, np.float64) * 1e200
        slope = np.asarray(jax.grad(gn.global_norm)(x))
    np.testing.assert_allclose(slope, reference.wide(VECTOR) / reference.norm([VECTOR]))


@pytest.mark.parametrize("order", [1.5, 2, 3, jnp.inf, "rms"])
@pytest.mark.parametrize("size", [1e38, 2e38])
def test_norms_and_slopes_are_right_at_the_far_end_of_float32(order, size):
    # Above 8.5e37 a reciprocal is subnormal, and XLA flushes it to 0.
    x = np.float32([size, size / 4])
    norm, slope = jax.jit(jax.value_and_grad(lambda x: gn.global_norm(x, ord=order)))(x)
    unit_norm, unit_slope = jax.value_and_grad(lambda x: gn.global_norm(x, ord=order))(
        np.float32([1, 0.25])
    )
    np.testing.assert_allclose(norm / np.float32(size), unit_norm, rtol=1e-6)
    np.testing.assert_allclose(slope, unit_slope, rtol=1e-6)


RULES = {
    "percentile": (gn.thresholds.percentile(50.0, window=3), "rescale"),
    "z_score": (gn.thresholds.z_score(0.5, warmup_steps=2), "reciprocal"),
    "ema_relative": (
        gn.thresholds.ema_relative(
            1.05, warmup_steps=3, warmup_limit=0.5, rearm_after=2
        ),
        "rescale",
    ),
    "ema_band": (gn.thresholds.ema_band(0.9, 1.1), "band"),
    "quantile": (gn.thresholds.quantile(0.5, rearm_after=2), "smooth"),
    "rolling_sigma": (gn.thresholds.rolling_sigma(0.5, window=4), "center"),
    "max_ema": (gn.thresholds.max_ema(rearm_after=2), "rescale"),
    "moment_ratio": (gn.thresholds.moment_ratio(), "normalize"),
    "second_moment": (gn.thresholds.second_moment(0.5), "rescale"),
}


@pytest.mark.parametrize("name", RULES)
def test_steps_with_memory_can_be_differentiated_with_a_leaf_of_zeros(name):
    rule, shrink = RULES[name]
    clip = gn.clip_by_norm(
        rule, granularity=gn.per_leaf(), shrink=getattr(gn.shrink, shrink)
    )
    sizes = jnp.array([1.0, 1.5, 0.0, 0.8, 2.0, 1.2])

    def total(x):
        def step(state, size):
            grads = {"a": size * x, "b": jnp.zeros(2), "c": 0.0 * x}
            clipped, state = clip.update(grads, state)
            return state, sum(jnp.vdot(y, jnp.arange(1.0, 3)) for y in clipped.values())

        start = clip.init({"a": x, "b": jnp.zeros(2), "c": x})
        return jnp.sum(jax.lax.scan(step, start, sizes)[1])

    slope = jax.jit(jax.grad(total))(jnp.array([0.6, -0.3]))
    assert np.all(np.isfinite(slope))
    assert np.any(slope != 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
@pytest.mark.parametrize("size", [2**16 - 1, 2**16])
@pytest.mark.parametrize("order", [2, math.inf])
def test_a_slope_does_not_depend_on_how_a_leaf_is_read(order, dtype, size):
    places = [3, size // 2, size - 1]
    x = jnp.zeros(size, dtype).at[jnp.array(places)].set(jnp.array([1, -2, 0.5], dtype))
    slope = jax.jit(jax.grad(lambda x: gn.global_norm(x, ord=order)))(x)
    want = reference.slope(np.array([1, -2, 0.5]), order)
    found = np.real(np.asarray(slope[jnp.array(places)]).astype(np.complex64))
    np.testing.assert_allclose(found, want, rtol=4e-3 if x.itemsize < 4 else 1e-5)
    assert np.count_nonzero(slope) == np.count_nonzero(want)


@pytest.mark.parametrize("size", [1000, 2**16])
def test_equal_largest_entries_share_the_slope(size):
    slope = jax.grad(lambda x: gn.global_norm(x, ord=math.inf))(jnp.ones(size))
    np.testing.assert_allclose(slope, np.full(size, 1 / size), rtol=1e-6)


@pytest.mark.parametrize("size", [100, 2**16 + 1])
@pytest.mark.parametrize("jit", [lambda fun: fun, jax.jit])
def test_details_do_not_change_the_slope_of_what_is_beside_them(size, jit):
    x = jnp.arange(1.0, size + 1) / size
    details = ("grad_max", "grad_zeros", "grad_nonfinite")
    row = lambda x: gn.measure(x, details=details).values  # noqa: E731
    norm, largest, zeros, nonfinite = (
        jit(jax.grad(lambda x, k=k: row(x)[k]))(x) for k in (0, 1, 2, 3)
    )
    np.testing.assert_allclose(norm, x / np.linalg.norm(np.float64(x)), rtol=1e-5)
    np.testing.assert_array_equal(largest, np.arange(size) == size - 1)
    np.testing.assert_array_equal(zeros, 0)
    np.testing.assert_array_equal(nonfinite, 0)
    clip = gn.clip_by_global_norm(1.0)
    watched = gn.watch(clip, record=("grad", *details))

    def slope(tx):
        state = tx.init(x)
        return jit(jax.grad(lambda x: jnp.sum(tx.update(x, state)[0][:3])))(x)

    np.testing.assert_allclose(slope(watched), slope(clip), rtol=1e-5)
