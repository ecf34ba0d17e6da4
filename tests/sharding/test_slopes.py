"""A norm of shards and a clip by it have the gradients of the unsplit ones."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

import gradnorm_jax as gn

from ..references import norms as reference
from .meshes import mapped, mesh_of, put

SPECS = {
    "both": P(("d", "t")),
    "columns": P(None, "t"),
    "replicated": P(),
    "rows": P("d"),
    "swapped": P("t", "d"),
}
SIZES = {
    "both": (24,),
    "columns": (3, 24),
    "replicated": (5,),
    "rows": (24, 2),
    "swapped": (4, 24),
}
ORDERS = {"1": 1, "2": 2, "3": 3, "inf": math.inf, "rms": "rms"}


def arrays(seed=0):
    random = np.random.default_rng(seed)
    return {
        name: random.normal(size=size).astype(np.float32)
        for name, size in SIZES.items()
    }


def slopes_of(plain, order):
    """The gradient of the norm of a whole tree, in float64."""
    flat = np.concatenate([plain[name].ravel() for name in SIZES])
    slope = reference.slope(flat, order)
    ends = np.cumsum([math.prod(size) for size in SIZES.values()])[:-1]
    return {
        name: part.reshape(SIZES[name])
        for name, part in zip(SIZES, np.split(slope, ends), strict=True)
    }


def inside(mesh, fun, **options):
    """The gradient is taken on each shard."""
    return mapped(jax.grad(fun), mesh, (SPECS,), SPECS, **options)


def outside(mesh, fun, **options):
    """The gradient is taken of the map."""
    return jax.jit(
        jax.grad(
            jax.shard_map(fun, mesh=mesh, in_specs=(SPECS,), out_specs=P(), **options)
        )
    )


def under_jit(mesh, fun):
    return jax.jit(jax.grad(fun))


ways = pytest.mark.parametrize("way", [inside, outside, under_jit])


def all_orders(grads):
    """One program for all orders: the weights tell them apart."""
    return jnp.stack([gn.global_norm(grads, ord=order) for order in ORDERS.values()])


def slopes(way, mesh):
    """The slopes of the order whose weight is 1, others being 0."""

    def weighted(grads, weights):
        return jnp.sum(all_orders(grads) * weights)

    slope = jax.grad(weighted)
    if way is outside:
        value = jax.shard_map(weighted, mesh=mesh, in_specs=(SPECS, P()), out_specs=P())
        return jax.jit(jax.grad(value))
    return mapped(slope, mesh, (SPECS, P()), SPECS) if way is inside else jax.jit(slope)


def weights(*orders):
    return np.float32([name in orders for name in ORDERS])


@ways
def test_the_slope_of_a_norm_is_that_of_the_whole_tree(wide_mesh, way):
    plain, run = arrays(), slopes(way, wide_mesh)
    grads = put(wide_mesh, plain, SPECS)
    for name, order in ORDERS.items():
        got = jax.device_get(run(grads, weights(name)))
        want = slopes_of(plain, order)
        chex.assert_trees_all_close(got, want, rtol=2e-4, atol=2e-6)

    zeros = jax.tree.map(np.zeros_like, plain)
    at_zero = run(put(wide_mesh, zeros, SPECS), weights(*ORDERS))
    chex.assert_trees_all_equal(jax.device_get(at_zero), zeros)


def test_a_device_that_holds_zeros_only_has_slopes_like_any_other():
    mesh, plain = mesh_of("Auto", (4, 2)), arrays()
    plain["rows"][:6] = 0
    plain["both"][:12] = 0
    run, grads = slopes(inside, mesh), put(mesh, plain, SPECS)
    alone = jax.jit(jax.grad(lambda x, weights: jnp.sum(all_orders(x) * weights)))
    for name in ORDERS:
        got, want = run(grads, weights(name)), alone(plain, weights(name))
        chex.assert_trees_all_close(
            jax.device_get(got), jax.device_get(want), rtol=1e-5, atol=1e-7
        )


@ways
def test_entries_that_tie_on_several_devices_share_the_slope(way):
    mesh, plain = mesh_of("Auto", (4, 2)), jax.tree.map(np.ones_like, arrays())
    got = slopes(way, mesh)(put(mesh, plain, SPECS), weights("inf"))
    want = {name: 1 / len(plain) / x.size * x for name, x in plain.items()}
    chex.assert_trees_all_close(jax.device_get(got), want, rtol=1e-5)


@ways
def test_slopes_of_norms_beyond_their_squares_are_right(way):
    mesh = mesh_of("Explicit", (3, 2))
    run = slopes(way, mesh)
    for factor in (1e19, 1e-30):
        plain = jax.tree.map(lambda x: x * np.float32(factor), arrays())  # noqa: B023
        got = run(put(mesh, plain, SPECS), weights("2"))
        chex.assert_trees_all_close(
            jax.device_get(got), slopes_of(arrays(), 2), rtol=2e-4, atol=2e-6
        )


@pytest.mark.parametrize("way", [inside, outside])
def test_leaf_and_group_norms_have_the_slopes_of_whole_leaves(way):
    def total(grads):
        groups = gn.group_norms(grads, {"(rows|both)": "x", "replicated": "y"})
        return sum(jax.tree.leaves(gn.leaf_norms(grads))) + 3 * groups["x"]

    plain = arrays()
    want = jax.device_get(jax.grad(total)(plain))
    for mesh in (mesh_of("Auto", (4, 2)), mesh_of("Explicit", (3, 2))):
        got = jax.device_get(way(mesh, total)(put(mesh, plain, SPECS)))
        chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", [inside, outside])
def test_the_slope_is_right_where_one_axis_is_manual(way):
    mesh, plain = mesh_of("Auto", (4, 2)), arrays()
    specs = {name: P("d") for name in ("rows", "both")} | {
        "swapped": P(None, "d"),
        "columns": P(),
        "replicated": P(),
    }
    if way is inside:
        run = mapped(jax.grad(gn.global_norm), mesh, (specs,), specs, axis_names={"d"})
    else:
        run = jax.jit(
            jax.grad(
                jax.shard_map(
                    gn.global_norm,
                    mesh=mesh,
                    in_specs=(specs,),
                    out_specs=P(),
                    axis_names={"d"},
                )
            )
        )
    got = run(put(mesh, plain, SPECS))
    chex.assert_trees_all_close(
        jax.device_get(got), slopes_of(plain, 2), rtol=2e-4, atol=2e-6
    )


CLIPS = {
    "global": lambda **how: gn.clip_by_global_norm(1.0, **how),
    "global, not clipped": lambda **how: gn.clip_by_global_norm(1e3, **how),
    "largest entry": lambda **how: gn.clip_by_norm(1.0, norm=gn.norms.linf, **how),
    "leaf": lambda **how: gn.clip_by_leaf_norm(2.0, **how),
    "unit": lambda **how: gn.clip_by_unit_norm(1.0, **how),
    "agc": lambda **how: gn.adaptive_grad_clip(0.1, **how),
}
NEEDS_SPECS = ("unit", "agc")


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("way", [inside, outside])
def test_a_clip_can_be_differentiated_through(way, name):
    how = {"specs": SPECS} if name in NEEDS_SPECS else {}
    plain, weights = arrays(), arrays(1)

    def objective(clip, total, grads, weights):
        updates, _ = clip.update(grads, clip.init(grads), grads)
        products = jax.tree.map(lambda x, w: jnp.sum(x * w), updates, weights)
        return sum(total(name, x) for name, x in products.items())

    def whole(name, x):
        return x

    def over_devices(name, x):
        axes = tuple(
            axis
            for entry in SPECS[name]
            for axis in ((entry,) if isinstance(entry, str) else entry or ())
        )
        return jax.lax.psum(x, axes) if axes else x

    alone = functools.partial(objective, CLIPS[name](), whole)
    split = functools.partial(objective, CLIPS[name](**how), over_devices)
    want = jax.device_get(jax.jit(jax.grad(alone))(plain, weights))
    for mesh in (mesh_of("Explicit", (4, 2)), mesh_of("Auto", (3, 2))):
        if way is inside:
            run = mapped(jax.grad(split), mesh, (SPECS, SPECS), SPECS)
        else:
            value = jax.shard_map(
                split, mesh=mesh, in_specs=(SPECS, SPECS), out_specs=P()
            )
            run = jax.jit(jax.grad(value))
        got = run(put(mesh, plain, SPECS), put(mesh, weights, SPECS))
        chex.assert_trees_all_close(jax.device_get(got), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_a_tangent_is_that_of_the_whole_tree(order):
    mesh, plain, along = mesh_of("Explicit", (3, 2)), arrays(), arrays(1)
    measure = functools.partial(gn.global_norm, ord=ORDERS[order])

    def run(grads, along):
        return jax.jvp(measure, (grads,), (along,))

    grads, tangents = put(mesh, plain, SPECS), put(mesh, along, SPECS)
    norm, tangent = mapped(run, mesh, (SPECS, SPECS))(grads, tangents)
    want = slopes_of(plain, ORDERS[order])
    product = sum(np.sum(want[name] * along[name]) for name in SIZES)
    np.testing.assert_allclose(
        norm, reference.norm(plain.values(), ORDERS[order]), 2e-6
    )
    np.testing.assert_allclose(tangent, product, rtol=1e-4)
