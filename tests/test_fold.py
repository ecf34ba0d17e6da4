"""A norm is a fold: partial results join to the norm of all, however it was cut."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gradnorm_jax as gn

from .references import norms as reference

pytestmark = pytest.mark.usefixtures("strict")

NORMS = [
    gn.norms.l1,
    gn.norms.lp(1.5),
    gn.norms.l2,
    gn.norms.lp(3),
    gn.norms.lp(7),
    gn.norms.linf,
    gn.norms.rms,
]
each_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda norm: str(norm.ord))

exponents = st.one_of(
    st.integers(-120, 124), st.integers(-70, -50), st.integers(58, 66)
)
entries = st.builds(
    lambda sign, fraction, e: sign * fraction * 2.0**e,
    st.sampled_from([-1, 0, 1]),
    st.floats(1, 2, exclude_max=True, width=16),
    exponents,
)
arrays = hnp.arrays(np.float32, 6, elements=entries)


@functools.cache  # compile once, not once for each example
def fold(norm, cuts):
    """Folds the pieces of x between the cuts, each measured on its own."""

    def run(x):
        partials = [norm.partial([piece], [()]) for piece in jnp.split(x, cuts)]
        return norm.finish(norm.combine(jnp.concatenate(partials)))

    return jax.jit(run)


@functools.cache
def fold_again(norm):
    """Folds folds: (x, y) first, then z, as a tree of devices would."""

    def run(x):
        a, b, c = (norm.partial([piece], [()]) for piece in jnp.split(x, (3, 7)))
        left = norm.combine(jnp.concatenate([a, b]))
        return norm.finish(norm.combine(jnp.stack([left, c[0]])))

    return jax.jit(run)


@each_norm
@given(x=arrays, y=arrays)
def test_a_fold_of_parts_is_the_norm_of_both_end_to_end(norm, x, y):
    both = np.concatenate([x, y])
    expected = reference.norm([both], norm.ord)
    assume(expected < 3.4e38)
    np.testing.assert_allclose(fold(norm, (6,))(both), expected, rtol=2e-6)
    np.testing.assert_allclose(fold(norm, ())(both), expected, rtol=2e-6)


@each_norm
@given(x=arrays, y=arrays)
def test_neither_splits_nor_order_matter(norm, x, y):
    both = np.concatenate([x, y])
    assume(reference.norm([both], norm.ord) < 3.4e38)
    whole = fold(norm, ())(both)
    for other in (fold(norm, (1, 2, 9)), fold_again(norm)):
        np.testing.assert_allclose(other(both), whole, rtol=2e-6)
        np.testing.assert_allclose(other(both[::-1].copy()), whole, rtol=2e-6)


@each_norm
def test_a_fold_of_nothing_is_zero_and_adds_nothing(norm):
    nothing = norm.partial([jnp.zeros(0)], [()])
    something = norm.partial([jnp.array([3.0])], [()])
    assert norm.finish(norm.combine(nothing)) == 0
    assert norm.finish(norm.combine(norm.partial([], []))) == 0
    both = norm.combine(jnp.concatenate([nothing, something, nothing]))
    np.testing.assert_allclose(norm.finish(both), 3, rtol=1e-6)


@each_norm
def test_what_is_not_finite_stays_so_through_the_fold(norm):
    for bad in (np.nan, np.inf, -np.inf):
        x = jnp.array([1.0, 2.0, 3.0, 4.0]).at[2].set(bad)
        np.testing.assert_equal(float(fold(norm, (1, 2))(x)), abs(bad))


@each_norm
def test_subnormal_entries_count_as_they_are_or_as_zero(norm):
    # A CPU flushes them: they are then 0 beside other entries, and alone.
    x = jnp.array([1e-40, 0.0, 2e-39, 0.0])
    alone = float(fold(norm, (2,))(x))
    assert alone == 0 or math.isclose(alone, reference.norm([x], norm.ord), rel_tol=0.1)
    beside = float(fold(norm, (2,))(x.at[1].set(1e-30)))
    assert math.isclose(
        beside, reference.norm([x.at[1].set(1e-30)], norm.ord), rel_tol=1e-6
    )


@each_norm
def test_only_one_reduction_along_a_mesh_axis_joins_devices(norm):
    mesh = jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,))
    x = jnp.arange(1.0, 17.0) * 2e18

    def run(piece):
        partials = jax.lax.all_gather(norm.partial([piece], [()])[0], "x")
        return norm.finish(norm.combine(partials))

    shard_map = jax.shard_map(
        run, mesh=mesh, in_specs=jax.P("x"), out_specs=jax.P(), check_vma=False
    )
    expected = reference.norm([x], norm.ord)
    np.testing.assert_allclose(jax.jit(shard_map)(x), expected, rtol=1e-6)


def test_equal_orders_are_one_norm_so_that_jit_compiles_once():
    assert gn.norms.lp(3) == gn.norms.lp(3.0)
    assert hash(gn.norms.lp(3)) == hash(gn.norms.lp(3.0))
    assert gn.norms.lp(3) != gn.norms.lp(4)


@pytest.mark.parametrize("p", [0.5, 0, -1, math.inf, math.nan])
def test_an_order_that_is_no_finite_norm_is_refused(p):
    with pytest.raises(ValueError, match=r"lp\(p=\.\.\.\)` must be a finite number"):
        gn.norms.lp(p)
