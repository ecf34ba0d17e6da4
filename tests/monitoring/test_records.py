"""A monitor brings every row of the ring to disk, and never disturbs the training."""

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import gradnorm_jax as gn
from gradnorm_jax.monitoring import Monitor, load
from gradnorm_jax.telemetry import WatchState

PARAMS = {"b": jnp.zeros(2), "w": jnp.ones((3, 2))}
WIDTH = 3 * 2 + 4


def state_after(rows, window):
    """The state after some steps: a ring whose entries are their steps."""
    ring = np.zeros((window, WIDTH), np.float32)
    steps = np.full(window, -1, np.int32)
    for row in range(rows):
        ring[row % window] = steps[row % window] = row
    rows, checksum = (
        jnp.int32(rows),
        jnp.int32(gn.measure(*[PARAMS] * 3).columns.checksum),
    )
    return WatchState(None, jnp.asarray(ring), jnp.asarray(steps), rows, rows, checksum)


def watched_step(tx):
    """A step on a quadratic, with the loss recorded."""

    def step(params, state, target):
        def loss_fn(params):
            return jnp.sum((params["w"] - target) ** 2) + jnp.sum(params["b"] ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    return step


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


@pytest.mark.parametrize("steps_a_call", [1, 3])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("window", [1, 5, 16])
@pytest.mark.parametrize("calls", [1, 4, 11])
def test_what_is_on_disk_is_what_the_ring_held_at_each_drain(
    tmp_path, steps_a_call, every, window, calls
):
    expected = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(PARAMS, every=every, dir=tmp_path) as monitor:
            for call in range(1, calls + 1):
                rows = call * steps_a_call
                monitor(state_after(rows, window))
                if call % every == 0 or call == calls:
                    expected |= set(range(max(0, rows - window), rows))
    history = load(tmp_path)
    assert history.steps.tolist() == sorted(expected)
    for norms in (history.grad, history.update, history.param):
        np.testing.assert_array_equal(norms, np.stack([history.steps] * 2, axis=1))
    assert monitor.num_dropped == calls * steps_a_call - len(expected)
    assert len(caught) == (monitor.num_dropped > 0)


def test_dropped_rows_are_told_once_with_the_remedy(tmp_path):
    monitor = Monitor(PARAMS, every=1, dir=tmp_path)
    monitor(state_after(300, 128))
    with pytest.warns(UserWarning, match=r"lost 172 rows.*window=300") as told:
        monitor(state_after(600, 128))
    assert told[0].filename == __file__
    monitor(state_after(900, 128))
    monitor.close()
    assert monitor.num_dropped == 3 * 172
    assert load(tmp_path).dropped == 2 * 172


def test_a_donated_training_leaves_a_full_record(tmp_path):
    tx = gn.watch(optax.chain(gn.clip_by_global_norm(1.0), optax.adam(0.1)), window=8)
    step = jax.jit(watched_step(tx), donate_argnums=(0, 1))
    params, state = copied(PARAMS), tx.init(PARAMS)
    expected, losses = [], []
    with Monitor(PARAMS, every=8, dir=tmp_path) as monitor:
        for target in range(30):
            grads = {"b": 2 * params["b"], "w": 2 * (params["w"] - target)}
            expected.append([np.linalg.norm(grad) for grad in jax.tree.leaves(grads)])
            losses.append(np.sum((params["w"] - target) ** 2))
            params, state = step(params, state, target)
            monitor({"params": params, "opt_state": (state,)})
    history = load(tmp_path)
    assert history.parts == ("b", "w")
    assert history.steps.tolist() == list(range(30))
    np.testing.assert_allclose(history.grad, expected, rtol=1e-6)
    np.testing.assert_allclose(history.scalars["loss"], losses, rtol=1e-5)
    np.testing.assert_array_equal(history.scalars["clip/limit"], 1.0)


def test_the_steps_of_an_inner_scan_are_all_recorded(tmp_path):
    tx = gn.watch(optax.sgd(0.1), window=20)
    step = watched_step(tx)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def ten_steps(params, state):
        def body(carry, target):
            return step(*carry, target), None

        return jax.lax.scan(body, (params, state), jnp.arange(10.0))[0]

    params, state = copied(PARAMS), tx.init(PARAMS)
    with Monitor(PARAMS, every=2, dir=tmp_path) as monitor:
        for _ in range(5):
            params, state = ten_steps(params, state)
            monitor(state)
    history = load(tmp_path)
    assert history.steps.tolist() == list(range(50))
    np.testing.assert_allclose(history.param[0], [0, np.sqrt(6)], rtol=1e-6)
    assert np.all(np.isnan(history.scalars["clip/limit"]))


def test_a_step_that_is_not_finite_is_recorded_as_it_was(tmp_path):
    tx = gn.watch(optax.sgd(0.1))
    state = tx.init(PARAMS)
    with Monitor(PARAMS, dir=tmp_path) as monitor:
        for w in (1.0, np.nan, np.inf, 0.0):
            grads = {"b": jnp.zeros(2), "w": jnp.full((3, 2), w)}
            _, state = tx.update(grads, state, PARAMS)
            monitor(state)
    np.testing.assert_allclose(load(tmp_path).grad[:, 1], [6**0.5, np.nan, np.inf, 0])
    lines = (tmp_path / "scalars.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["grad_norm/global_preclip"] == "nan"


@pytest.mark.parametrize(
    "settings",
    [
        {"record": ("update", "grad")},
        {"groups": {"w": "weights", "b": "rest"}},
        {"stacked_axes": {"w": 0}},
    ],
    ids=str,
)
def test_the_settings_of_watch_are_the_settings_of_the_monitor(tmp_path, settings):
    tx = gn.watch(optax.sgd(0.1), **settings)
    grads = {"b": jnp.full(2, 3.0), "w": jnp.ones((3, 2))}
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    with Monitor(PARAMS, dir=tmp_path, **settings) as monitor:
        monitor(state)
    history = load(tmp_path)
    np.testing.assert_allclose(history.global_norm("grad"), np.sqrt(24), rtol=1e-6)
    np.testing.assert_allclose(history.global_norm("update"), np.sqrt(24) / 10, 1e-6)
    sizes = json.loads((tmp_path / "run.json").read_text())["parts"]
    assert tuple(sizes) == history.parts
    assert sum(sizes.values()) == 8


def test_the_copy_of_a_drain_is_written_by_the_next_one(tmp_path):
    monitor = Monitor(PARAMS, every=2, dir=tmp_path)
    written = []
    for rows in range(1, 6):
        monitor(state_after(rows, 8))
        written.append(len(list(tmp_path.glob("rows-*"))))
    assert written == [0, 0, 0, 1, 1]
    monitor.close()
    assert load(tmp_path).steps.tolist() == [0, 1, 2, 3, 4]


def test_closing_twice_and_closing_at_once_write_nothing_more(tmp_path):
    with Monitor(PARAMS, dir=tmp_path) as monitor:
        monitor(state_after(3, 8))
        monitor.close()
    assert len(list(tmp_path.glob("rows-*"))) == 1
    Monitor(PARAMS, dir=tmp_path / "unused").close()
    with pytest.raises(ValueError, match="no rows yet"):
        load(tmp_path / "unused")


def test_a_last_state_that_was_donated_is_told_and_the_rest_is_kept(tmp_path):
    tx = gn.watch(optax.sgd(0.1))
    step = jax.jit(watched_step(tx), donate_argnums=(0, 1))
    params, state = step(copied(PARAMS), tx.init(PARAMS), 1.0)
    monitor = Monitor(PARAMS, every=2, dir=tmp_path)
    for _ in range(3):
        monitor(state)
        params, state = step(params, state, 1.0)
    with pytest.warns(UserWarning, match="has been donated since"):
        monitor.close()
    assert load(tmp_path).steps.tolist() == [0, 1]


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    with Monitor(PARAMS, dir=tmp_path) as monitor:
        monitor(state_after(12, 16))
    with Monitor(PARAMS, dir=tmp_path, resume=True) as monitor:
        monitor(state_after(10, 16))  # from a checkpoint two steps before the end
        monitor(state_after(15, 16))
    assert load(tmp_path).steps.tolist() == list(range(15))


def test_a_training_that_goes_back_keeps_what_counts(tmp_path):
    with Monitor(PARAMS, every=1, dir=tmp_path) as monitor:
        for rows in (5, 10, 8, 12):
            monitor(state_after(rows, 6))
    assert load(tmp_path).steps.tolist() == list(range(12))


def test_a_ring_on_every_device_is_read_from_one(tmp_path):
    mesh = jax.make_mesh((8,), ("data",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    with Monitor(PARAMS, every=1, dir=tmp_path) as monitor:
        monitor(jax.device_put(state_after(5, 8), everywhere))
    assert load(tmp_path).steps.tolist() == list(range(5))


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Monitor(PARAMS, every=1, dir=tmp_path / "run") as monitor:
        monitor(state_after(5, 8))
    assert not (tmp_path / "run").exists()


def test_a_state_that_is_not_watched_is_refused_at_the_first_call(tmp_path):
    monitor = Monitor(PARAMS, dir=tmp_path)
    with pytest.raises(ValueError, match=r"no `WatchState` in a tuple.*watch\(optax"):
        monitor(optax.adam(0.1).init(PARAMS))


def test_a_ring_with_other_columns_is_refused_at_the_first_call(tmp_path):
    monitor = Monitor(PARAMS, dir=tmp_path, record=("grad",))
    with pytest.raises(ValueError, match=r"6 columns.*shape \(8, 10\).*`record=`"):
        monitor(state_after(1, 8))


def test_a_call_inside_jit_is_refused(tmp_path):
    monitor = Monitor(PARAMS, dir=tmp_path)
    with pytest.raises(ValueError, match="inside `jit`"):
        jax.jit(monitor)(state_after(1, 8))


def test_a_monitor_that_never_drains_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`Monitor\(every=...\)`.*got 0"):
        Monitor(PARAMS, every=0, dir=tmp_path)


def test_a_monitor_writes_the_report_of_its_run(tmp_path):
    page = tmp_path / "pages" / "report.html"
    with Monitor(PARAMS, every=1, dir=tmp_path / "run") as monitor:
        monitor(state_after(3, 8))
    monitor.report(page)
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_a_state_from_a_checkpoint_is_read_like_any_other(tmp_path):
    with Monitor(PARAMS, every=1, dir=tmp_path) as monitor:
        monitor(jax.device_get(state_after(3, 8)))
    assert load(tmp_path).steps.tolist() == [0, 1, 2]


@pytest.mark.parametrize("record", [("grads",), "grad"])
def test_another_kind_of_record_is_refused(record, tmp_path):
    with pytest.raises(ValueError, match=r"Monitor\(record=...\)` must be a tuple"):
        Monitor(PARAMS, dir=tmp_path, record=record)
