"""What clips, skips and watches keep in the optimizer's state: arrays, no names."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


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
      steps: int32 `[window]`: the update that each row is of, counted from 0.
      rows: How many rows were written so far, int32.
      step: How many updates there were so far, int32.
      checksum: Of what the columns are, int32: who reads the ring may have others.
    """

    inner_state: Any
    ring: jax.Array
    steps: jax.Array
    rows: jax.Array
    step: jax.Array
    checksum: jax.Array


class Columns(NamedTuple):
    """What stands in a row of a record; hashable, and no arrays.

    Attributes:
      names: The name of each column.
      parts: The name of each part of the tree, in the order of the columns.
      sizes: How many entries each part has.
      dims: How many dimensions each part has; `None` for a group.
      checksum: A number that other kinds, or parts of other sizes, would hardly have.
    """

    names: tuple[str, ...]
    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    dims: tuple[int | None, ...]
    checksum: int


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values",), meta_fields=("columns",)
)
@dataclasses.dataclass(frozen=True)
class Stats:
    """One row of a record, as `measure` returns it; a stack of rows, out of a `scan`.

    Attributes:
      values: float32 `[columns]`, or `[rows, columns]`.
      columns: What the columns are, static.
    """

    values: jax.Array
    columns: Columns

    def as_dict(self) -> dict[str, jax.Array]:
        """Returns the value of each column by its name."""
        return {name: self.values[..., k] for k, name in enumerate(self.columns.names)}
