"""What a norm above its limit becomes is the formula of its shrink, however far."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradnorm_jax as gn
from gradnorm_jax import shrink

from .references import clips

pytestmark = pytest.mark.usefixtures("strict")

SHRINKS = {
    name: (getattr(shrink, name), getattr(clips, name))
    for name in ("reciprocal", "center", "zero", "smooth", "band")
}
shrinks = pytest.mark.parametrize("name", SHRINKS)
sizes = st.floats(-100, 100).map(lambda x: float(np.float32(2.0**x)))


@functools.cache
def clip_of(name):
    def run(norm, limit, center, floor):
        rule = gn.Threshold(
            init=lambda norms: (),
            decide=lambda *_: gn.thresholds.Bound(limit, center, floor),
            observe=lambda memory, *_: memory,
        )
        clip = gn.clip_by_norm(rule, shrink=getattr(shrink, name))
        grads = jnp.stack([norm, jnp.zeros_like(norm)])
        clipped, state = clip.update(grads, clip.init(grads))
        return clipped, state.metrics

    return jax.jit(run)


def clipped_norm(name, *values):
    clipped, metrics = clip_of(name)(*map(np.float32, values))
    assert clipped[1] == 0
    return float(clipped[0]), metrics


@shrinks
@given(norm=sizes, limit=sizes, low=st.floats(0, 1), share=st.floats(0, 1))
def test_a_norm_becomes_what_its_formula_says(name, norm, limit, low, share):
    center, floor = float(np.float32(limit * share)), float(np.float32(limit * low))
    got, metrics = clipped_norm(name, norm, limit, center, floor)
    expected = SHRINKS[name][1](norm, limit, center, floor)
    # A difference of two numbers that are close is known to float32 only.
    slack = 4e-7 * (norm if name == "reciprocal" and norm > limit else 0)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-37 + slack)
    assert got <= limit * (1 + 1e-6)
    if name != "smooth" and floor <= norm <= limit:
        assert got == norm
        assert metrics.scales == 1
        assert metrics.num_clipped == 0


@shrinks
@pytest.mark.parametrize("norm", [0.0, 3.0])
def test_a_limit_of_infinity_and_a_norm_of_zero_change_nothing(name, norm):
    for limit in (math.inf, 1.0) if norm == 0 else (math.inf,):
        got, metrics = clipped_norm(name, norm, limit, 0.5, 0.25)
        assert got == norm
        assert metrics.num_clipped == 0


@shrinks
@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_what_is_not_finite_is_passed_on(name, norm):
    clipped, metrics = clip_of(name)(*map(np.float32, (norm, 1.0, 0.5, 0.25)))
    assert np.isnan(clipped).any()
    assert np.isnan(metrics.scales)


@shrinks
def test_a_limit_of_zero_stops_all_but_what_has_a_center_or_a_floor(name):
    assert clipped_norm(name, 3.0, 0.0, 0.0, 0.0)[0] == 0


@shrinks
@pytest.mark.parametrize("norm", [0.5, 3.0])
def test_a_shrink_can_be_differentiated(name, norm):
    def clipped(x):
        return clip_of(name)(x, *map(np.float32, (1.0, 0.5, 0.75)))[0][0]

    slope = jax.jit(jax.grad(clipped))(np.float32(norm))
    oracle = functools.partial(SHRINKS[name][1], limit=1.0, center=0.5, floor=0.75)
    expected = (oracle(norm + 1e-5) - oracle(norm - 1e-5)) / 2e-5
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-5)


def test_only_the_entries_above_the_limit_are_scaled():
    clip = gn.clip_by_norm(2.0, norm=gn.norms.linf, shrink=shrink.spikes)
    grads = {"a": jnp.array([1.0, -4.0, 2.0]), "b": jnp.array([3.0, 0.0])}
    clipped, state = jax.jit(clip.update)(grads, clip.init(grads))
    np.testing.assert_allclose(clipped["a"], [1, -2, 2])
    np.testing.assert_allclose(clipped["b"], [1.5, 0])
    assert state.metrics.norms == 4
    assert state.metrics.scales == 0.5


def test_spikes_are_entries_so_their_norm_is_the_largest():
    with pytest.raises(ValueError, match=r"shrink=spikes, norm=...\)` must be `norms"):
        gn.clip_by_norm(1.0, shrink=shrink.spikes)


def test_a_float16_spike_is_compared_in_float32():
    clip = gn.clip_by_norm(1e-3, norm=gn.norms.linf, shrink=shrink.spikes)
    grads = jnp.array([6e4, 5e-4], jnp.float16)
    clipped, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(clipped, np.float16([1e-3, 5e-4]))
