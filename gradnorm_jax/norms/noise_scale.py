r"""The gradient noise scale: how noisy gradients are, from norms alone.

For gradients :math:`g_b` of batches of b examples
:math:`E \lVert g_b \rVert^2 = \lVert G \rVert^2 + \mathrm{tr} \, \Sigma / b`, where
:math:`G` is the true gradient and :math:`\Sigma` the covariance of those of single
examples. So norms at two batch sizes tell both, without bias. Their ratio is not
without: averages over steps are taken of the two, and then divided.

Squares of norms leave float32 long before norms do. They are kept in units of a norm
that is about as large.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gradnorm_jax import _layout, _sharding
from gradnorm_jax._checks import check_decay
from gradnorm_jax._sharding import Placement
from gradnorm_jax._typing import AUTO, AxisNames, Scalar
from gradnorm_jax.norms.fold import accumulator, rms, step_down
from gradnorm_jax.norms.measurement import measure


class NoiseScale(NamedTuple):
    r"""The gradient noise scale, and the two estimates that it is the ratio of.

    Attributes:
      grad_square: The square of the norm of the true gradient
        (:math:`\lVert G \rVert^2`). Chance can take it below 0. Outside of the range of
        its dtype it is 0 or infinite, which the ratio is not.
      noise_trace: The variance of the gradient of one example, summed over all entries
        (:math:`\mathrm{tr} \, \Sigma`), of which the same is true.
      noise_scale: `noise_trace / grad_square`, in examples; NaN if it is not valid.
      is_valid: Whether there are data, `grad_square` is above 0 and `noise_trace` not
        below 0. Where not, more data are needed to tell the two apart.
    """

    grad_square: jax.Array
    noise_trace: jax.Array
    noise_scale: jax.Array
    is_valid: jax.Array


class NoiseScaleState(NamedTuple):
    """What `running_noise_scale` remembers: two averages, in units of a norm squared.

    Attributes:
      grad_square: The average of `NoiseScale.grad_square`, over the square of `unit`.
      noise_trace: The average of `NoiseScale.noise_trace`, over the square of `unit`.
      unit: A norm about as large as those of the gradients.
      total_weight: The sum of the weights of all steps, where the last one has 1.
    """

    grad_square: jax.Array
    noise_trace: jax.Array
    unit: jax.Array
    total_weight: jax.Array


class RunningAverage(NamedTuple):
    """An average over steps: three pure functions.

    Attributes:
      init: Returns a state of one structure and dtype for good: it rides in `scan`.
      update: `(state, ...) -> state`.
      read: `state -> result`.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    read: Callable[..., Any]


def gradient_noise_scale(
    norms: jax.Array,
    mean_norm: jax.Array | float,
    *,
    batch_size: int = 1,
    total_batch_size: int | None = None,
    mask: jax.Array | None = None,
    axis_names: AxisNames = AUTO,
) -> NoiseScale:
    r"""Estimates how many examples it takes until a gradient is more signal than noise.

    From norms :math:`n_i` of gradients over b examples each, and the norm :math:`N` of
    the gradient over B examples,

    .. math::

        \lVert G \rVert^2 = \frac{B N^2 - b \, \overline{n^2}}{B - b}, \qquad
        \mathrm{tr} \, \Sigma = \frac{\overline{n^2} - N^2}{1/b - 1/B}, \qquad
        B_{\mathrm{simple}} = \frac{\mathrm{tr} \, \Sigma}{\lVert G \rVert^2} .

    Well below :math:`B_{\mathrm{simple}}` examples, a batch twice as large saves nearly
    half of the steps; well above it saves hardly any. One step tells little: average
    with :func:`running_noise_scale`.

    Args:
      norms: From per-example norms, `[B]` (b = 1); from accumulated microbatches, the
        norm of the mean gradient of every one of them (b = `batch_size`); from two
        batches of any sizes, the norm of the one. With parts along axis 1, as
        `per_example_norms(granularity=per_leaf())` has them, each has a noise scale.
      mean_norm: The norm of the mean gradient over all these examples, or that of the
        other batch; `[parts]` if `norms` has parts. Before any clip, like `norms`.
      batch_size: Over how many examples each of `norms` is (b).
      total_batch_size: Over how many examples `mean_norm` is (B); by default over those
        of all `norms` that count.
      mask: Which of `norms` count, `[B]`: `False` for padding.
      axis_names: Inside `shard_map`, the mesh axes over which `norms` are split, as in
        :func:`global_norm`.

    Returns:
      A :class:`NoiseScale` of scalars, float32 or wider, or of arrays `[parts]`.

    Guarantees:
      - `noise_scale` is right wherever the norms are, though their squares may leave
        float32.
      - A norm that counts and is NaN or infinite makes the result invalid.

    Raises:
      ValueError: If `norms`, `mean_norm` and `mask` do not fit one another, or both
        norms are over the same number of examples.

    Example:
      >>> grads = jnp.array([[4.0, 1.0], [4.0, -1.0]])  # of two examples
      >>> norms = jnp.linalg.norm(grads, axis=1)
      >>> found = gradient_noise_scale(norms, jnp.linalg.norm(grads.mean(0)))
      >>> print(f"{found.noise_trace:.3f} / {found.grad_square:.3f} examples")
      2.000 / 15.000 examples

    References:
      McCandlish et al., `An Empirical Model of Large-Batch Training
      <https://arxiv.org/abs/1812.06162>`_, 2018
    """
    found = _estimated(norms, mean_norm, batch_size, total_batch_size, mask, axis_names)
    return _ratio_of(found)


def running_noise_scale(decay: Scalar = 0.99) -> RunningAverage:
    r"""Averages both estimates of the noise scale over steps, and then divides them.

    The average of a step that is k steps old has the weight :math:`\beta^k` over the
    sum of all weights: it is right from the first step on.

    Args:
      decay: What the averages keep at each step (:math:`\beta`). The noise scale is as
        many steps late as it averages over, about `1 / (1 - decay)`.

    Returns:
      Three functions. `init()` is a state for scalar norms, `init(mean_norm)` one for
      norms of that shape and dtype. `update(state, norms, mean_norm, ...)` takes what
      :func:`gradient_noise_scale` does; what is not finite teaches nothing.
      `read(state)` is a :class:`NoiseScale`.

    Raises:
      ValueError: If `decay` is not at least 0 and below 1.

    Example:
      >>> average = running_noise_scale(decay=0.9)
      >>> state = average.init()
      >>> for norms, mean_norm in [([2.0, 2.0], 1.5), ([4.0, jnp.nan], 3.0)]:
      ...     state = average.update(state, jnp.array(norms), mean_norm)
      >>> found = average.read(state)
      >>> print(found.noise_trace, found.grad_square, found.noise_scale)
      3.5 0.5 7.0
    """
    check_decay(decay, "running_noise_scale(decay=...)")

    def init(mean_norm: jax.Array | float = 0.0) -> NoiseScaleState:
        like = _floating(mean_norm)
        dtype = accumulator([like])
        # A buffer for each: one that two arrays share could not be donated.
        return NoiseScaleState(*(jnp.zeros_like(like, dtype=dtype) for _ in range(4)))

    def update(
        state: NoiseScaleState,
        norms: jax.Array,
        mean_norm: jax.Array | float,
        *,
        batch_size: int = 1,
        total_batch_size: int | None = None,
        mask: jax.Array | None = None,
        axis_names: AxisNames = AUTO,
    ) -> NoiseScaleState:
        new = _estimated(
            norms, mean_norm, batch_size, total_batch_size, mask, axis_names
        )
        new = NoiseScaleState(*(x.astype(state.unit.dtype) for x in new))
        kept = jnp.asarray(decay, state.unit.dtype)
        total_weight = 1 + kept * state.total_weight
        unit = jnp.maximum(_level(state), new.unit)

        def average(old: jax.Array, fresh: jax.Array) -> jax.Array:
            old = _times_square(old, over(state.unit, unit))
            fresh = _times_square(fresh, over(new.unit, unit))
            return old + (fresh - old) / total_weight

        learned = NoiseScaleState(
            average(state.grad_square, new.grad_square),
            average(state.noise_trace, new.noise_trace),
            unit,
            total_weight,
        )
        teaches = (new.total_weight > 0) & jnp.isfinite(new.unit)
        return jax.tree.map(lambda x, old: jnp.where(teaches, x, old), learned, state)

    return RunningAverage(init, update, _ratio_of)


def _estimated(
    norms: jax.Array,
    mean_norm: jax.Array | float,
    batch_size: int,
    total_batch_size: int | None,
    mask: jax.Array | None,
    axis_names: AxisNames,
) -> NoiseScaleState:
    """Both estimates of one step, with the weight 1, or 0 where there are none."""
    norms, large = jnp.atleast_1d(_floating(norms)), _floating(mean_norm)
    _check(norms, large, batch_size, total_batch_size)
    counted = which_count(mask, norms.shape[0], "gradient_noise_scale")
    dtype = accumulator([norms, large])
    # The root mean square of a column, over that of the mask, is that of what counts:
    # at any magnitude, and on a mesh all of them by one collective.
    columns = [norms] if norms.ndim == 1 else list(jnp.unstack(norms, axis=1))
    columns = [jnp.where(counted, x, 0).astype(dtype) for x in columns]
    columns.append(_sharding.varying_like(counted.astype(dtype), norms))
    layout = _layout.by_leaf(
        columns,
        Placement(axis_names),
        stacked_axes=None,
        caller="gradient_noise_scale(norms)",
    )
    *roots, share = jnp.unstack(measure(layout, columns, rms).norms)
    any_counts, share = share > 0, jnp.where(share > 0, share, 1)
    small = (jnp.stack(roots) / share).reshape(large.shape)
    large = large.astype(dtype)
    b = jnp.asarray(batch_size, dtype)
    if total_batch_size is None:
        total = b * jnp.round(share**2 * layout.size(len(roots)))
    else:
        total = jnp.asarray(total_batch_size, dtype)
    sound = jnp.isfinite(small) & jnp.isfinite(large) & (total != b) & any_counts
    unit = jnp.where(sound, jnp.maximum(small, large), 0)
    n, mean = (over(jnp.where(sound, x, 0), unit) for x in (small, large))
    gap = jnp.where(total != b, total - b, 1)
    return NoiseScaleState(
        grad_square=(total * mean**2 - b * n**2) / gap,
        noise_trace=(n - mean) * (n + mean) * (b * total / gap),
        unit=unit,
        total_weight=sound.astype(dtype),
    )


def _ratio_of(state: NoiseScaleState) -> NoiseScale:
    grad_square, noise_trace = state.grad_square, state.noise_trace
    is_valid = (state.total_weight > 0) & (grad_square > 0) & (noise_trace >= 0)
    ratio = noise_trace / jnp.where(is_valid, grad_square, 1)
    return NoiseScale(
        _times_square(grad_square, state.unit),
        _times_square(noise_trace, state.unit),
        jnp.where(is_valid, ratio, math.nan),
        is_valid,
    )


def _level(state: NoiseScaleState) -> jax.Array:
    """How large the norms are of which the averages speak."""
    largest = jnp.maximum(jnp.abs(state.grad_square), jnp.abs(state.noise_trace))
    level = state.unit * jnp.sqrt(largest)
    return jnp.minimum(level, jnp.finfo(level.dtype).max)


def _floating(x: jax.Array | float) -> jax.Array:
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def which_count(mask: jax.Array | None, number: int, caller: str) -> jax.Array:
    """Returns which of some examples count: all, if there is no mask."""
    if mask is None:
        return jnp.ones(number, bool)
    if jnp.shape(mask) != (number,):
        raise ValueError(
            f"`{caller}(mask=...)` must say of each of the {number} along axis 0 if it"
            f" counts, so be of shape ({number},), got {jnp.shape(mask)}."
        )
    return jnp.asarray(mask).astype(bool)


def over(x: jax.Array, unit: jax.Array) -> jax.Array:
    """Divides, by 1 if the unit is 0, and though 1 / unit may be flushed to 0."""
    unit = jnp.where(unit > 0, unit, 1)
    factor = step_down(unit)
    return (x * factor.astype(x.dtype)) / (unit * factor).astype(x.dtype)


def _times_square(x: jax.Array, unit: jax.Array) -> jax.Array:
    # What is large first, or the product is 0 or infinite too soon.
    return (x * unit) * unit


def _check(
    norms: jax.Array,
    mean_norm: jax.Array,
    batch_size: int,
    total_batch_size: int | None,
) -> None:
    if norms.ndim > 2 or norms.shape[1:] != mean_norm.shape:
        raise ValueError(
            "`gradient_noise_scale(norms, mean_norm)` must have the shapes [B] and (),"
            f" or [B, parts] and [parts], got {norms.shape} and {mean_norm.shape}."
        )
    known = isinstance(batch_size, int) and isinstance(total_batch_size, int)
    alone = norms.shape[0] == 1 and not _sharding.is_manual()
    if total_batch_size is None and alone:
        raise ValueError(
            "`gradient_noise_scale(norms)` has one norm, so that `mean_norm` would be"
            " over the same batch. Give the norms of two or more examples or"
            " microbatches, or `total_batch_size=` of another batch."
        )
    if known and batch_size == total_batch_size:
        raise ValueError(
            "`gradient_noise_scale(batch_size=..., total_batch_size=...)` must differ,"
            f" got {batch_size} twice: it takes two batch sizes to tell noise from"
            " gradient."
        )


__all__ = [
    "NoiseScale",
    "NoiseScaleState",
    "RunningAverage",
    "gradient_noise_scale",
    "over",
    "running_noise_scale",
    "which_count",
]
