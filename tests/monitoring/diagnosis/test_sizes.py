"""A history knows how large its parts are, where the run that it is of said so."""

import json

import numpy as np
import pytest

from gradnorm_jax.monitoring import History, load
from gradnorm_jax.monitoring.archive import Archive, Description

COLUMNS = ("grad/b", "grad/w", "update/b", "update/w", "loss")
ROWS = np.ones((2, 5))


def test_sizes_and_dimensions_come_in_the_order_of_the_parts():
    run = History.from_rows(COLUMNS, [0, 1], ROWS, sizes=[3, 12], dims=[1, None])
    np.testing.assert_array_equal(run.sizes, [3, 12])
    assert run.sizes.dtype == np.int64
    assert run.dims == (1, None)


def test_what_is_not_known_is_none():
    run = History.from_rows(COLUMNS, [0, 1], ROWS)
    assert run.sizes is None
    assert run.dims is None


@pytest.mark.parametrize("given", [{"sizes": [1]}, {"dims": [1, 2, 3]}])
def test_one_entry_for_each_part_is_wanted(given):
    [name] = given
    with pytest.raises(
        ValueError, match=rf"{name}=...\).*2 parts, got {len(given[name])}"
    ):
        History.from_rows(COLUMNS, [0, 1], ROWS, **given)


def test_a_run_on_disk_keeps_them(tmp_path):
    writer = Archive(
        tmp_path,
        Description(COLUMNS, {"w": 12, "b": 3}, {"w": 2, "b": None}),
        resume=False,
    )
    writer.append(np.arange(2), ROWS)
    run = load(tmp_path)
    np.testing.assert_array_equal(run.sizes, [3, 12])
    assert run.dims == (None, 2)


def test_a_run_that_was_written_without_dimensions_loads(tmp_path):
    Archive(tmp_path, Description(COLUMNS, {"w": 12, "b": 3}), resume=False).append(
        [0, 1], ROWS
    )
    assert "dims" not in json.loads((tmp_path / "run.json").read_text())
    run = load(tmp_path)
    np.testing.assert_array_equal(run.sizes, [3, 12])
    assert run.dims is None


def test_a_run_that_says_only_of_some_parts_how_large_they_are_loads(tmp_path):
    Archive(tmp_path, Description(COLUMNS, {"w": 12}), resume=False).append(
        [0, 1], ROWS
    )
    assert load(tmp_path).sizes is None
