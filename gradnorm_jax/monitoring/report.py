"""The report of a run: one HTML page that needs nothing else, and no network."""

import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from gradnorm_jax.monitoring import charts, series
from gradnorm_jax.monitoring.archive import write_whole
from gradnorm_jax.monitoring.diagnosis import CODES, Finding, diagnose, explain
from gradnorm_jax.monitoring.diagnosis.evidence import FEWEST_ROWS, WARMUP
from gradnorm_jax.monitoring.history import History
from gradnorm_jax.monitoring.rows import arrange
from gradnorm_jax.monitoring.series import plain
from gradnorm_jax.monitoring.style import CSS
from gradnorm_jax.monitoring.summary import Part, Summary, summarize

#: How many findings are told in full before the others are folded away.
_MOST_FINDINGS = 12


def report(history: History, findings: Sequence[Finding] | None = None) -> str:
    """Writes a run as a page of HTML: findings, three pictures, a table of parts.

    The page has no script and loads nothing. It is made for a phone, a screen and
    paper, in light and dark. The findings are marked in the pictures.

    Args:
      history: The run, as `load` reads it.
      findings: What to say of it; by default what `diagnose` finds.

    Returns:
      The page.

    Raises:
      ValueError: If no norms were recorded.

    Example:
      >>> rows = [[1.0, 2.0], [1.0, float("nan")]]
      >>> page = report(History.from_rows(("grad/a", "grad/b"), [0, 1], rows))
      >>> "no-findings" in page, "non-finite" in page
      (False, True)
    """
    summary = summarize(history)
    findings = diagnose(history) if findings is None else findings
    name = series.NAMES[series.main_kind(history)]
    sections = (
        _figure(
            f"The global {name} norm over time",
            "Logarithmic. A red bar is a step with a NaN or an inf, a gap is a step"
            " without a row. The bars on the right say how often the norm was how"
            " large, the strip below how often the clip was at work.",
            charts.trace(history, findings),
        ),
        _figure(
            f"The {name} norm of every part over time",
            _heat_caption(history),
            charts.heat(history, findings),
        ),
        _figure(
            "How the signal flows through the network",
            _flow_caption(history),
            charts.flow(history, findings),
        ),
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Gradient norms</title><style>{CSS}</style></head><body><main>"
        f'<h1>Gradient norms</h1><p class="lead">{_text(summary.sentence)}</p>'
        f"{_key_figures(summary)}{_findings(findings, history)}"
        f"{''.join(sections)}{_parts(summary.parts)}"
        "<footer>Norms are L2; gradients are measured before the clip. Written by"
        " gradnorm_jax.</footer></main></body></html>\n"
    )


def write(
    history: History,
    path: str | os.PathLike,
    findings: Sequence[Finding] | None = None,
) -> Path:
    """Writes the report of a run to a file.

    Args:
      history: The run, as `load` reads it.
      path: The file to write, such as `"report.html"`.
      findings: What to say of it; by default what `diagnose` finds.

    Returns:
      The path of the file.
    """
    path = Path(path)
    page = report(history, findings).encode()
    write_whole(path, lambda file: file.write(page))
    return path


def _findings(findings: Sequence[Finding], history: History) -> str:
    """Says each finding in full, and what a code means where it first occurs."""
    if not findings:
        return (
            '<section class="findings" id="no-findings"><h2>No findings</h2>'
            f"<p>{_text(_nothing_found(history))}</p></section>"
        )
    items, told = [], set()
    for number, finding in enumerate(findings, 1):
        explained = finding.code in CODES and finding.code not in told
        told.add(finding.code)
        items.append(_finding(finding, number, explained))
    first, rest = items[:_MOST_FINDINGS], items[_MOST_FINDINGS:]
    body = f"<ol>{''.join(first)}</ol>"
    if rest:
        body += f"<details><summary>{len(rest):,} more</summary>"
        body += f'<ol start="{len(first) + 1}">{"".join(rest)}</ol></details>'
    number = f"{len(findings):,} finding{'s' * (len(findings) != 1)}"
    return f'<section class="findings" id="findings"><h2>{number}</h2>{body}</section>'


def _nothing_found(history: History) -> str:
    number = int(np.sum(history.steps >= WARMUP))
    if number < FEWEST_ROWS:
        return (
            "Nothing was found, but the run is too short for most of what diagnose"
            f" looks for: that takes {FEWEST_ROWS} steps after the first {WARMUP}."
        )
    return "Nothing that diagnose looks for was found in this run."


def _finding(finding: Finding, number: int, explained: bool) -> str:
    code = _text(finding.code)
    if finding.code in CODES:
        code = f'<a href="#{finding.code}">{code}</a>'
    words = (
        f'<li class="{finding.level}" id="finding-{number}"><h3>'
        f"<b>{finding.level.capitalize()}</b> {code}"
        f" <span>{_when(finding)}</span></h3>"
        f'<p class="where">{_text(finding.place)}</p>'
        f"<p>{_text(_sentence(finding.seen))}</p>"
    )
    for label, items in (("Likely", finding.likely), ("Try", finding.tries)):
        if items:
            joined = _text(_sentence("; or ".join(items)))
            words += f'<p class="advice"><i>{label}</i> <span>{joined}</span></p>'
    if len(finding.where) > 1:
        names = ", ".join(map(_text, finding.where))
        words += f"<details><summary>Its {len(finding.where):,} parts</summary>"
        words += f"<p>{names}</p></details>"
    if explained:
        words += (
            f'<details id="{finding.code}"><summary>What {finding.code} means</summary>'
            f"{_prose(explain(finding.code))}</details>"
        )
    return words + "</li>"


def _when(finding: Finding) -> str:
    last = finding.last_step
    if last is None or last == finding.step:
        return f"step {finding.step:,}"
    return f"steps {finding.step:,} to {last:,}"


def _sentence(words: str) -> str:
    """Ends words with a period; begins them large where that is no name or code."""
    begin = re.match(r"[a-z]+ ", words)
    return f"{words[0].upper() if begin else words[:1]}{words[1:]}."


def _prose(text: str) -> str:
    """Sets paragraphs, and lists whose lines begin with a dash."""
    blocks = []
    for block in re.split(r"\n\n|\n(?=Grounds:)", text):
        lead, *items = re.split(r"^- ", block, flags=re.MULTILINE)
        blocks.append(f"<p>{_text(lead)}</p>" if lead.strip() else "")
        listed = "".join(f"<li>{_text(item)}</li>" for item in items)
        blocks.append(f"<ul>{listed}</ul>" if items else "")
    return "".join(blocks)


def _figure(title: str, caption: str, body: str) -> str:
    return (
        f"<figure><figcaption><h2>{title}</h2><p>{caption}</p></figcaption>"
        f"{body}</figure>"
    )


def _heat_caption(history: History) -> str:
    row = "block of parts" if arrange(history.parts).grouped else "part"
    return (
        f"One row is one {row}, in the order of the network: what comes first is on"
        " top. Each cell shows its largest step, so that a spike of one step is seen. A"
        " column that lights up is a spike everywhere; a row that goes dark is a layer"
        " that stops learning."
    )


def _flow_caption(history: History) -> str:
    picture = series.flow(history)
    first, last = picture.steps
    row = "block with the dots of its parts" if picture.rows.grouped else "part"
    caption = (
        f"One row is one {row}: medians over the steps {first:,} to {last:,}, the input"
        " on top. A norm that"
        " falls steadily toward the input vanishes; one that rises explodes. Zero is on"
        " the left edge, a NaN or an inf on the right edge."
    )
    if len(picture.panels) > 1:
        caption += (
            " The update relative to its parameter usually lies in the shaded band,"
            " from 0.0001 to 0.01; what lies outside is red."
        )
    return caption


def _key_figures(summary: Summary) -> str:
    figures = "".join(
        f"<div{' class=alarming' * figure.alarming}><dt>{_text(figure.label)}</dt>"
        f'<dd class="value">{_text(figure.value)}</dd>'
        f'<dd class="note">{_text(figure.note)}</dd></div>'
        for figure in summary.figures
    )
    return f"<dl>{figures}</dl>"


def _parts(parts: tuple[Part, ...]) -> str:
    heads = ["Part", "Median norm", "Largest", "At step", "Steps zero"]
    heads += ["Steps not finite", "Update / parameter"]
    with_ratio = parts[0].ratio is not None
    head = "".join(f'<th scope="col">{name}</th>' for name in heads[: 6 + with_ratio])
    rows = []
    for part in parts:
        cells = [
            (plain(part.median), part.median == float("inf")),
            (plain(part.largest), False),
            (f"{part.at_step:,}", False),
            (f"{part.zero_steps:,}", part.zero_steps > 0),
            (f"{part.nonfinite_steps:,}", part.nonfinite_steps > 0),
        ]
        if part.ratio is not None:
            low, high = series.USUAL_RATIO
            cells.append((plain(part.ratio), not low <= part.ratio <= high))
        cells = "".join(
            f"<td{' class=strange' * strange}>{value}</td>" for value, strange in cells
        )
        rows.append(f'<tr><th scope="row">{_text(part.name)}</th>{cells}</tr>')
    return (
        f"<details><summary>All parts in figures</summary>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _text(words: str) -> str:
    """Escapes words, and lets a long path break where it has a slash."""
    return escape(words).replace("/", "/<wbr>")
