"""Clips on a mesh, in the wrappers of Optax, in ensembles, with states made inside."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import gradnorm_jax as gn

from .meshes import mesh_of

MESH = mesh_of("Auto", (4, 2))
SPECS = {"enc": {"w": P("d", "t"), "b": P()}, "head": P("d")}


def grads():
    random = np.random.default_rng(0)
    shapes = {"enc": {"w": (8, 6), "b": (3,)}, "head": (16,)}
    return jax.tree.map(
        lambda shape: random.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


WRAPPED = {
    "partition": lambda specs: optax.partition(
        {
            "a": gn.adaptive_grad_clip(0.1, specs=specs),
            "b": gn.clip_by_global_norm(1.0, specs=specs),
        },
        {"enc": "a", "head": "b"},
    ),
    "masked": lambda specs: optax.masked(
        gn.clip_by_global_norm(1.0, specs=specs), {"enc": False, "head": True}
    ),
}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", WRAPPED)
def test_specs_of_the_whole_tree_serve_a_clip_of_a_part_of_it(name, check_vma):
    tree = grads()
    alone = WRAPPED[name](None)
    expected, _ = alone.update(tree, alone.init(tree), tree)

    def update(tree):
        tx = WRAPPED[name](SPECS)
        return tx.update(tree, tx.init(tree), tree)[0]

    mapped = jax.shard_map(
        update, mesh=MESH, in_specs=(SPECS,), out_specs=SPECS, check_vma=check_vma
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
        jax.jit(mapped)(tree),
        expected,
    )


ENSEMBLES = {
    "constant": lambda **of: gn.clip_by_global_norm(1.0, **of),
    "zero": lambda **of: gn.clip_by_leaf_norm(1.0, nonfinite="zero", **of),
    "zclip": gn.zclip,
    "skip_step": lambda **of: gn.skip_step(optax.adam(0.1), 9.0, **of),
    "watch": lambda **of: gn.watch(gn.clip_by_global_norm(1.0, **of), **of),
}


@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_ensemble_rides_in_a_scan(name):
    tx = ENSEMBLES[name](axis_names="d")

    def run(x):
        def step(state, _):
            updates, state = tx.update(x, state, x)
            return state, updates

        return jax.lax.scan(step, tx.init(x), length=3)[1]

    x = np.arange(1, 33, dtype=np.float32).reshape(2, 16)
    mapped = jax.shard_map(
        run, mesh=MESH, in_specs=P("t", "d"), out_specs=P(None, "t", "d")
    )
    alone = ENSEMBLES[name]()
    for k, updates in enumerate(np.asarray(jax.jit(mapped)(x)).transpose(1, 0, 2)):
        state = alone.init(x[k])
        for found in updates:
            expected, state = alone.update(x[k], state, x[k])
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [gn.autoclip, lambda: gn.watch(optax.sgd(1.0))])
def test_a_state_may_be_made_inside_of_parameters_that_are_outside(make):
    params = {"w": jax.device_put(jnp.ones(8), jax.NamedSharding(MESH, P()))}
    tx = make()

    def update(grads):
        return tx.update(grads, tx.init(params), params)[0]

    mapped = jax.shard_map(update, mesh=MESH, in_specs=P(), out_specs=P())
    updates = jax.jit(mapped)({"w": jnp.ones(8)})
    assert np.all(np.isfinite(updates["w"]))


@pytest.mark.parametrize("way", ["jit", "shard_map"])
def test_a_parameter_that_no_loss_depends_on_leaves_the_norm_as_it_is(way):
    tx = gn.clip_by_global_norm(1.0)

    def update(params):
        slopes = jax.grad(lambda p: jnp.sum(p["a"] ** 2) / 2)(params)
        return tx.update(slopes, tx.init(params))[1].metrics.norms

    params = {"a": np.arange(8, dtype=np.float32), "spare": np.ones(8, np.float32)}
    if way == "shard_map":
        update = jax.shard_map(update, mesh=MESH, in_specs=P(), out_specs=P())
    found = jax.jit(update)(params)
    np.testing.assert_allclose(found, np.linalg.norm(params["a"]), rtol=2e-6)
