"""The report of a run: one HTML page that needs nothing else, and no network."""

import os
from html import escape
from pathlib import Path

from gradnorm_jax.monitoring import charts, series
from gradnorm_jax.monitoring.archive import write_whole
from gradnorm_jax.monitoring.history import History
from gradnorm_jax.monitoring.rows import arrange
from gradnorm_jax.monitoring.series import plain
from gradnorm_jax.monitoring.style import CSS
from gradnorm_jax.monitoring.summary import Part, Summary, summarize


def report(history: History) -> str:
    """Writes a run as a page of HTML: a summary, three pictures, a table of parts.

    The page has no script and loads nothing. It is made for a phone, a screen and
    paper, in light and dark.

    Args:
      history: The run, as `load` reads it.

    Returns:
      The page.

    Raises:
      ValueError: If no norms were recorded.
    """
    summary = summarize(history)
    name = series.NAMES[series.main_kind(history)]
    sections = (
        _figure(
            f"The global {name} norm over time",
            "Logarithmic. A red bar is a step with a NaN or an inf, a gap is a step"
            " without a row. The strip below shows how often the clip was at work.",
            charts.trace(history),
        ),
        _figure(
            f"The {name} norm of every part over time",
            _heat_caption(history),
            charts.heat(history),
        ),
        _figure(
            "How the signal flows through the network",
            _flow_caption(history),
            charts.flow(history),
        ),
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Gradient norms</title><style>{CSS}</style></head><body><main>"
        f'<h1>Gradient norms</h1><p class="lead">{_text(summary.sentence)}</p>'
        f"{_key_figures(summary)}{''.join(sections)}{_parts(summary.parts)}"
        "<footer>Norms are L2; gradients are measured before the clip. Written by"
        " gradnorm_jax.</footer></main></body></html>\n"
    )


def write(history: History, path: str | os.PathLike) -> Path:
    """Writes the report of a run to a file.

    Args:
      history: The run, as `load` reads it.
      path: The file to write, such as `"report.html"`.

    Returns:
      The path of the file.
    """
    path = Path(path)
    page = report(history).encode()
    write_whole(path, lambda file: file.write(page))
    return path


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
    caption = (
        f"Medians over the steps {first:,} to {last:,}, the input on top. A norm that"
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
