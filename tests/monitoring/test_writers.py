"""Whatever a writer is made of, each scalar of each step gets there as it was."""

import json
import logging
import math
import signal
import subprocess
import sys
import types

import numpy as np
import pytest

from gradnorm_jax.monitoring.writers import as_writer

SCALARS = {
    "clip/scale": 0.25,
    "nan": math.nan,
    "inf": math.inf,
    "negative": -math.inf,
    "zero": 0.0,
    "tiny": 1e-45,
    "large": 3.4e38,
}
NAMED = {f"gradnorm/{name}": value for name, value in SCALARS.items()}


def expect(found, wanted=NAMED, **like):
    """Compares names and float64 values, NaN with NaN."""
    assert list(found) == list(wanted)
    assert all(type(value) is float for value in found.values())
    np.testing.assert_array_equal(list(found.values()), list(wanted.values()), **like)


# Trackers, of each shape one. All keep (step, scalars) in `rows`.


class Fake:
    def __init__(self):
        self.rows, self.closed = [], 0

    def close(self):
        self.closed += 1

    def keep(self, step, name, value):
        if not self.rows or name in self.rows[-1][1]:
            self.rows.append((step, {}))
        assert self.rows[-1][0] == step
        self.rows[-1][1][name] = value


class Clu(Fake):
    def write_scalars(self, step, scalars):
        self.rows.append((step, scalars))


class MLflow(Fake):
    def log_metrics(self, metrics, step=None, synchronous=None):
        self.rows.append((step, metrics))


class Comet(Fake):
    def log_metrics(self, dic, prefix=None, step=None, epoch=None):
        assert prefix is None
        self.rows.append((step, dic))

    def log_metric(self, name, value):
        raise AssertionError("one call is enough")


class Trackio(Fake):
    def log(self, metrics, step=None):
        self.rows.append((step, metrics))


class Levanter(Fake):
    def log(self, metrics, *, step, commit=None):
        self.rows.append((step, metrics))


class TensorboardX(Fake):
    def add_scalar(self, tag, scalar_value, global_step=None, walltime=None):
        self.keep(global_step, tag, scalar_value)


class Flax(Fake):
    def scalar(self, tag, value, step):
        self.keep(step, tag, value)


class Aim(Fake):
    def track(self, value, name=None, step=None, epoch=None, *, context=None):
        self.keep(step, name, value)


class Function(Fake):
    def __call__(self, step, scalars):
        self.rows.append((step, scalars))


SHAPES = [Clu, MLflow, Comet, Trackio, Levanter, TensorboardX, Flax, Aim, Function]
shapes = pytest.mark.parametrize("shape", SHAPES)


@shapes
def test_a_tracker_gets_every_scalar_as_it_is(shape):
    tracker = shape()
    writer = as_writer(tracker)
    writer.write(3, SCALARS)
    writer.write(np.int64(5), {"clip/scale": np.float32(0.5)})
    (first, scalars), (second, more) = tracker.rows
    assert (first, second) == (3, 5)
    assert type(second) is int
    expect(scalars)
    expect(more, {"gradnorm/clip/scale": 0.5})


@shapes
def test_a_tracker_of_the_user_is_not_closed(shape):
    tracker = shape()
    as_writer(tracker).close()
    as_writer([tracker, tracker]).close()
    assert tracker.closed == 0


@shapes
def test_the_prefix_is_ones_own(shape):
    tracker = shape()
    as_writer(tracker, prefix="").write(0, SCALARS)
    expect(tracker.rows[0][1], SCALARS)


@shapes
def test_a_module_counts_as_its_functions(shape):
    tracker = shape()
    module = types.ModuleType("tracker")
    for name in set(dir(shape)) - set(dir(Fake)):
        setattr(module, name, getattr(tracker, name))
    if shape is not Function:
        as_writer(module).write(1, SCALARS)
        expect(tracker.rows[0][1])


def test_the_rows_that_a_tracker_holds_back_are_flushed_at_the_end():
    tracker = TensorboardX()
    flushed = []
    tracker.flush = lambda: flushed.append(True)
    as_writer(tracker).close()
    assert flushed == [True]


class WandB(Fake):
    """Like `wandb.Run`: a row for a step before the newest is dropped."""

    def __init__(self):
        super().__init__()
        self.axes, self.step = {}, 0

    def define_metric(self, name, step_metric=None):
        assert name not in self.axes
        self.axes[name] = step_metric

    def log(self, data, step=None, commit=None):
        if step is None or step >= self.step:
            self.rows.append((self.step if step is None else step, data))
            self.step = self.step + 1 if step is None else step


def test_rows_that_come_late_to_wandb_are_not_dropped():
    run = WandB()
    writer = as_writer(run)
    run.log({"loss": 1.0}, step=100)
    writer.write(50, SCALARS)
    run.log({"loss": 0.9}, step=101)
    writer.write(99, SCALARS)
    assert run.axes == {"gradnorm/*": "gradnorm/step"}
    assert [row.get("gradnorm/step") for _, row in run.rows] == [None, 50, None, 99]
    del run.rows[1][1]["gradnorm/step"]
    expect(run.rows[1][1])


def test_without_a_prefix_wandb_is_told_of_our_scalars_alone():
    run = WandB()
    writer = as_writer(run, prefix="")
    for scalars in ({"a": 1.0}, {"a": 2.0}, {"a": 3.0, "b": 4.0}):
        writer.write(0, scalars)
    assert run.axes == {"a": "step", "b": "step"}


def test_mlflow_gets_names_that_it_takes():
    tracker = MLflow()
    tracker.set_tracking_uri = lambda uri: None
    as_writer(tracker).write(0, {"grad/kernel[3]": 1.0, "a b/c-d.e_f": 2.0})
    expect(
        tracker.rows[0][1],
        {"gradnorm/grad/kernel_3_": 1.0, "gradnorm/a b/c-d.e_f": 2.0},
    )


class Own:
    """A writer that a user made, whose arguments have names of their own."""

    def __init__(self):
        self.rows, self.closed = [], 0

    def write(self, i, values):
        self.rows.append((i, dict(values)))

    def close(self):
        self.closed += 1


def test_a_writer_is_a_writer_already():
    own = Own()
    assert as_writer(own) is own
    for again in ("a", "b"):
        made = as_writer(Clu(), prefix=again)
        assert as_writer(made) is made


def test_several_writers_all_get_every_step(tmp_path):
    clu, own, nested = Clu(), Own(), Function()
    writer = as_writer([clu, (own, [nested]), tmp_path / "run.jsonl"])
    writer.write(1, SCALARS)
    writer.close()
    expect(clu.rows[0][1])
    expect(nested.rows[0][1])
    expect(own.rows[0][1], SCALARS)
    assert own.closed == 0
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 1


def test_no_writer_at_all_writes_nothing():
    writer = as_writer([])
    writer.write(0, SCALARS)
    writer.close()


class Broken(Fake):
    def write_scalars(self, step, scalars):
        raise OSError("no space left")


def test_where_one_writer_fails_the_others_get_the_row_and_it_is_named():
    clu, function = Clu(), Function()
    writer = as_writer([clu, Broken(), function])
    with pytest.raises(OSError, match="no space left") as failed:
        writer.write(1, SCALARS)
    (note,) = failed.value.__notes__
    assert note == f"This was raised by the writer a `{Broken.__module__}.Broken`."
    expect(clu.rows[0][1])
    expect(function.rows[0][1])


def test_where_several_writers_fail_each_is_told(tmp_path):
    path = tmp_path / "run.jsonl"
    writer = as_writer([path, Clu(), Broken()])
    writer.close()
    with pytest.raises(ExceptionGroup, match="2 of 3 writers failed") as failed:
        writer.write(1, SCALARS)
    closed, full = failed.value.exceptions
    assert isinstance(closed, ValueError)
    assert repr(str(path)) in closed.__notes__[0]
    assert isinstance(full, OSError)


def test_a_list_with_a_stranger_leaves_no_file_open(tmp_path):
    with pytest.raises(TypeError, match="does not know how to write to a `builtins"):
        as_writer([tmp_path / "run.jsonl", 3])  # an open file would warn here


@pytest.mark.parametrize(
    ("stranger", "called"),
    [
        (None, "`builtins.NoneType`"),
        (3, "`builtins.int`"),
        ({"wandb": True}, "`builtins.dict`"),
        (logging.getLogger("run"), "`logging.Logger`"),
        (math, "`math`"),
        (np, "`numpy`"),
        (lambda scalars: None, "`<lambda>`"),
        (Clu, "`Clu`. Give an instance of it, a path"),
    ],
    ids=["none", "number", "dict", "logger", "math", "numpy", "function", "class"],
)
def test_what_has_no_known_shape_is_named_with_all_that_is_taken(stranger, called):
    with pytest.raises(TypeError) as refused:
        as_writer(stranger)
    message = str(refused.value)
    assert f"write to {called}" in message or f"write to a {called}" in message
    for way in ("*.jsonl", "directory", "function", "write(step, d)", "log_metrics"):
        assert way in message


def test_an_open_file_is_no_writer(tmp_path):
    with (
        open(tmp_path / "run.jsonl", "w") as file,
        pytest.raises(TypeError, match="TextIOWrapper"),
    ):
        as_writer(file)


def test_an_address_of_remote_storage_is_no_directory():
    with pytest.raises(ValueError, match=r"gs://bucket/run.*only to files of this"):
        as_writer("gs://bucket/run")


def test_a_file_that_is_no_jsonl_is_refused(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"run\.json'\)` is a file. Name a `\*.jsonl`"):
        as_writer(path)


# JSON lines.


def lines_of(path):
    """Reads strict JSON, and its strings for NaN and infinities."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = path.read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_json_lines_read_back_exactly(tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    writer = as_writer(path)
    exact = SCALARS | {"third": 1 / 3, "below": 5e-324, "above": 1.7e308}
    writer.write(3, exact)
    (line,) = lines_of(path)  # before it is closed
    assert line.pop("step") == 3
    assert [line[f"gradnorm/{x}"] for x in ("nan", "inf", "negative")] == [
        "nan",
        "inf",
        "-inf",
    ]
    found = {name: float(value) for name, value in line.items()}
    expect(found, {f"gradnorm/{name}": value for name, value in exact.items()})
    writer.close()
    writer.close()


@pytest.mark.parametrize(
    ("torn", "left"),
    [
        ('{"step": 0}\n{"step": 1, "los', [0]),
        ('{"step": 0}\n{"step": 1}', [0, 1]),
        ('{"step": 0}\n', [0]),
        ('{"st', []),
        ("", []),
    ],
)
def test_a_file_of_lines_is_gone_on_with_and_a_torn_line_is_cut(tmp_path, torn, left):
    path = tmp_path / "run.jsonl"
    path.write_text(torn)
    writer = as_writer(str(path))
    writer.write(7, {})
    writer.close()
    assert [line["step"] for line in lines_of(path)] == [*left, 7]


KILLED = """
import sys
from gradnorm_jax.monitoring.writers import as_writer

writer = as_writer(sys.argv[1])
for step in range(10**9):
    writer.write(step, {f"norm/{i}": step + i for i in range(50)})
    print(step, flush=True)
"""


def test_a_kill_leaves_every_line_that_was_written(tmp_path):
    path = tmp_path / "run.jsonl"
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 300:
                process.kill()
            last = int(line)
    assert process.returncode == -signal.SIGKILL
    as_writer(path).close()
    found = lines_of(path)
    assert len(found) > last >= 300
    for step, line in enumerate(found):
        scalars = {f"gradnorm/norm/{i}": step + i for i in range(50)}
        assert line == {"step": step, **scalars}
