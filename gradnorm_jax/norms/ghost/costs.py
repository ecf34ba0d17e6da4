"""Which way to a norm costs least, by the shapes of what it is computed from."""

from typing import NamedTuple

from gradnorm_jax.norms.ghost.sums import Sum

#: A gradient of fewer entries is formed for all examples at a time: less than a loop.
SMALL = 2**12


class Cost(NamedTuple):
    """What a way to a norm takes for one example.

    Attributes:
      rule: Its name.
      flops: Additions and multiplications, beyond those of the factors.
      entries: Numbers that are held at a time, beyond the factors.
      in_turn: Whether one example comes after the other, so that `entries` are held
        once, and not for each.
      why: Why it was chosen.
    """

    rule: str
    flops: int
    entries: int
    in_turn: bool
    why: str


def cheapest(terms: Sum) -> Cost:
    """Chooses between inner products of factors and their product."""
    batch, length, rows, columns = terms.sizes
    own_rows = rows // terms.hot.size if terms.hot else rows
    has_dense = any(term.ids is None for term in terms.terms)
    width = (rows if has_dense else own_rows) + columns
    gram = 2 * batch * length**2 * (width + 1)
    has_left = any(term.left is not None for term in terms.terms)
    entries = batch * rows * columns
    product = 2 * entries + 2 * length * (entries if has_left else columns)
    sizes = f"T = {length}, {rows} rows, {columns} columns"
    if length == 1 and batch == 1 and len(terms.terms) == 1 and terms.hot is None:
        why = f"it is one outer product: {sizes}"
        return Cost("outer", 2 * (rows + columns), 0, False, why)
    if gram <= product:
        why = f"T (p + d) is below p d: {sizes}"
        return Cost("gram", gram, 2 * batch * length**2, False, why)
    if entries <= max(batch * length * width, SMALL) and not is_made(terms):
        why = f"the gradient is no larger than its factors: {sizes}"
        return Cost("product", product, entries, False, why)
    why = f"p d is below T (p + d): {sizes}"
    return Cost("product in turn", product, entries, True, why)


def is_made(terms: Sum) -> bool:
    """Whether its matrices are larger than what they are made from."""
    return any(
        x.make is not None
        for term in terms.terms
        for x in (term.left, term.right)
        if x is not None
    )


def is_worth_keeping(terms: Sum) -> bool:
    """Whether products take less to keep than to compute again."""
    batch, _, rows, columns = terms.sizes
    held = sum(x.size for x in terms.values)
    return is_made(terms) and batch * rows * columns <= held
