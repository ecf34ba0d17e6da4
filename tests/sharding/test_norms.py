"""A norm is that of the whole tree, wherever and however the tree is split."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import gradnorm_jax as gn

from ..references import norms as reference
from .meshes import (
    SPECS,
    agreed,
    mapped,
    mesh_of,
    only,
    put,
    replicate,
    tree,
    zeros_like,
)

pytestmark = pytest.mark.usefixtures("strict")

ORDERS = {"1": 1, "2": 2, "3": 3, "inf": math.inf, "rms": "rms"}
GROUPS = {"(rows|columns|replicated)": "x", "(half|both)": "y", "quarter": "z"}
MEMBERS = {
    "x": ("rows", "columns", "replicated"),
    "y": ("half", "both"),
    "z": ("quarter",),
}


def all_measures(grads, **how):
    """Every order of the global norm, and the norms of leaves and groups."""
    return {
        "whole": {
            name: gn.global_norm(grads, ord=order, **how)
            for name, order in ORDERS.items()
        },
        "leaves": gn.leaf_norms(grads, **how),
        "largest": gn.leaf_norms(grads, ord=jnp.inf, **how),
        "groups": gn.group_norms(grads, GROUPS, **how),
        "part": gn.whole_tree().measure(grads, **how),
        "parts": gn.per_leaf().measure(grads, **how),
    }


def two_measures(grads, **how):
    """A sum and a maximum: what contexts differ in is common to all orders."""
    return {
        "whole": {
            "2": gn.global_norm(grads, **how),
            "inf": gn.global_norm(grads, ord=jnp.inf, **how),
        }
    }


def expected(plain, names):
    """What `names` of `all_measures` are, from the formula in float64."""
    leaves = {name: x for name, x in plain.items() if x is not None}
    of_each = {name: reference.norm([x]) for name, x in leaves.items()}
    whole = {
        name: reference.norm(leaves.values(), order) for name, order in ORDERS.items()
    }
    everything = {
        "whole": whole,
        "leaves": of_each | {"frozen": None},
        "largest": {name: reference.norm([x], math.inf) for name, x in leaves.items()}
        | {"frozen": None},
        "groups": {
            label: reference.norm([plain[name] for name in members if name in plain])
            for label, members in MEMBERS.items()
        },
        "part": whole["2"],
        "parts": np.array([of_each[name] for name in sorted(leaves)]),
    }
    return {name: everything[name] for name in names}


def check(measured, plain):
    want = expected(plain, measured)
    want["whole"] = {name: want["whole"][name] for name in measured["whole"]}
    chex.assert_trees_all_close(agreed(measured), want, rtol=2e-6)


FEW = ("both", "columns", "half", "replicated", "scalar", "square")
FEW_SPECS = {name: SPECS[name] for name in FEW}


def few():
    """A leaf on each set of axes."""
    return {name: tree()[name] for name in FEW}


def in_jit(fun, mesh, specs=None):
    return jax.jit(fun)


def eagerly(fun, mesh):
    return fun


def in_shard_map(fun, mesh, specs=FEW_SPECS):
    return mapped(fun, mesh, (specs,))


def in_eager_shard_map(fun, mesh):
    return jax.shard_map(fun, mesh=mesh, in_specs=(FEW_SPECS,), out_specs=P())


def with_specs_that_agree(fun, mesh):
    return mapped(functools.partial(fun, specs=FEW_SPECS), mesh, (FEW_SPECS,))


def with_all_axes_named(fun, mesh):
    return mapped(functools.partial(fun, axis_names=("t", "d")), mesh, (FEW_SPECS,))


def unchecked_with_specs(fun, mesh, specs=FEW_SPECS):
    with_specs = functools.partial(fun, specs=specs)
    return mapped(with_specs, mesh, (specs,), check_vma=False)


def partly_manual(fun, mesh):
    return mapped(fun, mesh, (only("d", FEW_SPECS),), axis_names={"d"})


def partly_manual_unchecked(fun, mesh):
    specs = only("d", FEW_SPECS)
    with_specs = functools.partial(fun, specs=specs)
    return mapped(with_specs, mesh, (specs,), axis_names={"d"}, check_vma=False)


def nested(fun, mesh):
    def inner(grads):
        return jax.shard_map(
            fun, in_specs=(only("t", FEW_SPECS),), out_specs=P(), axis_names={"t"}
        )(grads)

    return mapped(inner, mesh, (only("d", FEW_SPECS),), axis_names={"d"})


def in_scan(fun, mesh):
    def run(grads):
        step = lambda norms, _: (fun(grads), norms)  # noqa: E731
        return jax.lax.scan(step, zeros_like(fun, grads), length=2)[0]

    return mapped(run, mesh, (FEW_SPECS,))


def in_cond(fun, mesh):
    def run(grads):
        none = zeros_like(fun, grads)
        return jax.lax.cond(grads["scalar"] < 1e9, fun, lambda grads: none, grads)

    return mapped(run, mesh, (FEW_SPECS,))


def in_remat(fun, mesh):
    return mapped(jax.checkpoint(fun), mesh, (FEW_SPECS,))


def in_jit_in_shard_map(fun, mesh):
    return mapped(jax.jit(fun), mesh, (FEW_SPECS,))


@pytest.mark.parametrize("context", [in_jit, in_shard_map, unchecked_with_specs])
def test_every_measure_is_that_of_the_whole_tree(context, wide_mesh):
    plain, measure = tree(), context(all_measures, wide_mesh, SPECS)
    check(measure(put(wide_mesh, plain, SPECS)), plain)


@pytest.mark.parametrize(
    "context",
    [
        eagerly,
        in_cond,
        in_jit,
        in_jit_in_shard_map,
        in_remat,
        in_scan,
        in_shard_map,
        nested,
        partly_manual,
        partly_manual_unchecked,
        unchecked_with_specs,
        with_all_axes_named,
        with_specs_that_agree,
    ],
)
def test_a_norm_is_right_in_every_context(context, every_mesh):
    plain = few()
    grads = put(every_mesh, plain, FEW_SPECS)
    check(context(two_measures, every_mesh)(grads), plain)


def test_a_norm_is_right_where_the_inner_axis_is_manual(every_mesh):
    # On an Explicit mesh JAX 0.12 wants the manual axis of a dimension first.
    specs, plain = FEW_SPECS | {"both": P(("t", "d"))}, few()
    measure = mapped(two_measures, every_mesh, (only("t", specs),), axis_names={"t"})
    check(measure(put(every_mesh, plain, specs)), plain)


def test_a_norm_is_right_in_shard_map_outside_of_jit(mesh):
    plain = few()
    norm = in_eager_shard_map(gn.global_norm, mesh)(put(mesh, plain, FEW_SPECS))
    np.testing.assert_allclose(agreed(norm), reference.norm(plain.values()), 2e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_right_where_one_axis_is_manual(order):
    mesh, plain = mesh_of("Explicit", (3, 2)), few()
    measure = functools.partial(gn.global_norm, ord=ORDERS[order])
    norm = partly_manual(measure, mesh)(put(mesh, plain, FEW_SPECS))
    want = expected(plain, ["whole"])["whole"][order]
    np.testing.assert_allclose(agreed(norm), want, rtol=2e-6)


def test_each_device_returns_the_same_bits_also_where_nothing_is_checked(mesh):
    def run(grads):
        norms = [
            gn.global_norm(grads, ord=order, specs=SPECS) for order in ORDERS.values()
        ]
        return jnp.stack(norms)[None]

    by_device = mapped(run, mesh, (SPECS,), P(("d", "t")), check_vma=False)
    plain = tree()
    norms = np.asarray(by_device(put(mesh, plain, SPECS)))
    assert norms.shape == (mesh.size, len(ORDERS))
    assert {row.tobytes() for row in norms} == {norms[0].tobytes()}
    want = list(expected(plain, ["whole"])["whole"].values())
    np.testing.assert_allclose(norms[0], want, rtol=2e-6)


def test_a_step_whose_outputs_are_all_sharded_divides_by_the_whole_norm(mesh):
    specs = {name: SPECS[name] for name in ("rows", "square", "swapped", "both")}
    plain = {name: tree()[name] for name in specs}

    def step(grads):
        norm = gn.global_norm(grads)
        return jax.tree.map(lambda x: x / norm, grads)

    updates = mapped(step, mesh, (specs,), specs)(put(mesh, plain, specs))
    norm = reference.norm(plain.values())
    want = {name: reference.wide(x) / norm for name, x in plain.items()}
    chex.assert_trees_all_close(jax.device_get(updates), want, rtol=2e-6)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_unchecked_needs_no_argument_where_all_axes_have_size_1(kind):
    mesh, plain = mesh_of(kind, (1, 1)), few()
    measure = mapped(two_measures, mesh, (FEW_SPECS,), check_vma=False)
    check(measure(put(mesh, plain, FEW_SPECS)), plain)


@pytest.mark.parametrize("check_vma", [True, False])
def test_one_specs_serves_a_whole_tree_that_is_split_alike(mesh, check_vma):
    plain = {"a": tree()["rows"], "b": {"c": tree(1)["rows"]}}
    fun = functools.partial(gn.global_norm, specs=P("d"))
    grads = jax.device_put(plain, jax.NamedSharding(mesh, P("d")))
    norm = mapped(fun, mesh, P("d"), check_vma=check_vma)(grads)
    want = reference.norm([plain["a"], plain["b"]["c"]])
    np.testing.assert_allclose(agreed(norm), want, rtol=2e-6)


@pytest.mark.parametrize("axes", ["d", ("d",), ("d", "t")])
def test_unchecked_axis_names_hold_for_every_leaf_alike(mesh, axes):
    plain = {"a": tree()["rows"], "b": tree(1)["half"]}
    fun = functools.partial(gn.global_norm, axis_names=axes)
    spec = P((axes,) if isinstance(axes, str) else axes)
    grads = jax.device_put(plain, jax.NamedSharding(mesh, spec))
    norm = mapped(fun, mesh, spec, check_vma=False)(grads)
    want = reference.norm(plain.values())
    np.testing.assert_allclose(agreed(norm), want, rtol=2e-6)


def test_unchecked_replicated_gradients_need_the_empty_axis_names(mesh):
    plain = {"a": tree()["rows"], "b": tree()["scalar"]}
    fun = functools.partial(two_measures, axis_names=())
    measured = mapped(fun, mesh, P(), check_vma=False)(replicate(mesh, plain))
    check(measured, plain)


@pytest.mark.parametrize(
    "nothing", [{}, (), None, optax.MaskedNode(), {"a": None, "b": ()}], ids=repr
)
def test_a_tree_without_leaves_has_the_norm_0_everywhere(nothing):
    mesh = mesh_of()

    def run(x):
        norms = jnp.stack([gn.global_norm(nothing, ord=o) for o in ORDERS.values()])
        return norms, gn.leaf_norms(nothing), x

    norms, leaves, _ = mapped(run, mesh, P("d"), (P(), P(), P("d")))(jnp.ones(8))
    np.testing.assert_array_equal(agreed(norms), np.zeros(len(ORDERS)))
    assert leaves == nothing


@pytest.mark.parametrize("order", ORDERS)
def test_leaves_of_size_0_have_the_norm_0_on_every_device(mesh, order):
    plain = {"a": np.zeros((0, 24), np.float32), "b": np.zeros((24, 0), np.float32)}
    specs = {"a": P(None, "t"), "b": P("d")}

    def run(grads, step):
        norm = gn.global_norm(grads, ord=ORDERS[order])
        return norm, step + 1

    # XLA cannot lower a map of which no input has entries, whatever is done inside.
    norm, _ = mapped(run, mesh, (specs, P()))(put(mesh, plain, specs), jnp.int32(0))
    assert agreed(norm) == 0


def test_a_float64_leaf_makes_the_norm_float64_on_a_mesh():
    mesh = mesh_of("Explicit", (3, 2))
    specs = {"a": P("d"), "b": P("t"), "c": P()}
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        plain = {name: random.normal(size=24) for name in specs}
        norm = mapped(gn.global_norm, mesh, (specs,))(put(mesh, plain, specs))
        assert norm.dtype == jnp.float64
        want = reference.norm(plain.values())
        np.testing.assert_allclose(agreed(norm), want, rtol=1e-14)


def test_experts_pipelines_and_tensors_each_count_once():
    specs = {
        "embedding": P("tensor"),
        "experts": P("expert", None, "tensor"),
        "layers": P("pipe", None, "tensor"),
        "router": P("pipe"),
        "scale": P(),
        "stacked_experts": P("pipe", "expert", "tensor"),
    }
    random = np.random.default_rng(0)
    plain = {name: random.normal(size=(4, 6, 8)).astype(np.float32) for name in specs}
    names = ("expert", "pipe", "tensor")
    for kind in ("Auto", "Explicit"):
        mesh = mesh_of(kind, (2, 2, 2), names)
        measured = mapped(
            lambda grads: (gn.global_norm(grads), gn.leaf_norms(grads)), mesh, (specs,)
        )(put(mesh, plain, specs))
        norm, leaves = agreed(measured)
        np.testing.assert_allclose(norm, reference.norm(plain.values()), rtol=2e-6)
        want = {name: reference.norm([x]) for name, x in plain.items()}
        chex.assert_trees_all_close(leaves, want, rtol=2e-6)
