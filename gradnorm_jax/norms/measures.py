"""The norms a user asks for: of a tree, of its leaves, of groups, of units."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp

from gradnorm_jax import _layout
from gradnorm_jax._layout import Layout
from gradnorm_jax._sharding import Placement
from gradnorm_jax._typing import AUTO, Axis, AxisNames, Groups, Ord, PerLeaf, Tree
from gradnorm_jax.norms.fold import from_ord
from gradnorm_jax.norms.granularity import measure


def global_norm(
    tree: Tree,
    *,
    ord: Ord = 2,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> jax.Array:
    r"""Returns the norm of all leaves of a tree together.

    .. math:: \Big( \sum_{\text{leaves}} \sum_i |x_i|^p \Big)^{1/p}

    The root of the sum of the squared norms of the leaves, for the default p = 2.

    Args:
      tree: A pytree of floating or complex arrays; an entry counts with its absolute
        value.
      ord: The order p: a number >= 1, `jnp.inf` for the largest absolute value, or
        "rms" for the root of the mean square.
      axis_names: The mesh axes to reduce over inside `shard_map`: by default those over
        which the type of a leaf says that it varies. An axis that is left out holds
        independent models, each with a norm of its own; `()` is for leaves that are
        the same on every device. An axis of `jax.vmap` is reduced over if it is named.
      specs: The PartitionSpec of each leaf inside `shard_map`, or a prefix of that
        tree, where types do not tell: with `check_vma=False`, and where parts lie
        across the shards of a leaf, as units do.

    Returns:
      A float32 scalar (float64 where a leaf is). 0 for a tree without entries.

    Guarantees:
      - Right wherever the norm itself fits into its dtype, though the sum of squares
        may not: entries of 300 in float16, of 3e19 or 1e-30 in float32. Entries that
        are subnormal in the dtype of the norm count as 0 where XLA flushes them, as it
        does on a CPU.
      - Leaves of bfloat16 and float16 are accumulated in float32.
      - A NaN in the tree gives NaN, an infinity gives infinity.
      - Differentiable; the gradient of the norm at 0 is 0.
      - `None` and `optax.MaskedNode` in place of a leaf pass by.
      - The norm of a sharded tree is that of the whole tree, under `jit` and inside
        `shard_map`, with one collective, and the same on every device.

    Raises:
      TypeError: If a leaf is of an integer or boolean dtype.
      ValueError: If `ord` is not an order.
      DistributedNormError: If it cannot be known how a leaf is split over a mesh.

    Example:
      >>> grads = {"w": jnp.array([[3.0, 0.0]]), "b": jnp.array([4.0])}
      >>> print(global_norm(grads), global_norm(grads, ord=1))
      5.0 7.0
      >>> print(global_norm(jnp.full(9, 100, jnp.float16)))
      300.0
    """
    placement = Placement(axis_names, specs)
    layout = _layout.by_tree(tree, placement, caller="global_norm(tree)")
    return _norms(layout, tree, ord, "global_norm")


def leaf_norms(
    tree: Tree,
    *,
    ord: Ord = 2,
    stacked_axes: PerLeaf | None = None,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> Tree:
    """Returns the norm of each leaf.

    Args:
      tree: A pytree of floating or complex arrays.
      ord: The order, as in :func:`global_norm`.
      stacked_axes: The axis along which leaves stack layers, for every leaf or as
        `{pattern: axis}`; such a leaf has one norm for each layer.
      axis_names: Which mesh axes to reduce over, as in :func:`global_norm`.
      specs: How each leaf is split, as in :func:`global_norm`.

    Returns:
      A tree of the same structure: a scalar for each leaf, `[layers]` for a stacked
      one, for the layers of its shard. What :func:`global_norm` guarantees holds of
      each.

    Raises:
      TypeError: If a leaf is of an integer or boolean dtype.
      ValueError: If `ord` is not an order, or a pattern matches no leaf.
      DistributedNormError: If it cannot be known how a leaf is split over a mesh.

    Example:
      >>> norms = leaf_norms({"layers": jnp.ones((2, 9)), "head": jnp.ones(4)})
      >>> print(norms["layers"], norms["head"])
      4.2426405 2.0
      >>> print(leaf_norms({"layers": jnp.ones((2, 9))}, stacked_axes=0)["layers"])
      [3. 3.]
    """
    placement = Placement(axis_names, specs)
    layout = _layout.by_leaf(
        tree, placement, stacked_axes=stacked_axes, caller="leaf_norms(tree)"
    )
    norms = _norms(layout, tree, ord, "leaf_norms")
    blocks = [layout.block(norms, i) for i in layout.members]
    return jax.tree.unflatten(
        jax.tree.structure(tree),
        [
            x.reshape([x.shape[k] for k in kept])
            for x, kept in zip(blocks, layout.kept, strict=True)
        ],
    )


def group_norms(
    tree: Tree,
    groups: Groups,
    *,
    ord: Ord = 2,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> dict[Hashable, jax.Array]:
    """Returns the norm of each group of leaves.

    Args:
      tree: A pytree of floating or complex arrays.
      groups: The label of each leaf: `{pattern: label}`, where the first pattern that
        matches the leaf's whole path counts; a function of the path; or a tree of
        labels. A leaf with no label (`None`) is left out.
      ord: The order, as in :func:`global_norm`.
      axis_names: Which mesh axes to reduce over, as in :func:`global_norm`.
      specs: How each leaf is split, as in :func:`global_norm`.

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
    placement = Placement(axis_names, specs)
    layout = _layout.by_group(
        tree, placement, groups=groups, caller="group_norms(tree)"
    )
    norms = _norms(layout, tree, ord, "group_norms")
    return dict(zip(layout.labels, norms, strict=True))


def unit_norms(
    tree: Tree,
    *,
    axes: PerLeaf | None = None,
    ord: Ord = 2,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> Tree:
    """Returns the norm of each unit of each leaf: of the weights into one output.

    Args:
      tree: A pytree of floating or complex arrays.
      axes: The axes that one unit spans, for every leaf or as `{pattern: axes}`. By
        default those of AGC for kernels in the layout of Flax: axis 0 of 2 or 3
        dimensions, all but the last of 4 or 5, all of a scalar or vector.
      ord: The order, as in :func:`global_norm`.
      axis_names: Which mesh axes to reduce over, as in :func:`global_norm`.
      specs: How each leaf is split, as in :func:`global_norm`.

    Returns:
      A tree of the same structure. Each leaf keeps its rank, with size 1 along the
      axes of a unit, so that it broadcasts against the leaf, or the shard of it, that
      it was taken of.

    Raises:
      TypeError: If a leaf is of an integer or boolean dtype.
      ValueError: If `ord` is not an order, a pattern matches no leaf, or a leaf has
        more than 5 dimensions and no `axes`.
      DistributedNormError: If it cannot be known how a leaf is split over a mesh.

    Example:
      >>> print(unit_norms(jnp.array([[3.0, 0.0], [4.0, 2.0]])))
      [[5. 2.]]
    """
    placement = Placement(axis_names, specs)
    layout = _layout.by_unit(tree, placement, axes=axes, caller="unit_norms(tree)")
    norms = _norms(layout, tree, ord, "unit_norms")
    blocks = [layout.block(norms, i) for i in layout.members]
    return jax.tree.unflatten(jax.tree.structure(tree), blocks)


def unitwise_norm(
    x: jax.Array,
    axis: Axis | None = None,
    *,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> jax.Array:
    """Returns the L2 norm of each unit of an array in the place of all its entries.

    The same call as `optax.transforms.unitwise_norm`, and right at any magnitude and in
    any dtype.

    Args:
      x: A floating or complex array.
      axis: The axes that one unit spans; by default as in :func:`unit_norms`.
      axis_names: Which mesh axes to reduce over, as in :func:`global_norm`.
      specs: How each leaf is split, as in :func:`global_norm`.

    Returns:
      An array of the shape of `x`, float32 or wider.

    Example:
      >>> print(unitwise_norm(jnp.array([[3.0, 0.0], [4.0, 2.0]])))
      [[5. 2.]
       [5. 2.]]
    """
    norms = unit_norms(x, axes=axis, axis_names=axis_names, specs=specs)
    return jnp.broadcast_to(norms, jnp.shape(x))


def _norms(layout: Layout, tree: Tree, order: Ord, caller: str) -> jax.Array:
    return measure(layout, jax.tree.leaves(tree), from_ord(order, caller)).norms


__all__ = ["global_norm", "group_norms", "leaf_norms", "unit_norms", "unitwise_norm"]
