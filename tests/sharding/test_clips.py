"""A clip inside shard_map does what the same clip does to the whole tree."""

import functools

import chex
import jax
import numpy as np
import pytest
from jax import P

import gradnorm_jax as gn

from . import meshes
from .meshes import agreed, mapped, mesh_of, only, put, zeros_like

GROUPS = {"(rows|columns|replicated)": "x", "(half|both)": "y"}
GRANULARITIES = {
    "per_group": gn.per_group(GROUPS, scaled={"scalar": "x", ".*s.*": "y"}),
    "per_leaf": gn.per_leaf(),
    "per_unit": gn.per_unit(),
    "stacked": gn.per_leaf(stacked_axes={"(rows|square)": 0, "columns": 1}),
    "whole_tree": gn.whole_tree(),
}
RULES = {
    "constant": lambda: 1.0,
    "ema_relative": lambda: gn.thresholds.ema_relative(1.05, decay=0.9),
    "percentile": lambda: gn.thresholds.percentile(50, window=3),
    "relative_to_params": lambda: gn.thresholds.relative_to_params(0.1),
    "z_score": lambda: gn.thresholds.z_score(0.5, decay=0.5, warmup_steps=2),
}
NAMES = ("both", "columns", "half", "replicated", "rows", "scalar", "square")
SPECS = {name: meshes.SPECS[name] for name in NAMES} | {"frozen": P()}
SOME = ("z_score",)
STEPS = 4
STREAM_SPECS = {name: P(None, *spec) for name, spec in SPECS.items()}
NEEDS_SPECS = ("per_unit", "stacked")


def tree(seed=0):
    """A leaf on each set of axes."""
    leaves = meshes.tree(seed)
    return {name: leaves[name] for name in SPECS}


@functools.cache
def stream():
    """Gradients of some steps along axis 0, of norms that rise and fall."""
    steps = [tree(seed) for seed in range(STEPS)]
    factors = (1.0, 0.5, 4.0, 2.0)
    return {
        name: None
        if steps[0][name] is None
        else np.stack(
            [
                (step[name] * factor).astype(step[name].dtype)
                for step, factor in zip(steps, factors, strict=True)
            ]
        )
        for name in steps[0]
    }


def clips_of(granularity, rules=RULES, **how):
    return {
        name: gn.clip_by_norm(
            RULES[name](), granularity=GRANULARITIES[granularity], **how
        )
        for name in rules
    }


def led_along(clips):
    """Returns a function that leads clips along gradients; it scans their states."""

    def run(params, states, stream):
        def step(states, grads):
            led = {
                name: clip.update(grads, states[name], params)
                for name, clip in clips.items()
            }
            outgoing = {name: updates for name, (updates, _) in led.items()}
            return {name: state for name, (_, state) in led.items()}, outgoing

        return jax.lax.scan(step, states, stream)

    return run


def out_specs(clips):
    return P(), dict.fromkeys(clips, STREAM_SPECS)


def init(clips, params):
    return {name: clip.init(params) for name, clip in clips.items()}


@functools.cache
def unsharded(granularity):
    clips, params = clips_of(granularity), tree(9)
    states = init(clips, params)
    return jax.device_get(jax.jit(led_along(clips))(params, states, stream()))


def assert_close(got, want):
    """Compares trees to what their own dtypes can tell apart."""
    chex.assert_trees_all_equal_structs(got, want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        coarse = x.dtype.itemsize == 2
        kind = np.complex128 if np.iscomplexobj(x) else np.float64
        np.testing.assert_allclose(
            np.asarray(x, kind), np.asarray(y, kind), rtol=1e-2 if coarse else 1e-5
        )


def assert_led_alike(run, mesh, granularity, clips, *, under_jit=False):
    params = put(mesh, tree(9), SPECS)
    grads = put(mesh, stream(), STREAM_SPECS)
    states, updates = run(params, init(clips, params), grads)
    want_states, want_updates = unsharded(granularity)
    # What a loop under `jit` hands out may be split: the compiler decides.
    states = jax.device_get(states) if under_jit else agreed(states)
    assert_close(states, {name: want_states[name] for name in clips})
    want_updates = {name: want_updates[name] for name in clips}
    assert_close(jax.device_get(updates), want_updates)
    for of_rule in updates.values():
        agreed([of_rule["replicated"], of_rule["scalar"]])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_rule_decides_and_remembers_as_for_the_whole_tree(wide_mesh, granularity):
    how = {"specs": SPECS} if granularity in NEEDS_SPECS else {}
    rules = RULES if wide_mesh.shape == {"d": 3, "t": 2} else SOME
    clips = clips_of(granularity, rules, **how)
    run = mapped(
        led_along(clips), wide_mesh, (SPECS, P(), STREAM_SPECS), out_specs(clips)
    )
    assert_led_alike(run, wide_mesh, granularity, clips)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_it_does_so_with_specs_where_nothing_is_checked(granularity):
    mesh, clips = mesh_of("Auto", (3, 2)), clips_of(granularity, SOME, specs=SPECS)
    run = mapped(
        led_along(clips),
        mesh,
        (SPECS, P(), STREAM_SPECS),
        out_specs(clips),
        check_vma=False,
    )
    assert_led_alike(run, mesh, granularity, clips)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_it_does_so_under_jit(granularity, kind):
    mesh, clips = mesh_of(kind, (4, 2)), clips_of(granularity, SOME)
    run = jax.jit(led_along(clips))
    assert_led_alike(run, mesh, granularity, clips, under_jit=True)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("granularity", ["per_group", "per_leaf", "whole_tree"])
def test_it_does_so_where_one_axis_is_manual(granularity, kind):
    mesh, clips = mesh_of(kind, (4, 2)), clips_of(granularity, SOME)
    one, streamed = only("d", SPECS), only("d", STREAM_SPECS)
    run = mapped(
        led_along(clips),
        mesh,
        (one, P(), streamed),
        (P(), dict.fromkeys(clips, streamed)),
        axis_names={"d"},
    )
    assert_led_alike(run, mesh, granularity, clips)


def test_a_state_made_inside_rides_in_a_scan(wide_mesh):
    clips = clips_of("whole_tree") | {"leaf": gn.clip_by_leaf_norm(1.0)}

    def run(params, stream):
        return led_along(clips)(params, init(clips, params), stream)

    compiled = mapped(run, wide_mesh, (SPECS, STREAM_SPECS), out_specs(clips))
    states, updates = compiled(
        put(wide_mesh, tree(9), SPECS), put(wide_mesh, stream(), STREAM_SPECS)
    )
    states, updates = agreed(states), jax.device_get(updates)
    states.pop("leaf"), updates.pop("leaf")
    want_states, want_updates = unsharded("whole_tree")
    assert_close(states, want_states)
    assert_close(updates, want_updates)


METHODS = {
    "adaclip": gn.adaclip,
    "adagc": lambda **how: gn.adagc(warmup_steps=1, **how),
    "adagn": gn.adagn,
    "adaptive_grad_clip": lambda **how: gn.adaptive_grad_clip(0.1, **how),
    "aggc": lambda **how: gn.aggc(GROUPS, low=0.8, high=1.2, **how),
    "autoclip": lambda **how: gn.autoclip(50, window=3, **how),
    "clip_by_block_rms": lambda **how: gn.clip_by_block_rms(0.5, **how),
    "clip_by_ema_norm": lambda **how: gn.clip_by_ema_norm(1.1, **how),
    "clip_by_global_norm": lambda **how: gn.clip_by_global_norm(1.0, **how),
    "clip_by_group_norm": lambda **how: gn.clip_by_group_norm(
        {"(rows|both)": 1.0, ".*": gn.thresholds.percentile(50, window=2)}, **how
    ),
    "clip_by_leaf_norm": lambda **how: gn.clip_by_leaf_norm(1.0, **how),
    "clip_by_quantile": gn.clip_by_quantile,
    "clip_by_rolling_sigma": lambda **how: gn.clip_by_rolling_sigma(
        0.5, window=3, **how
    ),
    "clip_by_unit_norm": lambda **how: gn.clip_by_unit_norm(1.0, **how),
    "normalize_by_norm": gn.normalize_by_norm,
    "smooth_clip": lambda **how: gn.smooth_clip(1.0, **how),
    "zclip": lambda **how: gn.zclip(0.5, warmup_steps=2, **how),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_every_method_takes_specs_and_agrees_with_itself_on_one_device(kind, name):
    mesh = mesh_of(kind, (3, 2))
    clips = {name: METHODS[name](specs=SPECS)}
    params, grads = put(mesh, tree(9), SPECS), put(mesh, stream(), STREAM_SPECS)
    run = mapped(led_along(clips), mesh, (SPECS, P(), STREAM_SPECS), out_specs(clips))
    states, updates = run(params, init(clips, params), grads)
    alone = {name: METHODS[name]()}
    want = jax.jit(led_along(alone))(tree(9), init(alone, tree(9)), stream())
    assert_close(agreed(states), jax.device_get(want[0]))
    assert_close(jax.device_get(updates), jax.device_get(want[1]))


@pytest.mark.parametrize("axis_names", ["t", ("t",)])
def test_each_model_of_an_ensemble_is_clipped_by_its_own_norm(wide_mesh, axis_names):
    specs = {"a": P("d", None, "t"), "b": P("d"), "c": P("d", "t")}
    random = np.random.default_rng(0)
    plain = {name: random.normal(size=(24, 4, 6)).astype(np.float32) for name in specs}
    clip = gn.clip_by_global_norm(1.0, axis_names=axis_names)

    def run(grads):
        updates, state = clip.update(grads, clip.init(grads), grads)
        return updates, state.metrics.norms[None]

    updates, norms = mapped(run, wide_mesh, (specs,), (specs, P("d")))(
        put(wide_mesh, plain, specs)
    )
    models = wide_mesh.shape["d"]
    rows = 24 // models
    alone = gn.clip_by_global_norm(1.0)
    for model in range(models):
        own = {name: x[model * rows :][:rows] for name, x in plain.items()}
        want, state = alone.update(own, alone.init(own))
        got = {
            name: np.asarray(x)[model * rows :][:rows] for name, x in updates.items()
        }
        chex.assert_trees_all_close(got, jax.device_get(want), rtol=1e-5)
        np.testing.assert_allclose(
            np.asarray(norms)[model], state.metrics.norms, rtol=2e-6
        )


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_measuring_what_a_scale_made_of_a_tree_is_scaling_its_norms(granularity):
    mesh, part = mesh_of("Explicit", (4, 2)), GRANULARITIES[granularity]
    if granularity == "per_group":
        part = gn.per_group(GROUPS)
    specs = {name: SPECS[name] for name in NAMES if name != "scalar"}
    plain = {name: np.asarray(tree()[name], np.float32) for name in specs}
    how = {"specs": specs} if granularity in NEEDS_SPECS else {}

    def run(grads, scales):
        spread = part.broadcast(scales, grads, **how)
        scaled = jax.tree.map(lambda s, x: s * x, spread, grads)
        return part.measure(scaled, **how), part.measure(grads, **how)

    scales = np.linspace(0.5, 2, max(len(part.names(plain)), 1), dtype=np.float32)
    scales = scales.reshape(zeros_like(part.measure, plain).shape)
    grads = put(mesh, plain, specs)
    scaled, norms = agreed(mapped(run, mesh, (specs, P()))(grads, scales))
    np.testing.assert_allclose(scaled, scales * norms, rtol=1e-5)
    np.testing.assert_allclose(norms, part.measure(plain), rtol=2e-6)
