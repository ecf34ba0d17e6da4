"""How the norm of each gradient is found, in words and in numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

from gradnorm_jax.norms.examples import Argnums, Loss
from gradnorm_jax.norms.granularity import Granularity, check_granularity, whole_tree


class LeafRule(NamedTuple):
    """How the norms of the gradients of one parameter are found.

    Attributes:
      name: Its path.
      shape: Its shape.
      rule: "zero": it is not used. "plain": its gradient is no larger than what it is
        made of, or has few entries. "outer", "gram": it is not formed. "product": it is
        formed, as that is no larger than its factors. "product in turn": it is formed
        for one example after the other. Where it is not understood: "formed in turn",
        or "formed" for all.
      flops: What that takes for all examples, besides the backward pass.
      entries: How many numbers are held for it at a time.
      why: Why the rule was chosen.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    flops: int
    entries: int
    why: str

    @property
    def is_understood(self) -> bool:
        """Whether it is known how the gradient is made."""
        return not self.rule.startswith("formed")


class Explanation(tuple[LeafRule, ...]):
    """The rules of all parameters; printed, a table."""

    def __str__(self) -> str:
        head = ("parameter", "shape", "rule", "MFLOP", "numbers", "why")
        rows = [
            (
                row.name,
                "x".join(map(str, row.shape)) or "scalar",
                row.rule,
                f"{row.flops / 1e6:.3g}",
                f"{row.entries}",
                row.why,
            )
            for row in self
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        return "\n".join(
            "  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)
        )


def explain_norms(
    loss_fn: Callable[..., Any],
    *,
    argnums: Argnums = 0,
    batch_argnums: Argnums = 1,
    key_argnum: int | None = None,
    has_aux: bool = False,
    batched: bool = False,
    granularity: Granularity = whole_tree(),  # noqa: B008 - frozen
) -> Callable[..., Explanation]:
    """Makes a function that says how `per_example_norms` finds its norms.

    It traces the loss, and computes nothing.

    Args:
      loss_fn: As in `per_example_norms`, and so are the other arguments.
      argnums: Which arguments the gradient is taken of.
      batch_argnums: Which arguments hold examples.
      key_argnum: Which argument is a PRNG key.
      has_aux: Whether `loss_fn` returns `(loss, aux)`.
      batched: Whether `loss_fn` takes a batch.
      granularity: What has one norm.

    Returns:
      A function of the arguments of `loss_fn` that returns a :class:`LeafRule` for each
      parameter, in a tuple that prints as a table.

    Example:
      >>> loss_fn = lambda params, x: jnp.sum(jnp.tanh(x @ params["w"]))
      >>> explain = explain_norms(loss_fn)
      >>> [row] = explain({"w": jnp.ones((8, 9))}, jnp.ones((5, 2, 8)))
      >>> print(row.name, row.rule, row.flops, row.entries)
      w gram 720 40
      >>> print(row.why)
      T (p + d) is below p d: T = 2, 9 rows, 8 columns
    """
    caller = "explain_norms"
    check_granularity(granularity, caller)
    loss = Loss.of(
        loss_fn,
        argnums=argnums,
        batch_argnums=batch_argnums,
        key_argnum=key_argnum,
        has_aux=has_aux,
        batched=batched,
        caller=caller,
    )

    def explain(*args: Any, **kwargs: Any) -> Explanation:
        from gradnorm_jax.norms.ghost.leaves import norm_of
        from gradnorm_jax.norms.ghost.tracing import trace

        one = loss.one(args, kwargs)
        layout = granularity.layout(one.params, measured=False)
        backward = trace(one)
        rows = []
        for i in layout.members:
            gradient = backward.gradient[i]
            own = norm_of(gradient, backward.program, layout.kept[i]).costs
            rows.append(
                LeafRule(
                    layout.names[i],
                    layout.shapes[i],
                    ", ".join(dict.fromkeys(cost.rule for cost in own)),
                    one.size * sum(cost.flops for cost in own),
                    sum(
                        cost.entries * (1 if cost.in_turn else one.size) for cost in own
                    ),
                    "; ".join(dict.fromkeys(cost.why for cost in own)),
                )
            )
        return Explanation(rows)

    return explain


__all__ = ["Explanation", "LeafRule", "explain_norms"]
