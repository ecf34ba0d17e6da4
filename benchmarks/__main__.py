"""Prints a table of ratios to Optax: `python -m benchmarks [--quick] [--json FILE]`."""

import argparse
import functools
import json
import pathlib
import platform
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import gradnorm_jax as gn
from benchmarks import models, per_example, sharded, timing, trees

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
SHAPES = {
    "transformer 85M/96": trees.transformer(),
    "many 10M/400": trees.many_leaves(),
}
HEADER = (
    "| what                 | tree               | dtype    |  ours ms | theirs ms "
    "| ratio | quartiles | limit          | of stream |\n"
    "|----------------------|--------------------|----------|---------:|----------:"
    "|------:|-----------|----------------|-------|"
)


class Row(NamedTuple):
    """One comparison: what was measured, and how it should come out."""

    what: str
    tree: str
    dtype: str
    ours_ms: float
    theirs_ms: float
    ratio: float
    low: float
    high: float
    limit: float | None = None
    share_of_bandwidth: float | None = None


def norms(repeats: int, bandwidth: float) -> Iterator[Row]:
    """The global norm, against `optax.tree.norm`."""
    for name, shapes in SHAPES.items():
        for dtype in DTYPES:
            grads = trees.fill(shapes, dtype)
            run = [
                functools.partial(jax.jit(norm), grads)
                for norm in (gn.global_norm, optax.tree.norm)
            ]
            got = timing.compare(*run, repeats)
            limit = 1.15 if dtype == jnp.float32 else None
            share = trees.size(grads) / got.ours / bandwidth
            yield _row("norm", name, dtype, got, limit, share)


def clips(repeats: int) -> Iterator[Row]:
    """The clip by global norm alone, against Optax's."""
    for name, shapes in SHAPES.items():
        for dtype in DTYPES:
            grads = trees.fill(shapes, dtype)
            run = [_update(tx, grads) for tx in _clips()]
            limit = None if dtype == jnp.float32 else 0.5
            yield _row("clip", name, dtype, timing.compare(*run, repeats), limit)


def adamw_steps(repeats: int) -> Iterator[Row]:
    """The clip inside an AdamW step that owns its state, against Optax's."""
    for name, shapes in SHAPES.items():
        for dtype in DTYPES:
            run = [
                _Step(optax.chain(clip, optax.adamw(1e-3)), shapes, dtype)
                for clip in _clips()
            ]
            inner = 1 if name.startswith("transformer") else 5
            got = timing.compare(*run, repeats, inner)
            limit = 1.03 if dtype == jnp.float32 else None
            yield _row("clip in AdamW", name, dtype, got, limit)


def watched_steps(repeats: int) -> Iterator[Row]:
    """A training step of 1.7 M parameters in 100 leaves, watched against not."""
    tx = optax.chain(gn.clip_by_global_norm(1.0), optax.adamw(1e-3))
    watched, plain = _Training(gn.watch(tx)), _Training(tx)
    got = timing.compare(watched, plain, repeats, inner=20)
    yield _row("watch in training", "dense 1.7M/100", jnp.float32, got, 1.05)
    shapes = {k: x.shape for k, x in watched.params.items()}
    run = [_Step(each, shapes, jnp.float32) for each in (gn.watch(tx), tx)]
    got = timing.compare(*run, repeats, inner=20)
    yield _row("watch in AdamW", "dense 1.7M/100", jnp.float32, got)


def rules(repeats: int) -> Iterator[Row]:
    """An AdamW step with each rule with memory, against one with a constant limit."""
    thresholds, shrink = gn.thresholds, gn.shrink
    by_leaf = {"granularity": gn.per_leaf()}
    largest = by_leaf | {"norm": gn.norms.linf}
    entries = {"granularity": gn.per_unit(axes=()), "norm": gn.norms.linf}
    percentile = functools.partial(thresholds.percentile, 10.0, window=1000)
    warm = {"warmup_steps": 100, "warmup_limit": 1.0}
    groups = (
        (
            by_leaf,
            {
                "constant again": (thresholds.constant(2.0), shrink.rescale),
                "percentile 1000": (percentile(), shrink.rescale),
                "percentile, rearm": (percentile(rearm_after=50), shrink.rescale),
                "z_score": (thresholds.z_score(2.5), shrink.reciprocal),
                "ema_relative": (thresholds.ema_relative(1.05, **warm), shrink.rescale),
                "ema_band": (thresholds.ema_band(0.5, 2.0), shrink.band),
                "quantile": (thresholds.quantile(0.5), shrink.rescale),
                "rolling_sigma 128": (thresholds.rolling_sigma(3.0), shrink.rescale),
                "moment_ratio": (thresholds.moment_ratio(), shrink.normalize),
                "second_moment": (thresholds.second_moment(5000.0), shrink.rescale),
            },
        ),
        (
            largest,
            {
                "max_ema": (thresholds.max_ema(), shrink.rescale),
                "max_ema, spikes": (thresholds.max_ema(), shrink.spikes),
            },
        ),
        (
            entries,
            {"second_moment, entry": (thresholds.second_moment(5e3), shrink.rescale)},
        ),
    )
    for settings, cases in groups:
        fixed = {"constant": (thresholds.constant(1.0), shrink.rescale)}
        steps = {
            name: _Step(
                optax.chain(
                    gn.clip_by_norm(rule, shrink=own, **settings), optax.adamw(1e-3)
                ),
                trees.dense(),
                jnp.float32,
            )
            for name, (rule, own) in (fixed | cases).items()
        }
        found = timing.against_the_first(steps, 20 * repeats, inner=3)
        for name, got in found.items():
            limit = 1.03 if settings is not entries else None
            yield _row(name, "dense 1.7M/100", jnp.float32, got, limit)


def skips(repeats: int) -> Iterator[Row]:
    """An AdamW step that may be skipped, against one that may not."""
    tx = optax.chain(gn.clip_by_global_norm(1.0), optax.adamw(1e-3))
    skipping = gn.skip_step(tx, gn.thresholds.rolling_sigma(6.0))
    run = [_Step(each, trees.dense(), jnp.float32) for each in (skipping, tx)]
    got = timing.compare(*run, repeats, inner=20)
    yield _row("skip_step", "dense 1.7M/100", jnp.float32, got)


def compiles(repeats: int) -> Iterator[Row]:
    """How long XLA compiles a clip of 400 leaves, against Optax's."""
    shapes = trees.abstract(trees.many_leaves(), jnp.float32)
    ours, theirs = [], []
    for _ in range(repeats):
        for tx, seconds in zip(_clips(), (ours, theirs), strict=True):
            state = jax.eval_shape(tx.init, shapes)
            seconds.append(timing.compile_seconds(tx.update, shapes, state))
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    got = timing.Timing(
        statistics.median(ours),
        statistics.median(theirs),
        statistics.median(ratios),
        (min(ratios), max(ratios)),
    )
    yield _row("compile a clip", "many 10M/400", jnp.float32, got, 1.5)


class _Step:
    """An optimizer step that donates its parameters and state."""

    def __init__(self, tx: Any, shapes: trees.Shapes, dtype: Any) -> None:
        self.grads = trees.fill(shapes, dtype)
        self.params = trees.fill(shapes, dtype, seed=1)
        self.state = tx.init(self.params)

        def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step, donate_argnums=(0, 1))

    def __call__(self) -> Any:
        self.params, self.state = self.step(self.params, self.state, self.grads)
        return self.params


class _Training:
    """A training step of a dense net: forward, backward, optimizer."""

    def __init__(self, tx: Any, layers: int = 50, width: int = 184) -> None:
        self.params = trees.fill(trees.dense(layers, width), jnp.float32)
        self.state = tx.init(self.params)
        self.batch = jax.random.normal(jax.random.key(2), (128, width))

        def loss_fn(params: Any, x: jax.Array) -> jax.Array:
            for layer in range(layers):
                dense = params[f"dense{layer:02}/kernel"]
                x = x + jnp.tanh(x @ dense + params[f"dense{layer:02}/bias"])
            return jnp.mean(x**2)

        def step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any]:
            grads = jax.grad(loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step, donate_argnums=(0, 1))

    def __call__(self) -> Any:
        self.params, self.state = self.step(self.params, self.state, self.batch)
        return self.params


def _clips() -> tuple[Any, Any]:
    return gn.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)


def _update(tx: Any, grads: Any) -> Callable[[], Any]:
    state, update = tx.init(grads), jax.jit(tx.update)
    return lambda: update(grads, state)


def _row(
    what: str,
    tree: str,
    dtype: Any,
    got: timing.Timing,
    limit: float | None = None,
    share: float | None = None,
) -> Row:
    times = (got.ours * 1e3, got.theirs * 1e3)
    dtype = jnp.dtype(dtype).name
    return Row(what, tree, dtype, *times, got.ratio, *got.spread, limit, share)


def _print(row: Row) -> None:
    limit = "" if row.limit is None else f"<= {row.limit:.2f}"
    missed = row.limit is not None and row.ratio > row.limit
    share = "" if row.share_of_bandwidth is None else f"{row.share_of_bandwidth:.2f}"
    print(
        f"| {row.what:20} | {row.tree:18} | {row.dtype:8} | {row.ours_ms:8.2f} "
        f"| {row.theirs_ms:9.2f} | {row.ratio:5.2f} | {row.low:.2f}-{row.high:.2f} "
        f"| {limit + (' missed' if missed else ''):14} | {share:5} |",
        flush=True,
    )


def _examples(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints what per-example norms cost beside the plain gradient."""
    print(
        "\nPer-example norms and clipped sums; ratios to the gradient of the mean loss"
    )
    arms = options.arm or list(per_example.ARMS)
    for arm in per_example.missing():
        if arm in arms:
            print(f"left out: {arm}, which is not installed")
    print("\n" + per_example.HEADER)
    rows = []
    for row in per_example.rows(
        options.model or (per_example.QUICK if options.quick else list(models.MODELS)),
        options.batch or [16 if options.quick else 64],
        arms,
        seconds=8 if options.quick else 30,
    ):
        per_example.show(row)
        rows.append(row._asdict())
    return rows


def main() -> None:
    """Runs the suite and prints one line for each comparison."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="fewer repeats, smaller batches"
    )
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows here")
    parser.add_argument("--only", default="", help="only rows whose name holds this")
    examples = parser.add_argument_group("per-example norms (--only examples)")
    examples.add_argument("--model", nargs="+", choices=models.MODELS)
    examples.add_argument("--arm", nargs="+", choices=per_example.ARMS)
    examples.add_argument("--batch", nargs="+", type=int, help="batch sizes")
    options = parser.parse_args()
    repeats = 7 if options.quick else 21

    machine = f"{platform.processor() or platform.machine()}, {jax.devices()[0]}"
    print(f"jax {jax.__version__}, optax {optax.__version__}, {machine}")
    suites = {
        "norm": lambda: norms(repeats, bandwidth),
        "clip": lambda: clips(repeats),
        "adamw": lambda: adamw_steps(repeats),
        "watch": lambda: watched_steps(repeats),
        "rules": lambda: rules(repeats),
        "skip": lambda: skips(repeats),
        "compile": lambda: compiles(3 if options.quick else 5),
    }
    chosen = [suite for name, suite in suites.items() if options.only in name]
    if chosen:
        bandwidth = timing.streaming_bandwidth()
        print(f"reading memory in a stream: {bandwidth / 1e9:.1f} GB/s on all cores")
        print("\n" + HEADER)
    rows: list[dict[str, Any]] = []
    for suite in chosen:
        for row in suite():
            _print(row)
            rows.append(row._asdict())
    if options.only in "examples":
        rows += _examples(options)
    if options.only in "sharded":
        rows += sharded.in_a_process(quick=options.quick)
    if options.only in "import":
        seconds = statistics.median(timing.import_seconds() for _ in range(7))
        print(
            "\n`import gradnorm_jax` once jax and optax are there:"
            f" {seconds * 1e3:.0f} ms (limit 60 ms)"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
