"""The command line does what it says, and says in one line what it cannot do."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest

import gradnorm_jax
from gradnorm_jax import cli, monitoring
from gradnorm_jax.cli import bench, doctor, following, live, terminal
from gradnorm_jax.monitoring.archive import Archive, Description

COLUMNS = ("grad/a", "grad/b", "update/a", "update/b", "param/a", "param/b", "loss")


def rows(steps, *, bad=()):
    """Rows of a calm run, with a NaN in some of them."""
    values = np.tile(np.float32([3, 4, 0.01, 0.01, 1, 1, 0.5]), (len(steps), 1))
    values[np.isin(steps, bad), 0] = values[np.isin(steps, bad), 2] = np.nan
    return values


def written(directory, *, steps=60, bad=(), every=20):
    """A run in a directory, and the archive that writes it."""
    archive = Archive(directory, Description(COLUMNS, {"a": 9, "b": 16}), resume=False)
    for start in range(0, steps, every):
        numbers = np.arange(start, start + every)
        archive.append(numbers, rows(numbers, bad=bad))
    return archive


@pytest.fixture
def on_a_terminal(monkeypatch):
    """Makes of what is printed a terminal of 80 columns."""
    monkeypatch.setattr(terminal, "is_there", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)


def stopped_after(monkeypatch, number):
    """Makes `watch` see a Ctrl-C at one of its pauses."""
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) >= number:
            raise KeyboardInterrupt

    monkeypatch.setattr(live, "time", types.SimpleNamespace(
        sleep=pause, monotonic=lambda: 10.0 * len(pauses)))  # fmt: skip
    return pauses


def test_report_writes_the_page_and_prints_where_and_what_was_found(tmp_path, capsys):
    written(tmp_path / "run", bad=(30,))
    page = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "run"), "-o", str(page), "--png"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(page)
    assert [line[-4:] for line in printed[1:4]] == [".png"] * 3
    assert printed[4:] == [
        str(finding)
        for finding in monitoring.diagnose(monitoring.load(tmp_path / "run"))
    ]
    assert page.read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("command", ["report", "diagnose"])
def test_strict_refuses_a_run_with_an_error_and_only_that(command, tmp_path, capsys):
    written(tmp_path / "calm")
    written(tmp_path / "bad", bad=(30,))
    assert cli.main([command, str(tmp_path / "calm"), "--strict"]) == 0
    assert "no findings in 60 recorded steps" in capsys.readouterr().out
    assert cli.main([command, str(tmp_path / "bad")]) == 0
    assert cli.main([command, str(tmp_path / "bad"), "--strict"]) == 1
    assert "ERROR non-finite @30 a: " in capsys.readouterr().out


def test_diagnose_speaks_strict_json(tmp_path, capsys):
    written(tmp_path / "bad", bad=(30,))
    written(tmp_path / "calm")

    def refuse(constant):
        raise AssertionError(constant)

    assert cli.main(["diagnose", str(tmp_path / "bad"), "--json", "--strict"]) == 1
    [found] = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert (found["code"], found["step"], found["where"]) == ("non-finite", 30, ["a"])
    assert cli.main(["diagnose", str(tmp_path / "calm"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_diagnose_leaves_out_what_it_is_told_to(tmp_path, capsys):
    written(tmp_path / "bad", bad=(30,))
    command = ["diagnose", str(tmp_path / "bad"), "--strict", "--ignore", "a"]
    assert cli.main(command) == 0
    assert "no findings" in capsys.readouterr().out


def test_explain_says_what_a_code_means_and_lists_all_of_them(capsys):
    assert cli.main(["explain", "spike"]) == 0
    assert capsys.readouterr().out.strip() == monitoring.explain("spike")
    assert cli.main(["explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(monitoring.CODES)


@pytest.mark.parametrize("code", monitoring.CODES)
def test_on_a_terminal_nothing_printed_is_wider_than_it(
    code, on_a_terminal, capsys, tmp_path
):
    assert cli.main(["explain", code]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.split() == monitoring.explain(code).split()


def test_on_a_terminal_a_finding_is_a_paragraph(on_a_terminal, monkeypatch, capsys):
    finding = monitoring.Finding(
        "quiet", "error", step=3, seen="so " * 40, likely=("this",), tries=("that",)
    )
    terminal.show_findings([finding], 10)
    out = capsys.readouterr().out
    plain = re.sub(r"\x1b\[[\d;]*m", "", out)
    assert out != plain
    assert max(map(len, plain.splitlines())) <= 80
    assert plain.splitlines()[-2:] == ["  Likely: this.", "  Try: that."]
    assert plain.split() == str(finding).split()
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.show_findings([finding], 10)
    assert capsys.readouterr().out == plain


@pytest.mark.parametrize(
    ("values", "curve", "in_ascii"),
    [
        ([1, 1, 1], "▁▁▁", "___"),
        ([1, 10, 100], "▁▅█", "_+#"),
        ([0, np.nan, np.inf, 2], "0!!▁", "0!!_"),
        ([0, 0], "00", "00"),
        ([-1, 0, 1, -np.inf], "▁▅█!", "_+#!"),
        ([], "", ""),
    ],
)
def test_a_curve_shows_norms_zeros_and_what_is_not_finite(values, curve, in_ascii):
    assert terminal.sparkline(np.array(values), 9, unicode=True) == curve
    assert terminal.sparkline(np.array(values), 9, unicode=False) == in_ascii


def test_no_spike_and_no_nan_is_lost_in_a_curve():
    values = np.ones(1000)
    values[[317, 705]] = 1e6, np.nan
    curve = terminal.sparkline(values, 10, unicode=True)
    assert curve == "▁▁▁█▁▁▁!▁▁"


def test_watch_once_says_in_one_line_how_a_run_stands(tmp_path, capsys):
    written(tmp_path / "run", bad=(58,))
    assert cli.main(["watch", str(tmp_path / "run"), "--once"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.split()[:4] == ["step", "59", "norm", "5"]
    assert line.endswith("!  loss    0.5  ERROR non-finite a")


def test_watch_prints_a_line_for_each_new_drain_until_it_is_stopped(
    tmp_path, monkeypatch, capsys
):
    archive = written(tmp_path / "run", steps=40)
    pauses = stopped_after(monkeypatch, 3)
    pause = live.time.sleep

    def write_and_pause(seconds):
        if len(pauses) == 1:
            for start in (40, 50):
                archive.append(np.arange(start, start + 10), rows(range(10)))
        pause(seconds)

    live.time.sleep = write_and_pause
    assert cli.main(["watch", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["39", "49", "59"]


def test_watch_waits_for_the_first_rows(tmp_path, monkeypatch, capsys):
    written(tmp_path / "run", steps=0)
    stopped_after(monkeypatch, 3)
    assert cli.main(["watch", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err.count("waiting for the first rows") == 1
    assert cli.main(["watch", str(tmp_path / "run"), "--once"]) == 2
    assert "no rows yet" in capsys.readouterr().err


def test_on_a_terminal_watch_shows_a_table_that_fits(
    on_a_terminal, monkeypatch, tmp_path, capsys
):
    pytest.importorskip("rich")
    written(tmp_path / "run", bad=(58,))
    stopped_after(monkeypatch, 2)
    for options in [], ["--once"]:
        assert cli.main(["watch", str(tmp_path / "run"), *options]) == 0
        out = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capsys.readouterr().out)
        assert max(map(len, out.splitlines())) <= 80
        for words in ("gradient norm", "update/param", "ERROR non-finite @58 a"):
            assert words in out


def test_a_large_model_leaves_a_table_as_high_as_the_terminal(tmp_path):
    console = pytest.importorskip("rich.console").Console(
        width=80, height=24, file=io.StringIO(), color_system=None
    )
    names = [f"block_{k:03}/[bold]/{'long_name_' * 9}" for k in range(200)]
    columns = [f"{kind}/{n}" for kind in ("grad", "update", "param") for n in names]
    values = np.random.default_rng(0).uniform(0.5, 1, (60, 600))
    values[:, 77] = 0
    history = monitoring.History.from_rows(columns, range(60), values)
    look = live.Look.of("runs/" + "a" * 99, history)
    console.print(live._table(look, "new rows", console.size, unicode=True))
    lines = console.file.getvalue().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert any("block_077" in line and "dead" in line for line in lines)
    assert any(re.search(r"and \d+ parts more", line) for line in lines)


def test_without_rich_a_terminal_gets_lines_cut_to_its_width(
    on_a_terminal, monkeypatch, tmp_path, capsys
):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setenv("COLUMNS", "50")
    written(tmp_path / "run", bad=(58,))
    assert cli.main(["watch", str(tmp_path / "run"), "--once"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert len(line) == 50
    assert line.endswith("…")


def test_a_follower_reads_each_file_once_and_keeps_the_newest_rows(
    tmp_path, monkeypatch
):
    archive = written(tmp_path / "run", steps=2000, every=100)
    read = []
    inner = following.archive.read_chunk
    monkeypatch.setattr(
        following.archive, "read_chunk", lambda path: read.append(path) or inner(path)
    )
    follower = following.Follower(tmp_path / "run")
    assert follower.next().steps.tolist() == list(range(2000 - 256, 2000))
    assert len(set(read)) == 3
    assert follower.next() is None
    read.clear()
    archive.append(np.arange(1900, 1950), rows(range(50)))  # it went back
    archive.append(np.arange(1950, 1960), rows(range(10)))
    assert follower.catch_up().steps[-2:].tolist() == [1958, 1959]
    assert len(read) == 2


def test_a_follower_begins_anew_with_another_run_in_the_directory(tmp_path):
    written(tmp_path / "run")
    follower = following.Follower(tmp_path / "run")
    follower.next()
    shutil.rmtree(tmp_path / "run")
    written(tmp_path / "run", steps=20)
    assert follower.next().steps.tolist() == list(range(20))


def test_watch_follows_a_run_that_another_process_writes(tmp_path):
    archive = written(tmp_path / "run", steps=20)
    program = (  # a process that runs in the background would be deaf to it
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from gradnorm_jax.cli import main; raise SystemExit(main())"
    )
    command = [sys.executable, "-u", "-c", program, "watch"]
    with subprocess.Popen(
        [*command, str(tmp_path / "run")], stdout=subprocess.PIPE, encoding="utf8"
    ) as process:
        killer = threading.Timer(60, process.kill)
        killer.start()
        assert "step      19" in process.stdout.readline()
        archive.append(np.arange(20, 30), rows(range(10)))
        assert "step      29" in process.stdout.readline()
        process.send_signal(2)
        assert process.wait() == 0
        killer.cancel()


def test_bench_prints_the_cost_of_both_carriers(monkeypatch, capsys):
    monkeypatch.setattr(bench, "_EVERY", 4)
    monkeypatch.setattr(bench, "_AT_A_TIME", 2)
    monkeypatch.setattr(bench, "_PARAMETERS", 1000)
    assert cli.main(["bench", "--leaves", "5"]) == 0
    out = capsys.readouterr().out
    assert "in 5 leaves" in out
    for arm in ("no record", "returned: measure", "in state: watch"):
        assert re.search(rf"{arm} +\d+\.\d\d", out)


def test_bench_all_hands_its_options_to_the_benchmarks_of_a_checkout(monkeypatch):
    calls = []
    monkeypatch.setattr(
        subprocess, "call", lambda words, env: calls.append((words, env)) or 1
    )
    assert cli.main(["bench", "--all", "--quick", "--only", "norm", "clip"]) == 1
    [(words, env)] = calls
    assert words[1:] == ["-m", "benchmarks", "--quick", "--only", "norm", "clip"]
    root = Path(env["PYTHONPATH"].split(os.pathsep)[0])
    assert (root / "benchmarks" / "__main__.py").exists()


def test_bench_all_says_where_the_benchmarks_are(monkeypatch, tmp_path, capsys):
    package = tmp_path / "gradnorm_jax" / "__init__.py"
    monkeypatch.setattr(gradnorm_jax, "__file__", str(package))
    assert cli.main(["bench", "--all"]) == 2
    assert "folder `benchmarks` of the repository" in capsys.readouterr().err


def test_doctor_finds_nothing_broken_here(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "nothing is broken" in out
    for name in ("jax ", "optax", "x64", "matplotlib", "a watched step"):
        assert name in out


def test_doctor_fails_where_something_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_required", lambda: [("jax", "99.1"), ("lost", "2")])
    monkeypatch.setattr(doctor, "global_norm", lambda grads: 0 * grads[0])
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"BROKEN +jax .*too old: pip install -U 'jax>=99.1'", out)
    assert re.search(r"BROKEN +lost .*pip install 'lost>=2'", out)
    assert re.search(r"BROKEN +norms +the norm of 3e19 twice is 0", out)
    assert "3 broken" in out


def test_doctor_tells_of_settings_that_mislead(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    with doctor.jax.debug_nans(True):
        found = {check.what for check in doctor.hazards()}
    assert {"jax_debug_nans", "XLA_FLAGS"} <= found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "gradnorm report: .*nowhere"),
        (["watch", "nowhere"], "gradnorm watch: .*nowhere"),
        (["diagnose", "nowhere", "--json"], "gradnorm diagnose: .*nowhere"),
        (["diagnose", "{run}", "--ignore", "("], "gradnorm diagnose: .*no regular"),
        (["explain", "flood"], "gradnorm explain: .*The codes are non-finite"),
        (["demo", "--output", "{run}"], "gradnorm demo: .*holds a run"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, message, tmp_path, capsys):
    written(tmp_path)
    arguments = [part.format(run=tmp_path) for part in arguments]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--steps", "0"],
        ["demo", "--max-norm", "-1"],
        ["demo", "--fault", "flood"],
        ["bench", "--leaves", "0"],
        [],
        ["what"],
    ],
)
def test_a_wrong_argument_is_refused_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: gradnorm" in capsys.readouterr().err


def test_without_a_terminal_the_progress_is_a_line_now_and_then(capsys):
    for step in range(25, 1001, 25):
        terminal._line(step, 1000, "loss 1")
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_on_a_terminal_the_progress_is_a_bar(on_a_terminal, capsys):
    pytest.importorskip("rich")
    with terminal.progress() as update:
        update(500, 1000, "loss 0.1")
    assert "500/1000" in capsys.readouterr().out


def test_python_m_gradnorm_jax_is_the_command():
    command = [sys.executable, "-m", "gradnorm_jax", "--version"]
    result = subprocess.check_output(command, text=True)
    assert result == f"gradnorm {gradnorm_jax.__version__}\n"


def test_a_reader_that_goes_away_and_an_old_encoding_are_no_errors(tmp_path):
    written(tmp_path / "run", bad=(30,))
    command = f"{sys.executable} -m gradnorm_jax"
    shell = f"{command} explain | true; {command} watch --once {tmp_path}/run"
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(["bash", "-c", shell], capture_output=True, env=environment)
    assert result.stderr == b""
    assert result.stdout.decode("ascii").endswith("ERROR non-finite a\n")


def test_pictures_without_matplotlib_are_refused_in_one_line(
    tmp_path, monkeypatch, capsys
):
    written(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["report", str(tmp_path), "--png"]) == 2
    assert "pip install 'gradnorm-jax[plot]'" in capsys.readouterr().err
