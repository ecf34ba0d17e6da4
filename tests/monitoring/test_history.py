"""A history holds what was recorded, and says what follows from it."""

import dataclasses

import numpy as np
import pytest

from gradnorm_jax.monitoring import History


def test_columns_are_told_apart_by_their_names():
    columns = ("grad/a", "grad/grad/b", "param/a", "param/grad/b", "loss")
    history = History.from_rows(columns, [3, 4], np.arange(10.0).reshape(2, 5))
    assert history.parts == ("a", "grad/b")
    assert history.kinds == ("grad", "param")
    assert history.update is None
    np.testing.assert_array_equal(history.param, [[2, 3], [7, 8]])
    np.testing.assert_array_equal(history.scalars["loss"], [4, 9])


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1.0, 3e38])
def test_the_global_norm_fits_wherever_its_parts_fit(size):
    row = np.full((1, 4), size, np.float32)
    history = History.from_rows(["grad/a", "grad/b", "grad/c", "grad/d"], [0], row)
    np.testing.assert_allclose(history.global_norm(), 2 * row[:, 0].astype(float))


def test_a_part_that_rests_at_zero_has_ratio_zero_and_one_that_leaves_it_has_inf():
    columns = ("update/a", "update/b", "update/c", "param/a", "param/b", "param/c")
    history = History.from_rows(columns, [0], [[0.0, 1.0, np.nan, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(history.update_ratio, [[0, np.inf, np.nan]])


def test_metrics_name_which_norm_is_meant_and_leave_nothing_out(make):
    history = make()
    metrics = history.metrics()
    assert list(metrics) == [
        "grad_norm/global_preclip",
        "grad_norm/leaf_min",
        "grad_norm/leaf_max",
        "update_norm/global",
        "param_norm/global",
        "update_ratio/median",
        "update_ratio/max",
        "loss",
        "clip/limit",
        "clip/scale",
        "clip/fraction",
    ]
    assert all(values.shape == (len(history),) for values in metrics.values())
    ratio = history.update.astype(float) / history.param
    np.testing.assert_allclose(metrics["update_ratio/max"], ratio.max(axis=1))


def test_metrics_of_a_run_of_gradients_alone_speak_of_gradients_alone(make):
    names = make(kinds=("grad",)).metrics()
    assert not [name for name in names if name.startswith(("update", "param"))]


def test_dropped_counts_the_steps_without_a_row():
    columns = ("grad/a",)
    assert History.from_rows(columns, [0, 1, 2], np.ones((3, 1))).dropped == 0
    assert History.from_rows(columns, [2, 3, 7], np.ones((3, 1))).dropped == 3
    assert History.from_rows(columns, [], np.ones((0, 1))).dropped == 0


@pytest.mark.parametrize("kind", ["update", "grads"])
def test_norms_that_were_not_recorded_are_refused_by_name(make, kind):
    with pytest.raises(ValueError, match=rf"kind='{kind}'.*recorded \('grad',\)"):
        make(kinds=("grad",)).norms(kind)


def test_a_history_cannot_be_changed_by_accident(make):
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().grad = None


def test_rows_that_are_strides_apart_are_not_dropped_ones():
    def history(steps):
        return History.from_rows(("grad/a",), steps, np.ones((len(steps), 1)))

    assert (history([0, 10, 20, 30]).stride, history([0, 10, 20, 30]).dropped) == (
        10,
        0,
    )
    assert history([20, 30, 40, 60]).dropped == 1
    assert history([7]).stride == 1
