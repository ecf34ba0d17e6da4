"""Units, layers and entries that are split have norms of all their parts."""

import chex
import jax
import numpy as np
import pytest
from jax import P

import gradnorm_jax as gn

from ..references import norms as reference
from ..references import parts as reference_parts
from .meshes import agreed, mapped, mesh_of, put

MATRIX = (24, 48)
WAYS = {
    "P()": P(),
    "P(d,)": P("d", None),
    "P(,t)": P(None, "t"),
    "P(d,t)": P("d", "t"),
    "P(t,d)": P("t", "d"),
    "P(dt,)": P(("d", "t"), None),
    "P(,dt)": P(None, ("d", "t")),
}
ways = pytest.mark.parametrize("spec", WAYS.values(), ids=WAYS)
checks = pytest.mark.parametrize("check_vma", [True, False])
MODES = [
    ("Auto", (4, 2), True),
    ("Explicit", (3, 2), False),
    ("Explicit", (8, 1), True),
]


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def kept(spec, rank, summed):
    """How the norms of units are split: as the leaf along the dims that they keep."""
    entries = (*spec, *[None] * (rank - len(spec)))
    return P(*(None if k in summed else e for k, e in enumerate(entries)))


def unit_norms(x, summed, order=2):
    """The norms of units by their formula, with size 1 along what one unit spans."""
    shape = [1 if k in summed else size for k, size in enumerate(x.shape)]
    out = np.zeros(shape)
    for cell in np.ndindex(*shape):
        index = tuple(slice(None) if k in summed else i for k, i in enumerate(cell))
        out[cell] = reference.norm([x[index]], order)
    return out


@ways
def test_unit_norms_are_those_of_whole_units(mesh, spec):
    plain = normal(MATRIX)
    options = {"check_vma": mesh.shape["d"] != 4}

    def run(x):
        return {
            "inputs": gn.unit_norms(x, specs=spec),
            "rows": gn.unit_norms(x, axes=1, specs=spec),
            "all": gn.unit_norms(x, axes=(0, 1), specs=spec),
            "largest": gn.unit_norms(x, ord=np.inf, specs=spec),
            "everywhere": gn.unitwise_norm(x, specs=spec),
            "parts": gn.per_unit().measure(x, specs=spec),
        }

    spans = {"inputs": (0,), "rows": (1,), "all": (0, 1), "largest": (0,)}
    out_specs = {name: kept(spec, 2, summed) for name, summed in spans.items()}
    out_specs |= {"everywhere": spec, "parts": P()}
    x = put(mesh, {"x": plain}, {"x": spec})["x"]
    got = mapped(run, mesh, spec, out_specs, **options)(x)
    agreed(got["parts"])
    got = jax.device_get(got)
    inputs = unit_norms(plain, (0,))
    want = {
        "inputs": inputs,
        "rows": unit_norms(plain, (1,)),
        "all": unit_norms(plain, (0, 1)),
        "largest": unit_norms(plain, (0,), np.inf),
        "everywhere": np.broadcast_to(inputs, MATRIX),
        "parts": inputs.reshape(-1),
    }
    chex.assert_trees_all_close(got, want, rtol=2e-6)


@ways
def test_agc_clips_whole_units_however_the_matrix_is_split(mesh, spec):
    specs = {"kernel": spec, "bias": P()}
    params = {"kernel": normal(MATRIX), "bias": normal(48)}
    grads = {"kernel": normal(MATRIX, 1), "bias": normal(48, 2)}
    alone, clip = gn.adaptive_grad_clip(0.5), gn.adaptive_grad_clip(0.5, specs=specs)
    want = jax.device_get(alone.update(grads, alone.init(params), params))
    params, grads = put(mesh, params, specs), put(mesh, grads, specs)
    options = {"check_vma": mesh.shape["d"] != 3}
    run = mapped(clip.update, mesh, (specs, P(), specs), (specs, P()), **options)
    updates, state = run(grads, clip.init(params), params)
    agreed([state, updates["bias"]])
    chex.assert_trees_all_close(
        jax.device_get((updates, state)), want, rtol=1e-5, atol=1e-6
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(state, want[1])


@ways
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_under_jit_units_need_no_specs(kind, spec):
    mesh, plain = mesh_of(kind, (4, 2)), {"w": normal(MATRIX)}
    specs, clip = {"w": spec}, gn.adaptive_grad_clip(0.5)
    want = jax.device_get(clip.update(plain, clip.init(plain), plain))
    x = put(mesh, plain, specs)
    run = jax.jit(lambda x: (clip.update(x, clip.init(x), x), gn.unit_norms(x)))
    got, norms = jax.device_get(run(x))
    chex.assert_trees_all_close(got, want, rtol=1e-5)
    np.testing.assert_allclose(norms["w"], unit_norms(plain["w"], (0,)), rtol=2e-6)


CONVOLUTIONS = [
    P(None, None, "d", "t"),
    P(None, None, "t", "d"),
    P(None, None, ("d", "t")),
    P(None, None, None, ("d", "t")),
    P(None, "d", "t"),
    P(),
]


@pytest.mark.parametrize("spec", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(("kind", "shape", "check_vma"), MODES)
def test_units_of_a_convolution_span_all_but_the_last_dim(kind, shape, check_vma, spec):
    mesh, plain = mesh_of(kind, shape), normal((1, 24, 24, 24))
    specs, clip = {"w": spec}, gn.clip_by_unit_norm(20.0, specs={"w": spec})

    def run(x, state):
        norms = gn.unit_norms(x, specs=specs)
        return norms["w"], *clip.update(x, state, x)

    out_specs = (kept(spec, 4, (0, 1, 2)), specs, P())
    x = put(mesh, {"w": plain}, specs)
    compiled = mapped(run, mesh, (specs, P()), out_specs, check_vma=check_vma)
    norms, updates, state = compiled(x, clip.init(x))
    want = unit_norms(plain, (0, 1, 2))
    np.testing.assert_allclose(norms, want, rtol=2e-6)
    np.testing.assert_allclose(agreed(state.metrics.norms), want.reshape(-1), 2e-6)
    np.testing.assert_allclose(
        updates["w"], plain * np.minimum(1, 20 / want), rtol=1e-5
    )


@pytest.mark.parametrize("spec", [P("d"), P("t"), P(("d", "t"))], ids=str)
def test_a_bias_is_one_unit_and_needs_no_specs(mesh, spec):
    specs = {"bias": spec, "gain": P()}
    plain = {"bias": normal(24), "gain": normal(24, 1)}
    clip = gn.adaptive_grad_clip(0.5)
    want = jax.device_get(clip.update(plain, clip.init(plain), plain))

    def run(x, state):
        return gn.unit_norms(x), *clip.update(x, state, x)

    x = put(mesh, plain, specs)
    norms, updates, state = mapped(run, mesh, (specs, P()), (P(), specs, P()))(
        x, clip.init(x)
    )
    for name, norm in agreed(norms).items():
        np.testing.assert_allclose(norm, [reference.norm([plain[name]])], rtol=2e-6)
    chex.assert_trees_all_close(
        jax.device_get((updates, agreed(state))), want, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("shape", "size", "spec"),
    [
        ((8, 1), (8, 6), P("d")),
        ((8, 1), (6, 8), P(None, "d")),
        ((4, 2), (8, 6), P(("d", "t"))),
        ((4, 2), (4, 2), P("d", "t")),
        ((3, 2), (2, 3), P("t", "d")),
        ((4, 2), (4, 1), P("d")),
        ((8, 1), (2, 1, 1, 8), P(None, None, None, "d")),
    ],
    ids=str,
)
@checks
def test_a_matrix_of_which_a_device_holds_a_row_is_no_vector(
    shape, size, spec, check_vma
):
    mesh, plain = mesh_of("Explicit", shape), normal(size)
    summed = reference_parts.fan_in(size)
    clip = gn.clip_by_unit_norm(1.0, specs=spec)
    want = clip_alone(gn.clip_by_unit_norm(1.0), plain)

    def run(x, state):
        return gn.unit_norms(x, specs=spec), *clip.update(x, state)

    x = put(mesh, {"x": plain}, {"x": spec})["x"]
    out_specs = (kept(spec, len(size), summed), spec, P())
    compiled = mapped(run, mesh, (spec, P()), out_specs, check_vma=check_vma)
    norms, updates, state = compiled(x, clip.init(x))
    np.testing.assert_allclose(norms, unit_norms(plain, summed), rtol=2e-6)
    chex.assert_trees_all_close(
        jax.device_get((updates, agreed(state))), want, rtol=1e-5
    )


def clip_alone(clip, plain, params=None):
    return jax.device_get(clip.update(plain, clip.init(plain), params))


STACKS = {
    "pipeline": P("d"),
    "pipeline and tensor": P("d", None, "t"),
    "tensor": P(None, "t"),
    "tensor and pipeline": P("t", "d"),
    "both on layers": P(("d", "t")),
    "none": P(),
}


@pytest.mark.parametrize("spec", STACKS.values(), ids=STACKS)
@checks
def test_each_stacked_layer_has_a_norm_over_all_that_holds_it(
    wide_mesh, spec, check_vma
):
    specs = {"head": P(None, "t"), "layers": spec, "norm": P()}
    plain = {"head": normal((3, 6)), "layers": normal((24, 24, 4)), "norm": normal(5)}
    stacked = {"layers": 0}
    clip = gn.clip_by_leaf_norm(2.0, stacked_axes=stacked, specs=specs)
    alone = gn.clip_by_leaf_norm(2.0, stacked_axes=stacked)
    want = clip_alone(alone, plain)

    def run(x, state):
        norms = gn.leaf_norms(x, stacked_axes=stacked, specs=specs)
        return norms, *clip.update(x, state)

    layers = P(spec[0]) if spec else P()
    out_specs = ({"head": P(), "layers": layers, "norm": P()}, specs, P())
    x = put(wide_mesh, plain, specs)
    compiled = mapped(run, wide_mesh, (specs, P()), out_specs, check_vma=check_vma)
    norms, updates, state = compiled(x, clip.init(x))
    of_layers = unit_norms(plain["layers"], (1, 2)).reshape(-1)
    np.testing.assert_allclose(norms["layers"], of_layers, rtol=2e-6)
    for name in ("head", "norm"):
        np.testing.assert_allclose(norms[name], reference.norm([plain[name]]), 2e-6)
    chex.assert_trees_all_close(
        jax.device_get((updates, agreed(state))), want, rtol=1e-5
    )


def test_layers_that_no_axis_splits_need_no_specs(mesh):
    """Only a layer itself is split: its type says enough where the layers are kept."""
    plain = {"layers": normal((4, 5)), "head": normal(24)}
    specs = {"layers": P(), "head": P("d")}
    clip = gn.clip_by_leaf_norm(1.0, stacked_axes={"layers": 0})
    want = clip_alone(clip, plain)
    x = put(mesh, plain, specs)
    updates, state = mapped(clip.update, mesh, (specs, P()), (specs, P()))(
        x, clip.init(x)
    )
    chex.assert_trees_all_close(
        jax.device_get((updates, agreed(state))), want, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_experts_in_a_pipeline_have_a_norm_for_each_layer_of_each(kind):
    mesh = mesh_of(kind, (2, 2, 2), ("expert", "pipe", "tensor"))
    specs = {"experts": P("pipe", "expert", None, "tensor")}
    plain = {"experts": normal((4, 6, 3, 8))}
    axes = {"experts": (2, 3)}
    clip = gn.clip_by_unit_norm(1.0, axes=axes, specs=specs)
    want = clip_alone(gn.clip_by_unit_norm(1.0, axes=axes), plain)
    x = put(mesh, plain, specs)
    updates, state = mapped(clip.update, mesh, (specs, P()), (specs, P()))(
        x, clip.init(x)
    )
    assert state.metrics.norms.shape == (24,)
    chex.assert_trees_all_close(
        jax.device_get((updates, agreed(state))), want, rtol=1e-5
    )


@pytest.mark.parametrize(
    "spec", [P("d"), P(None, "t"), P("d", "t"), P("t", "d"), P()], ids=str
)
@checks
def test_each_entry_of_a_split_matrix_has_its_own_second_moment(spec, check_vma):
    specs = {"w": spec, "b": P("d")}
    steps = [{"w": normal((12, 12), seed), "b": normal(12, seed)} for seed in range(4)]
    steps[-1]["w"][3:5, 2] = 100.0
    alone = gn.clip_by_second_moment(2.0, decay=0.5, warmup_steps=1)
    clip = gn.clip_by_second_moment(2.0, decay=0.5, warmup_steps=1, specs=specs)
    for mesh in (mesh_of("Auto", (3, 2)), mesh_of("Explicit", (4, 2))):
        run = mapped(clip.update, mesh, (specs, P()), (specs, P()), check_vma=check_vma)
        state, want_state = clip.init(put(mesh, steps[0], specs)), alone.init(steps[0])
        for plain in steps:
            updates, state = run(put(mesh, plain, specs), state)
            want, want_state = alone.update(plain, want_state)
            chex.assert_trees_all_close(
                jax.device_get(updates), jax.device_get(want), rtol=1e-5
            )
        chex.assert_trees_all_close(
            agreed(state), jax.device_get(want_state), rtol=1e-5
        )


def test_float16_units_are_measured_in_float32_across_devices(mesh):
    plain = np.full((48, 24), 300, np.float16)
    for spec in (P("d", "t"), P(("d", "t")), P(None, "d")):
        x = put(mesh, {"x": plain}, {"x": spec})["x"]
        run = mapped(
            lambda x: gn.unit_norms(x, specs=spec),  # noqa: B023
            mesh,
            spec,
            kept(spec, 2, (0,)),
        )
        norms = run(x)
        assert norms.dtype == np.float32
        want = unit_norms(plain.astype(np.float32), (0,))
        np.testing.assert_allclose(norms, want, rtol=2e-6)


@pytest.mark.parametrize("order", [1, 2, 3, np.inf, "rms"])
def test_units_of_any_order_and_magnitude_are_those_of_whole_units(order):
    spec, plain = P("d", "t"), normal(MATRIX)
    plain[:6] *= np.float32(1e-25)
    plain[:, :7] *= np.float32(1e-12)
    plain[:, 30:] *= np.float32(3e18)
    for mesh in (mesh_of("Auto", (4, 2)), mesh_of("Explicit", (3, 2))):
        x = put(mesh, {"x": plain}, {"x": spec})["x"]
        run = mapped(
            lambda x: gn.unit_norms(x, ord=order, specs=spec), mesh, spec, P(None, "t")
        )
        want = unit_norms(plain, (0,), order)
        np.testing.assert_allclose(run(x), want, rtol=2e-6)
