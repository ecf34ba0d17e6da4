"""The colors of the pictures: safe for the color-blind, alike on paper and screen."""

import numpy as np

GRAD = "#2868a8"
UPDATE = "#00876c"
LIMIT = "#b8690b"
NONFINITE = "#d02f3e"
ZERO = "#9a9a9a"

# A heat map is an image of these: three cells that are not numbers, then a scale of
# even lightness from dark to light (viridis, at nine points).
NO_ROW, IS_ZERO, IS_NONFINITE, SCALE_START = 0, 1, 2, 3
_SCALE_POINTS = "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725"


def heat_colors() -> np.ndarray:
    """Returns the color of each of the 256 shades of a heat map: uint8 [256, 3]."""
    points = np.array([_rgb(point) for point in _SCALE_POINTS.split()])
    at = np.linspace(0, len(points) - 1, 256 - SCALE_START)
    scale = [np.interp(at, range(len(points)), channel) for channel in points.T]
    special = [(255, 255, 255), _rgb(ZERO[1:]), _rgb(NONFINITE[1:])]
    return np.concatenate([special, np.stack(scale, axis=1)]).round().astype(np.uint8)


def _rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color))
