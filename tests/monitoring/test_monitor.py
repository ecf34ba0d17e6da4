"""A monitor tells what it finds, sends a few scalars, and gives the record out."""

import contextlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas
import pytest

import gradnorm_jax as gn
from gradnorm_jax.monitoring import Finding, FindingError, Monitor, diagnose

PARAMS = {"body": {"w": jnp.ones((3, 2))}, "head": jnp.zeros(2)}
KINDS = ("grad", "update", "param")


def gradients(step):
    size = 1 + 0.1 * np.sin(step)
    return jax.tree.map(lambda x: jnp.full_like(x, size), PARAMS)


def optimizer(nonfinite="zero"):
    clip = gn.clip_by_global_norm(2.0, nonfinite=nonfinite)
    return optax.chain(clip, optax.sgd(1e-3))


def training(steps, *, edit=lambda step, grads: grads, nonfinite="zero", **how):
    """Yields a watched state for each step, the gradients known in advance."""
    tx = gn.watch(optimizer(nonfinite), **how)
    params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    for step in range(steps):
        grads = edit(step, gradients(step))
        updates, state = update(grads, state, params, value=1 / (step + 1))
        params = optax.apply_updates(params, updates)
        yield state


def spoiled(step, grads):
    return grads | {"head": grads["head"] * (jnp.nan if step == 40 else 1)}


def monitored(steps, every=5, *, edit=lambda _, grads: grads, nonfinite="zero", **how):
    with Monitor(PARAMS, every=every, **how) as monitor:
        for state in training(steps, edit=edit, nonfinite=nonfinite):
            monitor(state)
    return monitor


def test_without_a_directory_the_rows_are_kept_in_memory():
    monitor = monitored(23)
    assert monitor.history.steps.tolist() == list(range(23))
    np.testing.assert_allclose(monitor.history.scalars["loss"], 1 / np.arange(1, 24))
    assert repr(monitor) == "Monitor(23 steps, 10 columns)"


def test_what_is_in_memory_and_what_is_on_disk_are_one(tmp_path):
    kept, written = monitored(23), monitored(23, dir=tmp_path)
    for name, column in kept.to_dict().items():
        np.testing.assert_array_equal(column, written.to_dict()[name])
    assert kept.history.sizes.tolist() == written.history.sizes.tolist() == [6, 2]
    assert kept.history.dims == written.history.dims == (2, 1)


def test_one_of_every_few_updates_is_read_as_it_was_recorded(tmp_path):
    watched = monitored(60).history
    with Monitor(PARAMS, every=7, dir=tmp_path) as monitor:
        for state in training(60, every=4, window=2):
            monitor(state)
    history = monitor.history
    assert history.steps.tolist() == list(range(0, 60, 4))
    assert history.dropped == 0
    np.testing.assert_array_equal(history.grad, watched.grad[::4])
    assert "Dropped" not in gn.monitoring.report(history)


@pytest.mark.parametrize("every", [1, 7, 50])
@pytest.mark.parametrize("in_files", [True, False])
def test_steps_that_were_taken_anew_replace_those_of_before(
    every, in_files, tmp_path, caplog
):
    dir = tmp_path / "run" if in_files else None
    states = list(training(40))
    louder = list(
        training(40, edit=lambda _, grads: jax.tree.map(lambda x: 2 * x, grads))
    )
    tx = gn.watch(optimizer())
    with Monitor(PARAMS, every=every, dir=dir) as monitor:
        for state in states:
            monitor(state)
        state = states[19]  # a checkpoint with its record
        for step in range(20, 40):
            grads = jax.tree.map(lambda x: 2 * x, gradients(step))
            _, state = tx.update(grads, state, PARAMS, value=1 / (step + 1))
            monitor(state)
    history = monitor.history
    assert history.steps.tolist() == list(range(40))
    want = np.array([np.asarray(s.ring[k, :2]) for k, s in enumerate(states)])
    want[20:] = [np.asarray(s.ring[k, :2]) for k, s in enumerate(louder)][20:]
    np.testing.assert_allclose(history.grad, want, rtol=1e-6)
    if every < 50:
        assert "went back from step" in caplog.text


def test_a_run_that_was_killed_goes_on_from_an_older_checkpoint(tmp_path):
    states = list(training(37))
    with Monitor(PARAMS, every=5, dir=tmp_path) as monitor:
        for state in states:
            monitor(state)
    tx = gn.watch(optimizer())
    state = gn.attach(gn.detach(states[29]), PARAMS, tx, step=30)
    with Monitor(PARAMS, every=5, dir=tmp_path, resume=True) as monitor:
        for step in range(30, 50):
            grads = jax.tree.map(lambda x: 3 * x, gradients(step))
            _, state = tx.update(grads, state, PARAMS)
            monitor(state)
    history = gn.monitoring.load(tmp_path)
    assert history.steps.tolist() == list(range(50))
    factors = np.where(np.arange(50) < 30, 1, 3) * (1 + 0.1 * np.sin(np.arange(50)))
    np.testing.assert_allclose(history.grad[:, 1], np.sqrt(2) * factors, rtol=1e-6)


def test_rows_are_kept_whatever_is_raised_while_they_are_handed_on(tmp_path):
    def fail(step, scalars):
        raise OSError("the network is gone")

    monitor = Monitor(PARAMS, every=10, dir=tmp_path, log=fail)
    taken = 0
    with contextlib.suppress(OSError), monitor:
        for state in training(60):
            taken += 1
            monitor(state)
    assert taken == 20
    assert len(gn.monitoring.load(tmp_path)) == 20


def test_measures_may_say_of_which_step_they_are(tmp_path):
    def row(step, size=1.0):
        grads = jax.tree.map(lambda x: x + size, PARAMS)
        monitor.append(gn.measure(grads, value=step), step=step)

    with Monitor(every=4, dir=tmp_path) as monitor:
        for step in range(0, 100, 10):
            row(step)
        for step in (70, 80, 90, 100):
            row(step, 5.0)
    history = monitor.history
    assert history.steps.tolist() == list(range(0, 101, 10))
    np.testing.assert_array_equal(history.scalars["loss"], history.steps)
    assert (history.grad[7:] > 2 * history.grad[0]).all()
    with Monitor(every=4, dir=tmp_path, resume=True) as monitor:
        monitor.append(gn.measure(PARAMS))
    assert monitor.history.steps[-1] == 101


def test_other_columns_of_the_same_number_are_refused():
    for params, record in (
        (PARAMS, ("grad", "update", "grad_max")),
        (PARAMS | {"head": jnp.zeros(3)}, KINDS),
    ):
        with pytest.raises(ValueError, match=r"other columns.*though as many"):
            Monitor(params, record=record)(next(training(1)))


def test_a_process_that_is_not_the_first_reads_nothing(monkeypatch):
    monkeypatch.setattr(gn.monitoring.records, "is_first_process", lambda: False)
    monitor = monitored(30)
    assert monitor.findings() == []
    with pytest.raises(ValueError, match="process 0 alone"):
        monitor.history  # noqa: B018


def test_a_monitor_without_rows_has_no_findings_and_says_what_it_is():
    monitor = Monitor(PARAMS)
    assert monitor.findings() == []
    assert monitor._repr_html_() == "Monitor(0 steps, 10 columns)"


def test_there_is_no_history_before_the_first_row():
    monitor = Monitor(PARAMS)
    with pytest.raises(ValueError, match=r"no row was taken in yet.*2 \* `every`"):
        monitor.history  # noqa: B018


@pytest.mark.parametrize("every", [1, 4])
def test_rows_that_were_measured_are_taken_in_by_append(every):
    tx, watched = optimizer(), monitored(9)
    state, params = tx.init(PARAMS), PARAMS
    with Monitor(every=every) as monitor:
        for step in range(9):
            grads = gradients(step)
            updates, state = tx.update(grads, state, params)
            loss = 1 / (step + 1)
            monitor.append(gn.measure(grads, updates, params, value=loss, state=state))
            params = optax.apply_updates(params, updates)
    assert monitor.columns == watched.columns
    for name, column in watched.to_dict().items():
        np.testing.assert_allclose(monitor.to_dict()[name], column, rtol=1e-6)
    assert monitor.history.sizes.tolist() == [6, 2]


def test_the_rows_of_a_scan_are_appended_at_once(tmp_path):
    def step(carry, k):
        return carry, gn.measure(jax.tree.map(lambda x: x + k, PARAMS), value=k)

    with Monitor(every=2, dir=tmp_path) as monitor:
        for start in (0, 5, 10):
            steps = start + jnp.arange(5.0)
            monitor.append(jax.lax.scan(step, 0, steps)[1])
    np.testing.assert_array_equal(monitor.history.scalars["loss"], np.arange(15))
    want = np.sqrt(2.0) * np.arange(15)
    np.testing.assert_allclose(monitor.history.grad[:, 1], want, rtol=1e-6)


def test_what_cannot_be_appended_is_refused():
    monitor = Monitor()
    with pytest.raises(TypeError, match=r"append\(stats=.*`gradnorm_jax.measure`"):
        monitor.append({"loss": 1.0})
    with pytest.raises(ValueError, match=r"Monitor\(params=.*to read a state"):
        monitor(next(training(1)))
    monitor.append(gn.measure(PARAMS))
    with pytest.raises(ValueError, match=r"7 columns, those before it 6"):
        monitor.append(gn.measure({"a": jnp.ones(2), **PARAMS}))
    with pytest.raises(ValueError, match=r"append.*inside `jit`"):
        jax.jit(lambda x: monitor.append(gn.measure(x)))(PARAMS)
    with pytest.raises(ValueError, match=r"before, and now a state.*for each"):
        monitor(next(training(1)))


def test_findings_are_those_of_diagnose(tmp_path):
    monitor = monitored(60, edit=spoiled, dir=tmp_path, warn="off")
    [finding] = monitor.findings()
    assert (finding.code, finding.step, finding.where) == ("non-finite", 40, ("head",))
    assert str(finding) == str(*diagnose(monitor.history))


def test_a_finding_is_logged_once_and_again_after_500_steps(caplog):
    def bad(step, grads):
        return jax.tree.map(lambda x: x * (jnp.nan if step >= 30 else 1), grads)

    with caplog.at_level(logging.WARNING, "gradnorm_jax"):
        monitored(1100, every=10, edit=bad, nonfinite="propagate")
    steps = [record.getMessage() for record in caplog.records]
    assert len(steps) == 3
    assert all(line.startswith("ERROR non-finite @") for line in steps)
    assert {record.levelname for record in caplog.records} == {"ERROR"}


def test_a_finding_goes_where_it_is_told_to():
    told = []
    monitored(60, edit=spoiled, warn=told.append)
    assert [finding.code for finding in told] == ["non-finite"]


def test_an_error_may_end_the_training_and_keeps_the_rows(tmp_path):
    with pytest.raises(FindingError, match="non-finite @40") as caught:
        monitored(100, edit=spoiled, nonfinite="propagate", warn="raise", dir=tmp_path)
    assert caught.value.finding.code == "non-finite"
    history = gn.monitoring.load(tmp_path)
    assert 40 in history.steps.tolist()
    assert len(history) < 60


def test_a_warning_is_logged_where_errors_are_raised(caplog):
    def much(history):
        yield Finding("much", "warning", int(history.steps[0]), "too much")

    monitored(30, warn="raise", rules=[much])
    assert caplog.messages == ["WARN much @0 global: too much."]


def test_parts_may_be_left_out_of_findings():
    told = []
    for ignore in (["head"], "head"):
        monitor = monitored(60, edit=spoiled, warn=told.append, ignore=ignore)
        assert told == monitor.findings() == []


@pytest.mark.parametrize("names", [{"head": "out"}, lambda name: name.upper()])
def test_parts_may_have_other_names(names, tmp_path):
    monitor = monitored(7, names=names, dir=tmp_path)
    want = ("body/w", "out") if isinstance(names, dict) else ("BODY/W", "HEAD")
    assert monitor.history.parts == want
    assert monitor.columns[-4:] == gn.telemetry.SCALARS


def test_a_part_called_as_a_scalar_is_renamed_alone():
    params = {"scale": jnp.ones(2), "limit": jnp.ones(1)}
    monitor = Monitor(params, names={"scale": "gain"}, record=("grad",))
    assert monitor.columns == ("grad/limit", "grad/gain", *gn.telemetry.SCALARS)


def test_about_ten_scalars_are_sent_and_nothing_of_them_is_changed():
    sent = []
    monitor = monitored(
        60, every=20, edit=spoiled, warn="off", log=lambda s, d: sent.append((s, d))
    )
    assert [step for step, _ in sent] == [19, 39, 59]
    *_, (_, last) = sent
    assert set(last) == {
        "gradnorm/" + name
        for name in (
            "grad_norm/global_preclip",
            "grad_norm/global_preclip_max",
            "grad_norm/leaf_min",
            "grad_norm/leaf_max",
            "update_norm/global",
            "param_norm/global",
            "update_ratio/median",
            "update_ratio/max",
            "loss",
            "clip/limit",
            "clip/scale",
            "clip/fraction",
        )
    }
    norms = monitor.history.global_norm("grad")
    assert np.isnan(last["gradnorm/grad_norm/global_preclip_max"])
    first = sent[0][1]
    assert first["gradnorm/grad_norm/global_preclip"] == norms[19]
    assert first["gradnorm/grad_norm/global_preclip_max"] == norms[:20].max()


def test_every_column_is_sent_on_request_under_one_prefix():
    sent = {}
    record = (*KINDS, "grad_zeros")
    monitor = Monitor(
        PARAMS, every=5, record=record, log=lambda s, d: sent.update(d), log_parts=True
    )
    with monitor:
        for state in training(10, record=record):
            monitor(state)
    parts = {f"gradnorm/{k}/{p}" for k in record for p in monitor.history.parts}
    assert parts < set(sent)
    assert sent["gradnorm/grad_zeros/head"] == 0
    plain = {}
    monitor = Monitor(PARAMS, every=5, record=record, log=lambda s, d: plain.update(d))
    with monitor:
        for state in training(10, record=record):
            monitor(state)
    assert set(plain) == set(sent) - parts


def test_the_record_is_given_out_by_column():
    record = (*KINDS, "grad_max")
    monitor = Monitor(PARAMS, every=5, record=record)
    with monitor:
        for state in training(10, record=record):
            monitor(state)
    columns = monitor.to_dict()
    assert list(columns) == ["step", *monitor.columns]
    largest = 1 + 0.1 * np.sin(np.arange(10))
    np.testing.assert_allclose(columns["grad_max/head"], largest, rtol=1e-6)
    np.testing.assert_array_equal(
        monitor.history.details["grad_max"][:, 1], columns["grad_max/head"]
    )
    frame = monitor.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.index.tolist() == list(range(10))
    np.testing.assert_array_equal(frame["grad_max/head"], columns["grad_max/head"])


def test_pictures_are_figures_and_a_notebook_shows_the_report():
    monitor = monitored(40)
    for kind in ("trace", "heat", "flow"):
        assert monitor.plot(kind).axes
    with pytest.raises(ValueError, match=r"plot\(kind=.*'trace'.*got 'bars'"):
        monitor.plot("bars")
    frame = monitor._repr_html_()
    assert frame.startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;')
    assert frame.count('"') == 4


def test_a_writer_of_the_user_stays_open_and_one_of_ours_is_closed(tmp_path):
    class Mine:
        closed = 0

        def write(self, step, scalars):
            pass

        def close(self):
            self.closed += 1

    mine = Mine()
    monitored(10, log=[mine, tmp_path / "a.jsonl"])
    assert mine.closed == 0
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"warn": "shout"}, r"warn=.*'log', 'raise', 'off'.*got 'shout'"),
        ({"every": 0}, r"every=.*at least 1, got 0"),
        ({"record": ("grads",)}, r"record=.*got \('grads',\)"),
        ({"names": lambda name: "x"}, r"names=.*a name of its own"),
        ({"names": {"nope": "x"}}, r"names=.*'nope', which is no part.*body/w, head"),
        ({"names": 3}, r"names=.*got 3"),
        ({"rules": ["spike"]}, r"rules=.*got \['spike'\]"),
        ({"rules": gn.monitoring.diagnose}, r"rules=.*list of functions"),
        ({"ignore": ["(("]}, r"Monitor\(ignore=.*'\(\('"),
        ({"groups": {".*": "all"}, "stacked_axes": {"head": 0}}, r"groups=.*stacked"),
    ],
)
def test_settings_that_cannot_be_are_refused(how, words):
    with pytest.raises((TypeError, ValueError), match=words):
        Monitor(PARAMS, **how)


def test_a_file_is_no_directory_for_a_run(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(FileExistsError, match=r"dir=.*is a file.*a directory"):
        Monitor(PARAMS, dir=tmp_path / "run")


def test_a_state_is_found_wherever_it_is():
    for wrap in (
        lambda state: state,
        lambda state: (1, [state]),
        lambda state: {"params": PARAMS, "opt": state},
    ):
        with Monitor(PARAMS, every=1) as monitor:
            for state in training(3):
                monitor(wrap(state))
        assert len(monitor.history) == 3
