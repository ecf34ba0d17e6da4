"""The program `gradnorm`: its commands, their arguments, and its exit codes."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import gradnorm_jax
from gradnorm_jax import demo
from gradnorm_jax.cli import bench, doctor, live, runs, training

_EPILOG = (
    "Exit codes: 0; 1 with --strict for a run with findings of level error, and of"
    " doctor if something is broken; 2 for what cannot be done."
)
_RUN = "the directory that was given to Monitor(dir=...)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: The words after `gradnorm`; those of this process if not given.

    Returns:
      The exit code: 0; 1 for a run that `--strict` refuses and for what `doctor` finds
      broken; 2 for what cannot be done; 130 if it was stopped.

    Example:
      >>> main(["explain", "frozen"])  # doctest: +ELLIPSIS
      A part has a gradient, but its update is exactly 0.
      ...
      0
    """
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of parts may be anything
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = options.run(options)
        sys.stdout.flush()  # here, where a pipe that is closed is no surprise
        return code
    except BrokenPipeError:  # nobody reads on, as in `gradnorm ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        message = " ".join(str(error).split())
        print(f"gradnorm {options.command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ngradnorm {options.command}: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradnorm", description=gradnorm_jax.__doc__, epilog=_EPILOG
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {gradnorm_jax.__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        one = commands.add_parser(
            name, help=text, description=text[:1].upper() + text[1:] + "."
        )
        one.set_defaults(run=run)
        return one

    one = command(
        "demo", training.demonstrate, "train a small network, with a fault put in"
    )
    one.add_argument(
        "--fault",
        choices=demo.FAULTS,
        default="spike",
        help="what goes wrong (default: spike)",
    )
    one.add_argument(
        "-o", "--output", type=Path, help="the new run (default: runs/demo, -2, ...)"
    )
    one.add_argument(
        "--steps", type=_positive(int), default=1000, help="how many (default: 1000)"
    )
    one.add_argument(
        "--max-norm",
        type=_positive(float),
        default=1.0,
        help="the limit of the global norm (default: 1)",
    )
    one.add_argument("--seed", type=int, default=0, help="of weights and batches")

    one = command("report", runs.report, "make one HTML page of a run")
    one.add_argument("directory", type=Path, metavar="RUN", help=_RUN)
    one.add_argument(
        "-o", "--output", type=Path, help="the page (default: RUN/report.html)"
    )
    one.add_argument(
        "--png", action="store_true", help="also draw the pictures as PNG files"
    )
    _add_strict(one)

    one = command("watch", live.watch, "look on while another process writes a run")
    one.add_argument("directory", type=Path, metavar="RUN", help=_RUN)
    one.add_argument("--once", action="store_true", help="look once and end")

    one = command("diagnose", runs.diagnose, "say what goes wrong in a run")
    one.add_argument("directory", type=Path, metavar="RUN", help=_RUN)
    one.add_argument("--json", action="store_true", help="as a list in strict JSON")
    one.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="a regular expression of parts to leave out; may be given again",
    )
    _add_strict(one)

    one = command("explain", runs.explain, "say what the code of a finding means")
    one.add_argument("code", nargs="?", help="such as spike; without it, all are named")

    one = command("bench", bench.run, "time what the record costs on this machine")
    one.add_argument(
        "--all",
        nargs=argparse.REMAINDER,
        metavar="OPTION",
        help="run all benchmarks of a source checkout instead; what follows is handed"
        " to them, such as --all --quick or --all --help",
    )
    one.add_argument(
        "--leaves",
        type=_positive(int),
        default=100,
        help="how many leaves the parameters have (default: 100)",
    )

    command("doctor", doctor.run, "check versions, devices, extras, known hazards")
    return parser


def _add_strict(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--strict",
        action="store_true",
        help="exit with 1 if there is a finding of level error",
    )


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


__all__ = ["main"]
