"""A state is made where it stays: replicated, compiled for once, given away freely."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import gradnorm_jax as gn

from .meshes import agreed, mapped, mesh_of, put, state_specs

SPECS = {"b": P(), "layers": P("d", None, "t"), "rows": P("d"), "w": P("d", "t")}
SIZES = {"b": (5,), "layers": (24, 3, 4), "rows": (24,), "w": (24, 24)}
STEPS = 4
TRANSFORMATIONS = {
    "skip_step": lambda **how: gn.skip_step(
        optax.chain(gn.clip_by_global_norm(1.0, **how), optax.sgd(0.1, momentum=0.9)),
        gn.thresholds.rolling_sigma(6.0, window=4),
        **how,
    ),
    "adaclip": gn.adaclip,
    "adagc": lambda **how: gn.adagc(rearm_after=3, **how),
    "adaptive_grad_clip": lambda **how: gn.adaptive_grad_clip(0.1, **how),
    "aggc": lambda **how: gn.aggc({"w": "x", ".*": "y"}, low=0.5, high=2.0, **how),
    "autoclip": lambda **how: gn.autoclip(window=5, rearm_after=3, **how),
    "clip_by_global_norm": lambda **how: gn.clip_by_global_norm(1.0, **how),
    "clip_by_quantile": gn.clip_by_quantile,
    "clip_by_rolling_sigma": lambda **how: gn.clip_by_rolling_sigma(window=4, **how),
    "clip_by_second_moment": gn.clip_by_second_moment,
    "clip_by_stacked_norm": lambda **how: gn.clip_by_leaf_norm(
        1.0, stacked_axes={"layers": 0}, **how
    ),
    "reset_state_every": lambda **how: gn.reset_state_every(
        optax.chain(gn.adaclip(**how), optax.trace(0.9)), 2, warmup_steps=2
    ),
    "watch": lambda **how: gn.watch(
        optax.chain(gn.clip_by_global_norm(1.0, **how), optax.sgd(0.1, momentum=0.9)),
        window=3,
        **how,
    ),
    "with_residual": lambda **how: gn.with_residual(gn.clip_by_leaf_norm(1.0, **how)),
    "zclip": lambda **how: gn.zclip(granularity=gn.per_unit(), rearm_after=3, **how),
}
names = pytest.mark.parametrize("name", TRANSFORMATIONS)
COMPILED = "/jax/core/compile/backend_compile_duration"
compilations = []


@pytest.fixture(scope="module", autouse=True)
def listening():
    """Counts what XLA compiles: there is no public way to stop listening."""

    def listen(event, duration, **_):
        if event == COMPILED:
            compilations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)


def arrays(seed=0):
    random = np.random.default_rng(seed)
    return {
        name: random.normal(size=size).astype(np.float32)
        for name, size in SIZES.items()
    }


def shardings(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


@names
def test_init_places_the_state_on_the_mesh_of_the_parameters(wide_mesh, name):
    params = put(wide_mesh, arrays(), SPECS)
    state = TRANSFORMATIONS[name](specs=SPECS).init(params)

    def check(spec, part):
        wanted = jax.NamedSharding(wide_mesh, spec)
        for x in jax.tree.leaves(part):
            assert x.sharding.is_equivalent_to(wanted, x.ndim), (x.shape, x.sharding)
            assert x.sharding.device_set == set(wide_mesh.devices.flat)

    jax.tree.map(check, state_specs(state, params, SPECS), state)


@names
def test_four_steps_compile_once_and_leave_the_state_where_it_was(wide_mesh, name):
    mesh = wide_mesh
    tx, traced = TRANSFORMATIONS[name](), []

    def step(params, state, grads):
        traced.append(1)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = put(mesh, arrays(9), SPECS)
    state = tx.init(params)
    out = (shardings(params), shardings(state))
    run = jax.jit(step, donate_argnums=(0, 1), out_shardings=(out[0], None))
    steps = [put(mesh, arrays(seed), SPECS) for seed in range(STEPS)]
    jax.block_until_ready((params, state, steps))
    before = len(compilations)
    for grads in steps:
        params, state = jax.block_until_ready(run(params, state, grads))
    assert len(compilations) - before == 1
    assert len(traced) == 1
    same = jax.tree.map(
        lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim),
        (params, state),
        out,
    )
    assert all(jax.tree.leaves(same)), same


@names
def test_inside_shard_map_four_steps_compile_once(wide_mesh, name):
    mesh = wide_mesh
    tx, traced = TRANSFORMATIONS[name](specs=SPECS), []

    def step(params, state, grads):
        traced.append(1)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = put(mesh, arrays(9), SPECS)
    state = tx.init(params)
    placed, specs = shardings(state), state_specs(state, params, SPECS)
    run = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(SPECS, specs, SPECS), out_specs=(SPECS, specs)
        ),
        donate_argnums=(0, 1),
    )
    steps = [put(mesh, arrays(seed), SPECS) for seed in range(STEPS)]
    jax.block_until_ready((params, state, steps))
    before = len(compilations)
    for grads in steps:
        params, state = jax.block_until_ready(run(params, state, grads))
    assert len(compilations) - before == 1
    same = jax.tree.map(
        lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim),
        state,
        placed,
    )
    assert all(jax.tree.leaves(same)), same


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_watched_clip_and_adam_compile_once_with_a_mesh_that_is_set(kind):
    mesh = mesh_of(kind, (4, 2))
    tx = gn.watch(optax.chain(gn.zclip(), optax.adam(1e-3)), window=3)
    with jax.set_mesh(mesh):
        params = put(mesh, arrays(9), SPECS)
        state = tx.init(params)
        run = jax.jit(tx.update, donate_argnums=1)
        steps = [put(mesh, arrays(seed), SPECS) for seed in range(STEPS)]
        jax.block_until_ready((params, state, steps))
        before = len(compilations)
        for grads in steps:
            _, state = jax.block_until_ready(run(grads, state, params))
    assert len(compilations) - before == 1
    assert agreed(state.rows) == STEPS


@names
def test_a_state_made_inside_shard_map_rides_in_a_scan(name):
    for mesh in (mesh_of("Auto", (3, 2)), mesh_of("Explicit", (4, 2))):
        tx = TRANSFORMATIONS[name](specs=SPECS)

        def run(params, grads):
            def step(state, _):
                return tx.update(grads, state, params)[1], None  # noqa: B023

            state = tx.init(params)  # noqa: B023
            return jax.lax.scan(step, state, length=2)[0]

        params = put(mesh, arrays(), SPECS)
        specs = state_specs(tx.init(params), params, SPECS)
        mapped(run, mesh, (SPECS, SPECS), specs).lower(params, params)


@names
def test_a_state_made_eagerly_is_that_of_the_parameters_of_one_device(name, wide_mesh):
    tx, plain = TRANSFORMATIONS[name](), arrays()
    state = tx.init(put(wide_mesh, plain, SPECS))
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(tx.init(plain)))


@names
def test_init_under_jit_and_of_shapes_makes_the_same_state(name):
    mesh = mesh_of("Explicit", (4, 2))
    tx, params = TRANSFORMATIONS[name](), put(mesh, arrays(), SPECS)
    eager = tx.init(params)
    with jax.set_mesh(mesh):
        jitted = jax.jit(tx.init)(params)
    chex.assert_trees_all_equal(jax.device_get(jitted), jax.device_get(eager))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(lambda: tx.init(shapes)), eager
    )


def test_parameters_on_one_device_keep_the_state_there():
    device = jax.devices()[3]
    params = jax.device_put(arrays(), device)
    tx = gn.clip_by_global_norm(1.0)
    _, state = jax.jit(tx.update)(params, tx.init(params))
    for x in jax.tree.leaves(state):
        assert x.devices() == {device}


def test_numpy_parameters_make_a_state_of_jax_arrays():
    state = gn.watch(gn.zclip(), window=2).init(arrays())
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


def test_no_two_arrays_of_a_state_share_a_buffer_on_any_device(wide_mesh):
    params = put(wide_mesh, arrays(), SPECS)
    state = gn.watch(gn.zclip(), window=2).init(params)
    pointers = [
        shard.data.unsafe_buffer_pointer()
        for x in jax.tree.leaves(state)
        for shard in x.addressable_shards
        if shard.data.size
    ]
    assert len(set(pointers)) == len(pointers)


def test_the_record_is_read_from_a_state_on_a_mesh(wide_mesh):
    tx = gn.clip_by_global_norm(1.0)
    params = put(wide_mesh, arrays(), SPECS)
    _, state = jax.jit(tx.update)(params, tx.init(params))
    norm = float(
        jnp.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in arrays().values()))
    )
    assert gn.scalars(state)["grad_norm/global_preclip"] == pytest.approx(
        norm, rel=2e-6
    )
