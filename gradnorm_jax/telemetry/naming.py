"""What is in an optimizer's state, found and named.

A state holds arrays and no names. Names come from the parameters, on the host:
`leaf_names(params)`, `granularity.names(params)`, `columns(params)`.
"""

import zlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gradnorm_jax import _layout
from gradnorm_jax._layout import Layout
from gradnorm_jax._sharding import Placement
from gradnorm_jax._typing import DETAILS, KINDS, Groups, PerLeaf, Tree
from gradnorm_jax.telemetry.states import ClipMetrics, Columns, SkipMetrics

State = TypeVar("State", bound=tuple)

#: The columns that every row of `watch` ends with; NaN where there is none.
SCALARS = ("loss", "clip/limit", "clip/scale", "clip/fraction")
#: What a row holds after these on request: the word that asks, and its column.
EXTRAS = {"noise_scale": "noise_scale/simple"}


def find(state: Tree, kind: type[State]) -> list[State]:
    """Returns every state of a kind inside any optimizer state, outermost first.

    Args:
      state: An optimizer's state, or a tree that holds one: a `TrainState`, a tuple.
      kind: `ClipState`, `ClipMetrics`, `SkipState`, `SkipMetrics` or `WatchState`.

    Example:
      >>> clip = gn.clip_by_global_norm(1.0)
      >>> state = optax.chain(clip, optax.adam(1e-3)).init({"w": jnp.ones(3)})
      >>> [metrics] = find(state, ClipMetrics)
      >>> print(metrics.scales)
      1.0
    """
    found = []
    for leaf in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind)):
        if isinstance(leaf, kind):
            found.append(leaf)
            found += find(tuple(leaf), kind)
    return found


def layout(
    params: Tree,
    groups: Groups | None,
    stacked_axes: PerLeaf | None,
    placement: Placement = Placement(),  # noqa: B008 - frozen
    caller: str = "watch(params)",
    *,
    measured: bool = False,
) -> Layout:
    """How `watch` divides a tree: by groups, or by leaves and their layers."""
    if groups is None:
        return _layout.by_leaf(
            params,
            placement,
            stacked_axes=stacked_axes,
            caller=caller,
            measured=measured,
        )
    if stacked_axes is not None:
        raise ValueError(
            f"`{caller.split('(')[0]}(groups=..., stacked_axes=...)`: a group has one"
            " norm, layers and all. Give one of the two."
        )
    return _layout.by_group(
        params, placement, groups=groups, caller=caller, measured=measured
    )


def columns(
    params: Tree,
    *,
    record: tuple[str, ...] = KINDS,
    groups: Groups | None = None,
    stacked_axes: PerLeaf | None = None,
) -> tuple[str, ...]:
    """Names the columns of the ring that `watch` keeps.

    Args:
      params: The parameters, or their shapes.
      record: What `watch` was given.
      groups: What `watch` was given.
      stacked_axes: What `watch` was given.

    Returns:
      "grad/<part>", "update/<part>" and "param/<part>" for every part, then what else
      is recorded of the gradients, then "loss", "clip/limit", "clip/scale" and
      "clip/fraction", and "noise_scale/simple" where that is recorded.

    Example:
      >>> columns({"w": jnp.ones(3), "b": jnp.ones(1)}, record=("grad",))[:3]
      ('grad/b', 'grad/w', 'loss')
    """
    return columns_of(layout(params, groups, stacked_axes), record).names


def columns_of(parts: Layout, record: tuple[str, ...]) -> Columns:
    """Says what the columns of a record of the parts of a tree are."""
    names = parts.part_names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"`watch`: two parts of the tree have the name {twice!r}, so that a record"
            " could not tell them apart. Rename a key of the tree or a label."
        )
    dims: list[int | None] = [None] * len(names)
    if parts.fold == "each":
        left = [len(parts.shapes[i]) - len(parts.kept[i]) for i in parts.members]
        dims = np.repeat(left, np.diff(parts.offsets)).tolist()
    kinds = [kind for kind in (*KINDS, *DETAILS) if kind in record]
    sizes = tuple(parts.sizes.astype(int).tolist())
    extras = [word for word in EXTRAS if word in record]
    columns = (
        *(f"{kind}/{name}" for kind in kinds for name in names),
        *SCALARS,
        *(EXTRAS[word] for word in extras),
    )
    return Columns(
        columns,
        names,
        sizes,
        tuple(dims),
        # Not of the names: Flax NNX has others inside `init` than outside.
        zlib.crc32(repr((kinds + extras, sizes)).encode()) >> 1,
    )


def scalars(state: Tree) -> dict[str, Any]:
    """Returns what the clips and skips inside a state say, as a few flat scalars.

    Args:
      state: An optimizer's state, or a tree that holds one.

    Returns:
      A dictionary of floats, about ten, whatever the size of the model; of arrays where
      it is called inside `jit`. Of the outermost clip:

      ============================  =============================================
      `grad_norm/global_preclip`    the global norm before the clip (`whole_tree`)
      `grad_norm/part_min_preclip`  the smallest and the largest norm of a part
      `grad_norm/part_max_preclip`  (any other granularity)
      `clip/limit`                  the smallest limit
      `clip/scale`                  the smallest scale; 1 if nothing was clipped
      `clip/fraction`               the share of parts clipped in this step
      `clip/rate`                   that share, averaged over all steps so far
      `clip/consecutive`            steps in a row that some part was clipped
      `nonfinite/count`             steps so far with a norm that is not finite
      `nonfinite/first_leaf`        index into `leaf_names(params)`, or -1
      ============================  =============================================

      A second clip has the same names under "clip2/", and so on. Of `skip_step`, where
      there is one: `skip/norm` and `skip/limit`, `skip/skipped` (in this step),
      `skip/total`, `skip/consecutive`, `skip/let_through`, `skip/nonfinite`.

    Raises:
      ValueError: If there is neither inside.

    Example:
      >>> tx = optax.chain(gn.clip_by_global_norm(1.0), optax.sgd(0.1))
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> record = scalars(state)
      >>> round(record["grad_norm/global_preclip"], 3), round(record["clip/scale"], 3)
      (5.0, 0.2)
    """
    clips, skips = find(state, ClipMetrics), find(state, SkipMetrics)
    if not clips and not skips:
        raise ValueError(
            "`scalars(state)` found no clip of gradnorm_jax inside the state. Chain"
            " one, such as `gradnorm_jax.clip_by_global_norm(1.0)`; to only measure,"
            " give it the limit `jnp.inf`. What `watch` records a"
            " `monitoring.Monitor` reads."
        )
    # On the host the figures are computed there too, by NumPy: one process of many may
    # ask for them alone.
    traced = any(isinstance(x, Tracer) for x in jax.tree.leaves((clips, skips)))
    xp = jnp if traced else np
    if not traced:
        clips, skips = jax.device_get((clips, skips))
    record: dict[str, Any] = {}
    for name, found in (("clip", clips), ("skip", skips)):
        for position, metrics in enumerate(found, start=1):
            prefix = "" if position == 1 else f"{name}{position}/"
            record |= {prefix + key: x for key, x in _flat(metrics, xp).items()}
    return record if traced else {k: record[k].item() for k in sorted(record)}


def _flat(metrics: ClipMetrics | SkipMetrics, xp: Any) -> dict[str, Any]:
    if isinstance(metrics, SkipMetrics):
        return {
            "skip/norm": metrics.norm,
            "skip/limit": metrics.limit,
            "skip/skipped": metrics.skipped,
            "skip/total": metrics.num_skipped,
            "skip/consecutive": metrics.consecutive_skipped,
            "skip/let_through": metrics.let_through,
            "skip/nonfinite": metrics.nonfinite_count,
        }
    if metrics.norms.ndim == 0:
        norms = {"grad_norm/global_preclip": metrics.norms}
    else:
        norms = {
            "grad_norm/part_min_preclip": xp.min(metrics.norms, initial=xp.inf),
            "grad_norm/part_max_preclip": xp.max(metrics.norms, initial=0),
        }
    return norms | {
        "clip/limit": xp.min(metrics.limits, initial=xp.inf),
        "clip/scale": xp.min(metrics.scales, initial=1),
        "clip/fraction": metrics.clipped_fraction,
        "clip/rate": metrics.clip_rate,
        "clip/consecutive": xp.max(metrics.consecutive_clipped, initial=0),
        "nonfinite/count": metrics.nonfinite_count,
        "nonfinite/first_leaf": metrics.first_nonfinite_leaf,
    }
