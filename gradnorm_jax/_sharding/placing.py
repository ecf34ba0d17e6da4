"""Where arrays are put: a state on the mesh of its parameters, and kept there."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType

from gradnorm_jax._sharding.collective import Axes
from gradnorm_jax._sharding.reading import Split, is_manual, ordered, varying
from gradnorm_jax._typing import Tree


def replicated(x: jax.Array) -> jax.Array:
    """Returns an array of which every device has all, also where the compiler decides.

    Of a state, so that it stays where `init` put it.
    """
    sharding = jax.typeof(x).sharding
    kinds = set(sharding.mesh.axis_types)
    if not x.ndim or not kinds or kinds == {AxisType.Manual}:
        return x
    everywhere = _everywhere(sharding.mesh, x)
    if any(axes is not None for axes in sharding.spec):
        return jax.reshard(x, everywhere)
    if AxisType.Auto in kinds:
        return jax.lax.with_sharding_constraint(x, everywhere)
    return x


def spread_like(flag: jax.Array, x: jax.Array) -> jax.Array:
    """Returns a condition for a choice between arrays such as `x`.

    On Explicit axes it must be sharded as they are.
    """
    sharding = jax.typeof(x).sharding
    if all(axes is None for axes in sharding.spec):
        return flag
    return jnp.broadcast_to(flag, x.shape, out_sharding=sharding)


def _everywhere(mesh: Any, x: jax.Array) -> jax.NamedSharding:
    # As JAX spells it in what a compiled function returns, or that compiles twice.
    is_explicit = AxisType.Explicit in mesh.axis_types
    return jax.NamedSharding(mesh, jax.P(*[None] * x.ndim) if is_explicit else jax.P())


def placed(state: Tree, params: Tree, split: Sequence[Split] | None = None) -> Tree:
    """Returns a new state, every array with a buffer of its own, where `params` are.

    A buffer that two arrays share cannot be donated. A state that is not on the mesh of
    the parameters compiles the step twice: once more when it is. And with `split`,
    inside `shard_map`, it differs across the mesh axes that no norm is reduced over, so
    that it can ride in `scan` from the start.
    """
    leaves = jax.tree.leaves(params)
    meshes = {
        x.sharding.mesh
        for x in leaves
        if isinstance(x, jax.Array)
        and not isinstance(x, Tracer)
        and isinstance(x.sharding, jax.NamedSharding)
    }
    state = jax.tree.map(jnp.copy, state)
    if len(meshes) == 1 and not is_manual():
        [mesh] = meshes
        state = jax.tree.map(lambda x: jax.device_put(x, _everywhere(mesh, x)), state)
    return state if split is None else varied(state, params, split)


def varied(state: Tree, params: Tree, split: Sequence[Split]) -> Tree:
    """Returns a state that may differ across the axes that nothing reduces over."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    left = set().union(*map(varying, jax.tree.leaves(params))) if manual else set()
    axes = ordered(manual, left - {axis for own in split for axis in own.axes})
    return jax.tree.map(functools.partial(_varied_over, axes=axes), state)


def split_by_the_compiler(
    fun: Callable[..., Any],
    args: Sequence[Any],
    batch: Tree,
    out_specs: Callable[[jax.P], Any],
) -> Any:
    """Calls a function and lets the compiler decide what is split how.

    On Explicit axes, which would want every reshape to be told.

    Args:
      fun: A function of `args`.
      args: Trees; leaves that are no arrays are handed on as they are.
      batch: Those of them that have examples along axis 0.
      out_specs: The specs of the result, a function of the spec of `[B]`.
    """
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return fun(*args)
    leaves, treedef = jax.tree.flatten(args)
    places = [k for k, x in enumerate(leaves) if isinstance(x, jax.Array)]

    def of_arrays(*arrays: jax.Array) -> Any:
        own = list(leaves)
        for k, x in zip(places, arrays, strict=True):
            own[k] = x
        return fun(*jax.tree.unflatten(treedef, own))

    specs = (jax.typeof(x).sharding.spec for x in jax.tree.leaves(batch))
    of_examples = jax.P(next((spec[0] for spec in specs if spec), None))
    decided = jax.sharding.auto_axes(of_arrays, out_sharding=out_specs(of_examples))
    return decided(*(leaves[k] for k in places))


def varying_like(tree: Tree, others: Tree) -> Tree:
    """Returns a tree that may differ wherever one of `others` does.

    So that what is differentiated by it is a gradient of this device, not their sum.
    """
    if not is_manual():
        return tree
    over = set().union(*map(varying, jax.tree.leaves(others)))
    axes = ordered(jax.sharding.get_abstract_mesh().manual_axes, over)
    return jax.tree.map(functools.partial(_varied_over, axes=axes), tree)


def placed_like(state: Tree, before: Tree) -> Tree:
    """Returns a state that is where the one before it was, and varies where it did."""
    if not is_manual():
        return jax.tree.map(replicated, state)
    return jax.tree.map(
        lambda x, old: _varied_over(x, axes=tuple(varying(old))), state, before
    )


def _varied_over(x: jax.Array, *, axes: Axes) -> jax.Array:
    missing = tuple(axis for axis in axes if axis not in varying(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
