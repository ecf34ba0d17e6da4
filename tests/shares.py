"""Which cases the gate runs: all would take longer than anyone waits for a change.

With `GRADNORM_EVERY_CASE=1`, as in `make test-all`, or by name, all cases are run.
"""

import collections
import os

#: Tests of which the gate runs the first case, and then one in so many.
SHARES = {
    "ghost/test_composition.py::test_both_implementations_are_right": 2,
    "ghost/test_composition.py::test_in_float64_thirteen_digits_are_right": 2,
    "ghost/test_composition.py::test_microbatches_change_nothing": 3,
    "ghost/test_composition.py::test_the_mean_of_norms_has_a_gradient": 3,
    "ghost/test_magnitudes.py::test_large_activations_meet_small_weights": 2,
    "ghost/test_magnitudes.py::test_losses_of_all_magnitudes_ride_in_one_batch": 4,
    "ghost/test_models.py"
    "::test_values_and_norms_are_those_of_gradients_of_each_example": 3,
    "ghost/test_rules.py::test_each_layer_has_the_rule_that_costs_least": 2,
    "monitoring/diagnosis/test_training.py"
    "::test_nothing_is_found_in_four_healthy_runs": 3,
    "monitoring/test_monitor.py"
    "::test_steps_that_were_taken_anew_replace_those_of_before": 3,
    "monitoring/test_pictures.py::test_every_run_has_its_figures": 3,
    "test_composition.py::test_scaled_losses_are_clipped_as_unscaled_ones": 2,
    "test_contract.py::test_it_compiles_once_with_donation": 2,
    "test_contract.py::test_it_rides_in_scan_inside_the_wrappers_of_optax": 2,
    "test_contract.py::test_sharded_is_unsharded_and_the_state_stays_where_it_was": 2,
    "test_demo.py::test_each_fault_of_the_demo_leads_to_its_finding": 2,
    "test_fold.py::test_neither_splits_nor_order_matter": 2,
    "test_gradients.py"
    "::test_steps_with_memory_can_be_differentiated_with_a_leaf_of_zeros": 2,
    "test_laws.py::test_a_clip_is_its_formula": 2,
    "test_norms.py::test_entries_of_any_magnitude_may_mix": 4,
    "test_norms.py::test_float32_norms_are_right_to_the_last_digits": 2,
    "test_rearm.py::test_a_rule_is_rearmed_by_its_formula": 2,
    "test_summing.py::test_a_clipped_sum_is_that_of_a_loop": 2,
}


def leave_out(config, items, is_chosen):
    """Deselects the items that are not chosen, unless all are asked for."""
    if os.environ.get("GRADNORM_EVERY_CASE") or any("::" in x for x in config.args):
        return
    kept, left_out = [], []
    for item in items:
        (kept if is_chosen(item) else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def one_in_so_many():
    """Returns a function of an item that says whether it is of the share."""
    seen = collections.Counter()

    def is_chosen(item):
        test = item.nodeid.split("[")[0].removeprefix("tests/")
        seen[test] += 1
        return (seen[test] - 1) % SHARES.get(test, 1) == 0

    return is_chosen
