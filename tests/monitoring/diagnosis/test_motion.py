"""Parts that do not move, or move too far, are found by their update and gradient."""

import numpy as np
import pytest

from gradnorm_jax.monitoring.diagnosis import (
    dead,
    diagnose,
    param_growth,
    ratio_high,
    ratio_low,
)

from .runs import calm, codes, times

ALL = slice(None)


@pytest.mark.parametrize(("rows", "found"), [(49, []), (50, ["dead"])])
def test_fifty_exact_zeros_in_a_row_are_dead(rows, found):
    run = calm(edit=times("grad", (slice(100, 100 + rows), 3), 0))
    findings = diagnose(run)
    assert codes(findings) == found
    for finding in findings:
        assert (finding.step, finding.last_step, finding.count) == (100, 149, 50)
        assert finding.where == ("block_3/kernel",)
        assert "until step 149" in finding.seen
        assert "it is still moved" in finding.seen


def test_the_smallest_number_is_not_zero():
    run = calm(edit=times("grad", (ALL, 3), 1e-45 / 0.9), noise=0.0)
    assert np.all(run.grad[:, 3] > 0)
    assert codes(diagnose(run, [dead()])) == []


@pytest.mark.parametrize(("steps", "found"), [(9, []), (10, ["dead"])])
def test_a_part_that_never_had_a_gradient_is_told_in_a_short_run(steps, found):
    run = calm(steps, edit=times("grad", (ALL, 3), 0))
    assert codes(diagnose(run)) == found
    for finding in diagnose(run):
        assert "in all 10 recorded steps" in finding.seen
        assert "the loss does not use it" in finding.likely


def test_parts_that_died_together_are_one_finding_and_others_another():
    def edit(norms):
        norms["grad"][120:, 0] = norms["grad"][125:, 1:3] = 0
        norms["grad"][200:, 5] = 0

    below, other = diagnose(calm(parts=8, edit=edit))
    assert below.where == ("block_0/kernel", "block_1/kernel", "block_2/kernel")
    assert (below.step, below.last_step) == (120, 299)
    assert "with everything before block_3/kernel" in below.seen
    assert below.place == "block_0/kernel (+2 of 8 parts)"
    assert (other.where, other.step) == (("block_5/kernel",), 200)
    assert "everything before" not in other.seen


def test_a_part_that_does_not_move_is_not_said_to():
    def edit(norms):
        norms["grad"][:, 3] = norms["update"][:, 3] = 0

    [finding] = diagnose(calm(edit=edit))
    assert "moved" not in finding.seen


def test_steps_without_any_gradient_neither_count_nor_break_a_row():
    def edit(norms):
        norms["grad"][100:160, 3] = 0
        norms["grad"][120:160:2] = 0  # 20 masked batches

    assert diagnose(calm(edit=edit), [dead()]) == []
    [finding] = diagnose(calm(edit=edit), [dead(rows=40)])
    assert finding.count == 40


def test_nan_steps_do_not_count_as_zero():
    run = calm(edit=times("grad", (slice(100, 200), 3), np.nan), kinds=("grad",))
    assert diagnose(run, [dead()]) == []


def test_a_run_without_any_gradient_is_told():
    [finding] = diagnose(calm(edit=times("grad", slice(100, None), 0)))
    assert (finding.code, finding.step, finding.count) == ("dead", 100, 200)
    assert finding.place == "all 6 parts"


def test_a_part_without_entries_is_not_dead():
    run = calm(edit=lambda n: [x.__setitem__((ALL, 3), 0) for x in n.values()],
               sizes=[4, 4, 4, 0, 4, 4])  # fmt: skip
    assert diagnose(run) == []


@pytest.mark.parametrize("rows", [127, 128])
def test_a_gradient_without_an_update_is_frozen(rows):
    run = calm(edit=times("update", (slice(-rows, None), [1, 4]), 0))
    findings = diagnose(run)
    assert codes(findings) == ["frozen"] * (rows == 128)
    for finding in findings:
        assert finding.level == "info"
        assert finding.where == ("block_1/kernel", "block_4/kernel")


def test_a_learning_rate_of_zero_freezes_everything_and_is_one_finding():
    [finding] = diagnose(calm(edit=times("update", ALL, 0)))
    assert (finding.code, finding.place) == ("frozen", "all 6 parts")
    assert "the learning rate is 0" in finding.likely


@pytest.mark.parametrize(
    ("ratio", "level"), [(0.029, None), (0.031, "info"), (0.11, "warning")]
)
def test_large_relative_updates_are_told_by_level(ratio, level):
    run = calm(edit=times("update", slice(100, 200), ratio / 1e-3), noise=0.01)
    levels = [finding.level for finding in diagnose(run, [ratio_high()])]
    assert levels == ([level] if level else [])


def test_one_window_of_fifty_large_updates_is_enough_but_vectors_are_not():
    edit = times("update", slice(150, 250), 50.0)
    [finding] = diagnose(calm(edit=edit), [ratio_high()])
    assert finding.last_step - finding.step == 49
    assert diagnose(calm(edit=edit, dims=1), [ratio_high()]) == []
    few = times("update", (ALL, [0, 1]), 500.0)
    assert diagnose(calm(edit=few), [ratio_high()]) == []  # the median matrix is calm


@pytest.mark.parametrize(("ratio", "found"), [(1.1e-5, []), (0.9e-5, ["ratio-low"])])
def test_updates_that_are_nothing_beside_the_parameters_are_told(ratio, found):
    run = calm(edit=times("update", ALL, ratio / 1e-3), noise=0.001)
    findings = diagnose(run)
    assert codes(findings) == found
    assert all(finding.place == "all 6 parts" for finding in findings)


def test_the_end_of_a_schedule_is_not_a_low_ratio():
    decay = np.logspace(0, -5, 300)[:, None]
    assert diagnose(calm(edit=times("update", ALL, decay)), [ratio_low()]) == []


def test_frozen_matrices_do_not_count_for_the_ratio():
    def edit(norms):
        norms["update"][:, :4] = 0

    assert codes(diagnose(calm(edit=edit))) == ["frozen"]

    def and_low(norms):
        edit(norms)
        norms["update"] *= 1e-4

    assert codes(diagnose(calm(edit=and_low))) == ["ratio-low", "frozen"]


def test_steps_that_accumulate_do_not_lower_the_ratio():
    def accumulate(norms):
        norms["update"][np.arange(300) % 4 != 3] = 0

    assert diagnose(calm(edit=accumulate)) == []


def test_parameters_of_norm_zero_do_not_disturb():
    run = calm(edit=times("param", ALL, 0))
    assert codes(diagnose(run, [ratio_low(), param_growth()])) == []
    assert codes(diagnose(run, [ratio_high()])) == ["ratio-high"]


@pytest.mark.parametrize(
    ("growth", "level"), [(2.9, None), (3.1, "info"), (110.0, "warning")]
)
def test_parameters_that_grow_fast_are_told_by_level(growth, level):
    slope = np.exp(np.log(growth) / 300 * np.arange(301))[:, None]
    run = calm(301, edit=times("param", ALL, slope), noise=0.0)
    levels = [finding.level for finding in diagnose(run, [param_growth()])]
    assert levels == ([level] if level else [])


def test_slow_growth_is_healthy():
    slope = np.exp(np.log(2.5) / 300 * np.arange(3000))[:, None]
    run = calm(3000, edit=times("param", ALL, slope), noise=0.01)
    assert diagnose(run, [param_growth()]) == []


def test_growth_counts_from_the_first_step_and_by_the_number_of_the_step():
    def at_once(norms):
        norms["param"][5:] *= 4

    [finding] = diagnose(calm(edit=at_once), [param_growth()])
    assert finding.step < 5 <= finding.last_step
    slope = np.exp(np.log(2.5) / 30 * np.arange(100))[:, None]
    run = calm(100, edit=times("param", ALL, slope), noise=0.0)
    object.__setattr__(run, "steps", 10 * run.steps)  # every tenth step is recorded
    assert diagnose(run, [param_growth()]) == []
