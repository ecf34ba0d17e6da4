"""What is not finite, explodes or spikes is found, once, with its numbers."""

import dataclasses

import numpy as np
import pytest

from gradnorm_jax.monitoring.diagnosis import diagnose, exploding, nonfinite, spike

from .runs import calm, codes, times


@pytest.mark.parametrize("kinds", [("grad",), ("grad", "update", "param")])
@pytest.mark.parametrize("parts", [1, 6])
@pytest.mark.parametrize("steps", [0, 1, 19, 20, 45, 300, 1000])
def test_a_calm_run_has_no_findings(kinds, parts, steps):
    assert diagnose(calm(steps, parts, kinds=kinds)) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("step", [0, 3, 150, 299])
def test_one_value_that_is_not_finite_is_an_error_at_any_step(value, step):
    run = calm(edit=times("grad", (step, 2), value), kinds=("grad",))
    [finding] = diagnose(run)
    assert (finding.code, finding.level) == ("non-finite", "error")
    assert (finding.step, finding.last_step, finding.count) == (step, step, 1)
    assert finding.where == ("block_2/kernel",)
    np.testing.assert_equal(finding.value, value)


def test_a_run_of_one_step_that_is_not_finite_says_so():
    [finding] = diagnose(calm(1, edit=times("grad", (0, slice(None)), np.nan)))
    assert str(finding).startswith(
        "WARN non-finite @0 all 6 parts: gradient norm is nan"
    )


def test_what_updates_kept_out_is_a_warning_and_can_be_tolerated():
    run = calm(edit=times("grad", ([100, 200], 0), np.inf))
    [finding] = diagnose(run)
    assert finding.level == "warning"
    assert "so in 2 of 200 recorded steps" in finding.seen
    assert "every update stayed finite" in finding.seen
    assert diagnose(run, [nonfinite(tolerated=0.01)]) == []
    assert codes(diagnose(run, [nonfinite(tolerated=0.006)])) == ["non-finite"]


def test_what_reached_an_update_is_an_error_however_rare():
    run = calm(edit=times("update", (100, 0), np.inf))
    [finding] = diagnose(run, [nonfinite(tolerated=0.5)])
    assert finding.level == "error"
    assert finding.seen.startswith("update norm is inf")


def test_the_growth_before_a_nan_is_told_and_no_spike():
    def diverge(norms):
        for row, size in enumerate([40, 3e3, 2e8, np.nan], start=100):
            norms["grad"][row:] = size

    [finding] = diagnose(calm(edit=diverge, kinds=("grad",)))
    assert finding.place == "all 6 parts"
    assert "norm went 2.33 -> 98 -> 7,348 -> 4.9e8 -> nan" in finding.seen
    assert finding.likely == ("the learning rate is too high",)
    assert "so in 197 of 197 recorded steps" in finding.seen


def test_a_divergence_in_the_first_steps_is_told_as_growth():
    def diverge(norms):
        norms["grad"][:] = np.array([1, 100, 1e9, np.nan])[:, None]

    [finding] = diagnose(calm(4, edit=diverge, kinds=("grad",)))
    assert "norm went 2.45 -> 245 -> 2.45e9 -> nan" in finding.seen


@pytest.mark.parametrize("loss", [np.nan, 0.5])
def test_a_loss_that_was_not_finite_points_to_the_batch(loss):
    losses = np.ones(300)
    losses[150] = loss
    run = calm(
        edit=times("grad", (150, 0), np.nan), kinds=("grad",), scalars={"loss": losses}
    )
    [finding] = diagnose(run)
    assert ("batch" in finding.likely[0]) == np.isnan(loss)
    assert ("finite" in finding.seen) == (not np.isnan(loss))


@pytest.mark.parametrize(("growth", "found"), [(9.5, []), (10.5, ["exploding"])])
def test_a_norm_that_grows_for_long_is_exploding(growth, found):
    # 4 quarters of 100 steps after the warm-up: the median of the last is that of its
    # middle, which lies 300 steps after that of the first.
    slope = np.exp(np.log(growth) / 300 * np.arange(420))[:, None]
    run = calm(420, edit=times("grad", slice(None), slope), noise=0.0, kinds=("grad",))
    assert codes(diagnose(run)) == found
    for finding in diagnose(run):
        assert finding.level == "error"
        assert finding.value == pytest.approx(growth, rel=0.01)
        assert finding.step == 320


def test_a_new_level_that_stays_is_not_exploding():
    run = calm(edit=times("grad", slice(100, None), 50.0))
    assert codes(diagnose(run, [exploding()])) == []


def test_exploding_takes_two_blocks_of_twenty_finite_rows():
    slope = 2.0 ** np.arange(60)[:, None]
    assert not diagnose(
        calm(59, edit=times("grad", slice(None), slope[:59])), [exploding()]
    )
    assert diagnose(calm(60, edit=times("grad", slice(None), slope)), [exploding()])


@pytest.mark.parametrize("kind", ["grad", "update"])
@pytest.mark.parametrize(("factor", "found"), [(2.7, []), (3.5, ["spike"])])
def test_a_short_peak_of_all_gradients_or_updates_is_a_spike(kind, factor, found):
    run = calm(edit=times(kind, slice(150, 153), factor), noise=0.02)
    findings = diagnose(run)
    assert codes(findings) == found
    for finding in findings:
        assert (finding.step, finding.last_step, finding.count) == (150, 152, 3)
        assert finding.value == pytest.approx(factor, rel=0.05)
        assert len(finding.where) == 1
        assert "over at step 153" in finding.seen


def test_six_sigma_are_asked_of_a_noisy_run():
    edit = times("grad", 150, 4.0)
    quiet, noisy = (
        calm(edit=edit, noise=noise, parts=1, kinds=("grad",)) for noise in (0.05, 0.4)
    )
    assert codes(diagnose(quiet)) == ["spike"]
    assert diagnose(noisy) == []
    assert 150 in [finding.step for finding in diagnose(noisy, [spike(sigmas=1.0)])]


def test_the_part_that_leads_is_named_and_else_none():
    leading = calm(edit=times("grad", (150, 4), 30.0))
    [finding] = diagnose(leading)
    assert finding.where == ("block_4/kernel",)
    assert "% of its square is in this part" in finding.seen
    [finding] = diagnose(calm(edit=times("grad", 150, 30.0), parts=40))
    assert finding.where == ()
    assert "% of its square is in any one part" in finding.seen


def test_aftershocks_are_merged_and_what_is_apart_is_not():
    near = calm(edit=times("grad", [150, 155, 170], 9.0))
    [finding] = diagnose(near)
    assert (finding.step, finding.last_step, finding.count) == (150, 170, 3)
    apart = calm(edit=times("grad", [150, 166], 9.0))
    assert [finding.step for finding in diagnose(apart)] == [150, 166]


def test_a_peak_of_gradients_and_updates_is_one_spike():
    def both(norms):
        norms["grad"][150] *= 9
        norms["update"][150:153] *= 6

    [finding] = diagnose(calm(edit=both))
    assert finding.seen.startswith("the gradient norm")
    assert "the update norm was up to" in finding.seen


@pytest.mark.parametrize(("rows", "found"), [(10, ["spike"]), (11, [])])
def test_what_stays_up_for_longer_is_no_spike(rows, found):
    run = calm(edit=times("grad", slice(150, 150 + rows), 9.0))
    assert codes(diagnose(run)) == found


def test_many_spikes_are_one_finding_that_counts_them():
    run = calm(1000, edit=times("grad", slice(100, None, 50), 9.0))
    [finding] = diagnose(run)
    assert finding.count == 18
    first = "18 spikes, at steps 100, 150, 200, ..., 950; the largest is at step 750"
    assert finding.seen.startswith(first)
    assert finding.steps == tuple(range(100, 1000, 50))
    assert (finding.step, finding.last_step) == (100, 950)
    assert finding.last_step == 950


def test_one_spike_does_not_hide_the_next():
    run = calm(edit=times("grad", [150, 180], [[1000.0], [9.0]]))
    assert [finding.step for finding in diagnose(run)] == [150, 180]


def test_a_spike_in_the_last_step_is_not_over_yet():
    [finding] = diagnose(calm(edit=times("grad", -1, 9.0)))
    assert "not over yet" in finding.seen


@pytest.mark.parametrize("step", [0, 10, 39])
def test_there_is_no_spike_before_twenty_rows_after_the_warm_up(step):
    assert diagnose(calm(edit=times("grad", step, 100.0))) == []


def test_steps_that_only_accumulate_are_passed_over():
    def accumulate(norms):
        norms["update"][np.arange(300) % 4 != 3] = 0
        norms["update"][199] *= 9

    [finding] = diagnose(calm(edit=accumulate))
    assert (finding.code, finding.step) == ("spike", 199)


def test_rows_that_are_strides_apart_are_called_recorded_steps():
    run = calm(300, edit=times("grad", slice(150, 152), 30.0))
    run = dataclasses.replace(run, steps=10 * run.steps)
    [finding] = diagnose(run)
    assert (finding.step, finding.last_step) == (1500, 1510)
    assert "for 2 recorded steps;" in finding.seen
