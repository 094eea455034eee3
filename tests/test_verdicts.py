"""Verdicts on printed numbers: accuracies know chance, counts know the digits that were printed."""

import statistics

import pytest
import torch

from benchmarks.chance import mean_and_deviation, pack, paired, standard_error, unpack
from benchmarks.metrics import OF_A_LAYER, OF_A_ROW
from benchmarks.report import against_paper, table
from benchmarks.report.seeds import over_seeds
from benchmarks.report.verdicts import direction, judged, overall, verdicts
from methods.core.errors import ConfigError

from .made_rows import row as made


def row(**values):
    return {"n_test": 10_000, "budget": {}, "paper": {}, "layers": {}, "top1_float": 90.0, "top1_integer": 90.0,
            **values}


@pytest.mark.parametrize("ours, text", [
    (92.0, "reached"), (90.0, "reached"),      # at least as good
    (89.9, "cannot tell"), (89.4, "cannot tell"),  # 1.96 sqrt(0.89 x 0.11 / 10,000) = 0.61 points
    (89.3, "not reached"), (50.0, "not reached")])
def test_accuracies_within_chance(ours, text):
    assert judged("top1_float", 90.0, ours, row()).verdict == text
    assert judged("error_float", 10.0, 100 - ours, row()).verdict == text


@pytest.mark.parametrize("printed, change, text", [
    (0.0, 0.0, "reached"), (0.0, 0.3, "reached"), (0.0, -0.2, "cannot tell"), (0.0, -0.21, "not reached"),
    (0.7, 0.6, "cannot tell"), (0.7, 0.4, "not reached"), (-0.8, -0.7, "reached")])
def test_a_change_against_the_given_network_has_the_interval_of_the_pairs(printed, change, text):
    paired_ = {"float": {"change": change, "low": change - 0.2, "high": change + 0.2}}
    (one,) = verdicts(row(paper={"against_baseline.float.change": printed}, against_baseline=paired_))
    assert (one.verdict, one.kind, one.ours) == (text, "accuracy", change)
    assert verdicts(row(paper={"against_baseline.float.change": printed}))[0].verdict == "missing"


def test_a_small_test_set_tells_less():
    assert judged("top1_float", 90.0, 88.0, row(n_test=100)).verdict == "cannot tell"
    assert judged("top1_float", 90.0, 88.0, row()).verdict == "not reached"


@pytest.mark.parametrize("metric, printed, ours, text", [
    ("accounting.ratios.data_only", 1910, 1910.4, "reached"), ("accounting.ratios.data_only", 1910, 1909.6, "reached"),
    ("accounting.ratios.data_only", 1910, 1909.4, "not reached"), ("bytes", 100, 101, "not reached"),
    ("bytes", 100, 50, "reached"), ("hardware.bb_bops_percent", 0.36, 0.364, "reached"),
    ("hardware.bb_bops_percent", 0.36, 0.366, "not reached"), ("hardware.bb_bops_percent", 0.36, 0.22, "reached"),
    ("ip1 density", 0.08, 0.08, "reached"), ("ip1 rate_prune_quantize", 0.031, 0.032, "not reached"),
    ("ip1 rate_prune_quantize", 0.06, 0.0631, "reached"), ("ip1 rate_prune_quantize", "0.060", 0.0631, "not reached"),
    ("ip1 rate_prune_quantize", "0.060", 0.0604, "reached"), ("bytes", "100.0", 100.04, "reached"),
    ("bytes", "100.0", 100.06, "not reached"), ("cost.kept_weights", 2569, None, "missing")])
def test_counts_to_the_printed_digits(metric, printed, ours, text):
    assert judged(metric, printed, ours, row()).verdict == text


def test_a_printed_zero_counts_in_a_row():
    (one,) = verdicts(row(paper={"layers": {"a": {"rate_prune_quantize": "0.060"}}},
                          layers={"a": {"rate_prune_quantize": 0.0631}}))
    assert (one.verdict, one.printed, one.gain) == ("not reached", 0.06, pytest.approx(-0.0031))


def test_gain_is_positive_where_ours_is_better():
    assert judged("error_float", 1.58, 1.5, row()).gain == pytest.approx(0.08)
    assert judged("top1_float", 90.0, 91.0, row()).gain == 1.0


def test_a_row_is_as_good_as_its_worst_number():
    good = row(paper={"top1_float": 89.0, "bytes": 100}, bytes=90)
    assert [one.verdict for one in verdicts(good)] == ["reached", "reached"] and overall(good) == "reached"
    assert overall({**good, "bytes": 200}) == "not reached"
    assert overall(row()) is None


# --- chance ------------------------------------------------------------------------------------------------


def test_standard_error_of_single_answers():
    right = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.9
    values = [100.0 * bool(one) for one in right]
    assert standard_error(statistics.fmean(values), 400) == pytest.approx(statistics.pstdev(values) / 20)
    assert standard_error(100.0, 50) == standard_error(0.0, 50) == 0


def test_paired_intervals():
    """Half a pair is added to each of the four cells; then the mean and the deviation of the differences."""
    before = torch.arange(100) < 90
    after = (torch.arange(100) >= 5) & (torch.arange(100) < 92)
    found = paired(before, after)
    assert (found.lost, found.gained, found.change) == (5, 2, pytest.approx(-3))
    weighted = [(-1, 5.5), (1, 2.5), (0, 94)]
    mean = sum(value * weight for value, weight in weighted) / 102
    deviation = (sum(weight * (value - mean) ** 2 for value, weight in weighted) / 102) ** 0.5
    assert found.low == pytest.approx(100 * (mean - 1.959964 * deviation / 102**0.5))
    assert found.high == pytest.approx(100 * (mean + 1.959964 * deviation / 102**0.5))
    assert found.verdict == "cannot tell" and paired(before, ~before).verdict == "worse"
    assert paired(~before, before).verdict == "better" and paired(before, before).verdict == "cannot tell"


@pytest.mark.parametrize("n", [1, 8, 13, 10_000])
def test_answers_are_packed_whole(n):
    right = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.9
    text = pack(right)
    assert torch.equal(unpack(text, n), right) and text.isascii() and len(text) < n + 40


def test_means_of_seeds():
    assert mean_and_deviation([1.0, 2.5, 7.0]) == pytest.approx((3.5, statistics.stdev([1.0, 2.5, 7.0])))
    assert mean_and_deviation([4.0]) == (4.0, 0.0)


@pytest.mark.parametrize("deviation, ours, text", [
    (0.03, 99.24, "cannot tell"), (0.03, 99.19, "cannot tell"), (0.001, 99.29, "cannot tell"),
    (0.03, 98.9, "not reached")])
def test_printed_deviations_count(deviation, ours, text):
    one = row(paper={"top1_integer": [99.3, deviation], "hardware": {"bb_bops_percent": [0.36, 0.01]}},
              top1_integer=ours, hardware={"bb_bops_percent": 0.378})
    assert [found.verdict for found in verdicts(one)] == [text, "cannot tell"]
    assert verdicts({**one, "hardware": {"bb_bops_percent": 0.39}})[1].verdict == "not reached"
    assert verdicts({**one, "hardware": {"bb_bops_percent": 0.22}})[1].verdict == "reached"


def test_seeds_of_a_row_are_one_line():
    """Mean and sample deviation on one baseline; another baseline is another row."""
    rows = [made("a", top1=top1, size=size, seed=seed, n_test=10_000) for seed, (top1, size) in enumerate(
        [(90, 1000), (91, 1001), (92, 1005)])]
    other = made("a", top1=10, seed=3, checkpoint={"digest": "e", "source": "s"})
    found, left = over_seeds([*rows, other])
    assert found["top1_integer"] == 91 and found["bytes"] == 1002 and found["cost"]["macs"] == 500 and left is other
    assert [table.with_spread(one, "top1_integer") for one in (found, other)] == ["91.00 ± 1.00", "10.00"]
    assert table.cells(table.listed(rows)[1])[:3] == ["a", "91.25 ± 1.00", "91.00 ± 1.00"]
    others = [{"budget": {"bits": 3}}, {"config": {"lr": 0.1}}, {"data": "e"}]
    assert [len(over_seeds([rows[0], {**rows[1], **other}])) for other in others] == [2, 2, 2]
    alike = [{"budget": {"bits": None}}, {"densities": "uniform"}]  # what older rows do not have, left as it is
    assert [len(over_seeds([rows[0], {**rows[1], **other}])) for other in alike] == [1, 1]
    assert len(over_seeds([rows[0], {**rows[1], "densities": "global"}])) == 2
    (paper,) = over_seeds([one | {"paper": {"top1_integer": 92, "bytes": [990, 1]}} for one in rows])
    assert against_paper.texts(paper)[:2] == [("top1_integer", "92", "91 ± 1 (3 seeds)", "-1"),
                                              ("bytes", "990 ± 1", "1002 ± 2.6 (3 seeds)", "+12")]
    # 1.96 x hypot(1 / sqrt 3, sqrt(0.91 x 0.09 / 10,000)) = 1.26 points; of the bytes 1.96 hypot(2.6 / sqrt 3, 1) = 3.6
    assert [one.verdict for one in verdicts(paper)] == ["cannot tell", "not reached"]


def test_settings_that_do_nothing_make_no_other_row():
    """One-shot pruning has no `until`: rows from before its default changed are seeds of the same."""
    def pruned(seed, **prune):
        return made("a", seed=seed, method="pipeline", config={"order": ["prune", "quantize"], "prune": {
            "schedule": "one_shot", "criterion": "level", **prune}})

    recipe = {"epochs": 1, "lr": 0.1}
    assert len(over_seeds([pruned(0, until=0.75), pruned(1, until=0.25), pruned(2)])) == 1
    assert len(over_seeds([pruned(0, recipe=None), pruned(1, recipe=recipe)])) == 2
    assert len(over_seeds([pruned(0, recipe=recipe), pruned(1, recipe={**recipe, "lr": 0.2})])) == 2


@pytest.mark.parametrize("metric, budget, kind", [
    ("top1_float", {}, "accuracy"), ("error_integer", {"density": 0.1}, "accuracy"), ("bytes", {}, "counted"),
    ("cost.density", {"density": 0.1}, "given"), ("ip1 density", {"density": {"ip1": 0.1}}, "given"),
    ("cost.density", {"density": None, "bits": 4}, "counted"), ("cost.kept_weights", {"density": 0.1}, "given"),
    ("ip1 bits", {"bits": 4}, "given"), ("accounting.ratios.data_only", {"data_ratio": 0.1}, "given"),
    ("accounting.ratios.data_only", {"density": 0.1, "bits": 4}, "given"),
    ("accounting.ratios.data_only", {"density": 0.1, "bits": None}, "counted"),
    ("accounting.ratios.with_index", {"density": 0.1, "bits": 4, "data_ratio": 0.1}, "counted"),
    ("bytes", {"size_ratio": 0.1}, "given"), ("size_ratio", {"size_ratio": 0.1}, "given"),
    ("cost.macs", {"mac_ratio": 0.5}, "given"), ("cost.bops", {"bop_ratio": 0.5}, "given"),
    ("cost.bops", {"size_ratio": 0.5}, "counted"),
    ("accounting.ratios.data_only_fractional", {"data_ratio": 0.1}, "given")])
def test_what_a_budget_gives_is_no_result(metric, budget, kind):
    assert judged(metric, 1.0, 1.0, row(budget=budget)).kind == kind


@pytest.mark.parametrize("metric", [*OF_A_ROW, *(f"conv1 {name}" for name in OF_A_LAYER)])
def test_every_number_that_may_be_printed_has_a_better_side(metric):
    assert direction(metric) in (1, -1)


@pytest.mark.parametrize("metric, side", [
    ("size_ratio", -1), ("accounting.ratios.with_index", 1), ("hardware.macs_per_byte", 1), ("cost.macs", -1),
    ("conv1 fillers", -1), ("held_out_top1", 1), ("error_integer", -1), ("hardware.energy_ratio", -1),
    ("accounting.bits.data_only", -1), ("hardware.utilisation", 1)])
def test_which_side_is_better(metric, side):
    assert direction(metric) == side
    with pytest.raises(ConfigError, match="whether more of it or less is better"):
        direction("hardware.something")


def test_few_seeds_say_little_of_their_spread():
    """Printed 95; ours 94 over three seeds with a deviation of 0.5: 4.302653 * 0.5 / sqrt(3) = 1.24 points at least."""
    rows = [made("a", top1=top1, seed=seed, n_test=10**9, paper={"top1_integer": 95.0})
            for seed, top1 in enumerate((93.5, 94.0, 94.5))]
    (mean,) = over_seeds(rows)
    assert [one.verdict for one in verdicts(mean)] == ["cannot tell"]
    assert [one.verdict for one in verdicts({**mean, "paper": {"top1_integer": 95.3}})] == ["not reached"]
