"""Replicated parameters stay replicated, and training is that of one device."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import gradnorm_jax as gn

from .meshes import agreed, mapped, mesh_of, put, replicate, state_specs

STEPS = 100
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
    "gain": (4,),
    "rows": (24, 2),
    "square": (24, 24),
}
DATA = P("d")


def start():
    random = np.random.default_rng(0)
    params = {
        name: random.normal(size=size).astype(np.float32)
        for name, size in SIZES.items()
    }
    return params, random.normal(size=(24, 4)).astype(np.float32)


def gradients(params, data, mean):
    """Of a replicated affine layer on split data, and of four wells that are split."""
    error = data * params["gain"] + params["bias"] - 1
    wells = ("columns", "rows", "square")
    return {name: jnp.sin(params[name]) for name in wells} | {
        "bias": mean(jnp.mean(error, axis=0)),
        "gain": mean(jnp.mean(error * data, axis=0)),
    }


def step_of(tx, mean):
    def step(params, state, data):
        grads = gradients(params, data, mean)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def scanned(step):
    def run(params, state, data):
        def body(carry, _):
            return step(*carry, data), None

        return jax.lax.scan(body, (params, state), length=STEPS)[0]

    return run


OPTIMIZERS = {
    "leaf by leaf, skipping": lambda **how: gn.skip_step(
        optax.chain(gn.adagc(warmup_steps=3, **how), optax.sgd(0.1, momentum=0.9)),
        gn.thresholds.rolling_sigma(2.0, window=4),
        **how,
    ),
    "sgd": lambda **how: optax.chain(
        gn.clip_by_global_norm(0.5, **how), optax.sgd(0.1)
    ),
    "adam, watched": lambda **how: gn.watch(
        optax.chain(gn.zclip(0.5, warmup_steps=2, **how), optax.adam(1e-2)),
        window=8,
        **how,
    ),
}
FINAL = {}


def alone(name):
    """The parameters and the state after all steps on one device."""
    if name not in FINAL:
        params, data = start()
        tx = OPTIMIZERS[name]()
        run = jax.jit(scanned(step_of(tx, mean=lambda x: x)))
        FINAL[name] = jax.device_get(run(params, tx.init(params), data))
    return FINAL[name]


def placed(mesh, tx):
    params, data = start()
    params = put(mesh, params, SPECS)
    state = tx.init(params)
    data = jax.device_put(data, jax.NamedSharding(mesh, DATA))
    return params, state, data, state_specs(state, params, SPECS)


def average(x):
    return jax.lax.pmean(x, "d")


def check(params, state, name):
    agreed([params["bias"], params["gain"]])
    agreed(gn.find(state, gn.ClipState))
    agreed([(x.ring, x.rows) for x in gn.find(state, gn.WatchState)])
    agreed([(x.memory, x.metrics) for x in gn.find(state, gn.SkipState)])
    want_params, want_state = alone(name)
    # A sum in another order is wrong in another digit, and 100 steps make it larger.
    chex.assert_trees_all_close(jax.device_get(params), want_params, atol=1e-4)
    for kind in (gn.ClipMetrics, gn.SkipMetrics):
        for got, want in zip(
            gn.find(state, kind), gn.find(want_state, kind), strict=True
        ):
            chex.assert_trees_all_close(jax.device_get(got), want, rtol=1e-3)
    for got, want in zip(
        gn.find(state, gn.WatchState), gn.find(want_state, gn.WatchState), strict=True
    ):
        np.testing.assert_allclose(got.ring, want.ring, rtol=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_100_steps_in_a_scan_inside_shard_map(wide_mesh, name):
    mesh = wide_mesh
    tx = OPTIMIZERS[name]()
    params, state, data, specs = placed(mesh, tx)
    run = scanned(step_of(tx, average))
    compiled = mapped(run, mesh, (SPECS, specs, DATA), (SPECS, specs))
    check(*compiled(params, state, data), name)


def test_100_steps_on_a_mesh_of_any_shape(mesh):
    tx = OPTIMIZERS["sgd"]()
    params, state, data, specs = placed(mesh, tx)
    run = scanned(step_of(tx, average))
    compiled = mapped(run, mesh, (SPECS, specs, DATA), (SPECS, specs))
    check(*compiled(params, state, data), "sgd")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_100_steps_in_a_scan_where_nothing_is_checked(name):
    mesh, tx = mesh_of("Auto", (3, 2)), OPTIMIZERS[name](specs=SPECS)
    params, state, data, specs = placed(mesh, tx)
    run = scanned(step_of(tx, average))
    in_specs, out_specs = (SPECS, specs, DATA), (SPECS, specs)
    compiled = mapped(run, mesh, in_specs, out_specs, check_vma=False)
    check(*compiled(params, state, data), name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_100_steps_one_call_each(name):
    mesh, tx = mesh_of("Explicit", (4, 2)), OPTIMIZERS[name]()
    params, state, data, specs = placed(mesh, tx)
    step = mapped(step_of(tx, average), mesh, (SPECS, specs, DATA), (SPECS, specs))
    for _ in range(STEPS):
        # Programs that wait for one another on few cores do so forever.
        params, state = jax.block_until_ready(step(params, state, data))
    check(params, state, name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_100_steps_under_jit(name):
    mesh, tx = mesh_of("Explicit", (3, 2)), OPTIMIZERS[name]()
    params, state, data, _ = placed(mesh, tx)
    run = jax.jit(scanned(step_of(tx, mean=lambda x: x)))
    params, state = run(params, state, data)
    check(replicate_again(mesh, params), state, name)


def replicate_again(mesh, params):
    """Under jit the compiler chooses where outputs go: none is asked for here."""
    names = ("bias", "gain")
    return params | {name: replicate(mesh, params[name]) for name in names}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_100_steps_in_which_one_axis_is_manual(name):
    mesh, tx = mesh_of("Auto", (4, 2)), OPTIMIZERS[name]()
    params, state, data, _ = placed(mesh, tx)
    one = {"columns": P(), "square": P("d")}
    restricted = state_specs(state, params, SPECS | one)
    run = mapped(
        scanned(step_of(tx, average)),
        mesh,
        (SPECS | one, restricted, DATA),
        (SPECS | one, restricted),
        axis_names={"d"},
    )
    check(*run(params, state, data), name)
