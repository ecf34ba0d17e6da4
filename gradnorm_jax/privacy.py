"""Per-example clips: each example's gradient bounded on its own, then summed."""

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax import _layout, _trees, kernels
from gradnorm_jax._checks import check_limit
from gradnorm_jax._layout import Layout
from gradnorm_jax._sharding import Placement
from gradnorm_jax._typing import AUTO, AxisNames, Bound, Scalar, Tree
from gradnorm_jax.norms.fold import l2
from gradnorm_jax.norms.measurement import measure
from gradnorm_jax.shrink import rescale, scaling


def per_example_global_norm_clip(
    grads: Tree,
    l2_norm_clip: Scalar,
    *,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> tuple[Tree, jax.Array]:
    r"""Clips the gradient of each example by its global norm, and sums them.

    .. math:: \sum_i g_i \min\!\Big(1, \frac{C}{\lVert g_i \rVert}\Big)

    The same call as `optax.per_example_global_norm_clip`. An example with a NaN or an
    infinity adds nothing to the sum and counts as clipped; there it makes all NaN.

    Args:
      grads: A tree of gradients with the examples along axis 0 of every leaf.
      l2_norm_clip: The largest norm of one example's gradient (:math:`C`).
      axis_names: Inside `shard_map`, the mesh axes over which the gradient of one
        example is split; `()` where each device holds all of the gradients of its own
        examples. The sum is then that over the examples of one device.
      specs: The PartitionSpec of each leaf, which says so too.

    Returns:
      The sum over the examples, in float32 or wider, and the number of examples that
      were clipped.

    Guarantees:
      - Whatever the examples hold, adding or removing one changes the sum by a vector
        of norm at most `l2_norm_clip`, to rounding in float32.

    Raises:
      ValueError: If a leaf has no axis 0 of the common size, or `l2_norm_clip` is
        negative.
      TypeError: If a leaf is of an integer dtype.

    Example:
      >>> grads = [jnp.array([[0.0, 0, 0], [0, 3, 4], [4, 0, 3], [3, 4, 0]])]
      >>> total, num_clipped = per_example_global_norm_clip(grads, 1.25)
      >>> print(total[0], num_clipped)
      [1.75 1.75 1.75] 3

    References:
      Abadi et al., `Deep Learning with Differential Privacy
      <https://arxiv.org/abs/1607.00133>`_, 2016
    """
    caller = "per_example_global_norm_clip(l2_norm_clip=...)"
    check_limit(l2_norm_clip, caller)
    placement = Placement(axis_names, specs)
    layout = _layout.by_example(
        grads, placement, caller="per_example_global_norm_clip(grads)"
    )
    limits = jnp.broadcast_to(jnp.asarray(l2_norm_clip), layout.part_shape)
    total, clipped = _clip_and_sum(layout, grads, limits)
    return total, jnp.sum(clipped, dtype=jnp.int32)


def per_example_layer_norm_clip(
    grads: Tree,
    global_l2_norm_clip: Scalar,
    uniform: bool = True,
    *,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> tuple[Tree, Tree]:
    r"""Clips each leaf of the gradient of each example by its norm, and sums them.

    Of K leaves with D entries together, leaf i with D_i entries may have the norm
    :math:`C / \sqrt{K}` (`uniform`), or :math:`C \sqrt{D_i / D}`: the global norm of
    one example is then at most C. The same call as `optax.per_example_layer_norm_clip`.

    Args:
      grads: A tree of gradients with the examples along axis 0 of every leaf.
      global_l2_norm_clip: The largest global norm of one example's gradient (C).
      uniform: Whether every leaf has the same limit, or one that grows with its size.
      axis_names: As in :func:`per_example_global_norm_clip`.
      specs: As in :func:`per_example_global_norm_clip`.

    Returns:
      The sum over the examples, in float32 or wider, and a tree with the number of
      examples that were clipped in each leaf.

    Raises:
      ValueError: If a leaf has no axis 0 of the common size, or `global_l2_norm_clip`
        is negative.
      TypeError: If a leaf is of an integer dtype.

    Example:
      >>> grads = [jnp.array([[0.0, 0, 0], [0, 3, 4], [4, 0, 3], [3, 4, 0]])]
      >>> total, num_clipped = per_example_layer_norm_clip(grads, 1.25)
      >>> print(total[0], num_clipped[0])
      [1.75 1.75 1.75] 3

    References:
      McMahan et al., `Learning Differentially Private Recurrent Language Models
      <https://arxiv.org/abs/1710.06963>`_, 2017
    """
    caller = "per_example_layer_norm_clip(global_l2_norm_clip=...)"
    check_limit(global_l2_norm_clip, caller)
    layout = _layout.by_example(
        grads,
        Placement(axis_names, specs),
        caller="per_example_layer_norm_clip(grads)",
        each_leaf=True,
    )
    examples = layout.shapes[0][0] if layout.shapes else 0
    entries = [layout.size(i) // max(examples, 1) for i in layout.members]
    total_entries = max(sum(entries), 1)
    shares = [1 / len(entries) if uniform else n / total_entries for n in entries]
    limits = global_l2_norm_clip * jnp.repeat(
        jnp.sqrt(jnp.asarray(shares)),
        examples,
        total_repeat_length=len(shares) * examples,
    )
    total, clipped = _clip_and_sum(layout, grads, limits)
    counts = jnp.sum(clipped.reshape(len(entries), examples), axis=1, dtype=jnp.int32)
    return total, jax.tree.unflatten(jax.tree.structure(grads), list(counts))


def _clip_and_sum(
    layout: Layout, grads: Tree, limits: jax.Array
) -> tuple[Tree, jax.Array]:
    _, leaves, treedef = _trees.flatten(grads, "per-example clip")
    norms, _ = measure(layout, leaves, l2)
    factors = scaling(norms, Bound(limits.astype(norms.dtype)), 0.0, rescale)
    bad = ~jnp.isfinite(norms)
    sums = []
    for position, x in enumerate(leaves):
        keep, coarse, fine, dropped = (
            layout.spread(values, position) for values in (*factors, bad)
        )
        wide = x.astype(np.promote_types(x.dtype, norms.dtype))
        sums.append(
            jnp.sum(jnp.where(dropped, 0, kernels.scale(wide, keep, coarse, fine)), 0)
        )
    return jax.tree.unflatten(treedef, sums), bad | ~factors.keep


__all__ = ["per_example_global_norm_clip", "per_example_layer_norm_clip"]
