"""Where a norm cannot be known it is refused, and each way out that is named works."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import gradnorm_jax as gn

from .meshes import agreed, mapped, mesh_of, put, replicate

SPECS = {"b": P(), "w": P("d", "t")}
TREE = {"b": np.ones(24, np.float32), "w": np.ones((24, 24), np.float32)}
NORM = np.sqrt(24 + 24 * 24)
WHOLE = {"w": (0, 1)}


def clip_with(make):
    def run(grads, **how):
        clip = make(**how)
        return clip.update(grads, clip.init(grads), grads)[1]

    return run


MEASURES = {
    "global_norm": gn.global_norm,
    "leaf_norms": gn.leaf_norms,
    "group_norms": lambda x, **how: gn.group_norms(x, {".*": "all"}, **how),
    "unit_norms": lambda x, **how: gn.unit_norms(x, axes=WHOLE, **how),
    "unitwise_norm": lambda x, **how: gn.unitwise_norm(x["w"], (0, 1), **how),
    "measure": lambda x, **how: gn.per_leaf().measure(x, **how),
}
TRANSFORMS = {
    "clip_by_norm": lambda **how: gn.clip_by_norm(1.0, **how),
    "clip_by_global_norm": lambda **how: gn.clip_by_global_norm(1.0, **how),
    "adaptive_grad_clip": lambda **how: gn.adaptive_grad_clip(0.1, axis=WHOLE, **how),
    "autoclip": lambda **how: gn.autoclip(window=3, **how),
    "zclip": gn.zclip,
    "adagc": gn.adagc,
    "skip_step": lambda **how: gn.skip_step(optax.sgd(0.1), **how),
    "watch": lambda **how: gn.watch(optax.sgd(0.1), window=2, **how),
}
measures = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
transforms = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
refused = functools.partial(pytest.raises, gn.DistributedNormError)


def test_the_error_is_a_value_error_and_auto_is_no_axis():
    assert issubclass(gn.DistributedNormError, ValueError)
    assert gn.AUTO is not None
    assert gn.AUTO != ()


def trace(fun, mesh, *specs, **options):
    """Traces a function inside shard_map: what is refused is refused then."""
    grads = put(mesh, TREE, SPECS)
    run = mapped(fun, mesh, specs, P(), **options)
    return run.lower(*[grads] * len(specs))


UNTRACKED = r"(?s)\('d', 't'\).*does not track.*check_vma=True.*axis_names=\(\).*specs"


@measures
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_measure_is_refused_where_nothing_tells_what_differs(kind, measure):
    with refused(match=UNTRACKED):
        trace(measure, mesh_of(kind), SPECS, check_vma=False)


@pytest.mark.parametrize("name", ["global_norm", "leaf_norms", "group_norms"])
def test_that_refusal_names_the_measure_the_axes_a_leaf_and_the_ways_out(name):
    def measure_one(grads):
        return MEASURES[name]({"dense": {"w": grads["w"]}})

    match = UNTRACKED.replace("track.*", "track.*'dense/w'.*").replace(
        "(?s)", f"(?s){name}.*"
    )
    with refused(match=match):
        trace(measure_one, mesh_of(), SPECS, check_vma=False)


@transforms
def test_a_transformation_is_refused_where_nothing_tells_what_differs(make):
    with refused(match=UNTRACKED.replace("track.*", "track.*'[bw]'.*")):
        trace(clip_with(make), mesh_of(), SPECS, check_vma=False)


@transforms
def test_its_ways_out_work(make, wide_mesh):
    alone = make()
    want = alone.update(TREE, alone.init(TREE), TREE)[1]
    grads = put(wide_mesh, TREE, SPECS)
    with_types = mapped(clip_with(make), wide_mesh, (SPECS,))
    with_specs = functools.partial(clip_with(make), specs=SPECS)
    with_specs = mapped(with_specs, wide_mesh, (SPECS,), check_vma=False)
    for run in (with_types, with_specs):
        for x, y in zip(*map(jax.tree.leaves, (agreed(run(grads)), want)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5)
    replicated = functools.partial(clip_with(make), axis_names=())
    whole = put(wide_mesh, TREE, {name: P() for name in TREE})
    got = agreed(mapped(replicated, wide_mesh, (P(),), check_vma=False)(whole))
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


PER_REPLICA = r"gradient 'w' differs across mesh axes \('d',\).*parameter.*pmean"


def forgotten(make, mesh, *, averaged=False):
    """One step on gradients of each device's own examples."""
    tx = make()

    def step(params, x):
        own = jax.lax.pcast(params, "d", to="varying")
        grads = jax.grad(lambda p: jnp.mean((x @ p["w"]) ** 2))(own)
        if averaged:
            grads = jax.lax.pmean(grads, "d")
        return tx.update(grads, tx.init(params), params)[1]

    params, examples = replicate(mesh, {"w": jnp.ones((24, 2))}), jnp.ones((24, 24))
    run = mapped(step, mesh, (P(), P("d")), P())
    return run.lower(params, place(mesh, examples, P("d")))


def place(mesh, x, spec):
    return jax.device_put(x, jax.NamedSharding(mesh, spec))


@transforms
def test_a_gradient_that_was_not_averaged_is_refused_by_name(make):
    for kind in ("Auto", "Explicit"):
        with refused(match=PER_REPLICA):
            forgotten(make, mesh_of(kind))


def test_so_it_is_where_its_units_are_unknown_too():
    with refused(match=PER_REPLICA):
        forgotten(lambda: gn.adaptive_grad_clip(0.1), mesh_of())


@transforms
def test_a_gradient_that_was_averaged_is_not(make):
    forgotten(make, mesh_of(), averaged=True)


def test_a_gradient_that_differs_over_models_of_their_own_is_not():
    for name, make in TRANSFORMS.items():
        tx = make(axis_names="t")

        def step(params, x):
            own = jax.lax.pcast(params, "d", to="varying")
            grads = jax.tree.map(lambda p: p * jnp.sum(x), own)
            updates, _ = tx.update(grads, tx.init(own), params)  # noqa: B023
            return updates

        run = mapped(step, mesh_of(), (P(), P("d")), P("d"))
        run.lower({"w": jnp.ones((24, 2))}, jnp.ones(24))
        assert name


def test_gradients_that_vary_where_the_parameter_does_too_are_taken():
    clip = gn.clip_by_global_norm(1.0)
    trace(lambda x, p: clip.update(x, clip.init(p), p)[1], mesh_of(), SPECS, SPECS)


UNREDUCED = r"'w' is unreduced over \('d',\).*psum"


def pending(params, x):
    """A gradient whose sum over "d" JAX has put off."""
    own = jax.lax.pcast(params, "d", to="reduced")
    return jax.grad(lambda p: jnp.sum(p["w"] * jnp.sum(x)))(own)


def inputs_of_pending(mesh):
    params = replicate(mesh, {"w": jnp.ones((4, 2))})
    return params, place(mesh, jnp.ones(24), P("d"))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@measures
def test_a_measure_of_a_pending_sum_is_refused(kind, measure):
    def run(params, x):
        return measure(pending(params, x))

    mesh = mesh_of(kind)
    compiled = mapped(run, mesh, (P(), P("d")))
    with refused(match=UNREDUCED.replace("'w' ", "")):
        compiled.lower(*inputs_of_pending(mesh))


@transforms
def test_a_transformation_of_a_pending_sum_is_refused_by_name(make):
    tx = make()

    def run(params, x):
        return tx.update(pending(params, x), tx.init(params), params)[1]

    mesh = mesh_of()
    compiled = mapped(run, mesh, (P(), P("d")))
    with refused(match=UNREDUCED):
        compiled.lower(*inputs_of_pending(mesh))


def test_its_sum_is_measured():
    def run(params, x):
        return gn.global_norm(jax.lax.psum(pending(params, x), "d"))

    mesh = mesh_of("Explicit")
    norm = agreed(mapped(run, mesh, (P(), P("d")))(*inputs_of_pending(mesh)))
    np.testing.assert_allclose(norm, 24 * np.sqrt(8), rtol=2e-6)


def test_under_jit_a_pending_sum_of_an_explicit_mesh_is_refused_too():
    mesh = mesh_of("Explicit")

    def run(x):
        out = jax.NamedSharding(mesh, P(unreduced={"d"}))
        pending = jnp.einsum("i,ij->j", x, x[:, None], out_sharding=out)
        return gn.global_norm({"w": pending})

    x = jax.device_put(np.ones(24, np.float32), jax.NamedSharding(mesh, P("d")))
    with refused(match=UNREDUCED):
        jax.jit(run)(x)


MISMATCH = r"specs.*'w'.*split over {}.*varies over {}"
WRONG = {
    r"\(\)": {"b": P(), "w": P()},
    r"\('d',\)": {"b": P(), "w": P("d")},
    r"\('t',\)": {"b": P(), "w": P(None, "t")},
}


@pytest.mark.parametrize("said", WRONG)
@measures
def test_specs_that_say_another_thing_than_the_types_are_refused(measure, said):
    specs = WRONG[said]
    if measure is MEASURES["unitwise_norm"]:
        specs = specs["w"]
    match = MISMATCH.format(said, r"\('d', 't'\)")
    if measure is MEASURES["unitwise_norm"]:
        match = match.replace("'w'.*", "")
    with refused(match=match):
        trace(functools.partial(measure, specs=specs), mesh_of(), SPECS)


@transforms
def test_so_are_those_of_a_transformation(make):
    run = clip_with(functools.partial(make, specs={"b": P("d"), "w": P("d", "t")}))
    match = MISMATCH.format(r"\('d',\)", r"\(\)").replace("'w'", "'b'")
    with refused(match=match):
        trace(run, mesh_of(), SPECS)


SPLIT = r"'w' is split over mesh axes \('d',\).*along which.*specs"
LAYERS = {"w": 0}
OF_PARTS = {
    "unit_norms": gn.unit_norms,
    "per_unit": gn.per_unit().measure,
    "leaf_norms": functools.partial(gn.leaf_norms, stacked_axes=LAYERS),
    "per_leaf": gn.per_leaf(stacked_axes=LAYERS).measure,
    "clip_by_unit_norm": clip_with(lambda: gn.clip_by_unit_norm(1.0)),
    "clip_by_leaf_norm": clip_with(
        lambda: gn.clip_by_leaf_norm(1.0, stacked_axes=LAYERS)
    ),
    "adaptive_grad_clip": clip_with(lambda: gn.adaptive_grad_clip(0.1)),
    "clip_by_second_moment": clip_with(gn.clip_by_second_moment),
    "watch": clip_with(lambda: gn.watch(optax.sgd(1.0), stacked_axes=LAYERS)),
}


@pytest.mark.parametrize("measure", OF_PARTS.values(), ids=OF_PARTS)
def test_parts_of_a_split_leaf_are_refused_without_specs(measure):
    specs = {"a": P(), "w": P("d")}
    grads = {"a": jnp.ones(24), "w": jnp.ones((24, 5))}
    compiled = mapped(measure, mesh_of(), (specs,), P("d"))
    with refused(match=SPLIT):
        compiled.lower(grads)


def test_so_are_those_of_a_single_array():
    compiled = mapped(gn.unitwise_norm, mesh_of(), P("d"), P("d"))
    with refused(match=SPLIT.replace("'w'", "")):
        compiled.lower(jnp.ones((24, 5)))


UNBOUND = r"axis_names=\('d',\).*bound"


@pytest.mark.parametrize("names", ["d", ("d",)])
@measures
def test_an_axis_that_is_bound_nowhere_is_refused(measure, names):
    fun = functools.partial(measure, axis_names=names)
    grads = jax.tree.map(jnp.asarray, TREE)
    for run in (fun, jax.jit(fun), jax.vmap(fun), jax.vmap(fun, axis_name="other")):
        with refused(match=UNBOUND):
            run(grads)


@transforms
def test_update_refuses_it_and_init_does_not(make):
    tx = make(axis_names=("d",))
    state = tx.init(TREE)
    with refused(match=UNBOUND):
        jax.jit(tx.update)(TREE, state, TREE)


def test_an_axis_that_no_mesh_has_is_refused_inside_shard_map_too():
    for options in ({}, {"check_vma": False}):
        with refused(match=r"axis_names=\('x',\).*bound"):
            fun = functools.partial(gn.global_norm, axis_names=("x",))
            trace(fun, mesh_of(), SPECS, **options)


@pytest.mark.parametrize(
    "specs",
    [
        {"b": P()},
        [P(), P("d", "t")],
        {"b": P(), "w": ("d", "t")},
        {"b": P(), "w": "d"},
        "d",
    ],
    ids=str,
)
def test_specs_that_are_no_prefix_or_no_specs_are_refused(specs):
    for run in (
        functools.partial(gn.global_norm, specs=specs),
        clip_with(functools.partial(gn.clip_by_global_norm, 1.0, specs=specs)),
    ):
        with pytest.raises((TypeError, ValueError), match="specs"):
            trace(run, mesh_of(), SPECS)


@pytest.mark.parametrize("check_vma", [True, False])
def test_specs_that_name_an_axis_of_no_mesh_are_refused(check_vma):
    """A misspelled axis would be left out of the sum, and nothing else would tell."""
    fun = functools.partial(gn.global_norm, specs={"b": P(), "w": P("d", "x")})
    with pytest.raises(ValueError, match=r"specs.*'w'"):
        trace(fun, mesh_of(), SPECS, check_vma=check_vma)


def test_under_jit_specs_are_not_looked_at():
    norm = jax.jit(functools.partial(gn.global_norm, specs=SPECS))(TREE)
    np.testing.assert_allclose(norm, NORM, rtol=2e-6)
    clip = gn.clip_by_global_norm(1.0, specs=SPECS)
    _, state = jax.jit(clip.update)(TREE, clip.init(TREE), TREE)
    np.testing.assert_allclose(state.metrics.norms, NORM, rtol=2e-6)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (P("d", None, "t"), r"'w', which has only 2 dimensions"),
        (P("d", "x"), r"\('x',\) is no axis of this mesh.*\('d', 't'\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_spec_that_no_leaf_of_this_mesh_can_have_is_refused(spec, words, check_vma):
    def norm(w):
        return gn.global_norm({"w": w}, specs={"w": spec})

    run = jax.shard_map(
        norm,
        mesh=mesh_of("Auto", (4, 2)),
        in_specs=P("d"),
        out_specs=P(),
        check_vma=check_vma,
    )
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(run, jax.ShapeDtypeStruct((8, 2), np.float32))
