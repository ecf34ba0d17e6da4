r"""What is computed of a sum of products without forming it for every example.

.. math::
    \Big\lVert \sum_t x_t y_t^\top \Big\rVert^2
    = \sum_{t, s} \langle x_t, x_s \rangle \langle y_t, y_s \rangle

The right side is the *gram* form; it costs :math:`T^2 (p + d)` products for x of p and
y of d entries, the *product* itself :math:`T p d`. Where a gradient has a hot axis, x_t
stands in the row that an index says, and is orthogonal to all that have another one.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gradnorm_jax.norms.examples import in_turn, sum_in_turn
from gradnorm_jax.norms.ghost import costs
from gradnorm_jax.norms.ghost.sums import Matrices, Sum, wide

_EXACT = jax.lax.Precision.HIGHEST


def norm(x: jax.Array, kept: tuple[int, ...] = ()) -> jax.Array:
    """Returns the norm of an array, or of each slice along some axes."""
    x = wide(x)
    summed = tuple(k for k in range(x.ndim) if k not in kept)
    unit = _unit(jnp.max(jnp.abs(x), summed, initial=0, keepdims=True))
    squares = jnp.sum(_squares(x / unit), summed)
    return _root(squares) * unit.reshape(squares.shape)


def norm_of_outer_product(terms: Sum, *arrays: jax.Array) -> jax.Array:
    """Returns the norm of a sum of one product, the product of the norms."""
    [x] = terms.matrices(arrays)
    assert x.left is not None
    return norm(x.left) * norm(x.right)


def norm_by_gram(terms: Sum, *arrays: jax.Array) -> jax.Array:
    """Returns the norm of a sum of one example by inner products of its factors."""
    parts, unit = _scaled(terms.matrices(arrays))
    total = jnp.zeros((), unit.dtype)
    for k, one in enumerate(parts):
        for other in parts[: k + 1]:
            rows = _inner_products_of_rows(terms, one, other)
            columns = _inner_products(one.right, other.right)
            total += (1 if one is other else 2) * jnp.sum(rows * columns)
    return _root(jnp.maximum(total, 0)) * unit


def norm_by_product(terms: Sum, *arrays: jax.Array) -> jax.Array:
    """Returns the norm of a sum of one example by its product."""
    parts, unit = _scaled(terms.matrices(arrays))
    total = jnp.sum(jnp.square(_products(terms, parts, _EXACT)))
    return _root(total) * unit


def product(terms: Sum, *arrays: jax.Array) -> jax.Array:
    """Returns a sum of one example, formed."""
    parts = terms.matrices(arrays)
    return terms.unfolded(_products(terms, parts, None))


def norm_by_products_in_turn(terms: Sum, *arrays: jax.Array) -> jax.Array:
    """As `norm_by_product`; under `vmap` one example after the other."""
    return in_turn(functools.partial(norm_by_product, terms))(*arrays)


def total(
    terms: Sum, arrays: Sequence[jax.Array], weights: Sequence[jax.Array]
) -> jax.Array:
    """Returns the weighted sum over examples of a sum of products.

    Args:
      terms: The sum of one example.
      arrays: What its values are; `[B, ...]` of those that differ between examples.
      weights: Factors of each example, `[B]`, as in `weighted`; at least one.
    """
    batched = [*(True for _ in weights), *(x.of_example for x in terms.values)]

    def matrices(*own: jax.Array) -> list[Matrices]:
        factors, values = own[: len(weights)], own[len(weights) :]
        return [_weighted(x, factors) for x in terms.matrices(values)]

    def product(*own: jax.Array) -> jax.Array:
        return _products(terms, matrices(*own), None)

    if costs.is_made(terms):
        return terms.unfolded(sum_in_turn(product, batched, *weights, *arrays))
    in_axes = [0 if varies else None for varies in batched]
    parts = jax.vmap(matrices, in_axes)(*weights, *arrays)
    laid = [
        Matrices(
            None if x.left is None else _merged(x.left, 1),
            _merged(x.right, 1),
            None if x.ids is None else _merged(x.ids, 0),
        )
        for x in parts
    ]
    return terms.unfolded(_products(terms, laid, None))


def weighted(x: jax.Array, weights: Sequence[jax.Array]) -> jax.Array:
    """Multiplies an array by factors of its leading axes, in float32 or wider.

    One of booleans says what is kept: the rest is 0, whatever it was.
    """
    x = wide(x)
    for factor in weights:
        factor = factor.reshape(*factor.shape, *[1] * (x.ndim - factor.ndim))
        if factor.dtype == bool:
            x = jnp.where(factor, x, jnp.zeros((), x.dtype))
        else:
            x = x * factor.astype(x.dtype)
    return x


def _weighted(x: Matrices, weights: Sequence[jax.Array]) -> Matrices:
    """Multiplies the right factor, one of float16 in float32: it could come out 0."""
    right = weighted(x.right, weights)
    if x.right.dtype != np.float16:
        right = right.astype(x.right.dtype)
    return x._replace(right=right)


def _merged(x: jax.Array, axis: int) -> jax.Array:
    """Lays the examples of `[B, ...]` end to end along an axis of one example."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _products(
    terms: Sum, parts: Sequence[Matrices], precision: jax.lax.Precision | None
) -> jax.Array:
    first, *others = [_product(terms, x, precision) for x in parts]
    return functools.reduce(jnp.add, others, first)


def _product(terms: Sum, x: Matrices, precision: jax.lax.Precision | None) -> jax.Array:
    """Returns `[batch, rows, columns]`."""
    batch, _, rows, columns = terms.sizes
    dtype = wide(x.right[:0]).dtype

    def product(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
        both = np.promote_types(a.dtype, b.dtype)
        return jnp.einsum(
            formula,
            a.astype(both),
            b.astype(both),
            precision=precision,
            preferred_element_type=dtype,
        )

    if x.ids is None:
        assert x.left is not None
        if batch == 1:
            return product("tp,td->pd", x.left[0], x.right[0])[None]
        return product("gtp,gtd->gpd", x.left, x.right)
    assert terms.hot is not None
    if x.left is None:
        zeros = jnp.zeros((terms.hot.size, batch, columns), dtype)
        scattered = zeros.at[x.ids].add(jnp.swapaxes(x.right, 0, 1).astype(dtype))
        return jnp.swapaxes(scattered, 0, 1)
    here = jax.nn.one_hot(x.ids, terms.hot.size, dtype=x.right.dtype)
    spread = product("th,gtp->gthp", here, x.left).astype(x.right.dtype)
    return product("gthp,gtd->ghpd", spread, x.right).reshape(batch, rows, columns)


def _inner_products(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum("gti,gsi->gts", x, y, precision=_EXACT)


def _inner_products_of_rows(terms: Sum, a: Matrices, b: Matrices) -> jax.Array:
    """Returns `[batch, length of a, length of b]`."""
    if a.ids is None and b.ids is not None:
        return jnp.swapaxes(_inner_products_of_rows(terms, b, a), 1, 2)
    if a.ids is None:
        assert a.left is not None
        assert b.left is not None
        return _inner_products(a.left, b.left)
    if b.ids is None:
        assert b.left is not None
        assert terms.hot is not None
        there = b.left.reshape(*b.left.shape[:2], terms.hot.size, -1)[:, :, a.ids]
        if a.left is None:
            return jnp.swapaxes(there[..., 0], 1, 2)
        return jnp.einsum("gtp,gstp->gts", a.left, there, precision=_EXACT)
    same = (a.ids[:, None] == b.ids[None, :])[None]
    if a.left is None and b.left is None:
        return same.astype(a.right.dtype)
    ones = [
        jnp.ones_like(x.right[..., :1]) if x.left is None else x.left for x in (a, b)
    ]
    return jnp.where(same, _inner_products(*ones), 0)


def _scaled(
    parts: Sequence[Matrices],
) -> tuple[list[Matrices], jax.Array]:
    """Divides the factors by their magnitudes, so that no square leaves float32.

    Each row of a left factor by its own, by which that of the right one is multiplied:
    of two terms the one may have on the left what the other has on the right.
    """
    balanced = [_balanced(x) for x in parts]
    unit = _magnitude(*(x.right for x in balanced))
    scaled = [x._replace(right=x.right / unit) for x in balanced]
    return scaled, unit


def _balanced(x: Matrices) -> Matrices:
    right = wide(x.right)
    if x.left is None:
        return x._replace(right=right)
    left = wide(x.left)
    own = _unit(jnp.max(jnp.abs(left), -1, initial=0, keepdims=True))
    return Matrices(left / own, right * own, x.ids)


def _magnitude(*arrays: jax.Array) -> jax.Array:
    largest = [jnp.max(jnp.abs(x), initial=0) for x in arrays]
    return _unit(functools.reduce(jnp.maximum, largest))


def _unit(largest: jax.Array) -> jax.Array:
    """The power of two below a number; within what numbers can be divided by."""
    info = jnp.finfo(largest.dtype)
    bits = jnp.uint32 if info.bits == 32 else jnp.uint64
    exponent = np.array(np.inf, largest.dtype).view(bits)
    own = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(largest), bits)
    power = jax.lax.bitcast_convert_type(own & exponent, largest.dtype)
    # XLA makes (x / c)^2 into x^2 / c^2 where it knows c, and c^2 is 0 or infinite.
    power = jax.lax.optimization_barrier(power)
    far = 2.0 ** (info.maxexp * 25 // 32)  # 2^100 in float32
    return jnp.clip(power, 1 / far, far)


def _squares(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return jnp.square(jnp.real(x)) + jnp.square(jnp.imag(x))
    return jnp.square(x)


def _root(x: jax.Array) -> jax.Array:
    """The square root, of which the derivative at 0 is 0."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))
