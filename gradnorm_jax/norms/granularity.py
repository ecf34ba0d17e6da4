"""What has one norm: the whole tree, a leaf, a group of leaves, or a unit of a leaf."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax import _layout
from gradnorm_jax._layout import Layout
from gradnorm_jax._typing import Groups, PerLeaf, Tree
from gradnorm_jax.norms.fold import Norm, l2, step_down


@dataclasses.dataclass(frozen=True, repr=False)
class Granularity:
    """What has one norm, and what a scale goes back to.

    Attributes:
      name: How it was asked for.
      layout: `tree -> Layout`: how the leaves of a tree divide into parts.
    """

    name: str
    layout: Callable[[Tree], Layout]

    def __repr__(self) -> str:
        return self.name

    def measure(self, tree: Tree, norm: Norm = l2) -> jax.Array:
        """Returns the norm of each part: shape `()` for one part, else `(parts,)`.

        Example:
          >>> print(per_leaf().measure({"b": jnp.array([3.0, 4.0]), "w": jnp.ones(4)}))
          [5. 2.]
        """
        return measure(self.layout(tree), jax.tree.leaves(tree), norm)[0]

    def broadcast(self, parts: jax.Array, tree: Tree) -> Tree:
        """Returns what each part has as a tree that broadcasts against `tree`.

        `measure(broadcast(s) * g) == s * measure(g)` for any s >= 0; leaves that belong
        to no part get 1.

        Example:
          >>> tree = {"b": jnp.zeros(2), "w": jnp.zeros(4)}
          >>> per_leaf().broadcast(jnp.array([0.5, 1.0]), tree)["b"]
          Array(0.5, dtype=float32)
        """
        layout = self.layout(tree)
        one = jnp.ones((), parts.dtype)
        spread = [
            layout.spread(parts, i) if layout.scales(i) else one
            for i in range(len(layout.shapes))
        ]
        return jax.tree.unflatten(jax.tree.structure(tree), spread)

    def names(self, tree: Tree) -> tuple[str, ...]:
        """Names the parts of a tree, in the order of `measure`.

        Example:
          >>> per_leaf(stacked_axes={"layers/.*": 0}).names(
          ...     {"head": jnp.ones(3), "layers": {"w": jnp.ones((2, 5))}}
          ... )
          ('head', 'layers/w[0]', 'layers/w[1]')
        """
        return self.layout(tree).part_names


def whole_tree() -> Granularity:
    """All leaves together have one norm, the global norm."""
    return Granularity(
        "whole_tree()", functools.partial(_layout.by_tree, caller="whole_tree(tree)")
    )


def per_leaf(*, stacked_axes: PerLeaf | None = None) -> Granularity:
    """Each leaf has a norm of its own.

    Args:
      stacked_axes: The axis along which a leaf stacks layers, as those that
        `flax.linen.scan` makes: then each layer has a norm. One axis for every leaf, or
        `{pattern: axis}` for those whose whole path a pattern matches.
    """
    return Granularity(
        f"per_leaf(stacked_axes={stacked_axes})" if stacked_axes else "per_leaf()",
        functools.partial(
            _layout.by_leaf, stacked_axes=stacked_axes, caller="per_leaf(tree)"
        ),
    )


def per_group(groups: Groups, *, scaled: Groups | None = None) -> Granularity:
    """The leaves with one label have a norm together.

    Args:
      groups: The label of each leaf: `{pattern: label}`, where the first pattern that
        matches the whole path counts, a function of the path, or a tree of labels. A
        leaf with no label (`None`) enters no norm.
      scaled: The label by whose scale each leaf is multiplied, where that is another
        choice: say, the norm of the kernels scales the biases too. By default `groups`.
        A leaf with no label is left as it is.
    """
    return Granularity(
        "per_group(...)",
        functools.partial(
            _layout.by_group, groups=groups, scaled=scaled, caller="per_group(tree)"
        ),
    )


def per_unit(*, axes: PerLeaf | None = None) -> Granularity:
    """Each unit, the weights into one output, has a norm of its own.

    Args:
      axes: The axes that one unit spans, for every leaf or as `{pattern: axes}`. By
        default the inputs of a kernel in the layout of Flax, as in AGC: axis 0 of 2 or
        3 dimensions, all but the last of 4 or 5, and all of a scalar or vector. For
        Equinox or PyTorch layouts give them: `{".*weight": 1}`.
    """
    return Granularity(
        f"per_unit(axes={axes})" if axes is not None else "per_unit()",
        functools.partial(_layout.by_unit, axes=axes, caller="per_unit(tree)"),
    )


def per_example() -> Granularity:
    """Each entry of the leading axis has a norm over all leaves.

    For gradients made by `jax.vmap(jax.grad(loss), (None, 0))`.
    """
    return Granularity(
        "per_example()",
        functools.partial(_layout.by_example, caller="per_example(tree)"),
    )


def measure(
    layout: Layout, leaves: Sequence[jax.Array], norm: Norm
) -> tuple[jax.Array, jax.Array]:
    """Returns the norm of each part, and which cells have a norm that is finite."""
    leaves = tuple(jnp.asarray(leaves[i]) for i in layout.members)
    if norm.slope is None:
        return _compiled(norm, layout, leaves)
    return _measure(norm, layout, leaves)


def first_nonfinite_leaf(layout: Layout, sound: jax.Array) -> jax.Array:
    """Returns the position of the first leaf with a cell that is not sound, or -1."""
    if not sound.size:
        return jnp.full((), -1, jnp.int32)
    ends = jnp.asarray(layout.offsets[1:])
    member = jnp.searchsorted(ends, jnp.argmin(sound), side="right")
    return jnp.where(jnp.all(sound), -1, jnp.asarray(layout.members)[member])


def _evaluate(
    norm: Norm, layout: Layout, leaves: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    cells = norm.partial(leaves, [layout.kept[i] for i in layout.members])
    norms = norm.finish(layout.gather(cells, norm.combine))
    return norms, jnp.isfinite(norm.finish(cells))


# Compiled once for each norm and layout, so that a call outside of `jit` is cheap too.
_compiled = jax.jit(_evaluate, static_argnums=(0, 1), inline=True)
_measure = jax.custom_jvp(_compiled, nondiff_argnums=(0, 1))


@_measure.defjvp
def _measure_jvp(norm: Norm, layout: Layout, primals: tuple, tangents: tuple) -> tuple:
    assert norm.slope is not None
    # d norm = sum over a part's entries of slope(x) dx. Where the norm is 0 so is
    # every x, and the slope is taken at norm 1, where it is 0 for every order. A slope
    # does not depend on the scale: norms with a subnormal reciprocal are stepped down.
    (leaves,), (leaf_tangents,) = primals, tangents
    norms, sound = _measure(norm, layout, leaves)
    steady = jnp.where(norms == 0, 1, norms)
    factors = step_down(steady)
    sizes = jnp.broadcast_to(jnp.asarray(layout.sizes, norms.dtype), norms.shape)
    cells = []
    for i, x, dx in zip(layout.members, leaves, leaf_tangents, strict=True):
        wide = np.promote_types(x.dtype, norms.dtype)
        own_norm, factor, size = (
            layout.spread(value, i, measured=True).astype(wide)
            for value in (steady * factors, factors, sizes)
        )
        slope = norm.slope(x.astype(wide) * factor, own_norm, size)
        summed = tuple(k for k in range(x.ndim) if k not in layout.kept[i])
        product = jnp.real(jnp.conj(slope) * dx.astype(wide))
        cells.append(jnp.sum(product, summed).reshape(-1).astype(norms.dtype))
    folded = jnp.concatenate(cells) if cells else jnp.zeros((0,), norms.dtype)
    tangent = layout.gather(folded, lambda x: jnp.sum(x, axis=0))
    return (norms, sound), (tangent, np.zeros(sound.shape, jax.dtypes.float0))
