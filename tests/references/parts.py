"""Which entries have one norm: a part is a list of (leaf name, index into it)."""

import numpy as np


def whole_tree(shapes):
    return [[(name, ...) for name in sorted(shapes)]]


def per_leaf(shapes, stacked=()):
    """Stacked leaves are stacked along axis 0."""
    parts = []
    for name in sorted(shapes):
        layers = range(shapes[name][0]) if name in stacked else [...]
        parts += [[(name, k)] for k in layers]
    return parts


def per_group(shapes, labels):
    """`labels` is {name: label}; groups come in the order of their labels there."""
    groups = dict.fromkeys(labels.values())
    return [[(n, ...) for n in shapes if labels.get(n) == group] for group in groups]


def fan_in(shape):
    """The axes that AGC sums over."""
    if sum(size != 1 for size in shape) <= 1:
        return tuple(range(len(shape)))
    return (0,) if len(shape) <= 3 else tuple(range(len(shape) - 1))


def per_unit(shapes, axes=None):
    """`axes` is {name: axes}; by default those of AGC."""
    parts = []
    for name in sorted(shapes):
        shape = shapes[name]
        summed = fan_in(shape) if axes is None else axes[name]
        kept = [1 if k in summed else size for k, size in enumerate(shape)]
        for cell in np.ndindex(*kept):
            index = [slice(None) if k in summed else i for k, i in enumerate(cell)]
            parts.append([(name, tuple(index))])
    return parts
