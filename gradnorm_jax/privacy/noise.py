"""Gaussian noise for sums of clipped gradients, as differential privacy needs it."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradnorm_jax import _sharding, _trees
from gradnorm_jax._checks import check_between, check_state
from gradnorm_jax._sharding import DistributedNormError, Placement, Split
from gradnorm_jax._typing import AUTO, AxisNames, Scalar, Tree
from gradnorm_jax.norms.fold import accumulator
from gradnorm_jax.norms.granularity import whole_tree
from gradnorm_jax.privacy.sums import per_example_global_norm_clip
from gradnorm_jax.thresholds.rule import Value

_LARGEST = float(np.finfo(np.float32).max)


class NoiseState(NamedTuple):
    """The state of `add_gaussian_noise`.

    Attributes:
      key_data: The key of the noise to come, as `jax.random.key_data` returns it, so
        that any checkpoint can hold it.
      step: How many updates there were, int32.
      stddev: The standard deviation of the noise in the last update; 0 before it.
    """

    key_data: jax.Array
    step: jax.Array
    stddev: jax.Array


def add_gaussian_noise(
    l2_clip_norm: Value | None,
    noise_multiplier: Scalar,
    *,
    expected_batch_size: Scalar,
    key: jax.Array,
    axis_names: AxisNames = AUTO,
    specs: Tree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds Gaussian noise to a sum of clipped gradients, then divides it (DP-SGD).

    With :math:`\bar g_i` the gradients of the examples, each clipped to the norm C,

    .. math:: u = \frac{1}{m} \Big( \sum_i \bar g_i + \mathcal{N}(0, (z C)^2 I) \Big) .

    The updates must be that sum, which :func:`clipped_grad` makes with `reduce="sum"`,
    and nothing may come before it in the chain. Adding or removing an example changes
    it by at most C, its sensitivity; replacing one by another changes it by up to 2 C,
    for which z has to be twice as large. An accountant tells what this is worth over
    all steps: :func:`gradnorm_jax.privacy.epsilon`.

    Args:
      l2_clip_norm: The norm to which each example was clipped (C): a number, or a
        function of the step. With `None` each `update` is given it, as
        `l2_clip_norm=...`, for a limit that adapts: :func:`private_quantile`. Where
        each of K leaves or groups was clipped to c, it is :math:`\sqrt{K} c`.
      noise_multiplier: The standard deviation of the noise for a norm of 1 (z). 0 adds
        no noise, and nothing is private then.
      expected_batch_size: How many examples a batch has on average (m), a constant: the
        sampling rate times the number of examples. The number that a batch really has
        is private.
      key: A key of `jax.random.key`, used for nothing else, never again, and secret.
      axis_names: Inside `shard_map`, the mesh axes over which the leaves are split, as
        in :func:`clip_by_norm`.
      specs: How each leaf is split, as in :func:`clip_by_norm`.

    Returns:
      A transformation whose state is a :class:`NoiseState`.

    Guarantees:
      - The noise is independent in every entry, leaf and step, and the same whenever
        the key is. Its entries in a complex leaf are the real and the imaginary parts.
      - It is drawn and added in float32 or wider, before the division and the cast to
        the dtype of the leaf.
      - Under `jit` it is the same however the leaves are sharded. Inside `shard_map`
        each device draws that of its shards, and all that have the same shard draw the
        same.
      - `init` and `update` return one tree structure: the state rides in `scan`.

    Warning:
      - An epsilon holds for batches by Poisson sampling, in which each example is drawn
        on its own. Shuffled batches of a fixed size have another one.
      - No example may see another: no batch norm, no mean that is subtracted.
      - Norms are right to a relative error of about 5e-6, and so is the sensitivity. A
        sum that was rounded to bfloat16 has a larger one: give it in float32.
      - The normal numbers of JAX in float32 end at 5.4 standard deviations, and neither
        they nor the sum hide the rounding of floats: attacks on the last bits (Mironov,
        2012) are not defended against. The generator is not cryptographic.
      - What else is published of a step is not private by this: losses, norms, how many
        examples were clipped.

    To add up the sums of k microbatches and draw the noise once, wrap the whole chain:
    `optax.MultiSteps(tx, k, use_grad_mean=False)`, m being that of all k.

    Raises:
      ValueError: If a number is outside of its range. By `update`: if the norm is given
        twice, or not at all.
      TypeError: If `key` is no key. By `init` and `update`: if a leaf is of an integer
        dtype.
      DistributedNormError: By `update`, inside `shard_map`: if a gradient differs where
        its parameter is the same, as a sum does that is not over all devices yet.

    Example:
      >>> noise = add_gaussian_noise(
      ...     1.0, 1.1, expected_batch_size=64, key=jax.random.key(0)
      ... )
      >>> tx = optax.chain(noise, optax.sgd(0.1))
      >>> total = {"w": jnp.array([30.0, 40.0])}
      >>> updates, state = tx.update(total, tx.init(total))
      >>> print(state[0].stddev)  # 1.1 / 64
      0.0171875

    References:
      Abadi et al., `Deep Learning with Differential Privacy
      <https://arxiv.org/abs/1607.00133>`_, 2016
    """
    caller = "add_gaussian_noise"
    known_norm = l2_clip_norm
    if known_norm is not None:
        _check_norm(known_norm, f"{caller}(l2_clip_norm=...)")
    check_noise(noise_multiplier, expected_batch_size, key, caller)
    impl = jax.random.key_impl(key)

    def init(params: Tree) -> NoiseState:
        _, leaves, _ = _trees.flatten(params, f"{caller}(...).init(params)")
        zero = jnp.zeros((), accumulator(leaves))
        state = NoiseState(jax.random.key_data(key), jnp.zeros((), jnp.int32), zero)
        return _sharding.placed(state, params)

    def update(
        updates: Tree,
        state: Any,
        params: Tree | None = None,
        *,
        l2_clip_norm: Scalar | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, NoiseState]:
        del extra_args
        check_state(state, NoiseState, caller)
        placement = Placement(axis_names, specs, f"{caller}(...).update(updates)")
        names, leaves, treedef = _trees.flatten(updates, placement.caller)
        split = whole_tree().layout(updates, placement).split
        _check_summed(names, split, params, placement)
        limit = _given_once(known_norm, l2_clip_norm, caller)
        limit = limit(state.step) if callable(limit) else limit
        wide = state.stddev.dtype
        stddev = jnp.asarray(limit, wide) * jnp.asarray(noise_multiplier, wide)
        size = jnp.asarray(expected_batch_size, wide)

        now = jax.random.wrap_key_data(state.key_data, impl=impl)
        later, *keys = jax.random.split(now, len(leaves) + 1)
        axes = [own.axes for own in split] or [()] * len(leaves)
        each = zip(leaves, keys, axes, strict=True)
        noised = [_noised(*leaf, stddev, size) for leaf in each]
        after = NoiseState(
            jax.random.key_data(later),
            jnp.asarray(optax.safe_increment(state.step)),
            stddev / size,
        )
        return jax.tree.unflatten(treedef, noised), _sharding.placed_like(after, state)

    return optax.GradientTransformationExtraArgs(init, update)


def differentially_private_aggregate(
    l2_norm_clip: Scalar,
    noise_multiplier: Scalar,
    key: jax.Array,
    *,
    expected_batch_size: Scalar,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the gradient of each example, sums them, adds noise and divides (DP-SGD).

    This is :func:`per_example_global_norm_clip`, then :func:`add_gaussian_noise`, which
    says what is promised and what is not. It is first in a chain, and takes gradients
    with the examples along axis 0 of every leaf; where those of a whole batch take too
    much memory, :func:`clipped_grad` makes the sum without them.

    It is not quite `optax.contrib.differentially_private_aggregate`. An example with a
    NaN or an infinity adds nothing, where there it makes all NaN, for good. The sum is
    divided by a constant, not by the size of the batch. And the noise is float32 or
    wider whatever the leaves are.

    Args:
      l2_norm_clip: The largest norm of one example's gradient (C).
      noise_multiplier: The standard deviation of the noise for a norm of 1 (z).
      key: As in :func:`add_gaussian_noise`.
      expected_batch_size: As in :func:`add_gaussian_noise`: without the padding.

    Returns:
      A transformation whose state is a :class:`NoiseState`. `init` is given parameters,
      without axis 0. `update` takes the extra argument `example_mask`: False for each
      example that is padding, and adds nothing.

    Raises:
      ValueError: If a number is outside of its range, or a leaf has no axis 0 of the
        common size.
      TypeError: If `key` is no key, or a leaf is of an integer dtype.

    Example:
      >>> tx = differentially_private_aggregate(
      ...     5.0, 0.0, jax.random.key(0), expected_batch_size=2
      ... )
      >>> grads = jnp.array([[3.0, 4.0], [30.0, 40.0], [jnp.nan, 0.0]])
      >>> updates, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> print(updates)
      [3. 4.]

    References:
      Abadi et al., `Deep Learning with Differential Privacy
      <https://arxiv.org/abs/1607.00133>`_, 2016
    """
    caller = "differentially_private_aggregate"
    _check_norm(l2_norm_clip, f"{caller}(l2_norm_clip=...)", follows_steps=False)
    check_noise(noise_multiplier, expected_batch_size, key, caller)
    noise = add_gaussian_noise(
        l2_norm_clip,
        noise_multiplier,
        expected_batch_size=expected_batch_size,
        key=key,
    )

    def update(
        updates: Tree,
        state: Any,
        params: Tree | None = None,
        *,
        example_mask: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, Any]:
        del params, extra_args
        check_state(state, NoiseState, caller)
        total, _ = per_example_global_norm_clip(
            updates, l2_norm_clip, example_mask=example_mask
        )
        noised, after = noise.update(total, state)
        dtypes = jax.tree.map(jnp.result_type, updates)
        return jax.tree.map(lambda x, own: x.astype(own), noised, dtypes), after

    return optax.GradientTransformationExtraArgs(noise.init, update)


def _noised(
    x: jax.Array,
    key: jax.Array,
    axes: tuple[str, ...],
    stddev: jax.Array,
    size: jax.Array,
) -> jax.Array:
    if axes:  # each device has its own shard, and draws its own noise
        key = jax.random.fold_in(key, jax.lax.axis_index(axes))
    dtype = np.promote_types(x.dtype, np.float32)
    real = jnp.finfo(dtype).dtype
    sharding = jax.typeof(x).sharding
    is_cut = any(along is not None for along in sharding.spec)

    def draw(key: jax.Array) -> jax.Array:
        out_sharding = sharding if is_cut else None
        normal = jax.random.normal(key, x.shape, real, out_sharding=out_sharding)
        return stddev.astype(real) * normal

    if jnp.issubdtype(dtype, jnp.complexfloating):
        noise = jax.lax.complex(*map(draw, jax.random.split(key)))
    else:
        noise = draw(key)
    return ((x.astype(dtype) + noise) / size.astype(dtype)).astype(x.dtype)


def check_noise(
    noise_multiplier: Any, expected_batch_size: Any, key: Any, caller: str
) -> None:
    """Refuses what noise cannot be drawn with."""
    check_between(
        noise_multiplier,
        0,
        math.inf,
        f"{caller}(noise_multiplier=...)",
        "0 adds no noise; `gradnorm_jax.privacy.noise_multiplier_for` finds one.",
    )
    check_between(
        expected_batch_size,
        1,
        math.inf,
        f"{caller}(expected_batch_size=...)",
        "It is the sampling rate times the number of examples.",
    )
    if not (
        isinstance(key, jax.Array)
        and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        and key.ndim == 0
    ):
        given = jax.typeof(key) if isinstance(key, jax.Array) else repr(key)
        raise TypeError(
            f"`{caller}(key=...)` must be one key such as `jax.random.key(seed)`, with"
            f" a seed that nobody guesses, got {given}. Of an old `PRNGKey`,"
            " `jax.random.wrap_key_data` makes one."
        )


def _check_norm(limit: Any, caller: str, *, follows_steps: bool = True) -> None:
    if callable(limit) and not follows_steps:
        raise TypeError(
            f"`{caller}` must be a number, got {limit!r}. `add_gaussian_noise` takes a"
            " function of the step."
        )
    check_between(
        limit, 0, _LARGEST, caller, "A norm without a bound is hidden by no noise."
    )


def _given_once(known: Value | None, given: Scalar | None, caller: str) -> Value:
    if known is not None and given is not None:
        raise ValueError(
            f"`{caller}(...).update(l2_clip_norm=...)` was given {given}, but"
            f" `{caller}(l2_clip_norm=...)` was {known} already. Make it with"
            f" `{caller}(None, ...)` for a norm that each update is given."
        )
    if known is not None:
        return known
    if given is None:
        raise ValueError(
            f"`{caller}(...).update(l2_clip_norm=...)` must be given: the norm to which"
            " the examples of this step were clipped. Or make it with"
            f" `{caller}(1.0, ...)`, for a norm that stays."
        )
    _check_norm(given, f"{caller}(...).update(l2_clip_norm=...)", follows_steps=False)
    return given


def _check_summed(
    names: tuple[str, ...],
    split: tuple[Split, ...],
    params: Tree | None,
    placement: Placement,
) -> None:
    """Refuses sums over the examples of one device only: each would get noise."""
    if params is None or not split:
        return
    layout = whole_tree().layout(params, placement, measured=False)
    whole = dict.fromkeys(layout.names, ())
    whole |= {n: own.axes for n, own in zip(layout.names, layout.split, strict=False)}
    for name, own in zip(names, split, strict=True):
        if extra := tuple(sorted(set(own.axes) - set(whole.get(name, own.axes)))):
            raise DistributedNormError(
                f"`{placement.caller}`: {name!r} differs across mesh axes {extra}, but"
                " its parameter is the same there, so that it is a sum over the"
                " examples of one device. Add them up first, by"
                f" `jax.lax.psum(grads, {extra})`: the noise is added once."
            )


__all__ = ["NoiseState", "add_gaussian_noise", "differentially_private_aggregate"]
