"""A record of norms that rides in the optimizer's state: one ring, no host sync."""

import contextlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradnorm_jax import _sharding, _trees
from gradnorm_jax._checks import check_transformation
from gradnorm_jax._layout import Layout
from gradnorm_jax._sharding import Placement
from gradnorm_jax._typing import AUTO, AxisNames, Groups, PerLeaf, Tree
from gradnorm_jax.norms.fold import l2
from gradnorm_jax.norms.measurement import fold, sharing
from gradnorm_jax.telemetry import (
    KINDS,
    SCALARS,
    ClipMetrics,
    SkipMetrics,
    WatchState,
    find,
    layout,
)


def watch(
    tx: optax.GradientTransformation,
    *,
    window: int = 128,
    record: tuple[str, ...] = KINDS,
    groups: Groups | None = None,
    stacked_axes: PerLeaf | None = None,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the norms of the last steps of an optimizer in its state.

    Each update writes one row: the L2 norms of the gradients as they come in, of the
    updates as they go out, and of the parameters before the step, leaf by leaf; the
    loss, if `update` is given it as the extra argument `value`; and what the outermost
    clip inside `tx` did. `gradnorm_jax.monitoring.Monitor` reads the rows on the host.

    Args:
      tx: Any optimizer or chain. Wrap it whole, clip and all.
      window: How many rows are kept. Read them out at least that often.
      record: Which of "grad", "update" and "param" to measure.
      groups: Labels by which leaves have one norm together instead of one each, as in
        `group_norms`.
      stacked_axes: The axis along which a leaf stacks layers, as in `leaf_norms`.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation with the updates of `tx`, whose state is a :class:`WatchState`.
      Its ring has a column for each name that `telemetry.columns` gives, and costs
      4 bytes for each of them and each row of the window.

    Guarantees:
      - The updates of `tx` pass through bit for bit.
      - No callback, no host sync, one fixed shape: it rides in `scan` and in donation.
      - Nothing is filtered: a NaN, an infinity and an exact 0 are recorded as such.
      - What is measured of the gradients is measured once: a clip or a `skip_step` at
        the head of `tx` goes by the same sums. Inside `shard_map` the whole record
        costs two collectives, and it is the same on every device.

    Raises:
      ValueError: If `window` is below 1, or `record` is empty or holds another word.
        By `update`: if parameters are to be recorded and `params` is not given.

    Example:
      >>> tx = watch(optax.sgd(0.5), window=2, record=("grad", "update"))
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> _, state = tx.update(grads, tx.init(grads), value=0.1)
      >>> print(state.rows, state.ring[0, :3])
      1 [5.  2.5 0.1]
    """
    _check(tx, window, record)
    inner = optax.with_extra_args_support(tx)
    kinds = tuple(kind for kind in KINDS if kind in record)

    placement = Placement(axis_names, specs, "watch(...).update(updates)")

    def divided(tree: Tree, *, measured: bool = True) -> Layout:
        return layout(tree, groups, stacked_axes, placement, measured=measured)

    def init(params: Tree) -> WatchState:
        parts = divided(params, measured=False)
        width = len(kinds) * math.prod(parts.part_shape) + len(SCALARS)
        ring = jnp.zeros((window, width), jnp.float32)
        own = (ring, jnp.zeros((), jnp.int32))
        ring, rows = _sharding.placed(own, params, parts.split)
        return WatchState(inner.init(params), ring, rows)

    def update(
        updates: Tree,
        state: Any,
        params: Tree | None = None,
        *,
        value: jax.Array | float | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, WatchState]:
        if "param" in kinds and params is None:
            raise ValueError(
                "`watch(...).update(params=...)` must be given to record the norms of"
                " the parameters. Call `tx.update(grads, state, params)`, or watch with"
                " `record=('grad', 'update')`."
            )
        if value is not None:
            extra_args["value"] = value
        leaves = jax.tree.leaves(updates)
        names = _trees.leaf_names(updates)
        _sharding.check_averaged(names, leaves, params, placement)
        parts = divided(updates)
        live = state.rows >= 0
        grads = fold([(parts, leaves)] if "grad" in kinds else [], l2, live)
        with contextlib.ExitStack() as stack:
            for folded in grads:
                stack.enter_context(sharing(folded))
            outgoing, inner_state = inner.update(
                updates, state.inner_state, params, **extra_args
            )
        trees = {"update": outgoing, "param": params}
        later = [kind for kind in kinds if kind in trees]
        found = fold(
            [(divided(trees[k]), jax.tree.leaves(trees[k])) for k in later], l2, live
        )
        measured = dict(zip(later, found, strict=True))
        if grads:
            measured["grad"] = grads[0]
        row = [measured[kind].measured().norms.astype(jnp.float32) for kind in kinds]
        row.append(_scalars(inner_state, value))
        ring = _write(state.ring, state.rows, jnp.concatenate(row))
        rows = jnp.asarray(optax.safe_increment(state.rows))
        return outgoing, WatchState(inner_state, ring, rows)

    return optax.GradientTransformationExtraArgs(init, update)


def _scalars(inner_state: Any, value: jax.Array | float | None) -> jax.Array:
    absent = jnp.full((), jnp.nan, jnp.float32)
    loss = absent if value is None else jnp.asarray(value, jnp.float32).reshape(())
    clips = find(inner_state, ClipMetrics)
    if not clips:
        return jnp.stack([loss, absent, absent, absent])
    limit = jnp.min(clips[0].limits, initial=jnp.inf).astype(jnp.float32)
    scale = jnp.min(clips[0].scales, initial=jnp.inf).astype(jnp.float32)
    clipped = jnp.stack([limit, scale, clips[0].clipped_fraction])
    skips = find(inner_state, SkipMetrics)
    if skips:  # what a clip inside says is then of the last step that counted
        clipped = jnp.where(skips[0].skipped, absent, clipped)
    return jnp.concatenate([loss[None], clipped])


def _write(ring: jax.Array, rows: jax.Array, row: jax.Array) -> jax.Array:
    if row.shape != ring.shape[1:]:
        raise ValueError(
            f"`watch(...).update(updates)`: the updates have {row.shape[0]} columns to"
            f" record, but `init` was given a tree with {ring.shape[1]}. Both must have"
            " the same leaves."
        )
    return ring.at[rows % ring.shape[0]].set(row, mode="promise_in_bounds")


def _check(tx: Any, window: int, record: tuple[str, ...]) -> None:
    check_transformation(tx, "watch(tx=...)")
    if not window >= 1:
        raise ValueError(f"`watch(window=...)` must be at least 1 row, got {window!r}.")
    if isinstance(record, str) or not record or not set(record) <= set(KINDS):
        raise ValueError(
            f"`watch(record=...)` must be a tuple of some of {KINDS}, got {record!r}."
        )


__all__ = ["watch"]
