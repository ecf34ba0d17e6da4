"""Trees of random numbers, shaped as models are."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Shapes = dict[str, tuple[int, ...]]

_POOL = 2**22  # random numbers, of which every leaf is a cut, repeated to its size


def _gpt2_block(width: int) -> Shapes:
    block = {"ln_1/scale": (width,), "ln_1/bias": (width,)}
    for name, kernel in {
        "attn/qkv": (width, 3 * width),
        "attn/out": (width, width),
    }.items():
        block |= {f"{name}/kernel": kernel, f"{name}/bias": kernel[1:]}
    block |= {"ln_2/scale": (width,), "ln_2/bias": (width,)}
    for name, kernel in {
        "mlp/up": (width, 4 * width),
        "mlp/down": (4 * width, width),
    }.items():
        block |= {f"{name}/kernel": kernel, f"{name}/bias": kernel[1:]}
    return block


def gpt2(
    vocabulary: int = 50257, length: int = 1024, width: int = 768, layers: int = 12
) -> Shapes:
    """GPT-2 small: 124 M parameters in 148 leaves, its head being its embedding."""
    shapes: Shapes = {"wte": (vocabulary, width), "wpe": (length, width)}
    for layer in range(layers):
        block = _gpt2_block(width)
        shapes |= {f"h{layer:02}/{name}": shape for name, shape in block.items()}
    return shapes | {"ln_f/scale": (width,), "ln_f/bias": (width,)}


def stacked(width: int = 768, layers: int = 12) -> Shapes:
    """The blocks of GPT-2 small, stacked along a first axis: 85 M in 12 leaves."""
    return {f"h/{name}": (layers, *shape) for name, shape in _gpt2_block(width).items()}


def llama(vocabulary: int = 32000, width: int = 2048, layers: int = 16) -> Shapes:
    """A decoder with gated units and shared keys: 1.04 B parameters in 146 leaves."""
    block = {
        "attention_norm": (width,),
        "q": (width, width),
        "k": (width, width // 4),
        "v": (width, width // 4),
        "o": (width, width),
        "mlp_norm": (width,),
        "gate": (width, 4 * width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    shapes: Shapes = {"embedding": (vocabulary, width)}
    for layer in range(layers):
        shapes |= {f"layer{layer:02}/{name}": shape for name, shape in block.items()}
    return shapes | {"norm": (width,)}


def small(leaves: int = 1000, entries: int = 1000) -> Shapes:
    """A thousand leaves of a thousand numbers."""
    return {f"leaf{k:04}": (entries,) for k in range(leaves)}


def huge(entries: int = 125_000_000) -> Shapes:
    """One leaf of 125 M numbers."""
    return {"leaf": (entries,)}


def dense(layers: int = 50, width: int = 184) -> Shapes:
    """A dense net: 1.7 M parameters in 100 leaves, or in fewer and wider ones."""
    shapes = {}
    for layer in range(layers):
        shapes[f"dense{layer:02}/kernel"] = (width, width)
        shapes[f"dense{layer:02}/bias"] = (width,)
    return shapes


def matrices(leaves: int = 100, width: int = 144) -> Shapes:
    """Square matrices, 2.1 M parameters in 100 leaves, that 2, 4 and 8 divide."""
    return {f"matrix{k:02}": (width, width) for k in range(leaves)}


def many_leaves(blocks: int = 100, width: int = 224) -> Shapes:
    """10 M parameters in 400 leaves."""
    return {
        f"block{block:03}/{name}{half}": shape
        for block in range(blocks)
        for half in (0, 1)
        for name, shape in {"kernel": (width, width), "bias": (width,)}.items()
    }


FULL = {
    "gpt2": gpt2(),
    "llama": llama(),
    "small": small(),
    "huge": huge(),
    "stacked": stacked(),
    "dense": dense(),
    "wide": dense(layers=25, width=260),
    "many": many_leaves(),
    "matrices": matrices(),
}
TINY = {
    "gpt2": gpt2(vocabulary=11, length=8, width=8, layers=1),
    "llama": llama(vocabulary=11, width=8, layers=1),
    "small": small(leaves=5, entries=10),
    "huge": huge(entries=100),
    "stacked": stacked(width=8, layers=2),
    "dense": dense(layers=2, width=8),
    "wide": dense(layers=1, width=8),
    "many": many_leaves(blocks=2, width=8),
    "matrices": matrices(leaves=4, width=8),
}


def label(name: str, shapes: Shapes) -> str:
    """Names a tree with its numbers and leaves, as in `gpt2 124M/148`."""
    count = float(num_entries(shapes))
    for unit in ("", "k", "M", "B"):
        if count < 1000 or unit == "B":
            break
        count /= 1000
    digits = f"{count:.0f}" if count >= 10 or not unit else f"{count:.1f}"
    return f"{name} {digits}{unit}/{len(shapes)}"


def num_entries(shapes: Shapes) -> int:
    """Returns how many numbers a tree has."""
    return sum(math.prod(shape) for shape in shapes.values())


def fill(shapes: Shapes, dtype: Any, seed: int = 0) -> dict[str, jax.Array]:
    """Fills shapes with normal numbers of about the size of gradients."""
    rng = np.random.default_rng(seed)
    count = min(_POOL, max(map(math.prod, shapes.values())))
    pool = 0.01 * rng.standard_normal(count, np.float32)
    pool = pool.astype(jnp.dtype(dtype))
    tree = {
        name: jnp.array(np.resize(np.roll(pool, rng.integers(count)), shape))
        for name, shape in shapes.items()
    }
    return jax.block_until_ready(tree)


def size(tree: Any) -> int:
    """Returns the bytes of a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def true_norm(tree: Any) -> float:
    """Returns the L2 norm as NumPy finds it."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        x = np.asarray(leaf).astype(np.float32, copy=False).reshape(-1)
        parts = np.array_split(x, max(1, x.size // 2**20))
        total += sum(float(part.dot(part)) for part in parts)
    return math.sqrt(total)


def abstract(shapes: Shapes, dtype: Any) -> Any:
    """Returns the shapes of a tree as arrays to be, for compiling without data."""
    return {k: jax.ShapeDtypeStruct(s, jnp.dtype(dtype)) for k, s in shapes.items()}
