"""Refusals of what cannot be: each names the argument, the value and a way out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer


def check_transformation(inner: Any, caller: str) -> None:
    """Refuses what is no Optax transformation."""
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"`{caller}` must be an Optax transformation such as `optax.adam(1e-3)`,"
            f" got {inner!r}. Of `optax.MultiSteps` take `.gradient_transformation()`."
        )


def check_kind(value: Any, kind: type, caller: str, way_out: str) -> None:
    """Refuses what is not of a class of this library."""
    if not isinstance(value, kind):
        raise TypeError(
            f"`{caller}` must be a {kind.__name__} such as {way_out}, got {value!r}."
        )


def check_state(state: Any, kind: type, caller: str) -> None:
    """Refuses the state of another transformation."""
    if not isinstance(state, kind):
        raise TypeError(
            f"`{caller}(...).update(state=...)` must be the `{kind.__name__}` that"
            f" `init` or the last `update` returned, got a {type(state).__name__}."
        )


def check_limit(limit: Any, caller: str) -> None:
    """Refuses a limit that is no number, or one that is known to be below 0 or NaN."""
    known = _known(limit, caller)
    if known is not None and (np.any(known < 0) or np.any(np.isnan(known))):
        raise ValueError(
            f"`{caller}` must not be negative or NaN, got {limit}. To stop the updates"
            " of some parameters, use `optax.freeze`; to clip nothing and only measure,"
            " use the limit `jnp.inf`."
        )


def check_between(value: Any, low: float, high: float, caller: str, why: str) -> None:
    """Refuses a number outside of a closed range, unless it is traced or a schedule."""
    if callable(value):
        return
    known = _known(value, caller)
    if known is not None and not np.all((low <= known) & (known <= high)):
        raise ValueError(
            f"`{caller}` must be between {low:g} and {high:g}, got {value}. {why}"
        )


def check_decay(value: Any, caller: str) -> None:
    """Refuses a decay outside of [0, 1)."""
    known = _known(value, caller)
    if known is not None and not np.all((known >= 0) & (known < 1)):
        raise ValueError(
            f"`{caller}` must be at least 0 and below 1, got {value}. It is the share"
            " of a running mean that is kept at each step: 0.98 remembers 50 of them."
        )


def check_steps(value: Any, least: int, caller: str, why: str) -> None:
    """Refuses what is not a whole number of steps, or too few of them."""
    if isinstance(value, Tracer):
        return
    dtype = np.asarray(value).dtype
    if not np.issubdtype(dtype, np.integer) or np.ndim(value):
        raise TypeError(f"`{caller}` must be a whole number of steps, got {value!r}.")
    if value < least:
        raise ValueError(f"`{caller}` must be at least {least}, got {value}. {why}")


def check_window(value: Any, least: int, caller: str, why: str) -> None:
    """Refuses a number of norms to remember that is too small, or not known."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"`{caller}` must be a known number, as it is the size of an array, got"
            f" {value!r}. `optax.inject_hyperparams` takes `static_args='window'`."
        )
    check_steps(value, least, caller, why)


def _known(number: Any, caller: str) -> np.ndarray | None:
    """Returns a number that is known, or `None` for one that is traced."""
    if isinstance(number, Tracer):
        return None
    if not isinstance(number, bool | str):
        known = np.asarray(number)
        if np.issubdtype(known.dtype, np.number) or known.dtype == jnp.bfloat16:
            return known.astype(np.float64)
    way_out = "Thresholds may also be a function of the step, or a rule of"
    way_out += " `gradnorm_jax.thresholds`."
    if callable(number):
        way_out = "This one cannot follow the step."
    raise TypeError(f"`{caller}` must be a number, got {number!r}. {way_out}")
