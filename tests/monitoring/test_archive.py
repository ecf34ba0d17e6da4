"""A run on disk reads back whole, whenever the process that wrote it was killed."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from gradnorm_jax.monitoring import archive, load

COLUMNS = ("grad/a", "grad/b", "loss")
SIZES = {"a": 3, "b": 1}


def rows_of(steps):
    """Rows that show which step and which column each value belongs to."""
    return np.asarray(steps)[:, None] + np.array([0.0, 0.25, 0.5])


@pytest.fixture
def run(tmp_path):
    """Opens the run in the test's directory, which is made."""

    def opened(resume=False, columns=COLUMNS):
        return archive.Archive(
            tmp_path / "run", archive.Description(columns, SIZES), resume=resume
        )

    return opened


def strict_lines(directory):
    """Reads the lines of scalars, and refuses what is not strict JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (directory / "scalars.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_rows_read_back_as_they_were_written(run, tmp_path):
    writer = run()
    writer.append(np.arange(3), rows_of(range(3)))
    writer.append(np.arange(3, 5), rows_of(range(3, 5)))
    history = load(tmp_path / "run")
    assert history.steps.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(history.grad, rows_of(range(5))[:, :2])
    np.testing.assert_array_equal(history.scalars["loss"], np.arange(5) + 0.5)
    assert history.grad.dtype == np.float32


def test_the_description_names_the_columns_and_how_large_the_parts_are(run, tmp_path):
    run()
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert tuple(described["columns"]) == COLUMNS
    assert described["parts"] == SIZES


def test_each_step_has_a_line_of_strict_json_that_hides_nothing(run, tmp_path):
    rows = np.array([[3, 4, 0.1], [np.nan, 1, np.nan], [0, 0, -np.inf], [1, np.inf, 1]])
    run().append(np.arange(4), rows)
    lines = strict_lines(tmp_path / "run")
    assert lines[0] == {
        "step": 0,
        "grad_norm/global_preclip": 5.0,
        "grad_norm/leaf_min": 3.0,
        "grad_norm/leaf_max": 4.0,
        "loss": 0.1,
    }
    assert [line["grad_norm/global_preclip"] for line in lines[1:]] == ["nan", 0, "inf"]
    assert [line["loss"] for line in lines[1:]] == ["nan", "-inf", 1]


def test_steps_that_were_taken_anew_replace_those_that_they_repeat(run, tmp_path):
    writer = run()
    writer.append(np.arange(10), rows_of(range(10)))
    writer.append(np.arange(10, 20), rows_of(range(10, 20)))
    writer.append(np.arange(8, 12), rows_of(range(108, 112)))
    history = load(tmp_path / "run")
    assert history.steps.tolist() == list(range(12))
    expected = [*range(8), *range(108, 112)]
    np.testing.assert_array_equal(history.grad[:, 0], expected)


WRITER = """
import os, signal, sys
from pathlib import Path
import numpy as np
from gradnorm_jax.monitoring import archive

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def kill_within_a_line(path, mode, **more):
    file = open(path, mode, **more)
    if "a" in mode:
        file.write(b'{"step": 150, "grad_no')
        kill()
    return file

writer = archive.Archive(Path(sys.argv[1]), archive.Description(COLUMNS), resume=False)
for first in range(0, 10**9, 50):
    if first == 150:
        TRAP
    steps = np.arange(first, first + 50)
    writer.append(steps, steps[:, None] + np.array([0.0, 0.25, 0.5]))
    print(first + 50, flush=True)
"""


def run_until_killed(directory, trap):
    """Writes until the trap springs, or this process kills it; returns rows drained."""
    script = WRITER.replace("TRAP", trap).replace("COLUMNS", repr(COLUMNS))
    command = [sys.executable, "-c", script, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        drained = 0
        for line in process.stdout:
            drained = int(line)
            if drained >= 300:
                process.kill()
    assert process.returncode == -signal.SIGKILL
    return drained


@pytest.mark.parametrize(
    ("trap", "rows"),
    [
        pytest.param("os.fsync = kill", 150, id="before the rows are safe"),
        pytest.param("os.replace = kill", 150, id="before the rows have their name"),
        pytest.param("archive.open = kill_within_a_line", 200, id="within a line"),
        pytest.param("pass", None, id="at any moment"),
    ],
)
def test_a_killed_run_keeps_every_drained_row_and_can_go_on(tmp_path, run, trap, rows):
    drained = run_until_killed(tmp_path / "run", trap)
    history = load(tmp_path / "run")
    assert len(history) == rows or (rows is None and len(history) >= drained >= 300)
    assert history.steps.tolist() == list(range(len(history)))
    np.testing.assert_array_equal(history.grad, rows_of(history.steps)[:, :2])

    writer = run(resume=True)
    assert writer.next_step == len(history)
    writer.append(np.arange(len(history), len(history) + 2), np.ones((2, 3)))
    assert len(load(tmp_path / "run")) == len(history) + 2
    steps = [line["step"] for line in strict_lines(tmp_path / "run")]
    assert steps == sorted(set(steps))
    assert steps[-1] == len(history) + 1


def test_a_run_that_was_killed_before_its_first_drain_says_so_and_can_be_begun(run):
    writer = run()
    with pytest.raises(ValueError, match="has no rows yet"):
        load(writer.directory)
    assert run().next_step == 0


def test_a_failed_write_leaves_no_temporary_file(run, monkeypatch):
    writer = run()

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(archive.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        writer.append(np.arange(2), rows_of(range(2)))
    assert [path.name for path in writer.directory.iterdir()] == ["run.json"]


def test_a_second_run_in_the_same_directory_is_refused_unless_it_goes_on(run):
    run().append(np.arange(5), rows_of(range(5)))
    with pytest.raises(FileExistsError, match=r"already holds a run.*`resume=True`"):
        run()
    assert run(resume=True).next_step == 5


def test_a_run_with_other_columns_cannot_go_on(run):
    run().append(np.arange(5), rows_of(range(5)))
    with pytest.raises(ValueError, match="column 1 is 'grad/b' there and 'loss' here"):
        run(resume=True, columns=("grad/a", "loss"))
    with pytest.raises(ValueError, match="'clip/scale' is only in one of them"):
        run(resume=True, columns=(*COLUMNS, "clip/scale"))


def test_going_on_with_a_run_that_is_not_there_begins_it(run):
    assert run(resume=True).next_step == 0


def test_what_is_not_a_run_is_refused_with_what_is_wanted(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"not a run: .* run\.json and rows-"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "gradnorm_jax run"}'])
def test_a_description_that_describes_nothing_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="does not describe a run"):
        load(tmp_path)


def test_a_run_of_a_later_version_is_refused(run, tmp_path):
    run()
    path = tmp_path / "run" / "run.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match=r"version 2.*reads version 1"):
        load(tmp_path / "run")


def test_a_damaged_file_is_named(run, tmp_path):
    run().append(np.arange(5), rows_of(range(5)))
    path = tmp_path / "run" / "rows-00000001.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"rows-00000001\.npz' is damaged"):
        load(tmp_path / "run")
