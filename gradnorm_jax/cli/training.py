"""The command `demo`: trains with a fault put in, and says what came of it."""

import argparse
import textwrap
import time
from pathlib import Path

from gradnorm_jax import demo
from gradnorm_jax.cli import terminal


def demonstrate(options: argparse.Namespace) -> int:
    """Trains the network of the demo, and prints what came of it."""
    directory = options.output or _free(Path("runs/demo"))
    text = (
        f"Training a network on 1797 handwritten digits for {options.steps} steps,"
        f" gradients clipped to a global norm of {options.max_norm:g}."
        f" {demo.FAULTS[options.fault].sentence}"
    )
    print(textwrap.fill(text, 79), end="\n\n")
    start = time.perf_counter()
    with terminal.progress() as update:
        outcome = demo.train(
            directory,
            steps=options.steps,
            max_norm=options.max_norm,
            seed=options.seed,
            fault=options.fault,
            progress=update,
        )
    seconds = time.perf_counter() - start
    print(
        f"\ntest accuracy    {outcome.accuracy:.1%} after {outcome.steps} steps in"
        f" {seconds:.0f} s\n"
        f"largest norm     {outcome.largest_norm:.3g} at step {outcome.largest_step},"
        f" {outcome.fate}"
    )
    burst, others = outcome.burst, outcome.steps - len(outcome.burst)
    if burst:
        print(
            f"corrupted steps  {outcome.clipped_in_burst} of {len(burst)} clipped"
            f" (steps {burst.start} to {burst.stop - 1})"
        )
    print(
        f"{'ordinary steps' if burst else 'all steps':17}"
        f"{outcome.clipped - outcome.clipped_in_burst} of {others} clipped\n\n"
        f"report           {outcome.report}"
    )
    for picture in outcome.pictures:
        print(f"picture          {picture}")
    terminal.show_findings(outcome.findings, outcome.steps)
    return 0


def _free(directory: Path) -> Path:
    """The first of `directory`, `directory-2`, ... that is not there yet."""
    candidate, number = directory, 1
    while candidate.exists():
        number += 1
        candidate = directory.with_name(f"{directory.name}-{number}")
    return candidate


__all__ = ["demonstrate"]
