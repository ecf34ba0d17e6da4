"""The demo learns, and each fault that is put into it leads to its finding."""

import dataclasses
import sys

import numpy as np
import pytest

from gradnorm_jax import cli, demo, monitoring
from gradnorm_jax.cli import training


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "demo"
    seen = []
    outcome = demo.train(
        directory, steps=100, progress=lambda *update: seen.append(update)
    )
    return outcome, seen


def test_the_demo_learns_and_clips_every_corrupted_step(run):
    outcome, seen = run
    assert outcome.steps == 100
    assert outcome.accuracy > 0.6
    assert outcome.clipped_in_burst == len(outcome.burst) == 8
    assert outcome.largest_step in outcome.burst
    assert outcome.largest_norm > 50 * outcome.limit
    assert [step for step, _, _ in seen] == [25, 50, 75, 100]


def test_the_demo_leaves_a_run_a_report_and_three_pictures(run):
    outcome, _ = run
    history = monitoring.load(outcome.run)
    assert len(history.steps) == 100
    assert history.dropped == 0
    assert "Conv_0/kernel" in history.parts
    assert "</html>" in outcome.report.read_text()
    assert [p.suffix for p in outcome.pictures] == [".png"] * 3
    assert all(picture.stat().st_size > 10_000 for picture in outcome.pictures)


def test_a_spike_leads_to_its_finding(run):
    [spike] = [one for one in run[0].findings if one.code == "spike"]
    assert spike.step == run[0].burst.start


@pytest.mark.parametrize(
    ("fault", "steps", "level", "first"),
    [
        ("dead", 150, "warning", 75),
        ("nan", 50, "error", 25),
        ("vanish", 50, "warning", 20),
        ("explode", 200, "error", None),
    ],
)
def test_each_fault_of_the_demo_leads_to_its_finding(
    fault, steps, level, first, tmp_path, monkeypatch
):
    monkeypatch.setattr(monitoring, "save_all", lambda *_: [])
    outcome = demo.train(tmp_path / fault, steps=steps, fault=fault)
    found = {one.code: one for one in outcome.findings}
    finding = found[demo.FAULTS[fault].code]
    assert finding.level == level
    assert first is None or finding.step == first
    assert np.isfinite(outcome.largest_norm)
    assert outcome.clipped_in_burst == len(outcome.burst) == 0


def test_an_unknown_fault_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"fault=.*'spike'.*got 'flood'"):
        demo.train(tmp_path / "run", fault="flood")


def test_the_demo_command_makes_the_same_run_and_prints_what_came_of_it(
    run, tmp_path, monkeypatch, capsys
):
    outcome, _ = run
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--steps", "100"]) == 0
    out = capsys.readouterr().out
    assert f"test accuracy    {outcome.accuracy:.1%} after 100 steps" in out
    largest = f"{outcome.largest_norm:.3g} at step {outcome.largest_step}, clipped to 1"
    assert f"largest norm     {largest}\n" in out
    assert "corrupted steps  8 of 8 clipped" in out
    assert (tmp_path / "runs/demo/report.html").exists()
    assert training._free(tmp_path / "runs/demo").name == "demo-2"


def test_a_run_without_corrupted_steps_speaks_of_all(run, monkeypatch, capsys):
    calm = {"burst": range(0), "clipped_in_burst": 0, "limit": 1e9}
    outcome = dataclasses.replace(run[0], **calm)
    monkeypatch.setattr(demo, "train", lambda *_, **__: outcome)
    assert cli.main(["demo", "--fault", "none", "-o", "elsewhere"]) == 0
    out = capsys.readouterr().out
    assert f"all steps        {outcome.clipped} of 100 clipped" in out
    assert "not clipped\n" in out


def test_a_missing_extra_is_named_with_the_way_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"gradnorm-jax\[demo\]"):
        demo.train(tmp_path / "run", steps=25)
    assert not (tmp_path / "run").exists()
