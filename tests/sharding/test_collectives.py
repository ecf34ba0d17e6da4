"""How often devices speak: once for a measure or a clip, never where all is known."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

import gradnorm_jax as gn

from . import meshes
from .hlo import collectives, collectives_under_a_condition, compiled_text, reducers
from .meshes import mapped, mesh_of, put, state_specs

NAMES = ("both", "columns", "half", "replicated", "rows", "scalar", "square")
SPECS = {name: meshes.SPECS[name] for name in NAMES}
ORDERS = {"1": 1, "2": 2, "inf": math.inf, "rms": "rms"}
GROUPS = {"(rows|columns|replicated)": "x", "(half|both)": "y"}
STACKED = {"rows": 0}
MEASURES = {
    f"global_norm of order {name}": functools.partial(gn.global_norm, ord=order)
    for name, order in ORDERS.items()
} | {
    "leaf_norms": gn.leaf_norms,
    "largest of leaves": functools.partial(gn.leaf_norms, ord=math.inf),
    "stacked leaf_norms": functools.partial(
        gn.leaf_norms, stacked_axes={"columns": 0}, specs=SPECS
    ),
    "group_norms": lambda grads: gn.group_norms(grads, GROUPS),
    "unit_norms": lambda grads: gn.unit_norms(
        grads, axes={"(rows|half)": (0, 1)}, specs=SPECS
    ),
    "per_leaf": gn.per_leaf().measure,
}
CLIPS = {
    "clip_by_global_norm": gn.clip_by_global_norm(1.0),
    "clip_by_leaf_norm": gn.clip_by_leaf_norm(1.0),
    "clip_by_group_norm": gn.clip_by_group_norm({"rows": 1.0, ".*": 2.0}),
    "clip_by_block_rms": gn.clip_by_block_rms(1.0),
    "largest entry": gn.clip_by_norm(1.0, norm=gn.norms.linf),
    "autoclip": gn.autoclip(window=5),
    "zclip": gn.zclip(),
    "adagc": gn.adagc(),
    "zero": gn.clip_by_global_norm(1.0, nonfinite="zero"),
    "drop": gn.clip_by_leaf_norm(1.0, nonfinite="drop"),
    "relative to parameters": gn.clip_by_norm(
        gn.thresholds.relative_to_params(0.1), granularity=gn.per_leaf()
    ),
    "adaptive_grad_clip": gn.adaptive_grad_clip(0.1, specs=SPECS),
    "skip_step": gn.skip_step(optax.sgd(0.1), gn.thresholds.rolling_sigma(3.0)),
}


def tree():
    """A leaf on each set of axes."""
    leaves = meshes.tree()
    return {name: leaves[name] for name in NAMES}


both_kinds = pytest.mark.parametrize("kind", ["Auto", "Explicit"])


def program_of_measure(measure, mesh, specs=SPECS):
    """No output may ask for a collective of its own: each keeps what varies."""
    grads = put(mesh, tree(), specs)

    def run(grads):
        norms = measure(grads)
        return sum(jnp.sum(x) for x in jax.tree.leaves(norms))[None]

    compiled = mapped(run, mesh, (specs,), P(("d", "t")))
    return compiled_text(compiled, grads)


def program_of_update(tx, mesh, specs=SPECS, **extra):
    grads = put(mesh, tree(), specs)
    state = tx.init(grads)
    in_state = state_specs(state, grads, specs)

    def run(grads, state, params):
        return tx.update(grads, state, params, **extra)

    compiled = mapped(run, mesh, (specs, in_state, specs), (specs, in_state))
    return compiled_text(compiled, grads, state, grads)


@pytest.mark.parametrize("name", MEASURES)
@both_kinds
def test_a_measure_is_one_all_reduce(kind, name):
    text = program_of_measure(MEASURES[name], mesh_of(kind))
    assert collectives(text) == {"all-reduce": 1}
    assert not collectives_under_a_condition(text)


@pytest.mark.parametrize("shape", [(3, 2), (8, 1)])
def test_so_it_is_on_a_mesh_of_any_shape(shape):
    for measure in (gn.global_norm, gn.leaf_norms):
        text = program_of_measure(measure, mesh_of("Auto", shape))
        assert collectives(text) == {"all-reduce": 1}


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_is_one_all_reduce(name):
    text = program_of_update(CLIPS[name], mesh_of())
    if name == "adaptive_grad_clip":
        # Units that are split are told to all devices, grads and params in one go.
        assert sum(collectives(text).values()) == 1
    else:
        assert collectives(text) == {"all-reduce": 1}
    assert not collectives_under_a_condition(text)


def test_the_one_all_reduce_of_a_clip_by_units_is_a_vector():
    """Two numbers or more for each unit, of gradients and of parameters."""
    specs = {"w": P("d", None)}
    grads = put(mesh_of(), {"w": np.ones((24, 7), np.float32)}, specs)
    clip = gn.adaptive_grad_clip(0.1, specs=specs)
    run = mapped(clip.update, mesh_of(), (specs, P(), specs), (specs, P()))
    text = compiled_text(run, grads, clip.init(grads), grads)
    assert collectives(text) == {"all-reduce": 1}
    assert reducers(text) == ["add"]


@pytest.mark.parametrize(
    ("order", "joined"),
    [(1, "add"), (2, "add"), ("rms", "add"), (math.inf, "maximum")],
)
def test_sums_are_added_and_maxima_compared(order, joined):
    measure = functools.partial(gn.global_norm, ord=order)
    assert reducers(program_of_measure(measure, mesh_of())) == [joined]


@pytest.mark.parametrize(
    "measure",
    [
        functools.partial(gn.global_norm, ord=3),
        functools.partial(gn.leaf_norms, ord=3),
        gn.per_leaf(),
    ],
    ids=["global", "leaf", "own"],
)
def test_what_is_neither_is_gathered_once(measure):
    if isinstance(measure, gn.Granularity):
        own = gn.norms.l2._replace(ord="own", slope=None)
        measure = functools.partial(measure.measure, norm=own)
    found = collectives(program_of_measure(measure, mesh_of()))
    assert found in ({"all-gather": 1}, {"all-reduce": 1})  # one may be made as one


@pytest.mark.parametrize("name", [*MEASURES, "lp(3)"])
def test_a_replicated_tree_needs_no_collective(name):
    specs = dict.fromkeys(SPECS, P())
    measure = MEASURES.get(name, functools.partial(gn.global_norm, ord=3))
    if name in ("stacked leaf_norms", "unit_norms"):
        measure = {"unit_norms": gn.unit_norms}.get(name, gn.leaf_norms)
    for check_vma in (True, False):
        mesh = mesh_of()
        how = {} if check_vma else {"axis_names": ()}
        run = mapped(
            functools.partial(measure_of(name, measure), **how),
            mesh,
            (specs,),
            check_vma=check_vma,
        )
        assert collectives(compiled_text(run, put(mesh, tree(), specs))) == {}


def measure_of(name, measure):
    if name == "group_norms":
        return lambda grads, **how: gn.group_norms(grads, GROUPS, **how)
    return measure


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_of_a_replicated_tree_needs_none(name):
    specs = dict.fromkeys(SPECS, P())
    tx = CLIPS[name]
    if name == "adaptive_grad_clip":
        tx = gn.adaptive_grad_clip(0.1, specs=specs)
    assert collectives(program_of_update(tx, mesh_of(), specs)) == {}


@pytest.mark.parametrize("record", [("grad",), ("grad", "update", "param")])
@both_kinds
def test_a_watched_clip_measures_the_gradients_once(kind, record):
    inner = optax.chain(gn.clip_by_global_norm(1.0), optax.adam(1e-3))
    tx = gn.watch(inner, window=4, record=record)
    text = program_of_update(tx, mesh_of(kind), value=1.0)
    assert collectives(text) == {"all-reduce": 1 if record == ("grad",) else 2}
    assert not collectives_under_a_condition(text)


def test_a_watched_clip_by_leaves_measures_the_gradients_once():
    inner = optax.chain(gn.clip_by_leaf_norm(1.0), optax.adam(1e-3))
    text = program_of_update(gn.watch(inner, window=4), mesh_of())
    assert collectives(text) == {"all-reduce": 2}


def test_a_tree_on_axes_of_size_1_speaks_to_nobody_else():
    text = program_of_measure(gn.global_norm, mesh_of("Auto", (1, 1)))
    assert set(collectives(text)) <= {"all-reduce"}


@both_kinds
def test_under_jit_no_gradient_is_gathered(kind):
    mesh = mesh_of(kind)
    grads = put(mesh, tree(), SPECS)
    for measure in (gn.global_norm, gn.leaf_norms, gn.per_leaf().measure):
        text = compiled_text(jax.jit(measure), grads)
        assert not set(collectives(text)) & {"all-to-all", "collective-permute"}
        assert max([0, *gathered_sizes(text)]) <= 16


def gathered_sizes(text):
    """How many numbers each all-gather of a program returns."""
    sizes = []
    for line in text.splitlines():
        if " all-gather(" in line or " all-gather-start(" in line:
            shape = line.split("[", 1)[1].split("]", 1)[0]
            sizes.append(math.prod(int(n) for n in shape.split(",") if n))
    return sizes


@both_kinds
def test_under_jit_a_clip_gathers_no_gradient(kind):
    mesh = mesh_of(kind)
    specs = {"rows": P("d"), "square": P("d", "t"), "columns": P(None, "t")}
    grads = put(mesh, {name: tree()[name] for name in specs}, specs)
    clip = gn.clip_by_global_norm(1.0)
    out = jax.tree.map(lambda x: x.sharding, grads)
    run = jax.jit(clip.update, out_shardings=(out, None))
    text = compiled_text(run, grads, clip.init(grads))
    assert max([0, *gathered_sizes(text)]) <= 16
