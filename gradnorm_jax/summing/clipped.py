"""Sums of per-example gradients, each bounded by its own norm before it is added."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradnorm_jax import _sharding
from gradnorm_jax._checks import check_kind
from gradnorm_jax._layout import Layout
from gradnorm_jax._typing import Scalar, Tree
from gradnorm_jax.norms.examples import (
    Argnums,
    Loss,
    check_microbatch_size,
    in_microbatches,
)
from gradnorm_jax.norms.granularity import Granularity, check_granularity, whole_tree
from gradnorm_jax.norms.of_examples import check_implementation
from gradnorm_jax.shrink import Scaling, Shrink, rescale, scaling
from gradnorm_jax.summing.ways import WAYS
from gradnorm_jax.thresholds.memoryless import as_threshold
from gradnorm_jax.thresholds.rule import Context, Threshold

REDUCTIONS = ("sum", "mean")


class ClippedGrads(NamedTuple):
    """The sum or mean of clipped per-example gradients, and what was clipped.

    Attributes:
      grads: The sum or mean, in float32 or wider.
      norms: The norm of the gradient of each example, `[B]`, or `[B, parts]`; also of
        one that is padding, for whose sake averages of norms need the mask.
      scales: By how much each was multiplied; 0 for one that was left out.
      values: The loss of each example, `[B]`.
      aux: What the loss returned beside it, `[B, ...]`; `None` without `has_aux`.
      num_clipped: How many examples that were added came out smaller, int32.
      num_dropped: How many were left out as their norm is not finite, int32.
      clip_state: The state of the threshold after this batch.
    """

    grads: Tree
    norms: jax.Array
    scales: jax.Array
    values: jax.Array
    aux: Any
    num_clipped: jax.Array
    num_dropped: jax.Array
    clip_state: "SumState"


class SumState(NamedTuple):
    """The state of the threshold of a clipped sum.

    Attributes:
      step: How many batches came before, int32.
      memory: That of the threshold.
    """

    step: jax.Array
    memory: Any


def clipped_grad(
    loss_fn: Callable[..., Any],
    max_norm: Scalar | Callable[[jax.Array], Scalar] | Threshold,
    *,
    argnums: Argnums = 0,
    batch_argnums: Argnums = 1,
    key_argnum: int | None = None,
    has_aux: bool = False,
    batched: bool = False,
    granularity: Granularity = whole_tree(),  # noqa: B008 - frozen
    shrink: Shrink = rescale,
    reduce: str = "sum",
    microbatch_size: int | None = None,
    implementation: str | None = None,
) -> "ClippedGrad":
    r"""Makes a function that clips the gradient of each example, and adds them up.

    .. math:: \sum_i g_i \, \frac{\mathrm{shrink}(n_i, C)}{n_i} , \quad
        g_i = \nabla_\theta \, L(\theta, x_i) , \quad n_i = \lVert g_i \rVert_2

    With :func:`gradnorm_jax.add_gaussian_noise` that is DP-SGD. The gradients of single
    examples are mostly not formed: the sum is made from what their norms are made from,
    multiplied by the scales. Call it under `jax.jit`: outside, loops in it are compiled
    anew each time.

    Args:
      loss_fn: `(params, example, ...) -> loss`, the loss of one example.
      max_norm: The largest norm (:math:`C`): a number, an array with one for each part,
        a function of the step, or :func:`gradnorm_jax.thresholds.quantile`, which
        follows the norms of the examples and is **not** private.
      argnums: Which arguments the gradient is taken of.
      batch_argnums: Which arguments hold examples along axis 0 of every leaf.
      key_argnum: Which argument is a PRNG key, split into one for each example.
      has_aux: Whether `loss_fn` returns `(loss, aux)`.
      batched: Whether `loss_fn` takes a batch: it is given batches of one example.
      granularity: What has one norm, and is scaled by it.
      shrink: What a norm above its limit becomes, from :mod:`gradnorm_jax.shrink`.
      reduce: "sum", or "mean" over the examples that are there.
      microbatch_size: How many examples are computed at a time, to save memory; by
        default so many that what is kept of them is no larger than the parameters, and
        at least 16; all, where the loss convolves.
      implementation: "one_pass", the default. "two_pass" finds the norms and then
        differentiates the weighted loss, which holds less and takes longer; for
        ``whole_tree()``. "vmap" forms all gradients.

    Returns:
      A function of the arguments of `loss_fn` that returns :class:`ClippedGrads`. It
      takes two more by keyword: `example_mask`, `[B]`, False for examples that are
      padding and add nothing; and `clip_state`, which `max_norm` needs where it is no
      number: the first from `.init(params)`, then that of the last result.

    Guarantees:
      - Adding or removing one example changes the sum by a vector of norm at most
        `max_norm` with ``rescale`` and ``whole_tree()``, up to the error of a norm,
        5e-6 in float32. Replacing one changes it by at most twice that. With K parts
        the norm is that of their K limits: sqrt(K) times one for all.
      - An example whose norm is not finite adds nothing, and is counted.
      - In bfloat16 activations and their gradients are rounded once more after they are
        scaled, to 8 bits, and a bound may be missed by as much.
      - On a mesh nothing is reduced over devices but the sums of gradients and of
        counts, but for "two_pass", which also fetches an example in place of others.
        Inside `shard_map` both are those of the examples of one device.

      ================  ===================
      an example with   adds
      ================  ===================
      norm 0            0
      limit inf         its gradient
      limit 0           0
      a NaN or an inf   0
      mask False        0, whatever it holds
      ================  ===================

    Raises:
      ValueError: If `max_norm` is negative, or a rule that learns from one norm a step;
        if `implementation` or `reduce` is none. When called: without a `clip_state`
        that is needed, with a mask of another shape, where a leaf is in no group, or
        with an argument beside the batch that has as many entries along axis 0.
      TypeError: When called: if a parameter is of an integer dtype.

    Example:
      >>> loss_fn = lambda w, x: w @ x
      >>> xs = jnp.array([[3.0, 4.0], [0.3, 0.4], [jnp.nan, 0.0]])
      >>> clipped = clipped_grad(loss_fn, 1.0)(jnp.zeros(2), xs)
      >>> print(clipped.grads, clipped.num_clipped, clipped.num_dropped)
      [0.90000004 1.2       ] 1 1

    References:
      Abadi et al., `Deep Learning with Differential Privacy
      <https://arxiv.org/abs/1607.00133>`_, 2016; Bu et al., `Differentially Private
      Optimization on Large Model at Small Cost <https://arxiv.org/abs/2210.00038>`_,
      2023
    """
    caller = "clipped_grad"
    loss = Loss.of(
        loss_fn,
        argnums=argnums,
        batch_argnums=batch_argnums,
        key_argnum=key_argnum,
        has_aux=has_aux,
        batched=batched,
        caller=caller,
    )
    rule = as_threshold(max_norm, f"{caller}(max_norm=...)")
    if isinstance(max_norm, Threshold) and rule.observe_share is None:
        raise ValueError(
            f"`{caller}(max_norm=...)` must be a number, a function of the step or"
            " `thresholds.quantile(...)`, got a rule that learns from one norm a step,"
            " where here each example has one."
        )
    if reduce not in REDUCTIONS:
        raise ValueError(
            f"`{caller}(reduce=...)` must be one of {REDUCTIONS}, got {reduce!r}."
        )
    check_granularity(granularity, caller)
    check_kind(shrink, Shrink, f"{caller}(shrink=...)", "`gradnorm_jax.shrink.rescale`")
    if shrink.spikes_only:
        raise ValueError(
            f"`{caller}(shrink={shrink})` scales single entries by the largest, and"
            " here gradients have Euclidean norms. Use `gradnorm_jax.shrink.rescale`."
        )
    check_microbatch_size(microbatch_size, caller)
    check_implementation(implementation, tuple(WAYS), caller)
    is_number = not callable(max_norm) and not isinstance(max_norm, Threshold)
    return ClippedGrad(
        loss,
        rule,
        is_number,
        granularity,
        shrink,
        reduce,
        microbatch_size,
        implementation or "one_pass",
    )


@dataclasses.dataclass(frozen=True)
class ClippedGrad:
    """A function of parameters and a batch; made by :func:`clipped_grad`."""

    loss: Loss
    rule: Threshold
    is_number: bool
    granularity: Granularity
    shrink: Shrink
    reduce: str
    microbatch_size: int | None
    implementation: str

    def init(self, params: Tree) -> SumState:
        """Returns the state of the threshold before the first batch."""
        layout = self._layout(params)
        zeros = jnp.zeros(layout.part_shape, jnp.float32)
        return SumState(jnp.zeros((), jnp.int32), self.rule.init(zeros))

    def __call__(
        self,
        *args: Any,
        example_mask: jax.Array | None = None,
        clip_state: SumState | None = None,
        **kwargs: Any,
    ) -> ClippedGrads:
        """Returns the sum or mean of the clipped gradients of a batch."""
        batch = self.loss.batch(args)
        params = self.loss.params(args)

        def specs(of_examples: jax.P) -> Any:
            grads = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, params)
            return ClippedGrads(grads, *(of_examples,) * 4, *(jax.P(),) * 3)  # pyright: ignore

        return _sharding.split_by_the_compiler(
            self._of_batch,
            (args, kwargs, example_mask, clip_state),
            batch,
            specs,
        )

    def _of_batch(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        example_mask: jax.Array | None,
        clip_state: SumState | None,
    ) -> ClippedGrads:
        one = self.loss.one(args, kwargs)
        layout = self._layout(one.params)
        state = self._state(clip_state, one.params)
        present = self._present(example_mask, one.size)
        context = Context(state.step)

        def limited(norms: jax.Array) -> tuple[Scaling, jax.Array]:
            finite = jnp.isfinite(norms)
            bound = self.rule.decide(state.memory, jnp.where(finite, norms, 0), context)
            return scaling(norms, bound, 0.0, self.shrink), bound.limit

        way = WAYS[self.implementation](one, layout)

        def of_some(
            examples: tuple[Tree, jax.Array], counts: jax.Array
        ) -> tuple[list, tuple]:
            batch, present = examples
            result, norms, rest = way.measure(batch)
            factors, limits = jax.vmap(limited)(norms)
            added = counts & present & _over_parts(jnp.all, jnp.isfinite(norms))
            leaves = way.add(batch, rest, factors, added)
            return leaves, (result, norms, factors.scales, limits)

        leaves, (result, norms, scales, limits) = in_microbatches(
            of_some,
            (one.batch, present),
            one.size,
            self.microbatch_size or way.microbatch_size,
        )
        sound = _over_parts(jnp.all, jnp.isfinite(norms))
        added = sound & present
        if self.reduce == "mean":
            total = jnp.maximum(jnp.sum(present), 1)
            leaves = [x / total.astype(x.dtype) for x in leaves]
        smaller = added & _over_parts(jnp.any, scales < 1)
        in_parts = added.reshape(-1, *[1] * (norms.ndim - 1))
        return ClippedGrads(
            grads=jax.tree.unflatten(jax.tree.structure(one.params), leaves),
            norms=norms,
            scales=jnp.where(in_parts, scales, 0),
            values=result[0] if self.loss.has_aux else result,
            aux=result[1] if self.loss.has_aux else None,
            num_clipped=jnp.sum(smaller, dtype=jnp.int32),
            num_dropped=jnp.sum(present & ~sound, dtype=jnp.int32),
            clip_state=self._after(state, norms <= limits, in_parts, context),
        )

    def _layout(self, params: Tree) -> Layout:
        layout = self.granularity.layout(params, measured=False)
        if layout.fold == "groups":
            pairs = zip(layout.names, layout.measured, layout.scaled, strict=True)
            free = [name for name, own, scale in pairs if own < 0 or own != scale]
            if free:
                raise ValueError(
                    f"`clipped_grad(granularity={self.granularity})`: the gradient of"
                    f" {free[0]!r} would be added without a bound, as it is not both"
                    " measured and scaled in one group. Give it one; a limit of"
                    " `jnp.inf` in `max_norm` leaves a group as it is."
                )
        return layout

    def _state(self, clip_state: SumState | None, params: Tree) -> SumState:
        if clip_state is not None:
            if not isinstance(clip_state, SumState):
                raise TypeError(
                    "`clipped_grad(...)(clip_state=...)` must be the `SumState` of"
                    " `.init(params)` or of the last result, got a"
                    f" {type(clip_state).__name__}."
                )
            return clip_state
        if not self.is_number:
            raise ValueError(
                "`clipped_grad(...)(clip_state=...)` must be given where `max_norm` is"
                " a schedule or a rule: the first is `clipped_grad(...).init(params)`,"
                " the next the `clip_state` of the last result."
            )
        return self.init(params)

    def _present(self, mask: jax.Array | None, size: int) -> jax.Array:
        if mask is None:
            return jnp.ones(size, bool)
        if jnp.shape(mask) != (size,) or jnp.asarray(mask).dtype != bool:
            raise ValueError(
                f"`clipped_grad(...)(example_mask=...)` must be {size} booleans, False"
                f" for an example that is padding, got {jnp.asarray(mask).dtype} of"
                f" shape {jnp.shape(mask)}."
            )
        return jnp.asarray(mask)

    def _after(
        self, state: SumState, passed: jax.Array, added: jax.Array, context: Context
    ) -> SumState:
        """What the threshold learns from the share of norms that passed."""
        memory = state.memory
        if self.rule.observe_share is not None:
            among = jnp.sum(jnp.broadcast_to(added, passed.shape), 0)
            share = jnp.sum(passed & added, 0) / jnp.maximum(among, 1)
            share = share.astype(jnp.float32)
            taught = self.rule.observe_share(memory, share, context)
            memory = jax.tree.map(
                lambda old, new: jnp.where(among == 0, old, new), memory, taught
            )
        return SumState(jnp.asarray(optax.safe_increment(state.step)), memory)


def _over_parts(reduce: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    return reduce(x.reshape(len(x), -1), axis=1)


__all__ = ["ClippedGrad", "ClippedGrads", "SumState", "clipped_grad"]
