"""How gradients spread over a network is judged by its matrices, in their order."""

import numpy as np
import pytest

from gradnorm_jax.monitoring.diagnosis import (
    below_eps,
    dead,
    diagnose,
    imbalance,
    vanishing,
)

from .runs import calm, codes, times


def falling(decades, parts=6):
    """Gradients that rise from the first part to the last."""
    return times("grad", slice(None), np.logspace(-decades, 0, parts))


@pytest.mark.parametrize(("decades", "found"), [(2.9, []), (3.1, ["vanishing"])])
def test_gradients_that_fall_toward_the_input_vanish(decades, found):
    run = calm(parts=12, edit=falling(decades, 12), noise=0.01)
    findings = diagnose(run, [vanishing()])
    assert codes(findings) == found
    for finding in findings:
        assert finding.where == ("block_0/kernel",)
        assert finding.value == pytest.approx(decades, abs=0.02)
        assert "from block_11/kernel to block_0/kernel" in finding.seen
        assert "of 12 matrices" in finding.seen


def test_three_matrices_or_a_fall_the_other_way_do_not_vanish():
    assert diagnose(calm(parts=3, edit=falling(6, 3)), [vanishing()]) == []
    assert diagnose(calm(edit=falling(-6)), [vanishing()]) == []


def test_norms_are_divided_by_the_sizes_of_their_parts():
    sizes = np.logspace(0, 8, 6).astype(int)
    assert diagnose(calm(edit=falling(4)), [vanishing()])
    assert diagnose(calm(edit=falling(4), sizes=sizes), [vanishing()]) == []


def test_vectors_do_not_count_and_what_is_unknown_does():
    edit = times("grad", slice(None), np.array([1, 1e-9] * 5))
    mixed = [2, 1] * 5
    assert diagnose(calm(parts=10, edit=falling(5, 10), dims=mixed), [vanishing()])
    assert diagnose(calm(parts=10, edit=edit, dims=mixed), [vanishing()]) == []
    assert diagnose(calm(parts=6, edit=falling(5), dims=1), [vanishing()]) == []
    assert diagnose(calm(parts=6, edit=falling(5), dims=None), [vanishing()])
    assert diagnose(calm(parts=6, edit=falling(5), dims=[None] * 6), [vanishing()])


def test_a_dead_part_does_not_hide_the_fall():
    def edit(norms):
        falling(5, 8)(norms)
        norms["grad"][:, 3] = 0

    rules = [dead(), vanishing()]
    assert codes(diagnose(calm(parts=8, edit=edit), rules)) == ["dead", "vanishing"]


@pytest.mark.parametrize(("rms", "found"), [(1.1e-7, []), (0.9e-7, ["below-eps"])])
def test_gradients_that_eps_outweighs_are_found_where_eps_is_told(rms, found):
    edit = times("grad", (slice(None), 2), rms * 10)
    run = calm(edit=edit, sizes=[100] * 6, noise=0.001)
    findings = diagnose(run, [below_eps(1e-8)])
    assert codes(findings) == found
    assert all(finding.where == ("block_2/kernel",) for finding in findings)
    assert diagnose(calm(edit=edit), [below_eps(1e-8)]) == []  # sizes are not known


def test_a_gradient_of_zero_is_not_below_eps():
    run = calm(edit=times("grad", (slice(None), 2), 0), sizes=[100] * 6)
    assert diagnose(run, [below_eps(1e-8)]) == []


@pytest.mark.parametrize(("share", "found"), [(0.88, []), (0.92, ["imbalance"])])
def test_one_part_that_makes_up_the_norm_is_an_imbalance(share, found):
    factor = np.sqrt(share / (1 - share) * 5)
    run = calm(edit=times("grad", (slice(None), 4), factor), noise=0.001)
    findings = diagnose(run)
    assert codes(findings) == found
    for finding in findings:
        assert finding.where == ("block_4/kernel",)
        assert finding.value == pytest.approx(share, abs=0.005)


def test_an_imbalance_lasts_and_is_of_four_parts_with_a_gradient():
    assert diagnose(calm(parts=3, edit=times("grad", (slice(None), 0), 99.0))) == []
    late = times("grad", (slice(-100, None), 0), 99.0)
    assert diagnose(calm(edit=late), [imbalance()]) == []

    def all_but_one_dead(norms):
        norms["grad"][:, :5] = 0

    assert codes(diagnose(calm(edit=all_but_one_dead))) == ["dead"]


def test_what_a_clip_makes_of_an_imbalance_is_told_where_there_is_one():
    edit = times("grad", (slice(None), 0), 99.0)
    [finding] = diagnose(calm(edit=edit))
    assert "clip" not in finding.seen
    [finding] = diagnose(calm(edit=edit, limit=100.0))
    assert "a global clip scales every other part" in finding.seen
