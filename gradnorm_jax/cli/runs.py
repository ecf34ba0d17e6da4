"""Commands that read a run and say what is in it: report, diagnose, explain."""

import argparse
import json
from collections.abc import Sequence

from gradnorm_jax import monitoring
from gradnorm_jax.cli import terminal


def report(options: argparse.Namespace) -> int:
    """Writes the page, prints where it is, and what was found in the run."""
    history = monitoring.load(options.directory)
    page = options.output or options.directory / "report.html"
    findings = monitoring.diagnose(history)
    monitoring.write(history, page, findings)
    print(page)
    if options.png:
        for picture in monitoring.save_all(history, page.parent, findings):
            print(picture)
    terminal.show_findings(findings, len(history))
    return _exit_code(findings, options.strict)


def diagnose(options: argparse.Namespace) -> int:
    """Prints what was found in a run, for people or as JSON."""
    history = monitoring.load(options.directory)
    findings = monitoring.diagnose(history, ignore=options.ignore)
    if options.json:
        found = [finding.as_dict() for finding in findings]
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        terminal.show_findings(findings, len(history))
    return _exit_code(findings, options.strict)


def explain(options: argparse.Namespace) -> int:
    """Prints what a code means, or the codes with their first sentence."""
    if options.code is None:
        longest = max(map(len, monitoring.CODES))
        for code in monitoring.CODES:
            sentence = monitoring.explain(code).splitlines()[0]
            print(terminal.hanging(f"{code:{longest}}  ", sentence))
    else:
        print(terminal.fitted(monitoring.explain(options.code)))
    return 0


def _exit_code(findings: Sequence[monitoring.Finding], strict: bool) -> int:
    return int(strict and any(finding.level == "error" for finding in findings))


__all__ = ["diagnose", "explain", "report"]
