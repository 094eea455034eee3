"""Verdicts on printed numbers: accuracies know chance, counts know the digits that were printed."""

import pytest

from benchmarks.report.verdicts import judged, overall, verdicts


def row(**values):
    return {"n_test": 10_000, "paper": {}, "layers": {}, "top1_float": 90.0, "top1_integer": 90.0, **values}


@pytest.mark.parametrize("ours, text", [
    (92.0, "reached"), (90.0, "reached"),      # at least as good
    (89.9, "cannot tell"), (89.4, "cannot tell"),  # 1.96 sqrt(0.89 x 0.11 / 10,000) = 0.61 points
    (89.3, "not reached"), (50.0, "not reached")])
def test_accuracies_within_chance(ours, text):
    assert judged("top1_float", 90.0, ours, row()).verdict == text
    assert judged("error_float", 10.0, 100 - ours, row()).verdict == text


def test_a_small_test_set_tells_less():
    assert judged("top1_float", 90.0, 88.0, row(n_test=100)).verdict == "cannot tell"
    assert judged("top1_float", 90.0, 88.0, row()).verdict == "not reached"


@pytest.mark.parametrize("metric, printed, ours, text", [
    ("accounting.ratios.data_only", 1910, 1910.4, "reached"), ("accounting.ratios.data_only", 1910, 1909.6, "reached"),
    ("accounting.ratios.data_only", 1910, 1909.4, "not reached"), ("bytes", 100, 101, "not reached"),
    ("bytes", 100, 50, "reached"), ("hardware.bb_bops_percent", 0.36, 0.364, "reached"),
    ("hardware.bb_bops_percent", 0.36, 0.366, "not reached"), ("hardware.bb_bops_percent", 0.36, 0.22, "reached"),
    ("ip1 density", 0.08, 0.08, "reached"), ("ip1 rate_prune_quantize", 0.031, 0.032, "not reached"),
    ("cost.kept_weights", 2569, None, "missing")])
def test_counts_to_the_printed_digits(metric, printed, ours, text):
    assert judged(metric, printed, ours, row()).verdict == text


def test_gain_is_positive_where_ours_is_better():
    assert judged("error_float", 1.58, 1.5, row()).gain == pytest.approx(0.08)
    assert judged("top1_float", 90.0, 91.0, row()).gain == 1.0


def test_a_row_is_as_good_as_its_worst_number():
    good = row(paper={"top1_float": 89.0, "bytes": 100}, bytes=90)
    assert [one.verdict for one in verdicts(good)] == ["reached", "reached"] and overall(good) == "reached"
    assert overall({**good, "bytes": 200}) == "not reached"
    assert overall(row()) is None
