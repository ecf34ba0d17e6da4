"""The noise scale of a run goes from its step to the record, a tracker and the page."""

import html
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradnorm_jax as gn
from gradnorm_jax import monitoring
from gradnorm_jax.monitoring import History, Monitor, load
from gradnorm_jax.norms.noise_scale import running_noise_scale
from gradnorm_jax.telemetry import columns

RECORD = ("grad", "noise_scale")
PARAMS = {"w": jnp.ones(3)}


def page_of(scales):
    rows = np.stack([np.ones(len(scales)), scales], axis=1)
    steps = np.arange(0, 10 * len(scales), 10)
    history = History.from_rows(("grad/w", "noise_scale/simple"), steps, rows)
    words = html.unescape(re.sub(r"<[^>]*>", " ", monitoring.report(history, [])))
    return " ".join(words.split())


def test_a_training_loop_records_the_noise_scale_of_every_step(tmp_path):
    tx = gn.watch(optax.sgd(0.1), record=RECORD)
    average = running_noise_scale(0.9)
    lines = []

    def step(carry, noise):
        params, state, noise_state = carry
        grads = jax.tree.map(lambda x: 2 * x + noise, params)  # of each example
        norms = jax.vmap(gn.global_norm)(grads)
        grads = jax.tree.map(lambda x: jnp.mean(x, axis=0), grads)
        noise_state = average.update(noise_state, norms, gn.global_norm(grads))
        found = average.read(noise_state).noise_scale
        updates, state = tx.update(grads, state, params, noise_scale=found)
        return (optax.apply_updates(params, updates), state, noise_state), found

    noise = np.random.default_rng(0).normal(size=(12, 8, 3)).astype(np.float32)
    params = {"w": jnp.full((1, 3), 2.0)}
    carry = (jax.tree.map(lambda x: x[0], params), tx.init(PARAMS), average.init())
    carry, found = jax.jit(lambda c, n: jax.lax.scan(step, c, n))(carry, noise)
    log = lambda number, scalars: lines.append(scalars)  # noqa: E731
    with Monitor(PARAMS, every=1, dir=tmp_path / "run", log=log, record=RECORD) as own:
        own(carry[1])
    recorded = load(tmp_path / "run").scalars["noise_scale/simple"]
    np.testing.assert_array_equal(recorded, np.asarray(found))
    assert np.all(np.isfinite(recorded))
    assert lines[-1]["gradnorm/noise_scale/simple"] == pytest.approx(float(found[-1]))
    own.report(tmp_path / "page.html")
    assert "Noise scale" in (tmp_path / "page.html").read_text()


def test_what_measure_is_given_is_in_its_row_and_only_then():
    stats = gn.measure(PARAMS, value=0.5, noise_scale=jnp.float32(7)).as_dict()
    assert [*stats][-2:] == ["clip/fraction", "noise_scale/simple"]
    assert (stats["loss"], stats["noise_scale/simple"]) == (0.5, 7)
    assert "noise_scale/simple" not in gn.measure(PARAMS).as_dict()
    monitor = Monitor(every=1)
    for scale in (4.0, jnp.nan):
        monitor.append(gn.measure(PARAMS, noise_scale=scale))
    monitor.close()
    np.testing.assert_array_equal(
        monitor.history.scalars["noise_scale/simple"], [4, np.nan]
    )


@pytest.mark.parametrize("every", [1, 2])
def test_a_step_without_a_noise_scale_has_none(every):
    tx = gn.watch(optax.sgd(0.1), window=2, every=every, record=RECORD)
    state = tx.init(PARAMS)
    for scale in ({}, {"noise_scale": 3.0}, {"noise_scale": 4.0}):
        _, state = jax.jit(tx.update)(PARAMS, state, **scale)
    newest = {1: [4, 3], 2: [np.nan, 4]}[every]
    np.testing.assert_array_equal(state.ring[:, -1], np.float32(newest))
    assert columns(PARAMS, record=RECORD)[-1] == "noise_scale/simple"


def test_the_noise_scale_is_not_handed_on_to_what_is_watched():
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    tx = gn.watch(inner, record=RECORD)
    tx.update(PARAMS, tx.init(PARAMS), value=2.0, noise_scale=3.0)
    assert seen == [{"value": 2.0}]


def test_a_noise_scale_that_nobody_keeps_is_refused():
    tx = gn.watch(optax.sgd(0.1), record=("grad",))
    with pytest.raises(ValueError, match=r"noise_scale=.*'grad', 'noise_scale'\)"):
        tx.update(PARAMS, tx.init(PARAMS), noise_scale=3.0)


def test_a_monitor_of_other_columns_is_refused():
    tx = gn.watch(optax.sgd(0.1), record=RECORD)
    with pytest.raises(ValueError, match="ring of 5 columns"):
        Monitor(PARAMS, record=("grad",))(tx.init(PARAMS))
    with pytest.raises(ValueError, match=r"record=.*'noise_scale'.*got \('noise',\)"):
        Monitor(PARAMS, record=("noise",))


def test_what_was_recorded_before_has_the_columns_that_it_had():
    assert gn.measure(PARAMS).columns.checksum == 1_086_153_347
    with_noise = gn.measure(PARAMS, noise_scale=1.0).columns
    assert with_noise.checksum != gn.measure(PARAMS).columns.checksum


def test_the_page_says_the_last_noise_scale_and_the_middle_one():
    words = page_of([10, 20, np.nan, 300])
    assert "Noise scale 300 examples, at step 30; median 20" in words
    assert "no estimate in 1 row" in words
    assert "no estimate in 2 rows" in page_of([10, np.nan, np.nan, 300])


def test_the_page_is_silent_of_a_noise_scale_that_is_not_known():
    assert "Noise scale" not in page_of([np.nan, np.nan])
    assert "no estimate" not in page_of([1.0, 2.0])
