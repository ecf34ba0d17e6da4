"""The benchmarks run, small, and say what was measured and what was missed."""

import json
import sys

import pytest

from benchmarks import clips, norms, program, rows, torch_peer, trees
from benchmarks.rows import Limits, Row

ROW = Row(
    "made up",
    "norm",
    "gpt2 124M/148",
    "float32",
    "optax",
    ours_ms=2.0,
    theirs_ms=1.6,
    ratio=1.25,
    low=1.2,
    high=1.3,
    share=0.5,
    memory=10 * rows.MIB,
    peer_memory=2 * rows.MIB,
    build_ms=40.0,
    peer_build_ms=10.0,
)


@pytest.fixture
def made_up(monkeypatch):
    """Lets a run have one suite, with the row that is wanted."""

    def set_row(**fields):
        row = ROW._replace(**fields)
        monkeypatch.setattr(program, "SUITES", {"made up": lambda options: iter([row])})

    return set_row


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    torch_peer.why_missing.cache_clear()
    yield
    torch_peer.why_missing.cache_clear()


def test_a_tiny_run_writes_the_rows_in_three_forms(
    monkeypatch, without_torch, tmp_path, capsys
):
    for suite in (norms, clips):
        monkeypatch.setattr(suite, "QUICK_TREES", ("small",))
    files = {kind: tmp_path / f"rows.{kind}" for kind in ("json", "markdown", "plot")}
    files["plot"] = tmp_path / "rows.png"
    asked = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    only = ["norm", "clip", "skip", "eager"]
    words = ["--tiny", "--quick", "--repeats", "2", "--only", *only]
    assert program.main([*words, *asked]) == 0

    written = json.loads(files["json"].read_text())
    found = [(row["suite"], row["what"], row["peer"]) for row in written["rows"]]
    assert found == [
        ("norm", "norm", "optax"),
        ("clip", "clip", "optax"),
        ("skip", "skip_step in AdamW", "no skipping"),
        ("eager", "norm outside of jit", "optax"),
    ]
    norm = written["rows"][0]
    assert norm["moved"] == 4 * 50
    assert norm["share"] > 0
    assert norm["rounds"] == 2
    assert norm["low"] <= norm["ratio"] <= norm["high"]
    assert norm["build_ms"] > 0
    assert norm["memory"] is not None
    assert norm["limits"] == {}  # of tiny trees
    assert written["rows"][1]["moved"] == 3 * norm["moved"]
    machine = written["machine"]
    assert machine["command"] == (
        "python -m benchmarks --quick --only norm clip skip eager --repeats 2 --tiny"
    )
    assert str(tmp_path) not in machine["command"]
    assert set(machine["versions"]) >= {"jax", "optax", "numpy", "python"}

    page = files["markdown"].read_text()
    assert [x for x in page.splitlines() if x.startswith("## ")] == [
        f"## {name}" for name in only
    ]
    assert files["plot"].read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "left out: torch, which is not installed" in out
    assert out.count("small 50/5") == 2
    assert page.count("compile ms") == len(only)


def test_torch_without_the_device_is_left_out_too(monkeypatch):
    pytest.importorskip("torch")
    torch_peer.why_missing.cache_clear()
    assert torch_peer.why_missing("cpu") is None
    assert torch_peer.why_missing("tpu") == "torch, which finds no tpu here"


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (Limits(at_most=1.2), "time <= 1.20 is missed: 1.25 (1.20-1.30)"),
        (Limits(at_least=0.85), "stream >= 0.85 is missed: 0.50"),
        (Limits(memory=1.1), "memory <= 1.10 is missed: 10.0/2.0 MiB"),
        (Limits(build=3.0), "compile <= 3.00 is missed: 40/10 ms"),
        (Limits(ms=1.5), "ms <= 1.5 is missed: 2.0 ms"),
    ],
)
def test_a_check_fails_on_a_missed_limit_and_names_it(made_up, capsys, limits, text):
    made_up(limits=limits)
    assert program.main(["--check"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"made up: norm, gpt2 124M/148, float32, against optax: {text}"


def test_a_missed_limit_fails_only_a_check(made_up, capsys):
    made_up(limits=Limits(at_most=1.2))
    assert program.main([]) == 0
    out = capsys.readouterr().out
    assert "time <= 1.20 is missed" in out
    assert max(map(len, out.splitlines()[2:5])) <= 120


def test_a_check_passes_when_all_limits_are_kept(made_up, capsys):
    made_up(limits=Limits(at_most=1.25, at_least=0.5, memory=3.6, build=4.0, ms=2.0))
    assert program.main(["--check"]) == 0
    assert "5 of 5 limits are kept" in capsys.readouterr().out


def test_a_ratio_is_held_against_its_limit_as_it_is_printed(made_up):
    made_up(ratio=1.2543, limits=Limits(at_most=1.25))
    assert program.main(["--check"]) == 0


def test_what_was_not_run_has_no_limit_to_miss(made_up, capsys):
    made_up(ours_ms=None, ratio=None, low=None, limits=Limits(at_most=1.0, ms=1.0))
    assert program.main(["--check"]) == 0
    assert "not run" in capsys.readouterr().out


def test_rows_are_written_though_a_later_suite_fails(monkeypatch, tmp_path):
    def fail(options):
        yield ROW
        raise RuntimeError("out of memory")

    monkeypatch.setattr(program, "SUITES", {"made up": fail})
    path = tmp_path / "rows.json"
    with pytest.raises(RuntimeError, match="out of memory"):
        program.main(["--json", str(path)])
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_a_quick_run_names_the_suites_that_it_leaves_out(monkeypatch, capsys):
    ran = []
    suites = {
        name: lambda options, name=name: iter(ran.append(name) or ())
        for name in ("norm", "rules", "skip", "sharded")
    }
    monkeypatch.setattr(program, "SUITES", suites)
    program.main(["--quick", "--tiny"])
    assert ran == ["norm", "skip"]
    assert "ask for them: --only rules sharded" in capsys.readouterr().out
    program.main(["--quick", "--tiny", "--only", "rules"])
    assert ran[2:] == ["rules"]


def test_an_unknown_suite_is_refused_with_the_names_there_are(capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--only", "nrom"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "'nrom'" in error
    assert all(name in error for name in program.SUITES)


def test_a_device_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--device", "tpu"])
    assert stop.value.code == 2
    assert "there is no tpu here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--json no/rows.json", "--json no/rows.json: there is no folder no"),
        ("--markdown .", "--markdown .: is a folder, name a file"),
        ("--plot rows.txt", "a file that it knows, such as rows.png"),
        ("--only eager --arm norms", "add `examples` to --only"),
        ("--tiny --check", "means nothing"),
        ("--repeats 1.5", "must be a whole number above 0, got 1.5"),
    ],
)
def test_what_would_be_in_vain_is_refused_before_it_is_measured(
    monkeypatch, capsys, tmp_path, words, error
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        program.main(words.split())
    assert stop.value.code == 2
    assert error in capsys.readouterr().err


def test_a_run_without_a_row_fails(monkeypatch, capsys):
    monkeypatch.setattr(program, "SUITES", {"made up": lambda options: iter(())})
    assert program.main([]) == 1
    assert "nothing was measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "entries", "leaves", "label"),
    [
        ("gpt2", 124_439_808, 148, "gpt2 124M/148"),
        ("llama", 1_038_682_112, 146, "llama 1.0B/146"),
        ("small", 1_000_000, 1000, "small 1.0M/1000"),
        ("huge", 125_000_000, 1, "huge 125M/1"),
        ("stacked", 85_054_464, 12, "stacked 85M/12"),
        ("dense", 1_702_000, 100, "dense 1.7M/100"),
        ("wide", 1_696_500, 50, "wide 1.7M/50"),
        ("many", 10_080_000, 400, "many 10M/400"),
        ("matrices", 2_073_600, 100, "matrices 2.1M/100"),
    ],
)
def test_a_tree_has_the_numbers_and_leaves_that_it_is_named_for(
    name, entries, leaves, label
):
    shapes = trees.FULL[name]
    assert (trees.num_entries(shapes), len(shapes)) == (entries, leaves)
    assert trees.label(name, shapes) == label
    assert trees.TINY.keys() == trees.FULL.keys()


def test_a_filled_tree_is_random_and_its_norm_known():
    tree = trees.fill({"a": (300, 7), "b": (11,)}, "bfloat16")
    assert tree["a"].dtype == "bfloat16"
    assert trees.size(tree) == 2 * (300 * 7 + 11)
    assert trees.true_norm(tree) == pytest.approx(0.01 * (300 * 7 + 11) ** 0.5, rel=0.1)
    again = trees.fill({"a": (300, 7), "b": (11,)}, "bfloat16", seed=1)
    assert (tree["a"] != again["a"]).any()
