"""The command line: `gradnorm demo` and `gradnorm report RUN`."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gradnorm_jax
from gradnorm_jax import monitoring

Update = Callable[[int, int, str], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or 2 for what cannot be done."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"gradnorm {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ngradnorm {options.command}: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gradnorm", description=gradnorm_jax.__doc__)
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {gradnorm_jax.__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="train a small network on real digits, watched and clipped"
    )
    demo.add_argument(
        "-o", "--output", type=Path, help="the new run (default: runs/demo, -2, ...)"
    )
    demo.add_argument("--steps", type=_positive(int), default=1000)
    demo.add_argument("--max-norm", type=_positive(float), default=1.0)
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    report = commands.add_parser("report", help="make one HTML page of a run")
    report.add_argument("directory", type=Path, metavar="RUN")
    report.add_argument(
        "-o", "--output", type=Path, help="the page (default: RUN/report.html)"
    )
    report.add_argument(
        "--png", action="store_true", help="also draw the pictures as PNG files"
    )
    report.set_defaults(run=_report)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from gradnorm_jax import demo

    directory = options.output or _free(Path("runs/demo"))
    print(
        f"Training a convolutional network on 1797 handwritten digits for"
        f" {options.steps} steps,\ngradients clipped to a global norm of"
        f" {options.max_norm:g}. Half-way some batches are corrupted.\n"
    )
    start = time.perf_counter()
    with _progress() as update:
        outcome = demo.train(
            directory,
            steps=options.steps,
            max_norm=options.max_norm,
            seed=options.seed,
            progress=update,
        )
    seconds = time.perf_counter() - start
    ordinary = outcome.steps - len(outcome.burst)
    print(
        f"\ntest accuracy    {outcome.accuracy:.1%} after {outcome.steps} steps in"
        f" {seconds:.0f} s\n"
        f"largest norm     {outcome.largest_norm:.3g} at step {outcome.largest_step},"
        f" clipped to {outcome.limit:g}\n"
        f"corrupted steps  {outcome.clipped_in_burst} of {len(outcome.burst)} clipped"
        f" (steps {outcome.burst.start} to {outcome.burst.stop - 1})\n"
        f"ordinary steps   {outcome.clipped - outcome.clipped_in_burst} of {ordinary}"
        f" clipped\n\n"
        f"report           {outcome.report}"
    )
    for picture in outcome.pictures:
        print(f"picture          {picture}")
    return 0


def _report(options: argparse.Namespace) -> int:
    history = monitoring.load(options.directory)
    page = options.output or options.directory / "report.html"
    monitoring.write(history, page)
    print(page)
    if options.png:
        for picture in monitoring.save_all(history, page.parent):
            print(picture)
    return 0


@contextlib.contextmanager
def _progress() -> Iterator[Update]:
    """A progress bar on a terminal; elsewhere a line now and then."""
    if not sys.stdout.isatty():
        yield _line
        return
    try:
        from rich import progress
    except ModuleNotFoundError:
        yield _line
        return
    with progress.Progress(
        progress.BarColumn(bar_width=30),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.description}"),
        progress.TimeRemainingColumn(),
    ) as bar:
        task = bar.add_task("compiling", total=None)
        yield lambda step, steps, text: bar.update(
            task, completed=step, total=steps, description=text
        )


def _line(step: int, steps: int, text: str) -> None:
    if step == steps or step * 10 // steps > (step - 25) * 10 // steps:
        print(f"step {step:5} of {steps}  {text}", flush=True)


def _free(directory: Path) -> Path:
    """The first of `directory`, `directory-2`, ... that is not there yet."""
    candidate, number = directory, 1
    while candidate.exists():
        number += 1
        candidate = directory.with_name(f"{directory.name}-{number}")
    return candidate


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


__all__ = ["main"]
