r"""The signal-to-noise ratio of gradients, entry by entry or part by part.

The mean of some gradients is signal, their variance noise: those of the examples of a
batch, or of the last steps of a run. Of a part of the tree the ratio is 1 over its
noise scale.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax import _layout, _trees
from gradnorm_jax._checks import check_decay
from gradnorm_jax._typing import Scalar, Tree
from gradnorm_jax.norms.fold import accumulator
from gradnorm_jax.norms.granularity import Granularity
from gradnorm_jax.norms.measures import global_norm
from gradnorm_jax.norms.noise_scale import RunningAverage, over, which_count


class GradientSNR(NamedTuple):
    """The signal-to-noise ratio of gradients: of each entry, or of each part.

    Attributes:
      snr: The square of the mean over the variance; NaN where it is not valid. A value
        that is not above 0 cannot be told from none.
      is_valid: Whether there are two gradients or more, and the variance is above 0.
    """

    snr: Tree
    is_valid: Tree


class SNRState(NamedTuple):
    """What `running_snr` remembers, two trees like the gradients, in float32 or wider.

    Attributes:
      mean: The mean of the gradients.
      deviation: Their standard deviation.
      total_weight: The sum of the weights of all steps, where the last one has 1.
      concentration: The sum of the squares of the weights over the square of their sum:
        1 over the number of gradients, if all had one weight.
    """

    mean: Tree
    deviation: Tree
    total_weight: jax.Array
    concentration: jax.Array


def gradient_snr(
    grads: Tree,
    *,
    granularity: Granularity | None = None,
    mask: jax.Array | None = None,
) -> GradientSNR:
    r"""Returns the signal-to-noise ratio of the gradients of some examples.

    .. math:: r = \frac{\bar g^2 - v / B}{v}, \qquad
        v = \frac{1}{B - 1} \sum_i (g_i - \bar g)^2

    for each entry; of a part both are summed over its entries, and the ratio is 1 over
    the noise scale of that part. Numerator and denominator are each unbiased:
    :math:`\bar g^2 / v` alone, as the ratio is written in the paper, is 1 / B too high.

    Args:
      grads: A tree of gradients with the examples along axis 0 of every leaf, as
        `jax.vmap(jax.grad(loss), (None, 0))` makes them. Inside `shard_map` those of
        one device are not enough: gather them first.
      granularity: What has one ratio: `per_leaf()` and its like; by default each entry.
      mask: Which examples count, `[B]`: `False` for padding.

    Returns:
      A :class:`GradientSNR`: two trees like the gradient of one example or, with
      `granularity`, two arrays in the order of `granularity.names`.

    Raises:
      ValueError: If a leaf or `mask` has no axis 0 of the common size.
      TypeError: If a leaf is of an integer dtype.

    Example:
      >>> grads = {"w": jnp.array([[1.0, 4.0], [3.0, 6.0], [2.0, 2.0]])}
      >>> print(*(f"{ratio:.2f}" for ratio in gradient_snr(grads).snr["w"]))
      3.67 3.67

    References:
      Liu et al., `Understanding Why Neural Networks Generalize Well Through GSNR of
      Parameters <https://arxiv.org/abs/2001.07384>`_, 2020
    """
    layout = _layout.by_example(grads, caller="gradient_snr(grads)")
    _, leaves, treedef = _trees.flatten(grads, "gradient_snr(grads)")
    examples = layout.part_shape[0]
    counted = which_count(mask, examples, "gradient_snr")
    moments = [_moments(x, counted) for x in leaves]
    mean, deviation = (treedef.unflatten([own[k] for own in moments]) for k in range(2))
    number = jnp.maximum(jnp.sum(counted, dtype=jnp.int32), 1)
    return _snr(mean, deviation, 1 / number.astype(jnp.float32), granularity)


def running_snr(decay: Scalar = 0.99) -> RunningAverage:
    r"""Averages the mean and the variance of gradients over steps, and divides them.

    As :func:`gradient_snr` with the gradients of the last steps for examples, those
    that are k steps old with the weight :math:`\beta^k`, and 1 / B for the sum of the
    squares of the weights. That the gradient changes meanwhile counts as noise.

    Args:
      decay: What the averages keep at each step (:math:`\beta`).

    Returns:
      Three functions. `init(params)` is a state of twice their size in float32 or
      wider. `update(state, grads)` takes the gradients of a step; those with a NaN or
      an infinity teach nothing. `read(state, granularity=None)` is a
      :class:`GradientSNR`.

    Raises:
      ValueError: If `decay` is not at least 0 and below 1.

    Example:
      >>> average = running_snr()
      >>> state = average.init({"w": jnp.zeros(2)})
      >>> for grad in ([1.0, 5.0], [3.0, 5.0]):
      ...     state = average.update(state, {"w": jnp.array(grad)})
      >>> found = average.read(state)
      >>> print(f"{found.snr['w'][0]:.2f}", found.is_valid["w"])
      1.51 [ True False]
    """
    check_decay(decay, "running_snr(decay=...)")

    def init(params: Tree) -> SNRState:
        _, leaves, treedef = _trees.flatten(params, "running_snr(...).init(params)")
        mean = [jnp.zeros_like(x, dtype=_wide(x)) for x in leaves]
        deviation = [jnp.zeros_like(x, dtype=accumulator([x])) for x in leaves]
        return SNRState(
            treedef.unflatten(mean),
            treedef.unflatten(deviation),
            total_weight=jnp.zeros((), jnp.float32),
            concentration=jnp.zeros((), jnp.float32),
        )

    def update(state: SNRState, grads: Tree) -> SNRState:
        teaches = jnp.isfinite(global_norm(grads))
        total_weight = 1 + jnp.asarray(decay, jnp.float32) * state.total_weight
        share = 1 / total_weight

        def moved(mean: jax.Array, x: jax.Array) -> jax.Array:
            own = share.astype(mean.dtype)
            return jnp.where(teaches, mean + own * (x.astype(mean.dtype) - mean), mean)

        def spread(old: jax.Array, mean: jax.Array, x: jax.Array) -> jax.Array:
            own = share.astype(old.dtype)
            distance = jnp.abs(x.astype(mean.dtype) - mean)
            unit = jnp.maximum(old, distance)
            square = over(old, unit) ** 2 + own * over(distance, unit) ** 2
            return jnp.where(teaches, unit * jnp.sqrt((1 - own) * square), old)

        concentration = (1 - share) ** 2 * state.concentration + share**2
        return SNRState(
            jax.tree.map(moved, state.mean, grads),
            jax.tree.map(spread, state.deviation, state.mean, grads),
            jnp.where(teaches, total_weight, state.total_weight),
            jnp.where(teaches, concentration, state.concentration),
        )

    def read(state: SNRState, granularity: Granularity | None = None) -> GradientSNR:
        return _snr(state.mean, state.deviation, state.concentration, granularity)

    return RunningAverage(init, update, read)


def _moments(x: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean and the standard deviation over axis 0, right at any magnitude."""
    counted = counted.reshape(-1, *[1] * (x.ndim - 1))
    x = jnp.where(counted, x, 0).astype(_wide(x))
    real = accumulator([x])
    number = jnp.maximum(jnp.sum(counted, dtype=real), 1)
    unit = jnp.max(jnp.abs(x), axis=0, initial=0)
    scaled = over(x, unit[None])
    mean = jnp.sum(scaled, axis=0) / number.astype(x.dtype)
    apart = jnp.where(counted, jnp.abs(scaled - mean[None]), 0)
    deviation = jnp.sqrt(jnp.sum(apart**2, axis=0) / number)
    return unit.astype(x.dtype) * mean, unit * deviation


def _snr(
    mean: Tree,
    deviation: Tree,
    concentration: jax.Array,
    granularity: Granularity | None,
) -> GradientSNR:
    if granularity is not None:
        mean, deviation = granularity.measure(mean), granularity.measure(deviation)

    def snr(mean: jax.Array, deviation: jax.Array) -> jax.Array:
        few = concentration.astype(deviation.dtype)
        is_valid = deviation > 0  # that of one gradient, or of none, is 0
        ratio = over(jnp.abs(mean), jnp.where(is_valid, deviation, 1))
        found = (1 - few) * ratio**2 - few
        return jnp.where(is_valid & jnp.isfinite(found), found, math.nan)

    found = jax.tree.map(snr, mean, deviation)
    return GradientSNR(found, jax.tree.map(lambda x: ~jnp.isnan(x), found))


def _wide(x: jax.Array) -> np.dtype:
    return np.promote_types(x.dtype, accumulator([x]))


__all__ = ["GradientSNR", "SNRState", "gradient_snr", "running_snr"]
