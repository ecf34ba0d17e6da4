"""What the noise is worth: numbers of the package `dp-accounting`, none of our own."""

import math
import operator
from typing import Any

ACCOUNTANTS = ("pld", "rdp")


def epsilon(
    *,
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    delta: float,
    accountant: str = "pld",
) -> float:
    r"""The epsilon of DP-SGD with batches by Poisson sampling.

    Who sees all updates is no surer than by a factor :math:`e^\epsilon` whether any one
    example was there, but for a probability of about :math:`\delta`. The number is that
    of the package `dp-accounting`: `pip install 'gradnorm-jax[privacy]'`.

    It holds for neighbors by adding or removing one example; for batches to which each
    example comes on its own, with the probability `sampling_rate`, at every step anew;
    and for the noise of :func:`add_gaussian_noise` on a sum of examples that were
    clipped one by one. It is wrong for shuffled batches of a fixed size. It knows
    nothing of other runs on the same examples, such as those that tuned the settings.

    Args:
      noise_multiplier: The standard deviation of the noise for a clip norm of 1. With
        :func:`private_quantile`, its `noise_multiplier`, which counts both releases.
      sampling_rate: The probability of an example to be in a batch: the expected size
        of a batch over the number of examples.
      steps: How many updates there were, or will be.
      delta: The probability left over, well below one over the number of examples.
      accountant: "pld", by the distribution of the privacy loss, which is tight; or
        "rdp", by Renyi divergences, a larger bound.

    Returns:
      The smallest epsilon that the accountant can show; infinity without noise.

    Raises:
      ImportError: If `dp-accounting` is not installed.
      ValueError: If a number is outside of its range.
      TypeError: If `steps` is not a whole number.

    Example:
      >>> value = epsilon(
      ...     noise_multiplier=1.12, sampling_rate=256 / 60000, steps=14063, delta=1e-5
      ... )  # doctest: +SKIP
      >>> print(f"{value:.2f}")  # doctest: +SKIP
      2.31

    References:
      Koskela et al., `Computing Tight Differential Privacy Guarantees Using FFT
      <https://arxiv.org/abs/1906.03049>`_, 2020;
      Mironov et al., `Renyi Differential Privacy of the Sampled Gaussian Mechanism
      <https://arxiv.org/abs/1908.10530>`_, 2019
    """
    _check("epsilon", sampling_rate, steps, delta, accountant)
    if not noise_multiplier >= 0:
        raise ValueError(
            "`epsilon(noise_multiplier=...)` must not be negative, got"
            f" {noise_multiplier}."
        )
    if noise_multiplier == 0:
        return math.inf
    books = _fresh(accountant, "epsilon")
    books.compose(_event(noise_multiplier, sampling_rate), operator.index(steps))
    return float(books.get_epsilon(delta))


def noise_multiplier_for(
    epsilon: float,
    *,
    sampling_rate: float,
    steps: int,
    delta: float,
    accountant: str = "pld",
) -> float:
    """The least noise multiplier with which DP-SGD has an epsilon, or a smaller one.

    The inverse of :func:`epsilon`, which says what it is and when it holds. It tries
    about ten multipliers, which takes "pld" seconds.

    Args:
      epsilon: What is aimed at.
      sampling_rate: As in :func:`epsilon`.
      steps: As in :func:`epsilon`.
      delta: As in :func:`epsilon`.
      accountant: As in :func:`epsilon`.

    Returns:
      The noise multiplier for :func:`add_gaussian_noise`, to 1e-4.

    Raises:
      ImportError: If `dp-accounting` is not installed.
      ValueError: If a number is outside of its range.
      TypeError: If `steps` is not a whole number.

    Example:
      >>> value = noise_multiplier_for(
      ...     3.0, sampling_rate=256 / 60000, steps=14063, delta=1e-5, accountant="rdp"
      ... )  # doctest: +SKIP
      >>> print(f"{value:.2f}")  # doctest: +SKIP
      1.01
    """
    _check("noise_multiplier_for", sampling_rate, steps, delta, accountant)
    if not 0 < epsilon < math.inf:
        raise ValueError(
            "`noise_multiplier_for(epsilon=...)` must be above 0 and finite, got"
            f" {epsilon}. Values between 1 and 10 are common."
        )
    accounting = _package("noise_multiplier_for")
    return float(
        accounting.calibrate_dp_mechanism(
            lambda: _fresh(accountant, "noise_multiplier_for"),
            lambda noise: accounting.SelfComposedDpEvent(
                _event(noise, sampling_rate), operator.index(steps)
            ),
            epsilon,
            delta,
            accounting.LowerEndpointAndGuess(0.0, 1.0),
            tol=1e-4,
        )
    )


def _event(noise_multiplier: float, sampling_rate: float) -> Any:
    accounting = _package("epsilon")
    return accounting.PoissonSampledDpEvent(
        sampling_rate, accounting.GaussianDpEvent(noise_multiplier)
    )


def _fresh(accountant: str, caller: str) -> Any:
    """An accountant that has seen nothing yet."""
    accounting = _package(caller)
    relation = accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    if accountant == "rdp":
        return accounting.rdp.RdpAccountant(neighboring_relation=relation)
    return accounting.pld.PLDAccountant(neighboring_relation=relation)


def _package(caller: str) -> Any:
    try:
        import dp_accounting
        from dp_accounting import pld, rdp  # noqa: F401 - parts of the package
    except ImportError as error:
        raise ImportError(
            f"`{caller}` needs the package dp-accounting:"
            " `pip install 'gradnorm-jax[privacy]'`."
        ) from error
    return dp_accounting


def _check(
    caller: str, sampling_rate: Any, steps: Any, delta: Any, accountant: Any
) -> None:
    for argument, value, way_out in (
        ("sampling_rate", sampling_rate, "1 is for all examples in every batch."),
        ("delta", delta, "It is well below one over the number of examples."),
    ):
        if not 0 < value <= 1 or (argument == "delta" and value == 1):
            raise ValueError(
                f"`{caller}({argument}=...)` must be a probability above 0, got"
                f" {value}. {way_out}"
            )
    if not hasattr(steps, "__index__") or isinstance(steps, bool):
        raise TypeError(
            f"`{caller}(steps=...)` must be a whole number of updates, got {steps!r}."
        )
    if operator.index(steps) < 1:
        raise ValueError(f"`{caller}(steps=...)` must be at least 1, got {steps}.")
    if accountant not in ACCOUNTANTS:
        raise ValueError(
            f"`{caller}(accountant=...)` must be one of {ACCOUNTANTS}, got"
            f" {accountant!r}."
        )


__all__ = ["epsilon", "noise_multiplier_for"]
