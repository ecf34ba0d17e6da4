"""`measure` gives the row that `watch` writes; `attach` and `detach` move a record."""

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradnorm_jax as gn
from gradnorm_jax.telemetry import WatchState, columns, find

PARAMS = {"dense": {"b": jnp.ones(3), "w": jnp.full((4, 3), 0.5)}}
DETAILS = ("grad_max", "grad_zeros", "grad_nonfinite")


def gradients(seed=0):
    return jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(seed + x.size), x.shape), PARAMS
    )


def clipped():
    return optax.chain(gn.clip_by_global_norm(1.0), optax.adam(0.1))


@pytest.mark.parametrize("details", [(), ("grad_zeros",), DETAILS])
@pytest.mark.parametrize("groups", [None, {".*": "all"}])
def test_a_row_is_the_one_that_watch_writes(details, groups):
    tx = gn.watch(clipped(), record=(*gn.telemetry.KINDS, *details), groups=groups)
    grads = gradients()
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS, value=0.25)
    stats = jax.jit(
        lambda *trees: gn.measure(
            *trees, value=0.25, state=state, details=details, groups=groups
        )
    )(grads, updates, PARAMS)
    np.testing.assert_array_equal(stats.values, state.ring[0])
    record = (*gn.telemetry.KINDS, *details)
    assert stats.columns.names == columns(PARAMS, record=record, groups=groups)


def test_what_is_not_given_is_not_measured():
    stats = gn.measure(gradients())
    assert stats.columns.names[:3] == ("grad/dense/b", "grad/dense/w", "loss")
    assert np.isnan(stats.values[2:]).all()
    assert stats.values.dtype == jnp.float32


def test_columns_say_how_large_the_parts_are():
    stacked = {"layers": jnp.ones((2, 3, 5)), "out": jnp.ones(7)}
    plain, layers, group = (
        gn.measure(stacked, **how).columns
        for how in ({}, {"stacked_axes": {"layers": 0}}, {"groups": {".*": "all"}})
    )
    assert plain[1:4] == (("layers", "out"), (30, 7), (3, 1))
    assert layers.parts == ("layers[0]", "layers[1]", "out")
    assert (layers.sizes, layers.dims) == ((15, 15, 7), (2, 2, 1))
    assert (group.parts, group.sizes, group.dims) == (("all",), (37,), (None,))


def test_rows_come_out_of_a_scan_with_their_names():
    def step(carry, seed):
        grads = jax.tree.map(lambda x: x * seed, PARAMS)
        return carry, gn.measure(grads, value=seed)

    _, stats = jax.jit(lambda seeds: jax.lax.scan(step, 0, seeds))(jnp.arange(5.0))
    chex.assert_shape(stats.values, (5, 6))
    norm = np.sqrt(3.0)
    of = stats.as_dict()
    np.testing.assert_allclose(of["grad/dense/b"], norm * np.arange(5), rtol=1e-6)
    np.testing.assert_array_equal(of["loss"], np.arange(5))


@pytest.mark.parametrize("details", ["grad_max", ("grad",), ("max",)])
def test_details_that_are_none_are_refused(details):
    with pytest.raises(ValueError, match=r"measure\(details=.*'grad_zeros'"):
        gn.measure(PARAMS, details=details)


def after_steps(tx, steps, state=None, params=PARAMS):
    state = tx.init(params) if state is None else state
    for seed in range(steps):
        updates, state = tx.update(gradients(seed), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_what_is_saved_is_the_state_of_the_optimizer_alone():
    tx = gn.watch(clipped(), window=4)
    _, state = after_steps(tx, 3)
    _, plain = after_steps(clipped(), 3)
    chex.assert_trees_all_equal(gn.detach(state), plain)


def test_a_restored_state_goes_on_as_if_it_had_not_stopped():
    tx = gn.watch(clipped(), window=4)
    params, state = after_steps(tx, 3)
    saved = flax.serialization.to_bytes(gn.detach(state))
    restored = flax.serialization.from_bytes(clipped().init(PARAMS), saved)
    state_again = gn.attach(restored, params, tx, step=3)
    went_on = after_steps(tx, 2, state, params)
    again = after_steps(tx, 2, state_again, params)
    chex.assert_trees_all_equal(went_on[0], again[0])
    chex.assert_trees_all_equal(went_on[1].inner_state, again[1].inner_state)
    np.testing.assert_array_equal(again[1].steps, [3, 4, -1, -1])
    assert int(again[1].rows) == 2


def test_a_record_deep_inside_is_taken_out_and_put_back():
    tx = optax.chain(gn.skip_step(gn.watch(optax.adam(0.1))), optax.scale(0.5))
    bare = optax.chain(gn.skip_step(optax.adam(0.1)), optax.scale(0.5))
    _, state = after_steps(tx, 2)
    inner = gn.detach(state)
    assert jax.tree.structure(inner) == jax.tree.structure(bare.init(PARAMS))
    assert not find(inner, WatchState)
    again = gn.attach(inner, PARAMS, tx, step=2)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    chex.assert_trees_all_equal(gn.detach(again), inner)


def test_a_record_inside_a_record_goes_too():
    tx = gn.watch(optax.chain(gn.watch(optax.adam(0.1)), optax.scale(1.0)))
    _, state = after_steps(tx, 2)
    bare = optax.chain(optax.adam(0.1), optax.scale(1.0))
    inner = gn.detach(state)
    assert jax.tree.structure(inner) == jax.tree.structure(bare.init(PARAMS))
    again = gn.attach(inner, PARAMS, tx, step=2)
    assert [int(found.step) for found in find(again, WatchState)] == [2, 2]


def test_states_that_do_not_fit_are_refused():
    tx = gn.watch(optax.adam(0.1))
    with pytest.raises(ValueError, match=r"detach\(opt_state=.*found no record.*tuple"):
        gn.detach(optax.adam(0.1).init(PARAMS))
    with pytest.raises(ValueError, match=r"attach\(opt_state=.*of `tx` without"):
        gn.attach(optax.sgd(0.1).init(PARAMS), PARAMS, tx)
    with pytest.raises(ValueError, match=r"attach\(tx=.*`watch"):
        gn.attach(optax.adam(0.1).init(PARAMS), PARAMS, optax.adam(0.1))
    other = {"dense": {"b": jnp.ones(3), "w": jnp.ones((5, 3))}}
    with pytest.raises(ValueError, match=r"attach\(params=.*\[4, 3\].*\[5, 3\]"):
        gn.attach(optax.adam(0.1).init(PARAMS), other, tx)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(ValueError, match=r"attach\(params=.*bfloat16.*float32"):
        gn.attach(optax.adam(0.1).init(half), PARAMS, tx)
    with pytest.raises(ValueError, match=r"attach\(opt_state=.*a record already"):
        gn.attach(tx.init(PARAMS), PARAMS, tx)
    for step in (-1, 1.5):
        with pytest.raises(ValueError, match=rf"attach\(step=.*got {step}"):
            gn.attach(optax.adam(0.1).init(PARAMS), PARAMS, tx, step=step)


def test_trees_that_do_not_match_are_refused():
    for name in ("updates", "params"):
        for other in ({"dense": {"b": jnp.ones(3)}}, {"dense": {"b": 1.0, "v": 1.0}}):
            with pytest.raises(ValueError, match=rf"measure\({name}=.*'dense/[vw]'"):
                gn.measure(PARAMS, **{name: other})
    with pytest.raises(ValueError, match=r"measure\(grads=.*got None"):
        gn.measure(None)
    with pytest.raises(TypeError, match=r"measure\(grads"):
        gn.measure({"w": jnp.ones(2, jnp.int32)})
