"""What has one norm: the whole tree, a leaf, a group of leaves, or a unit of a leaf."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gradnorm_jax import _layout
from gradnorm_jax._checks import check_kind
from gradnorm_jax._layout import Layout
from gradnorm_jax._sharding import Placement
from gradnorm_jax._typing import AUTO, AxisNames, Groups, PerLeaf, Tree
from gradnorm_jax.norms.fold import Norm, l2
from gradnorm_jax.norms.measurement import measure


@dataclasses.dataclass(frozen=True, repr=False)
class Granularity:
    """What has one norm, and what a scale goes back to.

    Attributes:
      name: How it was asked for.
      layout: `(tree, placement) -> Layout`: how the leaves of a tree divide into parts.
    """

    name: str
    layout: Callable[..., Layout]

    def __repr__(self) -> str:
        return self.name

    def measure(
        self,
        tree: Tree,
        norm: Norm = l2,
        *,
        axis_names: AxisNames = AUTO,
        specs: Tree | None = None,
    ) -> jax.Array:
        """Returns the norm of each part: shape `()` for one part, else `(parts,)`.

        Args:
          tree: A pytree of floating or complex arrays.
          norm: Which norm.
          axis_names: Which mesh axes to reduce over, as in :func:`global_norm`.
          specs: How each leaf is split, as in :func:`global_norm`.

        Example:
          >>> print(per_leaf().measure({"b": jnp.array([3.0, 4.0]), "w": jnp.ones(4)}))
          [5. 2.]
        """
        layout = self.layout(tree, Placement(axis_names, specs))
        return measure(layout, jax.tree.leaves(tree), norm).norms

    def broadcast(
        self,
        parts: jax.Array,
        tree: Tree,
        *,
        axis_names: AxisNames = AUTO,
        specs: Tree | None = None,
    ) -> Tree:
        """Returns what each part has as a tree that broadcasts against `tree`.

        `measure(broadcast(s) * g) == s * measure(g)` for any s >= 0; leaves that belong
        to no part get 1.

        Args:
          parts: An array as `measure` returns it.
          tree: The tree it was measured of.
          axis_names: What `measure` was given.
          specs: What `measure` was given.

        Example:
          >>> tree = {"b": jnp.zeros(2), "w": jnp.zeros(4)}
          >>> per_leaf().broadcast(jnp.array([0.5, 1.0]), tree)["b"]
          Array(0.5, dtype=float32)
        """
        layout = self.layout(tree, Placement(axis_names, specs))
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
        return self.layout(tree, measured=False).part_names


def check_granularity(granularity: object, caller: str) -> None:
    """Refuses what does not say what has one norm."""
    check_kind(
        granularity,
        Granularity,
        f"{caller}(granularity=...)",
        "`whole_tree()` or `per_leaf()`",
    )


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
