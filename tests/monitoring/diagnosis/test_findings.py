"""Findings come in order, in one line, for people and for machines."""

import dataclasses
import json
import math
import re
import time

import numpy as np
import pytest

from gradnorm_jax.monitoring import History, diagnosis
from gradnorm_jax.monitoring.diagnosis import (
    CODES,
    DEFAULT_RULES,
    Finding,
    diagnose,
    explain,
    spike,
)

from .runs import calm, codes, times


def faulty(norms):
    """A spike, a dead part, one that is frozen, and a NaN at the end."""
    norms["grad"][100, 4] *= 99
    norms["grad"][150:, 0] = 0
    norms["update"][:, 2] = 0
    norms["grad"][-1] = norms["update"][-1] = np.nan


def test_findings_come_by_level_and_then_by_step():
    findings = diagnose(calm(edit=faulty))
    assert codes(findings) == ["non-finite", "spike", "dead", "frozen"]
    assert [finding.level for finding in findings] == [
        "error",
        "warning",
        "warning",
        "info",
    ]


def test_each_is_one_line_with_the_number_and_its_limit():
    for finding in diagnose(calm(edit=faulty)):
        line = str(finding)
        assert "\n" not in line
        assert line.isascii()
        assert line.startswith(("ERROR ", "WARN ", "INFO "))
        assert re.search(rf" {finding.code} @[\d,]+ {re.escape(finding.place)}: ", line)
        assert " Likely: " in line
        assert " Try: " in line
    [spiked] = diagnose(calm(edit=times("grad", (150, 4), 99.0)))
    assert re.fullmatch(
        r"WARN spike @150 block_4/kernel: the gradient norm of all is [\d.]+,"
        r" [\d.]+x its running median \(limit 3x and 6 sigma, this is [\d.]+\), for 1"
        r" step; 99 % of its square is in this part; over at step 151\. Likely: an"
        r" unusual batch, or a sharp place of the loss\. Try: .*",
        str(spiked),
    )


def test_a_name_cannot_break_the_line():
    finding = Finding(
        "mine", "info", 1234, "seen", where=("a\nb\x1b[31m", "c"), parts=3
    )
    assert str(finding) == r"INFO mine @1,234 a\nb\x1b[31m (+1 of 3 parts): seen."
    assert "größe" in str(dataclasses.replace(finding, where=("größe",)))


def test_a_finding_is_strict_json():
    finding = Finding("mine", "info", 3, "seen", value=math.nan, limit=math.inf)
    back = json.loads(json.dumps(finding.as_dict(), allow_nan=False))
    assert (back["value"], back["limit"], back["where"]) == ("nan", "inf", [])
    for found in diagnose(calm(edit=faulty)):
        back = json.loads(json.dumps(found.as_dict(), allow_nan=False))
        assert back["code"] == found.code
        assert back["where"] == list(found.where)


def test_a_level_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"level=.*'warning', 'info'.*'fatal'"):
        Finding("mine", "fatal", 0, "seen")


@pytest.mark.parametrize("ignore", ["block_0/.*", ["block_0/kernel", "other"]])
def test_ignored_parts_are_left_out_of_everything(ignore):
    run = calm(edit=times("grad", (slice(None), 0), 0))
    assert codes(diagnose(run)) == ["dead"]
    assert diagnose(run, ignore=ignore) == []
    loud = calm(edit=times("grad", (150, 0), np.nan))
    assert diagnose(loud, ignore=ignore) == []
    leading = calm(edit=times("grad", (150, 0), 99.0))
    assert diagnose(leading, ignore=ignore) == []


def test_a_pattern_is_for_the_whole_name():
    run = calm(parts=12, edit=times("grad", (slice(None), 11), 0))
    assert codes(diagnose(run, ignore="block_1/kernel")) == ["dead"]
    assert codes(diagnose(run, ignore="block_1")) == ["dead"]


def test_what_a_finding_says_to_ignore_can_be_ignored():
    run = calm(names="layers/kernel[{}]", edit=times("grad", (slice(None), 3), 0))
    [finding] = diagnose(run)
    pattern = re.search(r"ignore='(.*)'", finding.tries[1])[1].replace("\\\\", "\\")
    assert diagnose(run, ignore=pattern) == []


def test_all_parts_may_be_ignored():
    assert diagnose(calm(edit=faulty), ignore=".*") == []


@pytest.mark.parametrize("ignore", ["block_(", [3]])
def test_what_is_no_pattern_is_refused(ignore):
    with pytest.raises(ValueError, match=r"diagnose\(ignore=...\).*regular expression"):
        diagnose(calm(), ignore=ignore)


def test_a_negative_warm_up_is_refused():
    with pytest.raises(ValueError, match=r"diagnose\(warmup=...\).*-1"):
        diagnose(calm(), warmup=-1)


def test_steps_of_the_warm_up_count_for_no_spike():
    run = calm(edit=times("grad", 150, 99.0))
    assert codes(diagnose(run, warmup=130)) == ["spike"]
    assert diagnose(run, warmup=131) == []  # fewer than twenty rows before it
    assert codes(diagnose(run, warmup=0)) == ["spike"]


def test_rules_are_functions_of_a_history():
    seen = []

    def mine(history):
        seen.append(history)
        yield Finding("mine", "error", 7, "a thing", where=(history.parts[1],))

    run = calm(edit=times("grad", 150, 99.0))
    assert codes(diagnose(run, [*DEFAULT_RULES, mine])) == ["mine", "spike"]
    assert isinstance(seen[0], History)
    assert seen[0].parts == run.parts
    assert diagnose(run, [mine], ignore="block_1/.*") == []
    assert codes(spike()(run)) == ["spike"]  # ours are such functions, too


@pytest.mark.parametrize(
    ("rule", "error"),
    [
        (3, "3 is no function"),
        (lambda history: ["no"], "'no', which is no `Finding`"),
        (lambda history: None, "None, which is no `Finding`"),
    ],
)
def test_what_is_no_rule_is_refused_by_name(rule, error):
    with pytest.raises(TypeError, match=rf"(?s)diagnose\(rules=...\).*{error}"):
        diagnose(calm(), [rule])


def test_a_maker_of_rules_is_no_rule():
    with pytest.raises(TypeError, match=r"`spike` makes rules.*`spike\(\)`"):
        diagnose(calm(), [spike])


def test_an_option_that_a_rule_does_not_have_is_refused_where_it_is_written():
    with pytest.raises(TypeError, match="sigma"):
        spike(sigma=3)


def test_every_code_is_explained_and_no_other():
    exported = {getattr(diagnosis, name) for name in ("CODES", "explain")}
    assert exported == {CODES, explain}
    for code in CODES:
        assert "\nCriterion: " in explain(code)
        assert "\nWhat helps:" in explain(code)
        assert max(map(len, explain(code).splitlines())) <= 88
    with pytest.raises(ValueError, match=r"explain\(code='spikes'\).*non-finite, expl"):
        explain("spikes")


@pytest.mark.parametrize("kinds", [(), ("update",), ("param",), ("update", "param")])
def test_a_run_that_recorded_little_is_judged_by_that(kinds):
    assert diagnose(calm(kinds=kinds)) == []
    if kinds:
        broken = calm(kinds=kinds, edit=times(kinds[0], (150, 1), np.nan))
        assert codes(diagnose(broken)) == ["non-finite"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1e-45, 3e38])
@pytest.mark.parametrize("kind", ["grad", "update", "param"])
@pytest.mark.parametrize("rows", [slice(None), slice(150, None), slice(0, 30)])
def test_no_norm_makes_a_rule_stumble(value, kind, rows):
    def edit(norms):
        norms[kind][rows] = value

    for finding in diagnose(calm(edit=edit, limit=1.0), [*DEFAULT_RULES]):
        assert str(finding)


def test_few_finite_rows_allow_no_verdict():
    def wild(norms):
        norms["grad"] *= np.logspace(0, 6, len(norms["grad"]))[:, None]
        norms["update"] *= 1e3

    assert diagnose(calm(39, edit=wild), ignore="none") == []


def test_a_run_that_begins_late_has_no_warm_up():
    run = calm(40, first=1000, edit=times("update", slice(None), 500.0))
    assert codes(diagnose(run)) == ["ratio-high"]


def test_a_long_run_of_many_parts_is_judged_in_seconds():
    steps, parts = 20_000, 1000
    norms = np.tile(
        np.random.default_rng(0).uniform(0.9, 1.1, (100, parts)).astype(np.float32),
        (steps // 100, 1),
    )
    norms[9000:9003] *= 50
    names = tuple(f"block_{i}/kernel" for i in range(parts))
    ones = np.ones((steps, parts), np.float32)
    run = History(np.arange(steps), names, norms, ones * 1e-3, ones, {})
    start = time.perf_counter()
    assert codes(diagnose(run)) == ["spike"]
    assert time.perf_counter() - start < 20  # about 0.4 s where nothing else runs
