"""Marks of SVG that stretch with the page, and a PNG for what has too many of them.

The data lies in a box of 1000 x 100 units that is drawn as wide and high as its place
on the page is. Lines keep their width and dots stay round, since strokes do not scale.
"""

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 1000, 100

Numbers = Sequence[float] | np.ndarray


def box(*marks: str, label: str) -> str:
    """Returns a picture of marks that fills its place, with a name for a reader."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img"'
        f' aria-label="{escape(label)}">{"".join(marks)}</svg>'
    )


def line(x: Numbers, y: Numbers, css: str) -> str:
    """Draws a line through points in [0, 1], from the bottom up; a NaN is a gap."""
    runs = []
    for run in _runs(y):
        points = [_point(x[i], y[i]) for i in run]
        runs.append("M" + " ".join(points) + ("h0" if len(points) == 1 else ""))
    return f'<path class="{css}" d="{"".join(runs)}"/>' if runs else ""


def band(x: Numbers, low: Numbers, high: Numbers, css: str) -> str:
    """Fills what lies between two lines."""
    shapes = []
    for run in _runs(np.add(low, high)):
        there = [_point(x[i], high[i]) for i in run]
        back = [_point(x[i], low[i]) for i in reversed(run)]
        shapes.append("M" + " ".join(there + back) + "z")
    return f'<path class="{css}" d="{"".join(shapes)}"/>' if shapes else ""


def dots(x: Numbers, y: Numbers, css: str) -> str:
    """Draws round dots, as wide as the stroke of their class."""
    points = [f"M{_point(*at)}h0" for at in zip(x, y, strict=True)]
    return f'<path class="{css}" d="{"".join(points)}"/>' if points else ""


def bar(left, right, low=0.0, high=1.0, *, css="", title="", opacity=1.0) -> str:
    """Draws a rectangle, with words that show under the pointer."""
    x, y = WIDTH * left, HEIGHT * (1 - high)
    width, height = WIDTH * (right - left), HEIGHT * (high - low)
    faded = f' fill-opacity="{opacity:.3g}"' if opacity != 1 else ""
    words = f"<title>{escape(title)}</title>" if title else ""
    size = f'x="{x:.5g}" y="{y:.4g}" width="{width:.5g}" height="{height:.4g}"'
    return f'<rect class="{css}" {size}{faded}>{words}</rect>'


def png(cells: np.ndarray, colors: np.ndarray, transparent: int) -> str:
    """Returns an image of palette indices as a data URI.

    Args:
      cells: Which color each cell has: uint8 [height, width].
      colors: The palette, uint8 [256, 3].
      transparent: The index that lets the page shine through.
    """
    height, width = cells.shape
    opacity = bytes([255] * transparent + [0])
    scanlines = np.pad(cells, ((0, 0), (1, 0))).tobytes()  # filter 0 on each line
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", colors.tobytes()),
        (b"tRNS", opacity),
        (b"IDAT", zlib.compress(scanlines, 9)),
        (b"IEND", b""),
    )
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body
        + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )  # fmt: skip
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _point(x, y) -> str:
    return f"{WIDTH * x:.4g},{HEIGHT * (1 - y):.4g}"


def _runs(y: Numbers) -> list[np.ndarray]:
    """Returns the positions of each run of numbers between NaNs."""
    known = np.flatnonzero(~np.isnan(y))
    runs = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1)
    return [run for run in runs if len(run)]
