"""Every experiment runs, small, and what holds at any size holds."""

import functools

import numpy as np
import pytest

from examples import (
    corrupted_batches,
    digits,
    experiment,
    lock_in,
    mislabelled_digits,
    noise_scale,
    private_digits,
    rnn_explosion,
    scale_transfer,
    stable_rates,
)

MODULES = {
    "rnn_explosion": rnn_explosion,
    "stable_rates": stable_rates,
    "corrupted_batches": corrupted_batches,
    "scale_transfer": scale_transfer,
    "lock_in": lock_in,
    "noise_scale": noise_scale,
    "private_digits": private_digits,
    "mislabelled_digits": mislabelled_digits,
}
every_experiment = pytest.mark.parametrize("name", MODULES)


@functools.cache  # each experiment runs once, not once for each test
def outcome(name):
    return MODULES[name].run(quick=True)


def column(name, key, title):
    """Returns one column of an experiment's table, by the value of another."""
    return {row[key]: row[title] for row in outcome(name).rows}


@every_experiment
def test_a_table_has_the_same_columns_in_every_row(name):
    rows = outcome(name).rows
    assert len(rows) >= 2
    assert all(list(row) == list(rows[0]) for row in rows)
    table = experiment.markdown(rows).splitlines()
    assert len(table) == 2 + len(rows)
    assert {line.count(" | ") for line in table} == {len(rows[0]) - 1}


@every_experiment
def test_every_number_is_finite_and_every_accuracy_a_share(name):
    for row in outcome(name).rows:
        numbers = {
            title: x for title, x in row.items() if isinstance(x, float | np.floating)
        }
        assert numbers
        assert np.all(np.isfinite(list(numbers.values()))), row
        shares = [x for title, x in numbers.items() if "accuracy" in title]
        assert all(0 <= share <= 1 for share in shares)


@every_experiment
def test_the_command_prints_the_table_and_saves_a_picture(name, tmp_path, capsys):
    found = outcome(name)
    path = experiment.main(
        name, lambda quick: found, ["--quick", "--out", str(tmp_path / "new")]
    )
    printed = capsys.readouterr().out
    assert experiment.markdown(found.rows) in printed
    assert found.findings
    assert all(f"- {finding}\n" in printed for finding in found.findings)
    assert path == tmp_path / "new" / f"{name}.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert path.stat().st_size > 10_000


@every_experiment
def test_the_first_sentence_of_an_experiment_says_what_it_shows(name):
    summary = MODULES[name].__doc__.splitlines()[0]
    assert summary.endswith(".")


def test_the_clip_lets_a_recurrent_network_learn_at_a_rate_that_is_too_large():
    rows = [row for row in outcome("rnn_explosion").rows if row["rate"] == 0.3]
    accuracy = {row["clip"]: row["accuracy, median"] for row in rows}
    assert accuracy["global 1.0"] > accuracy["none"] + 0.2


def test_without_normalization_only_a_clip_survives_a_large_rate():
    accuracy = column("stable_rates", "clip", "0.03")
    assert accuracy["none"] < 0.2
    assert accuracy["global norm 1"] > 0.5


def test_an_adaptive_clip_survives_corrupted_batches_as_a_tuned_constant_does():
    accuracy = column("corrupted_batches", "clip", "accuracy")
    without, tuned, adaptive = accuracy.values()
    assert tuned > without + 0.05
    assert abs(adaptive - tuned) < 0.03


def test_a_tuned_constant_does_not_transfer_to_a_smaller_loss_but_zclip_does():
    change = {
        clip: float(by)
        for clip, by in column("scale_transfer", "clip", "change").items()
    }
    without, constant, adaptive = change.values()
    assert constant < -0.05
    assert abs(adaptive) < 0.01
    assert abs(without) < 0.01


def test_rearming_frees_a_clip_that_is_locked_in_and_costs_a_long_burst():
    _, locked, freed = outcome("lock_in").rows
    kept, short, long = (
        "kept at the end of the rise",
        "accuracy, burst of 10",
        "accuracy, burst of 80",
    )
    assert locked[kept] < 0.2
    assert freed[kept] > 0.8
    assert freed[short] == pytest.approx(locked[short], abs=0.02)
    assert freed[long] < locked[long] - 0.1


def test_an_average_of_the_noise_scale_is_valid_and_near_the_truth():
    last = outcome("noise_scale").rows[-1]
    ratios = [float(x) for x in last["estimate / truth, each seed"].split(", ")]
    assert 0.6 < np.mean(ratios) < 1.5
    assert last["valid, over 200 steps"] == "100%"
    assert last["valid, over 1 step"] != "100%"


def test_noise_costs_accuracy_and_the_less_there_is_the_more_is_told():
    rows = outcome("private_digits").rows
    epsilons = [row["epsilon at delta 0.0001"] for row in rows]
    assert epsilons[:2] == ["none", "none"]
    assert epsilons[2:5] == epsilons[5:]
    assert [float(x) for x in epsilons[2:5]] == sorted(
        map(float, epsilons[2:5]), reverse=True
    )
    accuracy = [row["accuracy"] for row in rows]
    assert accuracy[0] > accuracy[4] + 0.1
    assert accuracy[2] > accuracy[4]
    assert rows[0]["examples clipped"] == "0%"


def test_each_image_joins_a_private_batch_on_its_own():
    seed = private_digits.seeds(0, 2, 200)
    sizes = seed.is_there.sum(axis=-1)
    assert sizes.mean() == pytest.approx(private_digits.SIZE, abs=3)
    assert 9 < sizes.std() < 13  # that of a binomial is 10.8
    assert sizes.max() == seed.images.shape[-1]
    for images, is_there in zip(seed.images[0], seed.is_there[0], strict=True):
        assert len(np.unique(images[is_there])) == is_there.sum()


def test_wrong_labels_have_large_gradient_norms_as_they_have_large_losses():
    last = outcome("mislabelled_digits").rows[-1]
    assert last["found by gradient norm"] > 0.7
    assert last["found by loss"] == pytest.approx(
        last["found by gradient norm"], abs=0.1
    )
    assert last["found by chance"] < 0.2


def test_one_label_in_twenty_is_another_digit():
    seed, labels = mislabelled_digits.seeds(2, 1), digits.load()[1]
    np.testing.assert_array_equal(seed.labels != labels, seed.is_wrong)
    assert seed.is_wrong.mean() == pytest.approx(0.05, abs=0.001)
    assert set(np.unique(seed.labels)) == set(range(10))


def test_all_runs_are_the_outer_product_of_the_axes():
    found = experiment.all_runs(
        lambda x, pair: x * pair[0] + pair[1],
        (np.array([1.0, 10.0]), (np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.0, 0.0]))),
    )
    np.testing.assert_allclose(found, [[1.5, 2, 3], [10.5, 20, 30]])


def test_side_by_side_keeps_the_order_and_passes_an_error_on():
    arms = {str(n): functools.partial(int, n) for n in range(20)}
    assert experiment.side_by_side(arms) == {str(n): n for n in range(20)}
    with pytest.raises(ZeroDivisionError):
        experiment.side_by_side({"bad": lambda: 1 / 0})


def test_corrupted_steps_are_bright_and_wrong_and_the_others_as_they_were():
    rng = np.random.default_rng(0)
    clean = digits.Stream.clean(rng, 4)
    bad = clean.corrupted(rng, at=np.array([False, True, False, False]))
    np.testing.assert_array_equal(bad.brightness, [1, 100, 1, 1])
    np.testing.assert_array_equal(bad.labels[[0, 2, 3]], clean.labels[[0, 2, 3]])
    assert (bad.labels[1] != clean.labels[1]).mean() > 0.5


def test_the_recurrent_matrix_starts_at_spectral_radius_1():
    params = rnn_explosion.initial_params(np.random.default_rng(0))
    radius = np.abs(np.linalg.eigvals(params["recurrent"])).max()
    assert radius == pytest.approx(1)


def test_a_sequence_tells_which_symbols_came_early_and_late():
    symbols, orders = rnn_explosion.sequences(np.random.default_rng(0), (100,), 50)
    told = np.array([row[row < 2] for row in symbols])
    assert told.shape == (100, 2)
    np.testing.assert_array_equal(orders, 2 * told[:, 0] + told[:, 1])
    places = np.array([np.flatnonzero(row < 2) for row in symbols])
    assert places[:, 0].min() >= 5
    assert places[:, 0].max() <= 10
    assert places[:, 1].min() >= 20
    assert places[:, 1].max() <= 25
