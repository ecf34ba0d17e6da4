"""A limit for the norms of examples that follows their quantile, and stays private."""

import math
from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from gradnorm_jax._checks import check_between
from gradnorm_jax._typing import Scalar
from gradnorm_jax.privacy.noise import check_noise

_RANGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class PrivateQuantileState(NamedTuple):
    """The state of a `PrivateQuantile`.

    Attributes:
      l2_clip_norm: The limit for the next batch.
      unclipped_share: About which share of the last batch was below its limit, with
        noise; `q` before the first.
      key_data: The key of the noise to come, as `jax.random.key_data` returns it.
    """

    l2_clip_norm: jax.Array
    unclipped_share: jax.Array
    key_data: jax.Array


class PrivateQuantile(NamedTuple):
    """A limit that adapts, made by `private_quantile`.

    Attributes:
      init: `() -> state`.
      update: `(state, norms, example_mask=None) -> state`, given the norms of the
        examples as they were before the clip.
      sum_noise_multiplier: That of the sum of the gradients, for `add_gaussian_noise`.
      noise_multiplier: That of the sum and the count together, for an accountant.
    """

    init: Callable[[], PrivateQuantileState]
    update: Callable[..., PrivateQuantileState]
    sum_noise_multiplier: Scalar
    noise_multiplier: Scalar


def private_quantile(
    q: Scalar = 0.5,
    *,
    noise_multiplier: Scalar,
    expected_batch_size: Scalar,
    key: jax.Array,
    count_stddev: Scalar | None = None,
    rate: Scalar = 0.2,
    start: Scalar = 0.1,
    axis_names: str | tuple[str, ...] = (),
) -> PrivateQuantile:
    r"""A clip norm of which a share q of the examples stays below, found with noise.

    With m examples expected in a batch, of which those with the norms :math:`n_i` came,

    .. math::

        \tilde b = \frac12 + \frac1m \Big( \sum_i \big(\mathbf{1}[n_i \le C] -
        \tfrac12\big) + \mathcal{N}(0, \sigma_b^2) \Big), \qquad
        C \leftarrow C \exp\big(-\eta \, (\tilde b - q)\big)

    with :math:`\tilde b` kept in [0, 1]. This is :func:`thresholds.quantile` for the
    examples of a batch; that one would tell of them. Less 1/2 each, an example changes
    the count by 1/2, so that the noise of both releases of a step is that of one with
    the multiplier :math:`z` if the sum of the gradients has

    .. math:: z_\Delta = \big( z^{-2} - (2 \sigma_b)^{-2} \big)^{-1/2} .

    Args:
      q: The share of examples that shall not be clipped, in [0, 1] (:math:`q`).
      noise_multiplier: What an accountant is told (:math:`z`); 0 is not private.
      expected_batch_size: How many examples a batch has on average (m), a constant.
      key: A key of `jax.random.key` for this alone: not that of the other noise.
      count_stddev: The standard deviation of the noise of the count
        (:math:`\sigma_b`); by default m/20.
      rate: By how much the logarithm of the limit moves in a step (:math:`\eta`).
      start: The first limit (:math:`C_0`). It must not come from the examples.
      axis_names: Inside `shard_map`, the mesh axes over which the examples are spread.

    Returns:
      A :class:`PrivateQuantile`: `init`, `update`, and two noise multipliers.

    Guarantees:
      - Both functions are pure, and the state rides in `scan`.
      - A norm that is NaN counts as clipped; an example whose mask is False does not
        count.
      - The limit stays between the smallest and the largest normal number of float32.

    Raises:
      ValueError: If a number is outside of its range, or `noise_multiplier` is not
        below twice `count_stddev`, as the count alone would tell too much.
      TypeError: If `key` is no key.

    Example:
      >>> limit = private_quantile(
      ...     noise_multiplier=1.0, expected_batch_size=64, key=jax.random.key(0)
      ... )
      >>> print(round(limit.sum_noise_multiplier, 4))
      1.0124
      >>> sum_key = jax.random.key(1)
      >>> noise = gn.privacy.add_gaussian_noise(
      ...     None, limit.sum_noise_multiplier, expected_batch_size=64, key=sum_key
      ... )
      >>> grads = jnp.ones((64, 3))  # those of 64 examples, all of norm 1.7
      >>> state, noise_state = limit.init(), noise.init(jnp.ones(3))
      >>> for _ in range(60):
      ...     clip = state.l2_clip_norm
      ...     total, _ = gn.per_example_global_norm_clip(grads, clip)
      ...     mean, noise_state = noise.update(total, noise_state, l2_clip_norm=clip)
      ...     state = limit.update(state, jnp.linalg.norm(grads, axis=1))
      >>> bool(1.5 < state.l2_clip_norm < 2)
      True

    References:
      Andrew et al., `Differentially Private Learning with Adaptive Clipping
      <https://arxiv.org/abs/1905.03871>`_, 2021
    """
    caller = "private_quantile"
    check_noise(noise_multiplier, expected_batch_size, key, caller)
    if count_stddev is None:
        count_stddev = expected_batch_size / 20
    _check(q, noise_multiplier, count_stddev, rate, start)
    impl = jax.random.key_impl(key)

    def init() -> PrivateQuantileState:
        return PrivateQuantileState(
            jnp.asarray(start, jnp.float32),
            jnp.asarray(q, jnp.float32),
            jnp.copy(jax.random.key_data(key)),
        )

    def update(
        state: PrivateQuantileState,
        norms: jax.Array,
        example_mask: jax.Array | None = None,
    ) -> PrivateQuantileState:
        limit = state.l2_clip_norm
        counted = jnp.where(norms <= limit.astype(norms.dtype), 0.5, -0.5)
        if example_mask is not None:
            counted = jnp.where(example_mask, counted, 0)
        count = jnp.sum(counted, dtype=jnp.float32)
        if axis_names:
            count = jax.lax.psum(count, axis_names)
        now = jax.random.wrap_key_data(state.key_data, impl=impl)
        later, own_key = jax.random.split(now)
        noise = jax.random.normal(own_key, (), jnp.float32)
        noised = count + jnp.asarray(count_stddev, jnp.float32) * noise
        unclipped = 0.5 + noised / jnp.asarray(expected_batch_size, jnp.float32)
        unclipped = jnp.clip(unclipped, 0, 1)
        # The error of exp would be the same at every step, and add up.
        error = unclipped - jnp.asarray(q, jnp.float32)
        growth = jnp.expm1(-jnp.asarray(rate, jnp.float32) * error)
        limit = jnp.clip(limit + limit * growth, *_RANGE)
        return PrivateQuantileState(limit, unclipped, jax.random.key_data(later))

    of_sum = _multiplier_left(noise_multiplier, count_stddev)
    return PrivateQuantile(init, update, of_sum, noise_multiplier)


def _multiplier_left(noise_multiplier: Scalar, count_stddev: Scalar) -> Scalar:
    """The noise multiplier that the sum needs beside the count."""
    if isinstance(noise_multiplier, Real) and noise_multiplier == 0:
        return noise_multiplier
    share = noise_multiplier / (2 * count_stddev)
    return noise_multiplier * (1 - share**2) ** -0.5


def _check(
    q: Scalar,
    noise_multiplier: Scalar,
    count_stddev: Scalar,
    rate: Scalar,
    start: Scalar,
) -> None:
    check_between(q, 0, 1, "private_quantile(q=...)", "0.5 is the median.")
    check_between(
        count_stddev,
        0,
        math.inf,
        "private_quantile(count_stddev=...)",
        "A twentieth of the batch is that of the paper.",
    )
    check_between(rate, 0, math.inf, "private_quantile(rate=...)", "0.2 in the paper.")
    check_between(
        start, *_RANGE, "private_quantile(start=...)", "0.1 is that of the paper."
    )
    known = not any(isinstance(x, Tracer) for x in (noise_multiplier, count_stddev))
    if known and 0 < noise_multiplier >= 2 * count_stddev:
        raise ValueError(
            "`private_quantile(noise_multiplier=...)` must be below twice"
            f" `count_stddev`, got {noise_multiplier} and {count_stddev}: the count"
            " alone would tell more than the multiplier allows. Raise `count_stddev`,"
            " or take larger batches."
        )


__all__ = ["PrivateQuantile", "PrivateQuantileState", "private_quantile"]
