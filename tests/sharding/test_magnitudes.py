"""What squares cannot hold on one device or another is right on all of them."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

import gradnorm_jax as gn

from ..references import norms as reference
from . import hlo
from .meshes import SPECS, agreed, mapped, mesh_of, only, put, tree

pytestmark = pytest.mark.usefixtures("strict")

WIDE = {
    "columns": P(None, "t"),
    "replicated": P(),
    "rows": P("d"),
    "both": SPECS["both"],
}
SHAPES = {"columns": (3, 24), "replicated": (5, 3), "rows": (24, 2), "both": (24,)}


def filled(value, **others):
    """Every entry is `value`, but for the leaves that are named."""
    return {
        name: np.array(np.broadcast_to(others.get(name, value), shape), np.float32)
        for name, shape in SHAPES.items()
    }


def rising(*exponents):
    """A column that crosses these powers of ten from the first device to the last."""
    return np.logspace(*exponents, 24)[:, None] * np.ones(2)


def one_block(value, among):
    """The first block of rows, that of one device, differs from all others."""
    rows = np.full((24, 2), among)
    rows[:3] = value
    return rows


MAGNITUDES = {
    "all are huge": filled(3e19),
    "all are tiny": filled(1e-30),
    "one device is tiny among ordinary ones": filled(1.0, rows=one_block(1e-30, 1.0)),
    "one device is tiny among zeros": filled(0.0, rows=one_block(1e-30, 0.0)),
    "one device is huge among tiny ones": filled(1e-30, rows=one_block(3e19, 1e-30)),
    "one device is huge among ordinary ones": filled(1.0, rows=one_block(3e19, 1.0)),
    "one leaf is huge, one is tiny": filled(1.0, columns=3e19, both=1e-30),
    "only a replicated leaf is huge": filled(1.0, replicated=3e19),
    "only a replicated leaf is tiny": filled(0.0, replicated=1e-30),
    "the squares are lost only when they are added": filled(5e18),
    "rising from lost to lost": filled(0.0, rows=rising(-35, 35)),
    "nothing": filled(0.0),
}
ORDERS = (1, 2, 3, math.inf, "rms")


def measures(grads, **how):
    return {
        "whole": jnp.stack([gn.global_norm(grads, ord=o, **how) for o in ORDERS]),
        "leaves": gn.leaf_norms(grads, **how),
    }


def expected(plain):
    return {
        "whole": np.array([reference.norm(plain.values(), o) for o in ORDERS]),
        "leaves": {name: reference.norm([x]) for name, x in plain.items()},
    }


def in_jit(fun, mesh, specs):
    return jax.jit(fun)


def in_shard_map(fun, mesh, specs):
    return mapped(fun, mesh, (specs,))


def partly_manual(fun, mesh, specs):
    return mapped(fun, mesh, (only("d", specs),), axis_names={"d"})


@pytest.mark.parametrize("context", [in_jit, in_shard_map, partly_manual])
def test_a_norm_is_right_though_squares_are_lost_on_some_devices(mesh, context):
    measure = context(measures, mesh, WIDE)
    first = put(mesh, MAGNITUDES["all are huge"], WIDE)
    if context is in_shard_map:
        # A device that waits in a branch for one that took another waits forever.
        text = hlo.compiled_text(measure, first)
        assert not hlo.collectives_under_a_condition(text)
    for plain in MAGNITUDES.values():
        measured = agreed(measure(put(mesh, plain, WIDE)))
        chex.assert_trees_all_close(measured, expected(plain), rtol=2e-6)


def test_float16_entries_of_300_do_not_overflow_on_any_device(mesh):
    specs = {"a": P("d"), "b": P("t"), "c": P(("d", "t")), "e": P()}
    plain = {name: np.full((24, 5), 300, np.float16) for name in specs}
    for context in (in_shard_map, partly_manual):
        norms = context(measures, mesh, specs)(put(mesh, plain, specs))
        chex.assert_trees_all_close(agreed(norms), expected(plain), rtol=2e-6)


def test_bfloat16_entries_at_the_ends_of_their_range_are_measured(mesh):
    specs = {"a": P("d"), "b": P("t"), "e": P()}
    run = mapped(lambda grads: gn.global_norm(grads), mesh, (specs,))
    for value in (1e37, 1e-36):
        plain = {name: np.full(24, value, jnp.bfloat16) for name in specs}
        norm = agreed(run(put(mesh, plain, specs)))
        np.testing.assert_allclose(norm, reference.norm(plain.values()), rtol=2e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_on_one_device_is_so_on_all(mesh, bad):
    clip = gn.clip_by_leaf_norm(1.0)

    def run(grads, state):
        whole = jnp.stack([gn.global_norm(grads, ord=order) for order in ORDERS])
        return whole, gn.leaf_norms(grads), clip.update(grads, state)[1].metrics

    compiled = mapped(run, mesh, (SPECS, P()))
    names = [name for name, x in sorted(tree().items()) if x is not None]
    for name in ("rows", "both", "square", "replicated", "complex", "half"):
        plain = tree()
        plain[name].reshape(-1)[-1] = bad
        grads = put(mesh, plain, SPECS)
        whole, leaves, metrics = agreed(compiled(grads, clip.init(grads)))
        np.testing.assert_array_equal(whole, np.full(len(ORDERS), bad))
        np.testing.assert_array_equal(leaves.pop(name), bad)
        assert np.isfinite(jax.tree.leaves(leaves)).all()
        assert metrics.first_nonfinite_leaf == names.index(name)
        assert metrics.nonfinite_count == 1


def test_a_nan_on_one_device_is_found_where_another_axis_is_not_manual():
    mesh, plain = mesh_of("Auto", (4, 2)), tree()
    plain["square"][-1, -1] = np.nan
    clip = gn.clip_by_global_norm(1.0)
    specs = only("d", SPECS)
    run = mapped(
        lambda grads, state: clip.update(grads, state)[1].metrics,
        mesh,
        (specs, P()),
        axis_names={"d"},
    )
    grads = put(mesh, plain, SPECS)
    metrics = agreed(run(grads, clip.init(grads)))
    names = [name for name, x in sorted(plain.items()) if x is not None]
    assert np.isnan(metrics.norms)
    assert metrics.first_nonfinite_leaf == names.index("square")
