"""PyTorch's norm and clip on the same numbers and device, where it is installed."""

import functools
import os
from typing import Any

import jax

from benchmarks.timing import Arm

NORM = "torch foreach"
CLIP = "torch clip_grad_norm_"


@functools.cache
def why_missing(device: str) -> str | None:
    """Returns why there is nothing to compare with; `None` if there is."""
    # Threads that spin after their work is done would take the core of who comes next.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import torch
    except ImportError:
        return "torch, which is not installed (`pip install -e '.[bench]'`)"
    if device == "cpu" or (device == "gpu" and torch.cuda.is_available()):
        return None
    return f"torch, which finds no {device} here"


def norms(grads: Any) -> Arm:
    """Takes the norm of all leaves, and of these the norm; the memory is shared."""
    import torch

    tensors = [torch.from_dlpack(x) for x in jax.tree.leaves(grads)]

    def run() -> Any:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))

    return Arm(run, wait=_waiting(tensors))


def leaf_norms(grads: Any) -> Arm:
    """Takes the norm of each leaf."""
    import torch

    tensors = [torch.from_dlpack(x) for x in jax.tree.leaves(grads)]
    return Arm(lambda: torch._foreach_norm(tensors), wait=_waiting(tensors))


def clips(grads: Any) -> Arm:
    """Clips gradients where they lie, a fresh copy each time."""
    import torch

    tensors = [torch.from_dlpack(x) for x in jax.tree.leaves(grads)]
    wait = _waiting(tensors)

    def before() -> tuple[Any, ...]:
        params = [torch.nn.Parameter(x, requires_grad=False) for x in tensors]
        for param, x in zip(params, tensors, strict=True):
            param.grad = x.clone()
        wait(None)
        return (params,)

    def run(params: Any) -> Any:
        return torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)

    return Arm(run, before, wait, repeat=False)


def _waiting(tensors: Any) -> Any:
    import torch

    if tensors[0].is_cuda:
        return lambda _: torch.cuda.synchronize()
    return lambda _: None
