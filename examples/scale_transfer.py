"""Adaptive limits do not mind the scale of the loss; a tuned constant does.

The corrupted batches again, with the loss multiplied by a thousandth and the limit of
the constant clip as it was tuned before. Adam does not see the scale, and the learning
rate of SGD is raised to make up for it: without a clip nothing would change. This is
the honest case for adaptive methods. The gradients that AdaGN hands on have one size
whatever the loss, so that the raised rate of SGD is too large for it.
"""

from functools import partial
from typing import Any

from examples import corrupted_batches, experiment

WEIGHTS = [1.0, 1e-3]
SAME = 0.01


def run(quick: bool = False) -> experiment.Outcome:
    """Runs every method with both optimizers at both scales."""
    found = corrupted_batches.study(WEIGHTS, quick)
    rows = [
        {"optimizer": optimizer, "clip": method}
        | {
            f"accuracy, loss x{weight:g}": accuracy.mean()
            for weight, accuracy in zip(WEIGHTS, arm["accuracy"], strict=True)
        }
        | {"change": f"{_change(arm):+.3f}"}
        for optimizer, arms in found.items()
        for method, arm in arms.items()
    ]
    findings = [_what_changed(*item) for item in found.items()]
    labels = [f"loss x{weight:g}" for weight in WEIGHTS]
    return experiment.Outcome(
        rows, findings, partial(corrupted_batches.draw, found, labels)
    )


def _change(arm: dict[str, Any]) -> float:
    before, after = arm["accuracy"].mean(axis=-1)
    return after - before


def _what_changed(optimizer: str, arms: dict[str, Any]) -> str:
    changes = {method: _change(arm) for method, arm in arms.items()}
    (_, without), (constant, tuned), *adaptive = changes.items()
    moved = [f"{method} {by:+.3f}" for method, by in adaptive if abs(by) > SAME]
    return (
        f"{optimizer}: the accuracy of the {constant}, changes by {tuned:+.3f}, without"
        f" a clip by {without:+.3f}. Of {len(adaptive)} adaptive methods"
        f" {len(adaptive) - len(moved)} change by at most {SAME}"
        f"{'; the others: ' if moved else ''}{', '.join(moved)}."
    )


if __name__ == "__main__":
    experiment.use_all_cores()
    experiment.main("scale_transfer", run)
