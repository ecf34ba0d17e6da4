"""Per-example clips: examples stay where they are, and no one's norm is in parts."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

import gradnorm_jax as gn

from ..references import clips as reference
from .meshes import agreed, mapped, put

EXAMPLES = 24
SIZES = {"a": (6, 4), "b": (24,), "c": ()}
PARALLEL = {name: P("d") for name in SIZES}
TENSOR = {"a": P("d", None, "t"), "b": P("d", "t"), "c": P("d")}
MODEL = {"a": P(None, "t"), "b": P(None, ("d", "t")), "c": P()}
CLIPS = {
    "global": gn.per_example_global_norm_clip,
    "layer": gn.per_example_layer_norm_clip,
}
LIMIT = 4.0


@functools.cache
def plain():
    random = np.random.default_rng(0)
    grads = {
        name: random.normal(size=(EXAMPLES, *size)).astype(np.float32)
        for name, size in SIZES.items()
    }
    factors = np.linspace(0.1, 3, EXAMPLES).astype(np.float32)
    return {
        name: x * factors.reshape(-1, *[1] * (x.ndim - 1)) for name, x in grads.items()
    }


def expected(kind):
    leaves = list(plain().values())
    limits = [LIMIT] if kind == "global" else [LIMIT / np.sqrt(3)] * 3
    sums, clipped = reference.per_example(leaves, limits)
    counts = clipped.sum(1)
    sums = dict(zip(SIZES, sums, strict=True))
    if kind == "global":
        return sums, counts[0]
    return sums, dict(zip(SIZES, counts, strict=True))


def clipped(mesh, kind, placed, over, *, check_vma=True, **how):
    """Clips local examples; the sum over all of them is that of the user."""

    def run(grads):
        total, counts = CLIPS[kind](grads, LIMIT, **how)
        if over:
            total, counts = jax.lax.psum((total, counts), over)
        return total, counts

    out = {name: P(*spec[1:]) for name, spec in placed.items()}
    run = mapped(run, mesh, (placed,), (out, P()), check_vma=check_vma)
    return run(put(mesh, plain(), placed))


def check(result, kind):
    (total, counts), (sums, clipped) = result, expected(kind)
    chex.assert_trees_all_close(jax.device_get(total), sums, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(agreed(counts), clipped)


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("check_vma", [True, False])
def test_examples_that_are_split_over_devices_are_clipped_where_they_are(
    wide_mesh, kind, check_vma
):
    result = clipped(wide_mesh, kind, PARALLEL, "d", check_vma=check_vma, axis_names=())
    check(result, kind)


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("how", [{"axis_names": "t"}, {"specs": TENSOR}], ids=str)
def test_a_gradient_that_is_split_too_has_one_norm_over_its_devices(
    wide_mesh, kind, how
):
    check(clipped(wide_mesh, kind, TENSOR, "d", **how), kind)


@pytest.mark.parametrize("kind", CLIPS)
def test_it_does_so_with_specs_where_nothing_is_checked(wide_mesh, kind):
    how = {"check_vma": False, "specs": TENSOR}
    check(clipped(wide_mesh, kind, TENSOR, "d", **how), kind)


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("how", [{"axis_names": ("d", "t")}, {"specs": MODEL}], ids=str)
def test_one_set_of_examples_on_all_devices_needs_no_sum(wide_mesh, kind, how):
    check(clipped(wide_mesh, kind, MODEL, (), **how), kind)


@pytest.mark.parametrize("kind", CLIPS)
def test_under_jit_examples_may_be_split_in_any_way(wide_mesh, kind):
    run = jax.jit(lambda grads: CLIPS[kind](grads, LIMIT))
    total, counts = jax.device_get(run(put(wide_mesh, plain(), TENSOR)))
    sums, clipped = expected(kind)
    chex.assert_trees_all_close(total, sums, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(counts, clipped)


@pytest.mark.parametrize("kind", CLIPS)
def test_what_is_split_is_refused_until_it_is_said_how(wide_mesh, kind):
    with pytest.raises(
        gn.DistributedNormError, match=r"(?s)axis_names.*specs|specs.*axis_names"
    ):
        clipped(wide_mesh, kind, TENSOR, "d")


@pytest.mark.parametrize("kind", CLIPS)
def test_replicated_examples_need_no_argument(wide_mesh, kind):
    check(clipped(wide_mesh, kind, {name: P() for name in SIZES}, ()), kind)


def test_an_example_that_is_not_finite_on_one_device_adds_nothing_on_any(wide_mesh):
    bad = {name: x.copy() for name, x in plain().items()}
    bad["a"][5, -1, -1] = np.nan
    total, count = mapped(
        lambda grads: jax.lax.psum(
            gn.per_example_global_norm_clip(grads, LIMIT, axis_names="t"), "d"
        ),
        wide_mesh,
        (TENSOR,),
        ({"a": P(None, "t"), "b": P("t"), "c": P()}, P()),
    )(put(wide_mesh, bad, TENSOR))
    without = {name: np.delete(x, 5, axis=0) for name, x in plain().items()}
    want, clipped = gn.per_example_global_norm_clip(
        jax.tree.map(jnp.asarray, without), LIMIT
    )
    chex.assert_trees_all_close(jax.device_get(total), want, rtol=1e-5, atol=1e-5)
    assert agreed(count) == clipped + 1
