"""What is not finite, too large or left over on one device is so for all of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import gradnorm_jax as gn

from .meshes import agreed, mapped, mesh_of, put, state_specs

SPECS = {
    "bias": P(),
    "columns": P(None, "t"),
    "gain": P(),
    "rows": P("d"),
    "square": P("d", "t"),
}
SIZES = {
    "bias": (4,),
    "columns": (3, 24),
    "gain": (5,),
    "rows": (24, 2),
    "square": (24, 24),
}
SPOTS = {"columns": (-1, -1), "rows": (-1, 0), "square": (0, -1), "bias": (2,)}
GROUPS = {"(bias|rows)": "x", "(gain|columns|square)": "y"}
GRANULARITIES = {
    "per_group": gn.per_group(GROUPS),
    "per_leaf": gn.per_leaf(),
    "per_unit": gn.per_unit(),
    "whole_tree": gn.whole_tree(),
}


def arrays(seed):
    random = np.random.default_rng(seed)
    return {
        name: random.normal(size=size).astype(np.float32)
        for name, size in SIZES.items()
    }


def spoiled(seed, name, value):
    """One entry of one leaf, that of one device if the leaf is split, is `value`."""
    plain = arrays(seed)
    if name is not None:
        plain[name][SPOTS[name]] = value
    return plain


def step_of(tx):
    def step(grads, state, params):
        return tx.update(grads, state, params)

    return step


def led(mesh, tx, steps, step=step_of):
    """Leads a transformation along some steps inside shard_map."""
    params = put(mesh, arrays(9), SPECS)
    state = tx.init(params)
    specs = state_specs(state, params, SPECS)
    run = mapped(step(tx), mesh, (SPECS, specs, SPECS), (SPECS, specs))
    for plain in steps:
        updates, state = jax.block_until_ready(
            run(put(mesh, plain, SPECS), state, params)
        )
        agreed([updates["bias"], updates["gain"]])
        yield updates, state


def led_alone(tx, steps):
    params = arrays(9)
    state, run = tx.init(params), jax.jit(tx.update)
    for plain in steps:
        updates, state = run(plain, state, params)
        yield updates, state


def assert_alike(mesh, sharded, alone, steps):
    pairs = zip(led(mesh, sharded, steps), led_alone(alone, steps), strict=True)
    for got, want in pairs:
        chex.assert_trees_all_close(
            jax.device_get(got), jax.device_get(want), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "drop"])
def test_one_entry_that_is_not_finite_has_the_same_policy_everywhere(
    nonfinite, granularity
):
    mesh = mesh_of("Explicit", (3, 2))
    how = {"specs": SPECS} if granularity == "per_unit" else {}

    def clip(**how):
        return gn.clip_by_norm(
            gn.thresholds.percentile(50, window=2),
            granularity=GRANULARITIES[granularity],
            nonfinite=nonfinite,
            **how,
        )

    steps = [
        spoiled(0, None, None),
        spoiled(1, "square", np.nan),
        spoiled(2, "rows", np.inf),
        spoiled(3, "bias", np.nan),
        spoiled(4, None, None),
    ]
    assert_alike(mesh, clip(**how), clip(), steps)


def test_drop_drops_the_bad_leaf_on_every_device_and_no_other(wide_mesh):
    clip = gn.clip_by_leaf_norm(0.1, nonfinite="drop")
    [(updates, state)] = led(wide_mesh, clip, [spoiled(0, "square", np.nan)])
    updates = jax.device_get(updates)
    np.testing.assert_array_equal(updates.pop("square"), np.zeros(SIZES["square"]))
    for name, x in updates.items():
        np.testing.assert_allclose(np.linalg.norm(x), 0.1, rtol=1e-5, err_msg=name)
    assert agreed(state.metrics.first_nonfinite_leaf) == 4


@pytest.mark.parametrize("name", SPOTS)
def test_zero_stops_the_whole_step_on_every_device(wide_mesh, name):
    clip = gn.clip_by_global_norm(1.0, nonfinite="zero")
    [(updates, state)] = led(wide_mesh, clip, [spoiled(0, name, np.nan)])
    zeros = {leaf: np.zeros(size, np.float32) for leaf, size in SIZES.items()}
    chex.assert_trees_all_equal(jax.device_get(updates), zeros)
    assert agreed(state.metrics.nonfinite_count) == 1


def skipping(**how):
    return gn.skip_step(
        optax.sgd(0.1, momentum=0.9),
        gn.thresholds.rolling_sigma(3.0, window=4),
        **how,
    )


@pytest.mark.parametrize("name", SPOTS)
@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_a_spike_on_one_device_skips_the_step_on_all(name, value):
    mesh = mesh_of("Auto", (4, 2))
    steps = [spoiled(seed, None, None) for seed in range(3)]
    steps += [spoiled(3, name, value), spoiled(4, None, None)]
    assert_alike(mesh, skipping(), skipping(), steps)
    *_, (updates, state), _ = led(mesh, skipping(), steps)
    assert agreed(state.metrics.skipped)
    assert not any(np.any(x) for x in jax.device_get(jax.tree.leaves(updates)))


def test_a_large_loss_skips_the_step_on_every_device(wide_mesh):
    tx = gn.skip_step(optax.sgd(0.1), value_rule=2.0)

    def step(tx):
        def run(grads, state, params):
            loss = jax.lax.psum(jnp.sum(grads["rows"]), "d")
            return tx.update(grads, state, params, value=loss)

        return run

    small, large = arrays(0), arrays(1)
    small["rows"][:], large["rows"][:] = 0.01, 1.0
    (kept, _), (skipped, state) = led(wide_mesh, tx, [small, large], step)
    assert np.any(jax.device_get(kept["bias"]))
    assert agreed(state.metrics.num_skipped) == 1
    assert not np.any(jax.device_get(skipped["bias"]))


@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "drop"])
def test_what_a_clip_takes_away_comes_back_with_the_next_gradients(nonfinite):
    def tx(**how):
        return gn.with_residual(gn.clip_by_leaf_norm(1.0, nonfinite=nonfinite), **how)

    steps = [
        spoiled(0, None, None),
        spoiled(1, "square", np.nan),
        spoiled(2, "rows", np.inf),
        spoiled(3, None, None),
    ]
    for kind in ("Auto", "Explicit"):
        mesh = mesh_of(kind, (4, 2))
        assert_alike(mesh, tx(), tx(), steps)


@pytest.mark.parametrize("name", SPOTS)
def test_a_residual_is_kept_by_all_devices_or_by_none(wide_mesh, name):
    tx = gn.with_residual(gn.clip_by_global_norm(0.1))
    steps = [spoiled(0, None, None), spoiled(1, name, np.nan), arrays(2)]
    states = [state for _, state in led(wide_mesh, tx, steps)]
    for state in states:
        agreed([state.residual["bias"], state.residual["gain"]])
    residuals = [jax.device_get(state.residual) for state in states]
    chex.assert_trees_all_equal(residuals[1], residuals[0])
    assert np.any(residuals[2]["gain"] != residuals[1]["gain"])


def test_a_state_that_is_reset_inside_shard_map_starts_anew_everywhere(wide_mesh):
    def tx():
        return gn.reset_state_every(
            optax.chain(gn.adaclip(), optax.trace(0.9)), 2, warmup_steps=2
        )

    assert_alike(wide_mesh, tx(), tx(), [arrays(seed) for seed in range(4)])


def test_norms_that_are_given_are_taken_as_they_are(wide_mesh):
    clip = gn.clip_by_global_norm(1.0)

    def step(tx):
        def run(grads, state, params):
            return tx.update(grads, state, params, norms=gn.global_norm(grads))

        return run

    [(updates, state)] = led(wide_mesh, clip, [arrays(0)], step)
    [(want, alone)] = led_alone(clip, [arrays(0)])
    chex.assert_trees_all_close(jax.device_get(updates), want, rtol=1e-5)
    np.testing.assert_allclose(
        agreed(state.metrics.norms), alone.metrics.norms, rtol=2e-6
    )


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_watch_records_the_norms_of_the_whole_tree(wide_mesh, groups):
    def tx():
        inner = optax.chain(gn.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
        return gn.watch(inner, window=2, groups=groups)

    steps = [arrays(seed) for seed in range(3)]
    pairs = zip(led(wide_mesh, tx(), steps), led_alone(tx(), steps), strict=True)
    for (_, got), (_, want) in pairs:
        np.testing.assert_allclose(agreed(got.ring), want.ring, rtol=5e-6)
        assert agreed(got.rows) == want.rows


def test_watch_records_each_stacked_layer_of_a_leaf_that_is_split():
    specs = {"layers": P("d", None, "t"), "head": P("t")}
    random = np.random.default_rng(0)
    plain = {
        "layers": random.normal(size=(12, 2, 6)).astype(np.float32),
        "head": random.normal(size=6).astype(np.float32),
    }

    def tx(**how):
        return gn.watch(
            gn.clip_by_leaf_norm(1.0, stacked_axes={"layers": 0}, **how),
            window=2,
            stacked_axes={"layers": 0},
            **how,
        )

    _, want = tx().update(plain, tx().init(plain), plain)
    for kind, shape in (("Auto", (4, 2)), ("Explicit", (3, 2))):
        mesh = mesh_of(kind, shape)
        grads = put(mesh, plain, specs)
        state = tx(specs=specs).init(grads)
        run = mapped(tx(specs=specs).update, mesh, (specs, P(), specs), (specs, P()))
        _, got = run(grads, state, grads)
        assert got.ring.shape == want.ring.shape
        np.testing.assert_allclose(agreed(got.ring), want.ring, rtol=5e-6)
