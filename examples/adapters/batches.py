"""The batches of digits that every adapter trains on, and its command line."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from examples import digits
from gradnorm_jax import monitoring


def batches(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns images [steps, batch, pixels] and labels [steps, batch]."""
    images, labels, *_ = digits.load()
    stream = digits.Stream.clean(np.random.default_rng(0), steps)
    return images[stream.images], labels[stream.images].astype(np.int32)


def command(main: Callable[..., monitoring.History]) -> None:
    """Runs an adapter and prints what its record says.

    Args:
      main: The function `main(steps=..., dir=...)` of an adapter.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dir", type=Path, help="keep the run here")
    arguments = parser.parse_args()
    history = main(arguments.steps, arguments.dir)
    print(history)
    for part, norms in zip(history.parts, history.norms("grad").T, strict=True):
        print(f"  {part:<24} gradient {norms[0]:.3g} at first, {norms[-1]:.3g} at last")
    for finding in monitoring.diagnose(history):
        print(finding)
    if arguments.dir:
        print(f"gradnorm report {arguments.dir}")
