"""A small sample of the mutation suite; `make faults` runs all of it."""

from faults.mutated_files import mutate_files
from faults.mutated_replies import mutate_replies


def test_mutated_replies_are_refused(tmp_path, processes):
    refused, wrong = mutate_replies(tmp_path, 150, seed=11)
    assert wrong == []
    assert refused.total() == 150
    assert {"damage", "replay", "lie_stamp", "lie_value", "lie_metric", "lie_array", "lie_form"} <= set(refused)


def test_mutated_files_are_refused(tmp_path):
    refused, wrong = mutate_files(tmp_path, 40, seed=11)
    assert wrong == []
    assert refused.total() == 40
