"""What the experiments share: many runs at once, a table, a picture, a command line."""

import argparse
import os
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

# Colors that the color-blind can tell apart, in the order in which curves take them.
COLORS = ("#2868a8", "#b8690b", "#00876c", "#d02f3e", "#7a5195", "#5d6670")

Row = dict[str, Any]


class Outcome(NamedTuple):
    """What an experiment found.

    Attributes:
      rows: The table, one dictionary from column to value for each row.
      findings: What the numbers say, a sentence each.
      draw: Draws the picture on an empty `matplotlib.figure.Figure`.
    """

    rows: list[Row]
    findings: list[str]
    draw: Callable[[Any], None]


def all_runs(run: Callable[..., Any], axes: tuple) -> Any:
    """Calls a function on every combination of values, all at once.

    Args:
      run: What becomes of one value of each axis: a tree of arrays.
      axes: Trees of arrays; the values of an axis are along their first dimension.

    Returns:
      NumPy arrays whose first dimensions are the axes.
    """
    lengths = [len(jax.tree.leaves(axis)[0]) for axis in axes]
    places = np.indices(lengths).reshape(len(axes), -1)
    values = [
        jax.tree.map(lambda x, place=place: x[place], axis)
        for axis, place in zip(axes, places, strict=True)
    ]
    found = jax.jit(jax.vmap(run))(*values)
    return jax.tree.map(lambda x: np.asarray(x).reshape(*lengths, *x.shape[1:]), found)


def side_by_side(arms: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Calls every arm of an experiment, on as many devices at a time as there are."""
    free: queue.Queue = queue.Queue()
    for device in jax.devices()[: os.cpu_count()]:
        free.put(device)

    def call(arm: Callable[[], Any]) -> Any:
        device = free.get()
        try:
            with jax.default_device(device):
                return arm()
        finally:
            free.put(device)

    with ThreadPoolExecutor(free.qsize()) as pool:
        return dict(zip(arms, pool.map(call, arms.values()), strict=True))


def stack(trees: Sequence[Any]) -> Any:
    """Returns one tree whose leaves stack those of all."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def markdown(rows: list[Row]) -> str:
    """Returns the rows as a table of Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[_cell(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float | np.floating):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def save(outcome: Outcome, path: Path) -> None:
    """Draws the picture of an experiment into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    outcome.draw(figure)
    for axes in figure.axes:
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(
    name: str, run: Callable[[bool], Outcome], argv: Sequence[str] | None = None
) -> Path:
    """Runs an experiment, prints its table and findings, and saves its picture.

    Args:
      name: What the picture's file is called.
      run: The experiment; given True, a small one.
      argv: The arguments of the command line.

    Returns:
      Where the picture lies.
    """
    parser = argparse.ArgumentParser(prog=f"python -m examples.{name}")
    parser.add_argument(
        "--quick", action="store_true", help="small: seconds, no results"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    given = parser.parse_args(argv)
    start = time.perf_counter()
    outcome = run(given.quick)
    seconds = time.perf_counter() - start
    picture = given.out / f"{name}.png"
    save(outcome, picture)
    print(markdown(outcome.rows), end="\n\n")
    print("\n".join(f"- {finding}" for finding in outcome.findings))
    print(f"\n{seconds:.0f} s; the picture is {picture}")
    return picture


def use_all_cores() -> None:
    """Lets the CPU count as one device for each core; call before any array is made."""
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
