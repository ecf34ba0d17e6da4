"""The numbers in the pictures are right, hide nothing, and stay small."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradnorm_jax.monitoring import History, palette, series
from gradnorm_jax.monitoring.rows import MOST_ROWS, arrange, block_of, network_order


def history_of(grad, steps=None):
    grad = np.asarray(grad, float)
    columns = [f"grad/p{i}" for i in range(grad.shape[1])]
    return History.from_rows(
        columns, np.arange(len(grad)) if steps is None else steps, grad
    )


@given(st.sets(st.integers(0, 3000), min_size=1))
def test_each_row_is_in_the_one_bin_that_its_step_is_in(steps):
    history = history_of(np.ones((len(steps), 1)), sorted(steps))
    bins = series.time_bins(history)
    assert len(bins) <= series.MOST_BINS
    assert bins.edges[0] == min(steps)
    assert max(steps) < bins.edges[-1] <= max(steps) + history.stride
    assert np.all(np.diff(bins.edges) >= 1)
    for b, rows in enumerate(bins):
        inside = [s for s in sorted(steps) if bins.edges[b] <= s < bins.edges[b + 1]]
        assert history.steps[rows].tolist() == inside
    assert bins.cuts[-1] == len(steps)


def test_a_spike_of_one_step_is_seen_in_a_long_run():
    grad = np.ones((100_000, 3))
    grad[54_321, 1] = 1e4
    history = history_of(grad)
    heat = series.heat(history)
    assert heat.largest.shape == (3, series.MOST_BINS)
    assert heat.largest[1].max() == 1e4
    assert series.trace(history).top.max() == pytest.approx(1e4)


def test_one_step_that_is_not_finite_is_seen_in_a_long_run():
    grad = np.ones((10_000, 2))
    grad[7_000, 0], grad[2_000, 1] = np.nan, np.inf
    history = history_of(grad)
    shades = series.heat(history).shades()
    assert np.sum(shades == palette.IS_NONFINITE, axis=1).tolist() == [1, 1]
    trace = series.trace(history)
    assert trace.nonfinite.sum() == 2
    assert np.all(np.isfinite(trace.middle))


def test_a_cell_is_gray_only_if_every_step_in_it_is_zero():
    grad = np.zeros((2400, 2))
    grad[::10, 0] = 1
    shades = series.heat(history_of(grad)).shades()
    assert not np.any(shades[0] == palette.IS_ZERO)
    assert np.all(shades[1] == palette.IS_ZERO)


def test_steps_without_a_row_are_left_open():
    history = history_of(np.ones((4, 1)), [0, 1, 5, 6])
    assert series.heat(history).shades()[0].tolist()[2:5] == [palette.NO_ROW] * 3
    assert np.isnan(series.trace(history).middle).tolist()[1:6] == [0, 1, 1, 1, 0]


def test_the_share_of_steps_clipped_is_of_the_steps_with_a_clip(make):
    history = make(steps=1000, limit=2.0)
    picture = series.trace(history)
    lengths = np.diff(picture.bins.edges)
    total = np.sum(picture.clipped * lengths) / len(history)
    assert total == pytest.approx(np.mean(history.global_norm() > 2.0))
    assert not series.trace(make(limit=None)).clips


def test_an_infinite_limit_is_no_line(make):
    assert np.all(np.isnan(series.trace(make(limit=np.inf)).limit))


def test_a_block_has_the_norm_of_its_parts_together():
    parts = [f"layer_{i}/{name}" for i in range(80) for name in ("bias", "kernel")]
    rows = arrange(parts)
    assert rows.labels == tuple(f"layer_{i}" for i in range(80))
    norms = np.arange(160.0)[None]
    expected = np.hypot(norms[:, ::2], norms[:, 1::2])
    np.testing.assert_allclose(rows.combine(norms), expected)


def test_a_nan_stays_in_its_own_block():
    rows = arrange([f"layer_{i}/{name}" for i in range(80) for name in "ab"])
    norms = np.ones((1, 160))
    norms[0, 7] = np.nan
    assert np.flatnonzero(np.isnan(rows.combine(norms)[0])).tolist() == [3]


def test_a_numbered_root_is_no_block():
    leaves = ("bias", "kernel")
    parts = [f"net/Stack_0/Block_{i}/{leaf}" for i in range(100) for leaf in leaves]
    assert arrange(parts).labels == tuple(f"Block_{i}" for i in range(100))


def test_layers_of_stacked_leaves_form_blocks():
    parts = [f"layers/{leaf}[{i}]" for leaf in ("bias", "kernel") for i in range(100)]
    rows = arrange(parts)
    assert rows.labels == tuple(f"layers[{i}]" for i in range(100))
    np.testing.assert_allclose(rows.combine(np.ones((1, 200))), np.sqrt(2))


@given(st.integers(1, 2000))
def test_there_are_never_too_many_rows_and_every_part_is_in_one(number):
    rows = arrange([f"w{i}" for i in range(number)])
    assert len(rows) <= MOST_ROWS
    assert sorted(rows.order.tolist()) == list(range(number))
    total = np.sqrt(np.sum(rows.combine(np.ones((1, number))) ** 2))
    assert total == pytest.approx(np.sqrt(number))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        pytest.param(
            ["block_1/w", "block_10/w", "block_2/w", "head/w"],
            ["block_1/w", "block_2/w", "block_10/w", "head/w"],
            id="a dict is sorted as text",
        ),
        pytest.param(
            ["conv_2/w", "norm_2/w", "conv_1/w", "norm_1/w"],
            ["conv_2/w", "norm_2/w", "conv_1/w", "norm_1/w"],
            id="a module has an order of its own",
        ),
        pytest.param(
            ["embed/w", "blocks/0/w", "blocks/1/w", "blocks/10/w"],
            ["embed/w", "blocks/0/w", "blocks/1/w", "blocks/10/w"],
            id="a list is in order",
        ),
        pytest.param(["", "w"], ["", "w"], id="a leaf without a name"),
    ],
)
def test_parts_are_in_the_order_of_the_network(parts, expected):
    assert [parts[i] for i in network_order(parts)] == expected


def test_a_block_ends_at_the_first_number_of_a_path():
    assert block_of("stage_1/unit_2/kernel") == "stage_1"
    assert block_of("stages/kernel[2,3]") == "stages[2,3]"
    assert block_of("") == ""


@given(st.floats(1e-40, 1e35), st.floats(1.0, 1e40))
def test_a_logarithmic_axis_shows_its_values_and_has_ticks(low, factor):
    axis = series.LogAxis.around([low, low * factor, 0, np.nan, np.inf])
    assert axis.low < low <= low * factor < axis.high
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 6
    assert all(axis.low <= tick <= axis.high for tick in ticks)
    places = axis.position(np.array([0, low, low * factor, np.inf, np.nan]))
    assert places[0] == 0
    assert places[3] == places[4] == 1
    assert np.all(np.diff(places) >= 0)


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [np.nan], [np.inf]])
def test_an_axis_of_nothing_to_show_still_has_ticks(values):
    assert series.LogAxis.around(values).ticks()


@given(st.integers(0, 10**7), st.integers(0, 10**7))
def test_ticks_of_steps_are_few_and_inside(first, span):
    ticks = series.step_ticks(first, first + span)
    assert len(ticks) <= 6
    assert all(first <= tick <= first + span for tick in ticks)
    assert ticks or span > 0


def test_what_lies_outside_the_usual_ratio_stands_out_the_farthest_first():
    columns = [f"{kind}/p{i}" for kind in ("update", "param") for i in range(5)]
    row = [1e-3, 1e-5, 0.5, 1e-9, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    history = History.from_rows(columns, [0], [row])
    ratios = series.flow(history).panels[1]
    assert set(ratios.offenders) == {1, 2, 3, 4}
    assert set(ratios.offenders[:2]) == {3, 4}


def test_a_quantile_is_never_a_nan_and_never_passes_one_over():
    values = np.array([1.0, np.nan, np.inf, 2.0, 3.0])
    assert [series.quantile(values, q) for q in (0.1, 0.5, 0.9)] == [1, 3, np.inf]


@given(st.lists(st.floats(0, 1e30), min_size=1), st.floats(0, 1))
def test_a_quantile_is_the_nearest_of_the_values(values, q):
    expected = np.quantile(values, q, method="nearest")
    assert series.quantile(np.array(values), q) == expected


@pytest.mark.parametrize("number", [10, 400])
def test_the_largest_of_a_row_is_that_of_its_norms(number):
    norms = np.random.default_rng(0).exponential(size=(30, number)).astype(np.float32)
    norms[3, 5] = np.nan
    rows = arrange([f"layer_{i // 4}/w{i % 4}" for i in range(number)])
    expected = rows.combine(norms).max(axis=0)
    np.testing.assert_allclose(rows.largest(norms), expected, rtol=1e-7)


def test_rows_know_their_parts_and_their_blocks():
    rows = arrange(["embed", "layer_0/b", "layer_0/w", "layer_1/w"])
    assert rows.row_of().tolist() == [0, 1, 2, 3]
    assert rows.blocks() == [("embed", 0, 1), ("layer_0", 1, 3), ("layer_1/w", 3, 4)]
    rows = arrange(["embed", "layer_0/b", "layer_0/w", "layer_1/w"], 2)
    assert rows.row_of().tolist() == [0, 1, 1, 2]
    assert rows.blocks() == [("embed", 0, 1), ("layer_0", 1, 2), ("layer_1", 2, 3)]


def test_there_is_nothing_to_draw_without_norms():
    with pytest.raises(ValueError, match=r"nothing to draw .* `record=`"):
        series.main_kind(History.from_rows(["loss"], [0], [[1.0]]))


def test_rows_that_are_strides_apart_leave_no_gaps():
    steps = np.arange(0, 1000, 10)
    history = History.from_rows(("grad/a",), steps, np.ones((100, 1)))
    bins = series.time_bins(history)
    assert (len(bins), bins.single, bins.steps(3)) == (100, True, (30, 30))
    assert np.diff(bins.cuts).tolist() == [1] * 100
    np.testing.assert_allclose(bins.position([0, 990]), [0.005, 0.995])
