"""The norms a user asks for: of a tree, of its leaves, of groups, of units."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp

from gradnorm_jax import _layout
from gradnorm_jax._layout import Layout
from gradnorm_jax._typing import Axis, Groups, Ord, PerLeaf, Tree
from gradnorm_jax.norms.fold import from_ord
from gradnorm_jax.norms.granularity import measure


def global_norm(tree: Tree, *, ord: Ord = 2) -> jax.Array:
    r"""Returns the norm of all leaves of a tree together.

    .. math:: \Big( \sum_{\text{leaves}} \sum_i |x_i|^p \Big)^{1/p}

    The root of the sum of the squared norms of the leaves, for the default p = 2.

    Args:
      tree: A pytree of floating or complex arrays; an entry counts with its absolute
        value.
      ord: The order p: a number >= 1, `jnp.inf` for the largest absolute value, or
        "rms" for the root of the mean square.

    Returns:
      A float32 scalar (float64 where a leaf is). 0 for a tree without entries.

    Guarantees:
      - Right wherever the norm itself fits into its dtype, though the sum of squares
        may not: entries of 300 in float16, of 3e19 or 1e-30 in float32.
      - Leaves of bfloat16 and float16 are accumulated in float32.
      - A NaN in the tree gives NaN, an infinity gives infinity.
      - Differentiable; the gradient of the norm at 0 is 0.
      - `None` and `optax.MaskedNode` in place of a leaf pass by.
      - Under `jit` the norm of a sharded tree is that of the whole tree; inside
        `shard_map` it is that of the shards of one device.

    Raises:
      TypeError: If a leaf is of an integer or boolean dtype.
      ValueError: If `ord` is not an order.

    Example:
      >>> grads = {"w": jnp.array([[3.0, 0.0]]), "b": jnp.array([4.0])}
      >>> print(global_norm(grads), global_norm(grads, ord=1))
      5.0 7.0
      >>> print(global_norm(jnp.full(9, 100, jnp.float16)))
      300.0
    """
    layout = _layout.by_tree(tree, "global_norm(tree)")
    return _norms(layout, tree, ord, "global_norm")


def leaf_norms(
    tree: Tree, *, ord: Ord = 2, stacked_axes: PerLeaf | None = None
) -> Tree:
    """Returns the norm of each leaf.

    Args:
      tree: A pytree of floating or complex arrays.
      ord: The order, as in :func:`global_norm`.
      stacked_axes: The axis along which leaves stack layers, for every leaf or as
        `{pattern: axis}`; such a leaf has one norm for each layer.

    Returns:
      A tree of the same structure: a scalar for each leaf, `[layers]` for a stacked
      one. What :func:`global_norm` guarantees holds of each.

    Raises:
      TypeError: If a leaf is of an integer or boolean dtype.
      ValueError: If `ord` is not an order, or a pattern matches no leaf.

    Example:
      >>> norms = leaf_norms({"layers": jnp.ones((2, 9)), "head": jnp.ones(4)})
      >>> print(norms["layers"], norms["head"])
      4.2426405 2.0
      >>> print(leaf_norms({"layers": jnp.ones((2, 9))}, stacked_axes=0)["layers"])
      [3. 3.]
    """
    layout = _layout.by_leaf(tree, stacked_axes, "leaf_norms(tree)")
    cells = layout.split(_norms(layout, tree, ord, "leaf_norms"))
    inner = [
        [shape[k] for k in kept]
        for shape, kept in zip(layout.shapes, layout.kept, strict=True)
    ]
    return jax.tree.unflatten(
        jax.tree.structure(tree),
        [x.reshape(shape) for x, shape in zip(cells, inner, strict=True)],
    )


def group_norms(
    tree: Tree, groups: Groups, *, ord: Ord = 2
) -> dict[Hashable, jax.Array]:
    """Returns the norm of each group of leaves.

    Args:
      tree: A pytree of floating or complex arrays.
      groups: The label of each leaf: `{pattern: label}`, where the first pattern that
        matches the leaf's whole path counts; a function of the path; or a tree of
        labels. A leaf with no label (`None`) is left out.
      ord: The order, as in :func:`global_norm`.

    Returns:
      A dictionary with the norm of each label, in the order of the patterns or, where
      there are none, of the tree. What :func:`global_norm` guarantees holds of each.

    Raises:
      TypeError: If a leaf is of an integer or boolean dtype.
      ValueError: If `ord` is not an order, or a pattern matches no leaf.

    Example:
      >>> grads = {"encoder": {"w": jnp.ones(9), "b": jnp.ones(7)}, "head": jnp.ones(1)}
      >>> norms = group_norms(grads, {"encoder/.*": "encoder", ".*": "rest"})
      >>> print({label: float(norm) for label, norm in norms.items()})
      {'encoder': 4.0, 'rest': 1.0}
    """
    layout = _layout.by_group(tree, groups, None, "group_norms(tree)")
    norms = _norms(layout, tree, ord, "group_norms")
    return dict(zip(layout.labels, norms, strict=True))


def unit_norms(tree: Tree, *, axes: PerLeaf | None = None, ord: Ord = 2) -> Tree:
    """Returns the norm of each unit of each leaf: of the weights into one output.

    Args:
      tree: A pytree of floating or complex arrays.
      axes: The axes that one unit spans, for every leaf or as `{pattern: axes}`. By
        default those of AGC for kernels in the layout of Flax: axis 0 of 2 or 3
        dimensions, all but the last of 4 or 5, all of a scalar or vector.
      ord: The order, as in :func:`global_norm`.

    Returns:
      A tree of the same structure. Each leaf keeps its rank, with size 1 along the
      axes of a unit, so that it broadcasts against the leaf it was taken of.

    Raises:
      TypeError: If a leaf is of an integer or boolean dtype.
      ValueError: If `ord` is not an order, a pattern matches no leaf, or a leaf has
        more than 5 dimensions and no `axes`.

    Example:
      >>> print(unit_norms(jnp.array([[3.0, 0.0], [4.0, 2.0]])))
      [[5. 2.]]
    """
    layout = _layout.by_unit(tree, axes, "unit_norms(tree)")
    cells = layout.split(_norms(layout, tree, ord, "unit_norms"))
    return jax.tree.unflatten(jax.tree.structure(tree), cells)


def unitwise_norm(x: jax.Array, axis: Axis | None = None) -> jax.Array:
    """Returns the L2 norm of each unit of an array in the place of all its entries.

    The same call as `optax.transforms.unitwise_norm`, and right at any magnitude and in
    any dtype.

    Args:
      x: A floating or complex array.
      axis: The axes that one unit spans; by default as in :func:`unit_norms`.

    Returns:
      An array of the shape of `x`, float32 or wider.

    Example:
      >>> print(unitwise_norm(jnp.array([[3.0, 0.0], [4.0, 2.0]])))
      [[5. 2.]
       [5. 2.]]
    """
    return jnp.broadcast_to(unit_norms(x, axes=axis), jnp.shape(x))


def _norms(layout: Layout, tree: Tree, order: Ord, caller: str) -> jax.Array:
    return measure(layout, jax.tree.leaves(tree), from_ord(order, caller))[0]


__all__ = ["global_norm", "group_norms", "leaf_norms", "unit_norms", "unitwise_norm"]
