"""The gradient of a kernel as a product: windows of the input times the output's."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax.norms.ghost.programs import Value
from gradnorm_jax.norms.ghost.terms import Dim, Factor, Term, dim_of


def term(
    lhs: Value, rhs: Value, shape: tuple[int, ...], params: Mapping[str, Any]
) -> Term:
    """Returns a convolution as a product summed over channels and places.

    Each place of the result sees `lhs` through a window of the shape of `rhs`. There
    are few of them, as the result is a kernel: the windows are rows, side by side.
    """
    names = params["dimension_numbers"]
    batch, feature, *places = names.lhs_spec
    out_feature, in_feature, *taps = names.rhs_spec
    groups, batch_groups = params["feature_group_count"], params["batch_group_count"]

    group = dim_of(groups)
    batch_group = dim_of(batch_groups)
    rows = dim_of(lhs.shape[batch] // batch_groups)
    channels = dim_of(lhs.shape[feature] // groups)
    columns = dim_of(rhs.shape[out_feature] // (groups * batch_groups))
    windows = [dim_of(shape[k]) for k in names.out_spec[2:]]
    inside = [dim_of(rhs.shape[k]) for k in taps]

    left: dict[int, Dim] = {batch: (*batch_group, *rows), feature: (*group, *channels)}
    for k, place in enumerate(places):
        left[place] = (*windows[k], *inside[k])
    right: dict[int, Dim] = {
        out_feature: (*group, *batch_group, *columns),
        in_feature: channels,
    }
    right |= dict(zip(taps, inside, strict=True))
    out: dict[int, Dim] = {
        names.out_spec[0]: rows,
        names.out_spec[1]: (*group, *batch_group, *columns),
    }
    out |= dict(zip(names.out_spec[2:], windows, strict=True))

    def through_windows(x: jax.Array) -> jax.Array:
        return _through_windows(
            x,
            places,
            [rhs.shape[k] for k in taps],
            [shape[k] for k in names.out_spec[2:]],
            params,
        )

    return Term(
        Factor(lhs, _in_order(left), through_windows),
        Factor(rhs, _in_order(right)),
        _in_order(out),
    )


def _through_windows(
    x: jax.Array,
    places: list[int],
    inside: list[int],
    windows: list[int],
    params: Mapping[str, Any],
) -> jax.Array:
    """Cuts `x` along each spatial dimension into `[windows * inside]`."""
    config = [(0, 0, 0)] * x.ndim
    for place, (low, high), spread in zip(
        places, params["padding"], params["lhs_dilation"], strict=True
    ):
        config[place] = (low, high, spread - 1)
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), config)
    for k, place in enumerate(places):
        first = np.arange(windows[k]) * params["window_strides"][k]
        step = params["rhs_dilation"][k]
        cut = [
            jax.lax.slice_in_dim(
                x, start, start + (inside[k] - 1) * step + 1, step, place
            )
            for start in first
        ]
        x = jnp.concatenate(cut, place)
    return x


def _in_order(dims: dict[int, Dim]) -> tuple[Dim, ...]:
    return tuple(dims[k] for k in range(len(dims)))
