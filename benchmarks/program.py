"""The program: runs suites, prints rows as they come, checks and writes them."""

import argparse
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from benchmarks import (
    clips,
    compiling,
    eager,
    importing,
    models,
    norms,
    per_example,
    plot,
    rows,
    rules,
    sharded,
    skipping,
    steps,
    timing,
    torch_peer,
    watching,
)
from benchmarks.options import Options, machine

Suite = Callable[[Options], Iterator[rows.Row]]

SUITES: dict[str, Suite] = {
    "norm": norms.rows,
    "clip": clips.rows,
    "step": steps.rows,
    "rules": rules.rows,
    "watch": watching.rows,
    "skip": skipping.rows,
    "examples": per_example.rows,
    "sharded": sharded.rows,
    "eager": eager.rows,
    "compile": compiling.rows,
    "import": importing.rows,
}
BY_MEMORY = {"norm", "clip", "step"}  # suites whose rows are shares of the bandwidth
NOT_QUICK = {"rules", "sharded"}  # they take too long to compile
WITH_TORCH = {"norm", "clip"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suites and prints one line for each row.

    Returns:
      The exit code: 1 if limits are to be checked and one was missed, or nothing was
      measured, else 0.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    options = _chosen(given, parser.error)
    suites = list(dict.fromkeys(given.only or [])) or [
        name for name in SUITES if not (options.quick and name in NOT_QUICK)
    ]
    facts = machine(given, options)
    if BY_MEMORY.intersection(suites):
        facts["bandwidth"] = timing.bandwidth(options.stream)
    print(rows.described(facts))
    for text in _left_out(options, suites):
        print(f"left out: {text}")
    print(f"\n{rows.header()}", flush=True)
    found: list[rows.Row] = []
    try:
        for name in suites:
            for row in SUITES[name](options):
                if options.tiny:  # what means nothing is held against nothing
                    row = row._replace(limits=rows.Limits())
                print(rows.line(row), flush=True)
                found.append(row)
    finally:  # what was measured is not lost when a suite fails or is stopped
        for path, write in (
            (given.json, rows.write_json),
            (given.markdown, rows.write_markdown),
            (given.plot, plot.draw),
        ):
            if path:
                write(path, found, facts)
    return _checked(found, given.check)


def _checked(found: list[rows.Row], check: bool) -> int:
    """Says which limits were kept, and returns the exit code."""
    if not found:
        print("\nnothing was measured")
        return 1
    missed = rows.missed(found)
    if limits := sum(len(rows.kept(row)) for row in found):
        print(f"\n{limits - len(missed)} of {limits} limits are kept")
    for text in missed:
        print(text)
    return 1 if check and missed else 0


def _left_out(options: Options, suites: Sequence[str]) -> Iterator[str]:
    """Names the suites that are not run, and the peers that are not there."""
    if options.quick and not options.alone:
        names = " ".join(name for name in SUITES if name in NOT_QUICK)
        yield f"suites that take long to compile; ask for them: --only {names}"
    if WITH_TORCH.intersection(suites) and not options.torch:
        yield str(torch_peer.why_missing(options.device))
    if "examples" in suites:
        for arm in per_example.missing():
            if arm in (options.arms or per_example.ARMS):
                yield f"{arm}, which is not installed"


def _parser() -> argparse.ArgumentParser:
    """Returns what reads the words after `python -m benchmarks`."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compares what norms and clips cost with their peers.",
    )
    made.add_argument(
        "--device",
        choices=("cpu", "gpu", "tpu"),
        help="what to run on (default: what JAX finds)",
    )
    made.add_argument(
        "--quick", action="store_true", help="fewer trees, dtypes and rounds"
    )
    made.add_argument(
        "--only",
        action="extend",
        nargs="+",
        metavar="NAME",
        choices=list(SUITES),
        help=f"only these suites, of {', '.join(SUITES)}",
    )
    for name, text in (
        ("json", "also write the rows here"),
        ("markdown", "also write a page with a table of each suite here"),
        ("plot", "also draw the ratios here"),
    ):
        made.add_argument(f"--{name}", type=pathlib.Path, metavar="FILE", help=text)
    made.add_argument(
        "--check", action="store_true", help="exit with 1 if a limit is missed"
    )
    made.add_argument(
        "--repeats",
        type=_positive,
        metavar="N",
        help="rounds of each comparison (default: as many as fit into its time)",
    )
    made.add_argument(
        "--tiny",
        action="store_true",
        help="tiny trees: tries the program, the times mean nothing",
    )
    examples = made.add_argument_group("per-example norms (--only examples)")
    for name, words, text in (
        ("model", list(models.MODELS), "only these models"),
        ("arm", list(per_example.ARMS), "only these ways"),
    ):
        examples.add_argument(
            f"--{name}",
            nargs="+",
            metavar="NAME",
            choices=words,
            help=f"{text}, of {', '.join(map(repr, words))}",
        )
    examples.add_argument(
        "--batch", nargs="+", type=_positive, metavar="N", help="batch sizes"
    )
    return made


def _chosen(given: argparse.Namespace, error: Callable[[str], Any]) -> Options:
    """Returns the options of a run; `error` is told of a device that is not there."""
    if given.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    device = jax.default_backend()
    if given.device not in (None, device):
        error(f"there is no {given.device} here: JAX finds {jax.devices()}")
    if given.only and "examples" not in given.only:
        for name in ("model", "arm", "batch"):
            if getattr(given, name):
                error(f"--{name} is of per-example norms: add `examples` to --only")
    if given.tiny and given.check:
        error(
            "--check holds what --tiny measures against limits, and that means nothing"
        )
    for name in ("json", "markdown", "plot"):
        if path := getattr(given, name):
            _check_file(path, f"--{name} {path}", error)
    if given.plot and not plot.can_draw(given.plot):
        error(
            f"--plot {given.plot}: needs matplotlib (`pip install -e '.[plot]'`) and"
            " a file that it knows, such as rows.png"
        )
    return Options(
        device,
        given.quick,
        given.tiny,
        given.only is not None,
        given.repeats,
        tuple(given.model or ()),
        tuple(given.arm or ()),
        tuple(given.batch or ()),
    )


def _check_file(path: pathlib.Path, words: str, error: Callable[[str], Any]) -> None:
    """Refuses a file that cannot be written when all is measured."""
    if path.is_dir():
        error(f"{words}: is a folder, name a file")
    if not path.parent.is_dir():
        error(f"{words}: there is no folder {path.parent}")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text}")
    return value
