"""A clip that is always on, or never, is found from what it recorded."""

import numpy as np
import pytest

from gradnorm_jax.monitoring.diagnosis import clip_always, diagnose

from .runs import calm, codes, times

NORM = np.sqrt(6)  # of six parts of norm 1


@pytest.mark.parametrize(("share", "found"), [(0.5, []), (0.52, ["clip-always"])])
def test_a_clip_of_most_steps_is_always_on(share, found):
    large = np.random.default_rng(0).permutation(280) < share * 280
    factors = np.concatenate([np.full(20, 1.5), np.where(large, 1.5, 1.0)])
    edit = times("grad", slice(None), factors[:, None])
    findings = diagnose(calm(edit=edit, limit=1.25 * NORM, noise=0.01))
    assert codes(findings) == found
    for finding in findings:
        assert finding.level == "warning"
        assert finding.value == pytest.approx(share, abs=0.002)
        assert "90th percentile 3.6" in finding.seen
        assert finding.tries[0].startswith("a limit of 3.6")


def test_a_limit_that_follows_the_norms_is_an_info():
    limit = np.linspace(0.5, 0.8, 300)
    [finding] = diagnose(calm(limit=limit))
    assert (finding.code, finding.level) == ("clip-always", "info")
    assert "limit 0.52 to 0.8" in finding.seen


def test_a_clip_that_also_enlarges_is_passed_over():
    scalars = {"clip/scale": np.tile([0.5, 2.0], 150), "clip/fraction": 1.0}
    assert diagnose(calm(limit=1.0, scalars=scalars)) == []


def test_shares_of_many_parts_are_averaged_and_no_global_limit_is_advised():
    few = {"clip/limit": 0.9, "clip/scale": 0.8, "clip/fraction": 0.3}
    assert diagnose(calm(scalars=few)) == []
    [finding] = diagnose(calm(scalars=few | {"clip/fraction": 0.7}))
    assert finding.seen.startswith("70 % of norms")
    assert "percentile" not in finding.seen


@pytest.mark.parametrize(("steps", "found"), [(219, []), (220, ["clip-never"])])
def test_a_clip_that_did_nothing_for_two_hundred_steps_is_told(steps, found):
    assert codes(diagnose(calm(steps, limit=100.0))) == found


def test_a_limit_within_twice_the_largest_norm_is_a_safety_net_that_is_needed():
    assert codes(diagnose(calm(limit=2.2 * NORM, noise=0.0))) == ["clip-never"]
    assert diagnose(calm(limit=1.8 * NORM, noise=0.0)) == []
    assert diagnose(calm(limit=20.0, edit=times("grad", 30, 5.0), noise=0.0)) == []


def test_a_clip_goes_by_all_parts_also_by_those_that_are_ignored():
    edit = times("grad", (slice(None), 0), 9.0)
    assert diagnose(calm(edit=edit, limit=12.0), ignore="block_0/.*") == []
    [finding] = diagnose(calm(edit=edit, limit=2.0), ignore="block_0/.*")
    assert "the norm has median 9.2" in finding.seen


def test_a_limit_of_infinity_is_no_clip():
    assert diagnose(calm(limit=np.inf)) == []
    assert diagnose(calm(limit=np.nan, scalars={"clip/fraction": np.nan})) == []


def test_steps_without_a_record_of_the_clip_do_not_count():
    fraction = np.ones(300)
    fraction[:290] = np.nan
    run = calm(limit=1.0, scalars={"clip/fraction": fraction})
    assert diagnose(run, [clip_always()]) == []
