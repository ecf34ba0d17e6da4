"""The command line does what it says, and says in one line what it cannot do."""

import re
import subprocess
import sys

import pytest

from gradnorm_jax import cli, demo, monitoring


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


def test_the_same_seed_gives_the_same_run(run, tmp_path):
    outcome, _ = run
    again = demo.train(tmp_path / "again", steps=100)
    assert again.accuracy == outcome.accuracy
    assert again.largest_norm == outcome.largest_norm


def test_report_writes_the_page_and_prints_where(run, tmp_path, capsys):
    outcome, _ = run
    page = tmp_path / "page.html"
    assert cli.main(["report", str(outcome.run), "-o", str(page), "--png"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(page)
    assert len(printed) == 4
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_the_demo_command_prints_what_came_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--steps", "25", "--max-norm", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "test accuracy" in out
    assert "clipped to 0.5" in out
    assert (tmp_path / "runs/demo/report.html").exists()
    assert cli._free(tmp_path / "runs/demo").name == "demo-2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "gradnorm report: .*nowhere"),
        (["demo", "--output", "{run}"], "gradnorm demo: .*holds a run"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(run, arguments, message, capsys):
    arguments = [part.format(run=run[0].run) for part in arguments]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.parametrize(
    "arguments", [["demo", "--steps", "0"], ["demo", "--max-norm", "-1"], [], ["what"]]
)
def test_a_wrong_argument_is_refused_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: gradnorm" in capsys.readouterr().err


def test_a_missing_extra_is_named_with_the_way_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"gradnorm-jax\[demo\]"):
        demo.train(tmp_path / "run", steps=25)
    assert not (tmp_path / "run").exists()


def test_without_a_terminal_the_progress_is_a_line_now_and_then(capsys):
    for step in range(25, 1001, 25):
        cli._line(step, 1000, "loss 1")
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_on_a_terminal_the_progress_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with cli._progress() as update:
        update(500, 1000, "loss 0.1")
    assert "500/1000" in capsys.readouterr().out


def test_python_m_gradnorm_jax_is_the_command():
    command = [sys.executable, "-m", "gradnorm_jax", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("gradnorm 0.")


def test_pictures_without_matplotlib_are_refused_in_one_line(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["report", str(run[0].run), "--png"]) == 2
    assert "pip install 'gradnorm-jax[plot]'" in capsys.readouterr().err
