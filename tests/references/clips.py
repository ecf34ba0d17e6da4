"""Clips by their formulas, on {name: array}, in float64."""

import math

import numpy as np

from .norms import norm, wide


def rescale(size, limit):
    return min(size, limit)


def normalize(size, limit):
    return limit


def reciprocal(size, limit, center=0.0, floor=0.0):
    over = size > limit
    return center + (limit - center) ** 2 / (size - center) if over else size


def center(size, limit, center=0.0, floor=0.0):
    return center if size > limit else size


def zero(size, limit, center=0.0, floor=0.0):
    return 0.0 if size > limit else size


def smooth(size, limit, center=0.0, floor=0.0):
    return size * limit / (size + limit) if size else size


def band(size, limit, center=0.0, floor=0.0):
    return min(max(size, floor), limit)


def factor(size, limit, shrink=rescale, eps=0.0):
    """Returns what a part is multiplied by; `None` where it is left as it is."""
    if size == 0 or limit == math.inf:
        return None
    if not math.isfinite(size):
        return math.nan
    target = shrink(size + eps, limit)
    return None if target == size + eps else target / (size + eps)


def clip(
    tree, parts, limits, *, order=2, shrink=rescale, eps=0.0, nonfinite="propagate"
):
    """Returns the clipped tree, and the norm and the scale of each part."""
    out = {name: wide(x).copy() for name, x in tree.items()}
    norms = [norm([wide(tree[n])[i] for n, i in part], order) for part in parts]
    pairs = zip(norms, limits, strict=True)
    scales = [factor(size, limit, shrink, eps) for size, limit in pairs]
    any_bad = any(s is not None and math.isnan(s) for s in scales)
    for k, part in enumerate(parts):
        bad = scales[k] is not None and math.isnan(scales[k])
        if (bad and nonfinite == "drop") or (any_bad and nonfinite == "zero"):
            scales[k] = 0.0
        for name, index in part:
            if scales[k] == 0:
                out[name][index] = 0
            elif scales[k] is not None:
                out[name][index] *= scales[k]
    return out, np.array(norms), np.array([1.0 if s is None else s for s in scales])


def agc(grads, params, parts, factor_of_params, floor):
    """Adaptive gradient clipping: each unit's limit follows its weights."""
    sizes = [norm([params[n][i] for n, i in part]) for part in parts]
    return clip(grads, parts, [factor_of_params * max(s, floor) for s in sizes])[0]


def block_rms(x, threshold):
    return wide(x) / max(1.0, norm([x], "rms") / threshold)


def torch_coefficient(size, max_norm):
    """What `torch.nn.utils.clip_grad_norm_` multiplies by."""
    return min(1.0, max_norm / (size + 1e-6))


def per_example(leaves, limits):
    """Returns the sums of clipped examples, and which examples of a leaf were clipped.

    `limits` has a limit for all leaves together, or one for each leaf.
    """
    shared = len(limits) != len(leaves) or len(leaves) == 1
    sums = [np.zeros(np.shape(x)[1:]) for x in leaves]
    clipped = np.zeros((len(limits), len(leaves[0])), bool)
    for i in range(len(leaves[0])):
        for k, x in enumerate(leaves):
            size = norm([y[i] for y in leaves] if shared else [x[i]])
            limit = limits[0 if shared else k]
            clipped[0 if shared else k, i] |= not size <= limit
            if math.isfinite(size):
                sums[k] += wide(x[i]) * (1 if size <= limit else limit / size)
    return sums, clipped
