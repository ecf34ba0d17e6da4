"""A record of norms: one row a step, in the optimizer's state or as a plain value."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gradnorm_jax import _sharding, _trees
from gradnorm_jax._checks import check_state, check_steps, check_transformation
from gradnorm_jax._layout import Layout
from gradnorm_jax._sharding import Placement
from gradnorm_jax._typing import AUTO, AxisNames, Groups, PerLeaf, Tree
from gradnorm_jax.norms.fold import Norm, l2, linf, nonfinite, zeros
from gradnorm_jax.norms.measurement import fold, sharing
from gradnorm_jax.telemetry import (
    DETAILS,
    EXTRAS,
    KINDS,
    ClipMetrics,
    SkipMetrics,
    Stats,
    WatchState,
    columns_of,
    find,
    layout,
)

#: By which fold each quantity of the gradients is measured.
_OF_GRADS: dict[str, Norm] = dict(
    zip(("grad", *DETAILS), (l2, linf, zeros, nonfinite), strict=True)
)


def watch(
    tx: optax.GradientTransformation,
    *,
    window: int = 128,
    every: int = 1,
    record: tuple[str, ...] = KINDS,
    groups: Groups | None = None,
    stacked_axes: PerLeaf | None = None,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the norms of the last steps of an optimizer in its state.

    Every update, or one of `every` updates, writes one row: the L2 norms of the
    gradients as they come in, of the updates as they go out, and of the parameters
    before the step, leaf by leaf; the loss, if `update` is given it as the extra
    argument `value`; and what the outermost clip inside `tx` did.
    `gradnorm_jax.monitoring.Monitor` reads the rows on the host.

    Args:
      tx: Any optimizer or chain. Wrap it whole, clip and all.
      window: How many rows are kept. Read them out at least that often.
      every: Of how many updates one is recorded, from the first on.
      record: Which of "grad", "update" and "param" to measure; and of each part of the
        gradients, on request, "grad_max", the largest absolute value, "grad_zeros" and
        "grad_nonfinite", how many entries are exactly 0, as a subnormal number may be
        to XLA, and how many are NaN or infinite. With "noise_scale" also the number
        that `update(noise_scale=...)` is given, such as the one that
        `running_noise_scale` reads; it is not handed on to `tx`.
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
      - What is measured of the gradients is measured once: with `every=1` a clip or a
        `skip_step` at the head of `tx` goes by the same sums. Inside `shard_map` the
        whole record costs two collectives, and one more for each of the three details
        on request; it is the same on every device.
      - A step that is not recorded costs nothing, but inside `shard_map`, where a
        branch could leave devices waiting for each other.

    Raises:
      ValueError: If `window` or `every` is below 1, or `record` is empty or holds
        another word. By `update`: if parameters are to be recorded and `params` is not
        given, or `noise_scale` is given and not to be recorded.

    Example:
      >>> tx = watch(optax.sgd(0.5), window=2, record=("grad", "update"))
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> _, state = tx.update(grads, tx.init(grads), value=0.1)
      >>> print(state.rows, state.ring[0, :3])
      1 [5.  2.5 0.1]
    """
    _check(tx, window, every, record)
    inner = optax.with_extra_args_support(tx)
    placement = Placement(axis_names, specs, "watch(...).update(updates)")

    def divided(tree: Tree, *, measured: bool = True) -> Layout:
        return layout(tree, groups, stacked_axes, placement, measured=measured)

    def init(params: Tree) -> WatchState:
        parts = divided(params, measured=False)
        columns = columns_of(parts, record)
        none = jnp.zeros((), jnp.int32)
        own = WatchState(
            (),
            ring=jnp.zeros((window, len(columns.names)), jnp.float32),
            steps=jnp.full(window, -1, jnp.int32),
            rows=none,
            step=none,
            checksum=jnp.full((), columns.checksum, jnp.int32),
        )
        own = _sharding.placed(own, params, parts.split)
        return own._replace(inner_state=inner.init(params))

    def update(
        updates: Tree,
        state: Any,
        params: Tree | None = None,
        *,
        value: jax.Array | float | None = None,
        noise_scale: jax.Array | float | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, WatchState]:
        check_state(state, WatchState, "watch")
        _need("param" in record, params, "watch(...).update(params=...)")
        _check_noise_scale(noise_scale, record)
        if value is not None:
            extra_args["value"] = value
        leaves = jax.tree.leaves(updates)
        names = _trees.leaf_names(updates)
        _sharding.check_averaged(names, leaves, params, placement)
        parts = divided(updates)
        _check_columns(len(columns_of(parts, record).names), state.ring.shape[1])
        # What is recorded of the gradients at every step is for the clip inside, too.
        wanted = [norm for kind, norm in _OF_GRADS.items() if kind in record]
        shared = [(parts, leaves, norm) for norm in wanted] if every == 1 else []
        with sharing(*fold(shared, apart=True)):
            outgoing, inner_state = inner.update(
                updates, state.inner_state, params, **extra_args
            )
            trees = {"grad": updates, "update": outgoing, "param": params}

            def row() -> jax.Array:
                norms = _norms(trees, record, divided, "watch(...).update")
                scalars = _scalars(inner_state, value, record, noise_scale)
                return jnp.concatenate([*norms, scalars])

            return outgoing, _written(state, inner_state, row, every)

    return optax.GradientTransformationExtraArgs(init, update)


def measure(
    grads: Tree,
    updates: Tree | None = None,
    params: Tree | None = None,
    *,
    value: jax.Array | float | None = None,
    noise_scale: jax.Array | float | None = None,
    state: Any = None,
    details: tuple[str, ...] = (),
    groups: Groups | None = None,
    stacked_axes: PerLeaf | None = None,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> Stats:
    """Measures a step into one row: what `watch` records, as a plain value.

    For a step that returns what it measures, or gives it out of a `scan`; then
    `Monitor.append` takes it. It leaves the state and its checkpoints as they are.

    Args:
      grads: The gradients, before any clip.
      updates: What is added to the parameters, if that is to be measured.
      params: The parameters before the step, if they are to be measured.
      value: The loss.
      noise_scale: The gradient noise scale, such as `running_noise_scale` reads it, if
        that is to be recorded.
      state: The optimizer's state after the step; what its clip did is recorded.
      details: Some of "grad_max", "grad_zeros" and "grad_nonfinite", as in `watch`.
      groups: Labels by which leaves have one norm together, as in `group_norms`.
      stacked_axes: The axis along which a leaf stacks layers, as in `leaf_norms`.
      axis_names: Which mesh axes to reduce over, as in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A :class:`Stats`: float32 `[columns]`, and what the columns are.

    Raises:
      ValueError: If `details` holds another word, or `updates` or `params` have other
        leaves than `grads`.

    Example:
      >>> stats = measure({"w": jnp.array([3.0, 4.0])}, value=0.5)
      >>> print(stats.columns.names[:2], stats.values[:2])
      ('grad/w', 'loss') [5.  0.5]
    """
    if isinstance(details, str) or not set(details) <= set(DETAILS):
        raise ValueError(
            f"`measure(details=...)` must be a tuple of some of {DETAILS}, got"
            f" {details!r}."
        )
    if not jax.tree.leaves(grads):
        raise ValueError(
            f"`measure(grads=...)` must be a tree with leaves, got {grads!r}."
        )
    given = {"grad": grads, "update": updates, "param": params}
    trees = {kind: tree for kind, tree in given.items() if tree is not None}
    record = (*trees, *details)
    if noise_scale is not None:
        record = (*record, "noise_scale")
    placement = Placement(axis_names, specs, "measure(...)")
    divided = functools.partial(
        layout,
        groups=groups,
        stacked_axes=stacked_axes,
        placement=placement,
        caller="measure(grads)",
        measured=True,
    )
    norms = _norms(trees, record, divided, "measure")
    scalars = _scalars(state, value, record, noise_scale)
    columns = columns_of(divided(grads), record)
    return Stats(jnp.concatenate([*norms, scalars]), columns)


def _scalars(
    inner_state: Any,
    value: jax.Array | float | None,
    record: tuple[str, ...],
    noise_scale: jax.Array | float | None,
) -> jax.Array:
    """What a row ends with: the loss, what the clip did, and what else is recorded."""
    known = [_clipped(inner_state)]
    if "noise_scale" in record:
        known.append(_number(noise_scale))
    return jnp.concatenate([_number(value), *known])


def _number(value: jax.Array | float | None) -> jax.Array:
    number = jnp.nan if value is None else value
    return jnp.asarray(number, jnp.float32).reshape(1)


def _clipped(inner_state: Any) -> jax.Array:
    absent = jnp.full(3, jnp.nan, jnp.float32)
    clips = find(inner_state, ClipMetrics)
    if not clips:
        return absent
    limit = jnp.min(clips[0].limits, initial=jnp.inf).astype(jnp.float32)
    scale = jnp.min(clips[0].scales, initial=jnp.inf).astype(jnp.float32)
    clipped = jnp.stack([limit, scale, clips[0].clipped_fraction])
    skips = find(inner_state, SkipMetrics)
    if skips:  # what a clip inside says is then of the last step that counted
        clipped = jnp.where(skips[0].skipped, absent, clipped)
    return clipped


def _norms(
    trees: dict[str, Tree],
    record: tuple[str, ...],
    divided: Callable[[Tree], Layout],
    caller: str,
) -> list[jax.Array]:
    """The norms to record, kind by kind, and the details of the gradients."""
    parts = divided(trees["grad"]).part_names

    def tree(kind: str) -> tuple[Layout, list[jax.Array]]:
        own = divided(trees[kind])
        if own.part_names != parts:
            only = sorted(set(own.part_names) ^ set(parts)) or own.part_names
            raise ValueError(
                f"`{caller}({kind}s=...)` must have the same leaves as the gradients,"
                f" got {len(own.part_names)} parts to their {len(parts)}; of one alone"
                f" is {only[0]!r}."
            )
        return own, jax.tree.leaves(trees[kind])

    wanted = [(*tree(kind), l2) for kind in KINDS if kind in record]
    details = [detail for detail in DETAILS if detail in record]
    wanted += [(*tree("grad"), _OF_GRADS[detail]) for detail in details]
    found = fold(wanted)
    return [folded.measured().norms.astype(jnp.float32) for folded in found]


def _written(
    state: WatchState, inner_state: Any, row: Callable[[], jax.Array], every: int
) -> WatchState:
    """Returns the state with one row more, if this step is to be recorded."""
    step, at = state.step, state.rows % len(state.ring)
    if every == 1:
        due, values = jnp.ones((), bool), row()
    else:
        due, kept = step % every == 0, state.ring[at]
        if _sharding.is_manual():  # a collective is for all devices, branch or not
            values = jnp.where(due, row(), kept)
        else:
            values = jax.lax.cond(due, row, lambda: kept)
    number = jnp.where(due, step, state.steps[at])
    return state._replace(
        inner_state=inner_state,
        ring=state.ring.at[at].set(values, mode="promise_in_bounds"),
        steps=state.steps.at[at].set(number, mode="promise_in_bounds"),
        rows=state.rows + due.astype(jnp.int32),
        step=jnp.asarray(optax.safe_increment(step)),
    )


def _check_columns(given: int, wanted: int) -> None:
    if given != wanted:
        raise ValueError(
            f"`watch(...).update(updates)`: the updates have {given} columns to record,"
            f" but `init` was given a tree with {wanted}. Both must have the same"
            " leaves."
        )


def _need(asked: bool, params: Tree | None, argument: str) -> None:
    if asked and params is None:
        raise ValueError(
            f"`{argument}` must be given to record the norms of the parameters. Call"
            " `tx.update(grads, state, params)`, or watch with"
            " `record=('grad', 'update')`."
        )


def _check_noise_scale(noise_scale: Any, record: tuple[str, ...]) -> None:
    if noise_scale is not None and "noise_scale" not in record:
        raise ValueError(
            "`watch(...).update(noise_scale=...)` was given, but nothing keeps it."
            f" Watch with `record={(*record, 'noise_scale')}`, and give that to"
            " `Monitor` too."
        )


def _check(tx: Any, window: int, every: int, record: tuple[str, ...]) -> None:
    check_transformation(tx, "watch(tx=...)")
    if not window >= 1:
        raise ValueError(f"`watch(window=...)` must be at least 1 row, got {window!r}.")
    check_steps(every, 1, "watch(every=...)", "1 records every update.")
    known = (*KINDS, *DETAILS, *EXTRAS)
    if isinstance(record, str) or not record or not set(record) <= set(known):
        raise ValueError(
            f"`watch(record=...)` must be a tuple of some of {known}, got {record!r}."
        )


__all__ = ["measure", "watch"]
