"""Rules for how the gradient spreads over the network: vanishing, tiny, lopsided."""

# ruff: noqa: D417 - `rule` takes the first argument away

from collections.abc import Iterator

import numpy as np

from gradnorm_jax.monitoring.diagnosis.evidence import Evidence, rule, several
from gradnorm_jax.monitoring.diagnosis.finding import Finding
from gradnorm_jax.monitoring.series import plain
from gradnorm_jax.monitoring.summary import percent


@rule
def vanishing(
    run: Evidence, *, decades: float = 3.0, correlation: float = 0.8
) -> Iterator[Finding]:
    """Finds gradients that become smaller and smaller toward the input: `vanishing`.

    Args:
      decades: How many powers of ten the gradient of a matrix falls over the network.
      correlation: How closely its size follows the depth (Spearman).
    """
    if run.grad is None or not len(run.late) or not run.matrices.any():
        return
    norms = np.median(run.at("grad", run.late, run.matrices), axis=0)
    names = run.named(run.matrices)
    word = "norm"
    if run.sizes is not None:
        norms = norms / np.sqrt(run.sizes[run.kept[run.matrices]])
        word = "RMS"
    alive = np.flatnonzero(norms > 0)
    if len(alive) < 4:
        return
    logs = np.log10(norms[alive])
    depth = np.arange(len(logs))
    slope = np.polyfit(depth, logs, 1)[0]
    fall = slope * (len(logs) - 1)
    if not (fall > decades and np.corrcoef(depth, _ranks(logs))[0, 1] > correlation):
        return
    first, last = names[alive[0]], names[alive[-1]]
    yield Finding(
        "vanishing",
        "warning",
        step=run.step(run.late[0]),
        last_step=run.step(run.late[-1]),
        where=(first,),
        parts=len(run.names),
        value=float(fall),
        limit=decades,
        seen=(
            f"the gradient {word} falls by {fall:.1f} decades (limit"
            f" {plain(decades)}) from {last} to {first}, {plain(10**-slope)}x for each"
            f" of {len(alive):,} matrices"
        ),
        likely=("saturating activations without residuals or normalization",),
        tries=(
            "residual connections or normalization",
            "ReLU or GELU with He initialization; with Adam the harm is less",
        ),
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns the place of each value in their order; equal ones share theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


@rule
def below_eps(run: Evidence, eps: float, *, factor: float = 10.0) -> Iterator[Finding]:
    """Finds gradients that the `eps` of Adam outweighs: `below-eps`.

    A record does not hold `eps`, so this rule is not among the defaults. It needs the
    sizes of the parts, and says nothing about a run that was written without.

    Args:
      eps: The `eps` of the optimizer.
      factor: How many times `eps` the RMS of a gradient should be.
    """
    if run.grad is None or run.sizes is None or not len(run.late):
        return
    norms = np.median(run.at("grad", run.late), axis=0)
    sizes = np.sqrt(run.sizes[run.kept])
    low = (norms > 0) & (norms < factor * eps * sizes)
    if not low.any():
        return
    smallest = float((norms[low] / sizes[low]).min())
    yield Finding(
        "below-eps",
        "warning",
        step=run.step(run.late[0]),
        last_step=run.step(run.late[-1]),
        where=run.named(low),
        parts=len(run.names),
        value=smallest,
        limit=factor * eps,
        seen=(
            f"the gradient RMS is down to {plain(smallest)}, below {plain(factor)} eps"
            f" = {plain(factor * eps)} in {int(low.sum()):,} of"
            f" {several(len(run.names), 'part')}, so that Adam makes their updates"
            " smaller"
        ),
        likely=("a large model, or a loss that is scaled down",),
        tries=(f"an eps of about {plain(smallest / 100)}", "a loss of a larger scale"),
    )


@rule
def imbalance(
    run: Evidence, *, share: float = 0.9, of_steps: float = 0.8
) -> Iterator[Finding]:
    """Finds one part that alone makes up the global norm: `imbalance`.

    Args:
      share: The share of the square of the global norm that one part has,
      of_steps: in what share of the last steps.
    """
    if run.grad is None or not len(run.late):
        return
    squares = np.square(run.at("grad", run.late))
    if np.count_nonzero(squares.any(axis=0)) < 4:  # the others are dead, not small
        return
    total = squares.sum(axis=1)
    squares = squares[total > 0] / total[total > 0, None]
    if not len(squares):
        return
    often = (squares > share).mean(axis=0)
    leader = int(often.argmax())
    if not often[leader] > of_steps:
        return
    middle = float(np.median(squares[:, leader]))
    name = run.names[leader]
    clips = not np.isnan(run.scalars.get("clip/fraction", np.array([np.nan]))).all()
    scaled = (
        "a global clip scales every other part by its norm"
        if clips
        else "the global norm says nothing of the other parts"
    )
    yield Finding(
        "imbalance",
        "warning",
        step=run.step(run.late[0]),
        last_step=run.step(run.late[-1]),
        where=(name,),
        parts=len(run.names),
        value=middle,
        limit=share,
        seen=(
            f"{percent(middle)} of the squared gradient norm (limit {percent(share)})"
            f" in {percent(often[leader])} of the last {run.counted(len(squares))},"
            f" so {scaled}"
        ),
        likely=("a part of another scale, such as an embedding or a head",),
        tries=(
            "a clip of its own for each part (clip_by_group_norm, adaptive_grad_clip)",
            "a smaller initialization or a normalized input of this part",
        ),
    )


__all__ = ["below_eps", "imbalance", "vanishing"]
