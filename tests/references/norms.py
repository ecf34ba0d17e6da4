"""Norms and their slopes by their formulas, in float64."""

import math

import numpy as np


def wide(x):
    """Returns an array of any dtype as float64 or complex128."""
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def norm(arrays, order=2):
    """Returns the norm of some arrays laid end to end."""
    x = np.concatenate([np.zeros(0), *(np.abs(wide(a)).ravel() for a in arrays)])
    largest = np.max(x, initial=0.0)
    if largest == 0 or not np.isfinite(largest):
        return float(largest)
    ratio = x / largest
    if order == math.inf:
        return float(largest)
    if order == "rms":
        return float(largest * np.sqrt(np.mean(ratio**2)))
    return float(largest * np.sum(ratio**order) ** (1 / order))


def slope(x, order=2):
    """Returns the gradient of the norm of one array by central differences."""
    x = wide(x)
    out = np.zeros_like(x)
    step = 1e-6 * np.max(np.abs(x))
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[index] = step
        rise = norm([x + shift], order) - norm([x - shift], order)
        out[index] = rise / (2 * step)
    return out


def curvature(x, order=2):
    """Returns the second derivatives of the norm of a vector."""
    step = 1e-4 * np.max(np.abs(x))
    return np.stack(
        [
            (slope(x + shift, order) - slope(x - shift, order)) / (2 * step)
            for shift in step * np.eye(len(x))
        ]
    )
