"""Models that compute in 16 bits, in part or all of them."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from .oracle import Model
from .plain import B, drawn, matrices, squared_error


def rounded(x, dtype):
    """Casts to `dtype`, unless it is `None`."""
    return x if dtype is None else x.astype(dtype)


def mixed_precision():
    """Parameters in float32 are cast to bfloat16 before their use."""
    draw = drawn(55)
    first, second = matrices(draw, 12, 16, 4)
    params = {"b": draw(16), "first": first, "second": second}

    def loss_of(params, example, dtype):
        x, y = example
        first, b = rounded(params["first"], dtype), rounded(params["b"], dtype)
        h = jnp.tanh(rounded(x, dtype) @ first + b)
        return squared_error((h @ rounded(params["second"], dtype)).astype(y.dtype), y)

    return Model(
        functools.partial(loss_of, dtype=jnp.bfloat16),
        params,
        (draw(B, 3, 12), draw(B, 3, 4)),
        functools.partial(loss_of, dtype=None),
        rounds=True,
    )


def products_in_float32():
    """Operands in bfloat16, what comes out of products is float32."""
    model = mixed_precision()

    def loss_of(params, example, dtype):
        x, y = example
        dot = functools.partial(jnp.einsum, "ti,ij->tj", preferred_element_type=y.dtype)
        h = dot(rounded(x, dtype), rounded(params["first"], dtype)) + params["b"]
        h = rounded(jnp.tanh(h), dtype)
        return squared_error(dot(h, rounded(params["second"], dtype)), y)

    return model._replace(
        loss_fn=functools.partial(loss_of, dtype=jnp.bfloat16),
        exact=functools.partial(loss_of, dtype=None),
    )


def _all_in(dtype):
    draw = drawn(56)
    first, second = matrices(draw, 5, 8, 3)
    params = {"b": draw(8), "first": first, "second": second, "table": draw(6, 5)}

    def loss_fn(params, example):
        ids, x, y = example
        h = jnp.tanh((params["table"][ids] + x) @ params["first"] + params["b"])
        return squared_error(h @ params["second"], y)

    ids = np.random.default_rng(56).integers(0, 6, size=(B, 7))
    cast = functools.partial(jax.tree.map, lambda x: x.astype(dtype))
    x, y = cast((draw(B, 7, 5), draw(B, 7, 3)))
    return Model(loss_fn, cast(params), (ids, x, y), rounds=True)


def all_in_bfloat16():
    """Parameters, examples and the loss are bfloat16."""
    return _all_in(ml_dtypes.bfloat16)


def all_in_float16():
    """Parameters, examples and the loss are float16."""
    return _all_in(np.float16)


def leaves_of_three_dtypes():
    """Parameters in float32, bfloat16 and float16 in one tree."""
    draw = drawn(57)
    params = {
        "b": draw(4).astype(np.float16),
        "first": draw(6, 4).astype(ml_dtypes.bfloat16),
        "second": draw(4, 2),
    }

    def loss_fn(params, example):
        x, y = example
        wide = params["second"].dtype
        h = jnp.tanh(x @ params["first"].astype(wide) + params["b"].astype(wide))
        return squared_error(h @ params["second"], y)

    return Model(loss_fn, params, (draw(B, 3, 6), draw(B, 3, 2)), rounds=True)
