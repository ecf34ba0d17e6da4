"""A vmapped or a pmapped axis is summed over where it is named, and nowhere else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

import gradnorm_jax as gn

from ..references import norms as reference
from .meshes import agreed, mapped, mesh_of, put, replicate

pytestmark = pytest.mark.usefixtures("strict")

SPECS = {"a": P(None, "d"), "b": P(None, "t", "d"), "c": P()}
EXAMPLES = 4


def batch():
    """Gradients with examples along axis 0, which no spec splits."""
    random = np.random.default_rng(0)
    sizes = {"a": (24, 2), "b": (4, 24), "c": (5,)}
    return {
        name: random.normal(size=(EXAMPLES, *size)).astype(np.float32)
        for name, size in sizes.items()
    }


def each_example(plain):
    return [reference.norm([x[k] for x in plain.values()]) for k in range(EXAMPLES)]


@pytest.mark.parametrize("axis_name", [None, "examples"])
def test_vmap_measures_each_example(mesh, axis_name):
    plain = batch()
    options = {} if axis_name is None else {"axis_name": axis_name}
    norms = jax.jit(jax.vmap(gn.global_norm, **options))(put(mesh, plain, SPECS))
    np.testing.assert_allclose(norms, each_example(plain), rtol=2e-6)


@pytest.mark.parametrize("names", ["examples", ("examples",)])
@pytest.mark.parametrize("order", [1, 2, 3, np.inf, "rms"])
def test_a_vmapped_axis_that_is_named_is_summed_over(names, order):
    plain = batch()
    measure = functools.partial(gn.global_norm, ord=order, axis_names=names)
    norms = jax.jit(jax.vmap(measure, axis_name="examples"))(plain)
    want = reference.norm(plain.values(), order)
    np.testing.assert_allclose(norms, [want] * EXAMPLES, rtol=2e-6)


def test_a_named_vmapped_axis_is_summed_over_on_a_mesh_too(mesh):
    plain = batch()
    measure = functools.partial(gn.global_norm, axis_names="examples")
    grads = put(mesh, plain, SPECS)
    norms = jax.jit(jax.vmap(measure, axis_name="examples"))(grads)
    want = reference.norm(plain.values())
    np.testing.assert_allclose(norms, [want] * EXAMPLES, rtol=2e-6)


@pytest.mark.parametrize("split", [False, True])
def test_a_clip_under_vmap_bounds_each_example(mesh, split):
    plain = batch()
    specs = {name: P("d") for name in plain} if split else SPECS
    tx = gn.clip_by_global_norm(1.0)
    run = jax.jit(jax.vmap(lambda grads: tx.update(grads, tx.init(grads))[0]))
    clipped = jax.tree.map(np.asarray, run(put(mesh, plain, specs)))
    np.testing.assert_allclose(each_example(clipped), np.ones(EXAMPLES), rtol=2e-6)


def test_a_clip_under_a_named_vmap_bounds_all_examples_together():
    plain = batch()
    clip = gn.clip_by_global_norm(1.0, axis_names="examples")

    def run(grads):
        return clip.update(grads, clip.init(grads))

    clipped, state = jax.jit(jax.vmap(run, axis_name="examples"))(plain)
    norm = reference.norm(plain.values())
    np.testing.assert_allclose(state.metrics.norms, [norm] * EXAMPLES, rtol=2e-6)
    np.testing.assert_allclose(clipped["a"], plain["a"] / norm, rtol=1e-5)


@pytest.mark.parametrize("axis_name", [None, "examples"])
def test_vmap_inside_shard_map_measures_each_example_over_all_devices(mesh, axis_name):
    plain = batch()
    options = {} if axis_name is None else {"axis_name": axis_name}
    run = mapped(jax.vmap(gn.global_norm, **options), mesh, (SPECS,))
    norms = agreed(run(put(mesh, plain, SPECS)))
    np.testing.assert_allclose(norms, each_example(plain), rtol=2e-6)


def a_sum_over_examples_too(check_vma):
    mesh, spec = mesh_of("Auto", (3, 2)), P(None, "d", "t")
    plain = np.random.default_rng(0).normal(size=(EXAMPLES, 6, 4)).astype(np.float32)
    measure = functools.partial(gn.global_norm, axis_names=("examples", "d", "t"))
    run = mapped(
        jax.vmap(measure, axis_name="examples"), mesh, spec, check_vma=check_vma
    )
    return plain, run(put(mesh, {"x": plain}, {"x": spec})["x"])


def test_a_vmapped_axis_that_is_named_inside_shard_map_is_summed_over():
    plain, norms = a_sum_over_examples_too(check_vma=False)
    want = reference.norm([plain])
    np.testing.assert_allclose(agreed(norms), [want] * EXAMPLES, rtol=2e-6)


def test_it_is_refused_where_jax_cannot_sum_over_it():
    with pytest.raises(gn.DistributedNormError, match=r"\('examples',\) of `jax.vmap`"):
        a_sum_over_examples_too(check_vma=True)


def test_vmap_of_shard_map_measures_each_example_over_all_devices(mesh):
    plain = batch()
    inner = {name: P(*spec[1:]) for name, spec in SPECS.items()}
    run = jax.jit(
        jax.vmap(
            jax.shard_map(gn.global_norm, mesh=mesh, in_specs=(inner,), out_specs=P())
        )
    )
    norms = run(put(mesh, plain, SPECS))
    np.testing.assert_allclose(norms, each_example(plain), rtol=2e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_an_axis_that_is_not_named_holds_models_of_their_own(mesh, check_vma):
    random = np.random.default_rng(0)
    specs = {"a": P("d", None, "t"), "c": P("d", "t")}
    if check_vma:
        specs["b"] = P("d")
    plain = {name: random.normal(size=(24, 4, 6)).astype(np.float32) for name in specs}

    def run(grads):
        norm = gn.global_norm(grads, axis_names="t")
        leaves = gn.leaf_norms(grads, axis_names="t")
        return norm[None], jax.tree.map(lambda x: x[None], leaves)

    norms, leaves = mapped(run, mesh, (specs,), P("d"), check_vma=check_vma)(
        put(mesh, plain, specs)
    )
    models = mesh.shape["d"]
    split = {name: np.split(x, models) for name, x in plain.items()}
    want = [reference.norm([x[k] for x in split.values()]) for k in range(models)]
    np.testing.assert_allclose(norms, want, rtol=2e-6)
    for name, blocks in split.items():
        want = [reference.norm([block]) for block in blocks]
        np.testing.assert_allclose(leaves[name], want, rtol=2e-6)


def a_device_each(plain):
    return {name: np.stack([x] * jax.device_count()) for name, x in plain.items()}


def average_and_measure(grads, **how):
    return gn.global_norm(jax.lax.pmean(grads, "i"), **how)


def test_pmap_is_refused_as_nothing_tells_what_differs():
    plain = a_device_each({"w": np.ones(3, np.float32)})
    with pytest.raises(gn.DistributedNormError, match=r"(?s)'i'.*axis_names=\(\)"):
        jax.pmap(average_and_measure, axis_name="i")(plain)


def test_pmap_is_right_with_empty_axis_names_once_the_gradients_are_averaged():
    random = np.random.default_rng(0)
    plain = {"w": random.normal(size=(jax.device_count(), 3)).astype(np.float32)}
    norms = jax.pmap(
        functools.partial(average_and_measure, axis_names=()), axis_name="i"
    )(plain)
    want = reference.norm([np.mean(plain["w"].astype(np.float64), axis=0)])
    np.testing.assert_allclose(norms, [want] * jax.device_count(), rtol=2e-6)
    assert len(set(np.asarray(norms).tolist())) == 1


@pytest.mark.parametrize("how", [{"axis_names": "i"}, {"specs": P("i")}])
def test_pmap_sums_over_its_axis_where_every_leaf_is_a_shard(how):
    random = np.random.default_rng(0)
    shape = (jax.device_count(), 3)
    plain = {"w": random.normal(size=shape).astype(np.float32)}
    norms = jax.pmap(functools.partial(gn.global_norm, **how), axis_name="i")(plain)
    want = reference.norm(plain.values())
    np.testing.assert_allclose(norms, [want] * jax.device_count(), rtol=2e-6)


def test_a_clip_in_pmap_keeps_the_parameters_equal():
    random = np.random.default_rng(0)
    plain = {"w": random.normal(size=(jax.device_count(), 3)).astype(np.float32)}
    clip = gn.clip_by_global_norm(0.1, axis_names=())

    def step(grads):
        averaged = jax.lax.pmean(grads, "i")
        return clip.update(averaged, clip.init(grads), averaged)[0]

    updates = np.asarray(jax.pmap(step, axis_name="i")(plain)["w"])
    assert {row.tobytes() for row in updates} == {updates[0].tobytes()}
    np.testing.assert_allclose(np.linalg.norm(updates[0]), 0.1, rtol=1e-5)


def test_gathered_gradients_count_once_for_each_device_and_cannot_be_told_apart():
    """The type of an `all_gather` says "may differ", though its values are equal."""
    mesh = mesh_of("Explicit", (8, 1))
    plain = np.random.default_rng(0).normal(size=24).astype(np.float32)

    def run(shard, to):
        return gn.global_norm(jax.lax.all_gather(shard, "d", tiled=True, to=to))

    x = put(mesh, {"x": plain}, {"x": P("d")})["x"]
    norm = {
        to: agreed(mapped(functools.partial(run, to=to), mesh, P("d"))(x))
        for to in ("varying", "invarying")
    }
    want = reference.norm([plain])
    np.testing.assert_allclose(norm["invarying"], want, rtol=2e-6)
    np.testing.assert_allclose(norm["varying"], np.sqrt(8) * want, rtol=2e-6)


def test_gathered_gradients_are_caught_where_the_parameters_are_given():
    mesh = mesh_of("Explicit", (8, 1))
    clip = gn.clip_by_global_norm(1.0)

    def run(params, shard):
        grads = {"w": jax.lax.all_gather(shard, "d", tiled=True, to="varying")}
        return clip.update(grads, clip.init(params), params)[0]

    step = mapped(run, mesh, (P(), P("d")), P("d"))
    with pytest.raises(gn.DistributedNormError, match="'w' differs across mesh axes"):
        step(
            replicate(mesh, {"w": jnp.ones(24)}),
            put(mesh, {"x": np.ones(24, np.float32)}, {"x": P("d")})["x"],
        )


@pytest.mark.xfail(reason="a type says what may differ, not what does", strict=True)
def test_gathered_gradients_count_once():
    mesh = mesh_of("Explicit", (8, 1))
    run = mapped(
        lambda x: gn.global_norm(jax.lax.all_gather(x, "d", tiled=True)), mesh, P("d")
    )
    x = put(mesh, {"x": np.ones(24, np.float32)}, {"x": P("d")})["x"]
    np.testing.assert_allclose(agreed(run(x)), np.sqrt(24), rtol=2e-6)
