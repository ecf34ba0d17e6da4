"""The noise of gradients is that of all examples, wherever on a mesh they lie."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

import gradnorm_jax as gn
from gradnorm_jax.norms.noise_scale import gradient_noise_scale, running_noise_scale
from gradnorm_jax.norms.snr import gradient_snr, running_snr

from .meshes import agreed, mapped, mesh_of, only, put, replicate

pytestmark = pytest.mark.usefixtures("strict")

MASK = np.arange(24) % 5 > 0


def gradients(*shape):
    return np.random.default_rng(0).normal(0.5, size=shape).astype(np.float32)


def norms_of(grads, parts):
    """The norms of 24 examples and of their mean, of each half or of the whole."""
    mean = np.mean(grads, axis=0, where=MASK[:, None])
    if parts == 1:
        return np.linalg.norm(grads, axis=1), np.linalg.norm(mean)
    halves = [np.linalg.norm(x, axis=-1) for x in np.split(grads, parts, axis=1)]
    return np.stack(halves, axis=1), np.linalg.norm(mean.reshape(parts, -1), axis=1)


def both(norms, mean_norm, mask):
    average = running_noise_scale()
    state = average.update(average.init(mean_norm), norms, mean_norm, mask=mask)
    return gradient_noise_scale(norms, mean_norm, mask=mask), average.read(state)


def placed(mesh, norms, mean_norm):
    specs = {"norms": P("d"), "mask": P("d")}
    there = put(mesh, {"norms": norms, "mask": MASK}, specs)
    return there["norms"], replicate(mesh, jnp.asarray(mean_norm)), there["mask"]


@pytest.mark.parametrize("parts", [1, 2])
def test_the_noise_scale_of_split_norms_is_that_of_all(mesh, parts):
    norms, mean_norm = norms_of(gradients(24, 6), parts)
    expected = both(jnp.asarray(norms), jnp.asarray(mean_norm), MASK)
    found = jax.jit(both)(*placed(mesh, norms, mean_norm))
    chex.assert_trees_all_close(agreed(found), expected, rtol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_inside_shard_map_it_is_so_too_and_the_same_everywhere(parts):
    norms, mean_norm = norms_of(gradients(24, 6), parts)
    expected = both(jnp.asarray(norms), jnp.asarray(mean_norm), MASK)
    mesh = mesh_of("Auto", (8,), ("d",))
    estimate = mapped(both, mesh, (P("d"), P(), P("d")))
    found = agreed(estimate(*placed(mesh, norms, mean_norm)))
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_inside_shard_map_without_a_mask_every_device_counts_its_own_examples():
    norms, mean_norm = norms_of(gradients(24, 6), 1)
    expected = gradient_noise_scale(jnp.asarray(norms), mean_norm)
    mesh = mesh_of("Auto", (8,), ("d",))
    estimate = mapped(gradient_noise_scale, mesh, (P("d"), P()))
    chex.assert_trees_all_close(agreed(estimate(norms, mean_norm)), expected, rtol=1e-5)


def test_one_norm_on_each_device_is_enough():
    norms = jnp.arange(1.0, 9.0)
    mesh = mesh_of("Auto", (8,), ("d",))
    estimate = mapped(gradient_noise_scale, mesh, (P("d"), P()))
    found = agreed(estimate(norms, jnp.float32(4)))
    expected = gradient_noise_scale(norms, 4.0)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_where_types_say_nothing_it_must_be_said():
    norms, mean_norm = norms_of(gradients(24, 6), 1)
    mesh = mesh_of("Auto", (8,), ("d",))
    specs = (P("d"), P())
    silent = mapped(gradient_noise_scale, mesh, specs, check_vma=False)
    with pytest.raises(gn.DistributedNormError, match="gradient_noise_scale"):
        silent(norms, mean_norm)

    def said(norms, mean_norm):
        return gradient_noise_scale(norms, mean_norm, axis_names="d")

    found = mapped(said, mesh, specs, check_vma=False)(norms, mean_norm)
    expected = gradient_noise_scale(jnp.asarray(norms), mean_norm)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_the_snr_of_split_examples_is_that_of_all(wide_mesh):
    grads = {"w": gradients(24, 4, 6)}
    expected = gradient_snr(grads, mask=MASK)
    specs = {"w": P("d"), "mask": P("d")}
    there = put(wide_mesh, {**grads, "mask": MASK}, specs)

    @jax.jit
    def ratios(there):
        return gradient_snr({"w": there["w"]}, mask=there["mask"])

    chex.assert_trees_all_close(ratios(there), expected, rtol=1e-3)


def test_the_snr_of_the_examples_of_one_device_is_refused():
    mesh = mesh_of("Auto", (8,), ("d",))
    with pytest.raises(gn.DistributedNormError, match="gradient_snr"):
        mapped(gradient_snr, mesh, P("d"))(gradients(24, 4))


def test_a_running_snr_of_split_gradients_is_that_of_the_whole(wide_mesh):
    steps = {"rows": gradients(3, 24, 2), "square": gradients(3, 24, 4)}
    specs = only(wide_mesh.axis_names, {"rows": P("d"), "square": P("d", "t")})
    average = running_snr()

    def run(steps):
        state = average.init({name: x[0] for name, x in steps.items()})
        for k in range(3):
            state = average.update(state, {name: x[k] for name, x in steps.items()})
        return average.read(state), average.read(state, gn.per_leaf())

    placed = put(wide_mesh, steps, {name: P(None, *x) for name, x in specs.items()})
    expected = run({name: jnp.asarray(x) for name, x in steps.items()})
    chex.assert_trees_all_close(jax.jit(run)(placed), expected, rtol=1e-4)


def test_inside_shard_map_a_nan_on_one_device_is_seen_by_all():
    steps = gradients(4, 24)
    steps[2, 20] = np.nan
    mesh = mesh_of("Auto", (8,), ("d",))
    average = running_snr()

    def run(steps):
        state = average.init(steps[0])
        for k in range(4):
            state = average.update(state, steps[k])
        return average.read(state).snr, state.total_weight

    expected = run(jnp.asarray(steps))
    found = mapped(run, mesh, P(None, "d"), (P("d"), P()))(steps)
    assert np.all(np.isfinite(found[0]))
    chex.assert_trees_all_close(found, expected, rtol=1e-4)
