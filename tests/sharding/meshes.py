"""Meshes, trees that are split over them, and what all devices must agree upon."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import P

SHAPES = ((4, 2), (3, 2), (8, 1), (1, 1))
KINDS = ("Auto", "Explicit")

#: How each leaf of `tree()` is split: on one axis, on the other, on both, on none.
SPECS = {
    "both": P(("d", "t")),
    "columns": P(None, "t"),
    "complex": P("d"),
    "empty": P(None, ("d", "t")),
    "frozen": P(),
    "half": P("d"),
    "quarter": P("t"),
    "replicated": P(),
    "rows": P("d"),
    "scalar": P(),
    "square": P("d", "t"),
    "swapped": P("t", "d"),
}


@functools.cache
def mesh_of(kind="Auto", shape=(4, 2), names=("d", "t")):
    """Returns a mesh over as many of the eight devices as its shape needs."""
    return jax.make_mesh(
        shape,
        names,
        axis_types=(getattr(jax.sharding.AxisType, kind),) * len(names),
        devices=jax.devices()[: math.prod(shape)],
    )


def tree(seed=0):
    """Returns leaves of all dtypes and ranks; 24 is split evenly by every mesh."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "both": normal(24),
        "columns": normal(3, 24),
        "complex": (normal(24, 2) + 1j * normal(24, 2)).astype(np.complex64),
        "empty": normal(0, 24),
        "frozen": None,
        "half": normal(24, 3).astype(ml_dtypes.bfloat16),
        "quarter": normal(24).astype(np.float16),
        "replicated": normal(5, 3),
        "rows": normal(24, 2),
        "scalar": normal(),
        "square": normal(24, 4),
        "swapped": normal(4, 24),
    }


def put(mesh, arrays, specs):
    """Places {name: array} on a mesh, each as its spec says.

    The specs are spelled as those of outputs are, which on an Explicit mesh name every
    dimension: what comes back as it went in is then no new kind of input.
    """
    explicit = jax.sharding.AxisType.Explicit in mesh.axis_types

    def place(x, spec):
        if explicit:
            spec = P(*spec, *[None] * (np.ndim(x) - len(spec)))
        return jax.device_put(x, jax.NamedSharding(mesh, spec))

    return {
        name: None if x is None else place(x, specs[name]) for name, x in arrays.items()
    }


def replicate(mesh, tree):
    """Places a tree on every device of a mesh."""
    return jax.device_put(tree, jax.NamedSharding(mesh, P()))


def only(axes, specs):
    """Returns the specs with the mesh axes that are named, and no others."""

    def restrict(spec):
        entries = [(e,) if isinstance(e, str) else (e or ()) for e in spec]
        kept = [tuple(axis for axis in entry if axis in axes) for entry in entries]
        return P(*(entry or None for entry in kept))

    return jax.tree.map(restrict, specs)


def mapped(fun, mesh, in_specs, out_specs=P(), **options):  # noqa: B008 - frozen
    """Returns a function of one argument or more, compiled to run on each shard."""
    return jax.jit(
        jax.shard_map(fun, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options)
    )


def agreed(tree):
    """Returns what replicated arrays hold, the same bits on every device."""

    def value(x):
        assert x.is_fully_replicated, x.sharding
        first, *others = (np.asarray(shard.data) for shard in x.addressable_shards)
        for other in others:
            assert first.tobytes() == other.tobytes(), (first, other)
        return first

    return jax.tree.map(value, tree)


def state_specs(state, params, specs):
    """Returns specs for a state: those of `params` for what has their structure."""
    structure = jax.tree.structure(params)
    like_params = lambda x: jax.tree.structure(x) == structure  # noqa: E731
    return jax.tree.map(
        lambda x: specs if like_params(x) else P(), state, is_leaf=like_params
    )


def zeros_like(fun, *args):
    """Returns zeros of the shapes and dtypes that a function returns."""
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fun, *args)
    )
