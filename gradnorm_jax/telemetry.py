"""RECORD: what a clip and a watch keep in the optimizer's state, found and named.

A state holds arrays of fixed shape and no names. Names come from the parameters, on
the host: `leaf_names(params)`, `granularity.names(params)`, `columns(params)`.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gradnorm_jax import _layout
from gradnorm_jax._layout import Layout
from gradnorm_jax._sharding import Placement
from gradnorm_jax._typing import Groups, PerLeaf, Tree

State = TypeVar("State", bound=tuple)

#: What `watch` can record, in the order of its columns.
KINDS = ("grad", "update", "param")
#: The columns that every row of `watch` ends with; NaN where there is none.
SCALARS = ("loss", "clip/limit", "clip/scale", "clip/fraction")


class ClipMetrics(NamedTuple):
    """What a clip did in its last step.

    Attributes:
      norms: The norm of each part before the clip, float32 or wider: of shape `()` for
        one part, else `(parts,)`, in the order of `granularity.names(params)`.
      limits: How large each norm could be.
      scales: By what each part was multiplied: 1 if it was left as it was, NaN if its
        norm was not finite and that was passed on, 0 if it was set to zero or the
        factor is below the smallest float32.
      num_clipped: How many parts were scaled, int32.
      clip_rate: The share of parts that were scaled, averaged over all steps so far.
      consecutive_clipped: For how many steps in a row each part was scaled, int32.
      nonfinite_count: How many steps so far had a norm that was not finite, int32.
      first_nonfinite_leaf: The first leaf whose norm was not finite in this step, as an
        index into `leaf_names` of the tree that the clip itself is given (inside
        `optax.masked` those are not all leaves); -1 if there was none. int32.
    """

    norms: jax.Array
    limits: jax.Array
    scales: jax.Array
    num_clipped: jax.Array
    clip_rate: jax.Array
    consecutive_clipped: jax.Array
    nonfinite_count: jax.Array
    first_nonfinite_leaf: jax.Array

    @classmethod
    def zeros(cls, norms: jax.Array) -> "ClipMetrics":
        """What there is to say before the first step."""
        zero = jnp.zeros((), jnp.int32)
        return cls(
            norms=norms,
            limits=jnp.full_like(norms, jnp.inf),
            scales=jnp.ones_like(norms),
            num_clipped=zero,
            clip_rate=jnp.zeros((), jnp.float32),
            consecutive_clipped=jnp.zeros(norms.shape, jnp.int32),
            nonfinite_count=zero,
            first_nonfinite_leaf=jnp.full((), -1, jnp.int32),
        )

    def after_a_step(
        self,
        step: jax.Array,
        *,
        norms: jax.Array,
        limits: jax.Array,
        scales: jax.Array,
        was_clipped: jax.Array,
        first_nonfinite_leaf: jax.Array,
    ) -> "ClipMetrics":
        """What there is to say after one more step, the first of which is 0."""
        seen = jnp.float32(1) + step.astype(jnp.float32)
        bad = jnp.any(~jnp.isfinite(norms))
        now = ClipMetrics(
            norms=norms.astype(self.norms.dtype),
            limits=limits.astype(self.norms.dtype),
            scales=scales.astype(self.norms.dtype),
            num_clipped=jnp.sum(was_clipped, dtype=jnp.int32),
            clip_rate=self.clip_rate,
            consecutive_clipped=jnp.where(was_clipped, self.consecutive_clipped + 1, 0),
            nonfinite_count=self.nonfinite_count + bad.astype(jnp.int32),
            first_nonfinite_leaf=first_nonfinite_leaf.astype(jnp.int32),
        )
        gain = (now.clipped_fraction - self.clip_rate) / seen
        return now._replace(clip_rate=self.clip_rate + gain)

    @property
    def clipped_fraction(self) -> jax.Array:
        """The share of parts that were scaled in this step."""
        return self.num_clipped.astype(jnp.float32) / max(self.norms.size, 1)


class ClipState(NamedTuple):
    """The state of a clip: how many steps it took, its memory, its record."""

    step: jax.Array
    memory: Any
    metrics: ClipMetrics


class SkipMetrics(NamedTuple):
    """What `skip_step` did in its last step, and so far.

    Attributes:
      norm: The norm of the gradients, float32 or wider.
      limit: How large it could be.
      skipped: Whether the step was skipped, bool.
      num_skipped: How many steps were skipped so far, int32.
      consecutive_skipped: How many of them in a row, up to this step, int32.
      let_through: How many steps were too large, and counted because too many before
        them were skipped, int32.
      nonfinite_count: How many steps so far were not finite, int32.
    """

    norm: jax.Array
    limit: jax.Array
    skipped: jax.Array
    num_skipped: jax.Array
    consecutive_skipped: jax.Array
    let_through: jax.Array
    nonfinite_count: jax.Array

    @classmethod
    def zeros(cls, norm: jax.Array) -> "SkipMetrics":
        """What there is to say before the first step."""
        none = jnp.zeros((), jnp.int32)
        limit = jnp.full_like(norm, jnp.inf)
        return cls(norm, limit, jnp.zeros((), bool), none, none, none, none)

    def after_a_step(
        self,
        *,
        norm: jax.Array,
        limit: jax.Array,
        skipped: jax.Array,
        let_through: jax.Array,
        finite: jax.Array,
    ) -> "SkipMetrics":
        """What there is to say after one more step."""
        return SkipMetrics(
            norm=norm.astype(self.norm.dtype),
            limit=limit.astype(self.norm.dtype),
            skipped=skipped,
            num_skipped=self.num_skipped + skipped.astype(jnp.int32),
            consecutive_skipped=jnp.where(skipped, self.consecutive_skipped + 1, 0),
            let_through=self.let_through + let_through.astype(jnp.int32),
            nonfinite_count=self.nonfinite_count + (~finite).astype(jnp.int32),
        )


class SkipState(NamedTuple):
    """The state of `skip_step`.

    Attributes:
      inner_state: The state of the transformation inside, as the last step that was not
        skipped left it.
      step: How many steps there were, skipped ones too, int32.
      memory: What the rule remembers.
      value_memory: What the rule for the loss remembers.
      metrics: What was done.
    """

    inner_state: Any
    step: jax.Array
    memory: Any
    value_memory: Any
    metrics: SkipMetrics


class WatchState(NamedTuple):
    """The state of `watch`: the inner state, and the last rows of norms.

    Attributes:
      inner_state: The state of the transformation that is watched.
      ring: float32 `[window, columns]`; row k is in `ring[k % window]`.
      rows: How many rows were written so far, int32.
    """

    inner_state: Any
    ring: jax.Array
    rows: jax.Array


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
      "grad/<part>", "update/<part>" and "param/<part>" for every part, then "loss",
      "clip/limit", "clip/scale" and "clip/fraction".

    Example:
      >>> columns({"w": jnp.ones(3), "b": jnp.ones(1)}, record=("grad",))[:3]
      ('grad/b', 'grad/w', 'loss')
    """
    parts = layout(params, groups, stacked_axes).part_names
    if len(set(parts)) < len(parts):
        twice = next(part for part in parts if parts.count(part) > 1)
        raise ValueError(
            f"`watch`: two parts of the tree have the name {twice!r}, so that a record"
            " could not tell them apart. Rename a key of the tree or a label."
        )
    kinds = [kind for kind in KINDS if kind in record]
    return (*(f"{kind}/{part}" for kind in kinds for part in parts), *SCALARS)


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
            " give it the limit `jnp.inf`."
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


__all__ = [
    "ClipMetrics",
    "ClipState",
    "SkipMetrics",
    "SkipState",
    "WatchState",
    "find",
    "scalars",
]
