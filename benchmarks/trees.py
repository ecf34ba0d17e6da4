"""Trees of random numbers, shaped as models are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Shapes = dict[str, tuple[int, ...]]


def transformer() -> Shapes:
    """GPT-2 small without its embeddings: 85 M parameters in 96 leaves."""
    width = 768
    block = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    shapes = {}
    for layer in range(12):
        for name, kernel in block.items():
            shapes[f"layer{layer:02}/{name}/kernel"] = kernel
            shapes[f"layer{layer:02}/{name}/bias"] = kernel[1:]
    return shapes


def many_leaves() -> Shapes:
    """10 M parameters in 400 leaves."""
    return {
        f"block{block:03}/{name}": shape
        for block in range(100)
        for name, shape in {
            "kernel0": (224, 224),
            "bias0": (224,),
            "kernel1": (224, 224),
            "bias1": (224,),
        }.items()
    }


def dense(layers: int = 50, width: int = 184) -> Shapes:
    """A dense net: 1.7 M parameters in 100 leaves."""
    shapes = {}
    for layer in range(layers):
        shapes[f"dense{layer:02}/kernel"] = (width, width)
        shapes[f"dense{layer:02}/bias"] = (width,)
    return shapes


def matrices(leaves: int = 100, width: int = 144) -> Shapes:
    """Square matrices, 2.1 M parameters in 100 leaves, that 2, 4 and 8 divide."""
    return {f"matrix{k:02}": (width, width) for k in range(leaves)}


def fill(shapes: Shapes, dtype: Any, seed: int = 0) -> dict[str, jax.Array]:
    """Fills shapes with normal numbers of about the size of gradients."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    make: Callable = jax.jit(
        lambda key, shape: (0.01 * jax.random.normal(key, shape)).astype(dtype),
        static_argnums=1,
    )
    tree = {
        name: make(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return jax.block_until_ready(tree)


def size(tree: dict[str, jax.Array]) -> int:
    """Returns the bytes of a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def abstract(shapes: Shapes, dtype: Any) -> Any:
    """Returns the shapes of a tree as arrays to be, for compiling without data."""
    return {k: jax.ShapeDtypeStruct(s, jnp.dtype(dtype)) for k, s in shapes.items()}
