"""Claims: paired on the same inputs, over seeds, answered only where rows are there."""

import math

import pytest
import torch

from benchmarks.chance import Change, changed, holm, pack, paired
from benchmarks.docs.readme import claim_lines
from benchmarks.jobs import all_tables
from benchmarks.report.claims import (
    CANNOT_TELL,
    MISSING,
    MIXED,
    NO,
    UNLIKE,
    YES,
    Claim,
    Found,
    in_words,
    lines_of,
    put_to,
    read_claims,
    told_of,
    verdict,
)
from methods.core.errors import ConfigError

N = 1000


def row(name, wrong, seed=0, network="net", start="a", n=N, data="d", size=100, needs="train"):
    right = torch.ones(n, dtype=torch.bool)
    right[list(wrong)] = False
    return {"name": name, "network": network, "seed": seed, "checkpoint": {"digest": start}, "n_test": n, "data": data,
            "right": {"integer": pack(right)}, "bytes": size, "task": "digits", "difficulty": {"data": needs}}


def judged(rows, pairs=(("a", "b"),)):
    return put_to(Claim("text", "t", pairs), {"t": rows})


def test_a_start_that_one_of_them_lacks_is_said():
    """Of two baselines each with one of its own: the shared one is judged, the others are not dropped in silence."""
    rows = [row("a", range(20)), row("a", range(300), start="q"), row("b", range(60)), row("b", range(10), start="r")]
    for pairs in ((("a", "b"),), (("b", "a"),)):
        found = judged(rows, pairs)
        assert sorted(one.verdict for one in found) == sorted([UNLIKE, UNLIKE, YES if pairs[0][0] == "a" else NO])
        assert "2 not comparable" in told_of(found)
    assert verdict(put_to(Claim("text", "t", (("a", "b"),), all=True), {"t": rows}), every=True) == CANNOT_TELL


def test_a_pair_is_judged_on_the_same_inputs():
    (one,) = judged([row("a", range(20), size=50), row("b", range(60))])
    assert one.change.change == pytest.approx(4.0) and one.change.interval()[0] > 0 and one.verdict == YES
    assert (one.network, one.seeds, one.ratio) == ("net", 1, 0.5)
    (other,) = judged([row("a", range(20)), row("b", range(60))], [("b", "a")])
    assert other.verdict == NO and other.change.change == -one.change.change
    (none,) = judged([row("a", range(20)), row("b", range(500, 525))])
    assert none.change.change == pytest.approx(0.5) and none.verdict == CANNOT_TELL


@pytest.mark.parametrize("sizes, words", [
    ((100, 100), (YES, NO)), ((105, 100), (YES, NO)), ((106, 100), (CANNOT_TELL, CANNOT_TELL)), ((50, 100), (YES, NO)),
    ((100, 50), (CANNOT_TELL, CANNOT_TELL))])
def test_better_in_a_larger_file_is_not_told(sizes, words):
    rows = [row("a", range(20), size=sizes[0]), row("b", range(60), size=sizes[1])]
    assert judged(rows)[0].verdict == words[0] and judged(rows, [("b", "a")])[0].verdict == words[1]
    (free,) = put_to(Claim("text", "t", (("a", "b"),), any_size=True), {"t": rows})
    assert free.verdict == YES


@pytest.mark.parametrize("other, word", [
    (row("b", range(60), start="z"), UNLIKE), (row("b", range(60), seed=1), UNLIKE),
    (row("b", range(60), data="e"), UNLIKE), (row("b", range(60), n=N + 1), UNLIKE),
    ({key: value for key, value in row("b", range(60)).items() if key != "right"}, UNLIKE),
    (row("c", range(60)), MISSING)])
def test_rows_that_do_not_fit_are_no_pair(other, word):
    (one,) = judged([row("a", range(20)), other])
    assert one.verdict == word and one.change is None and verdict([one]) == word
    assert judged([])[0].verdict == MISSING and put_to(Claim("x", "none", (("a", "b"),)), {})[0].verdict == MISSING


def test_seeds_are_averaged_and_their_spread_widens_the_interval():
    """Changes of 4, 2 and 0 points: mean 2; the deviation between them is 2, of which three seeds know little: 95 % of
    Student's t with 2 degrees of freedom lie within 4.302653. Of the mean over seeds 20 inputs are 2/3 better and 20
    1/3; half an input better, half a one worse and one without a change are added."""
    rows = [row("a", range(20), seed) for seed in range(3)]
    rows += [row("b", range(count), seed) for seed, count in enumerate((60, 40, 20))]
    (one,) = judged(rows)
    assert one.seeds == one.change.seeds == 3 and one.change.change == pytest.approx(2.0)
    values = [2 / 3] * 20 + [1 / 3] * 20 + [0.0] * (N - 40)
    weighted = [(value, 1.0) for value in values] + [(1.0, 0.5), (-1.0, 0.5), (0.0, 1.0)]
    mean = sum(value * weight for value, weight in weighted) / (N + 2)
    variance = sum(weight * (value - mean) ** 2 for value, weight in weighted) / (N + 2)
    half = math.hypot(1.959964 * 100 * math.sqrt(variance / (N + 2)), 4.302653 * 2 / math.sqrt(3))
    assert one.change.interval() == pytest.approx((100 * mean - half, 100 * mean + half))


@pytest.mark.parametrize("seed", range(5))
def test_one_seed_has_the_interval_of_a_matched_pair(seed):
    draw = torch.Generator().manual_seed(seed)
    before, after = (torch.rand(1, 200, generator=draw) < 0.8 for _ in range(2))
    other = paired(before[0], after[0])
    found = changed(before, after)
    assert found.change == pytest.approx(other.change)
    assert found.interval() == pytest.approx((other.low, other.high))


def test_what_flips_from_seed_to_seed_averages_out():
    """The same 20 inputs in every seed leave the error within as it is; other ones in each do not."""
    same = changed(torch.arange(N).repeat(4, 1) >= 20, torch.ones(4, N, dtype=torch.bool))
    other = changed(torch.stack([(torch.arange(N) < 20 * i) | (torch.arange(N) >= 20 * (i + 1)) for i in range(4)]),
                    torch.ones(4, N, dtype=torch.bool))
    alone = changed(torch.arange(N)[None] >= 20, torch.ones(1, N, dtype=torch.bool))
    assert same.change == other.change == alone.change == pytest.approx(2.0)
    assert same.within == pytest.approx(alone.within, rel=0.02) and other.within < 0.6 * alone.within


@pytest.mark.parametrize("seeds, between", [(1, 0.0), (3, 0.4)])
def test_p_is_where_the_interval_ends_at_no_change(seeds, between):
    for middle in (-2.0, 0.3):
        found = Change(middle, middle, 0.5, between, seeds)
        assert found.half(found.p) == pytest.approx(abs(middle))
    assert Change(50.0, 50.0, 0.5, 0.0, 1).p <= 1e-9 and Change(0.0, 0.0, 0.5, between, seeds).p == pytest.approx(1)


@pytest.mark.parametrize("ps, told", [
    ((0.04,), [True]), ((0.04, 0.04), [False, False]), ((0.02, 0.04), [True, True]), ((0.04, 0.02), [True, True]),
    ((0.03, 0.001, 0.026), [False, True, False]), ((0.024, 0.001, 0.049), [True, True, True]),
    ((0.5, 0.01, 0.012), [False, True, True]), ((), [])])
def test_holm_holds_the_smallest_against_the_smallest_share(ps, told):
    assert holm(ps) == told


@pytest.mark.parametrize("pairs, every, words", [
    ((("x", "y1"),), False, [YES]), ((("y1", "x"),), False, [NO]),
    ((("x", "y1"), ("x", "y2"), ("x", "y3")), False, [CANNOT_TELL] * 3),
    ((("x", "y1"), ("x", "y2"), ("x", "y3")), True, [YES] * 3),
    ((("y1", "x"), ("y2", "x"), ("y3", "x")), True, [CANNOT_TELL] * 3),
    ((("x", "z"), ("x", "y1"), ("x", "y2")), False, [YES] * 3)])
def test_of_several_pairs_each_has_to_be_surer_but_where_all_have_to_be_better(pairs, every, words):
    """Six inputs of 1,000 better: p = 0.023, above 0.05 / 3. Thirty: far below, which leaves 0.05 / 2 for the next."""
    rows = [row("x", ()), row("z", range(30))] + [row(f"y{i}", range(100 * i, 100 * i + 6)) for i in (1, 2, 3)]
    found = put_to(Claim("text", "t", pairs, all=every), {"t": rows})
    assert 0.05 / 3 < changed(torch.arange(N)[None] >= 6, torch.ones(1, N, dtype=torch.bool)).p < 0.05 / 2
    assert [one.verdict for one in found] == words


def test_each_network_baseline_and_data_set_is_a_pair_of_its_own():
    rows = [row(name, range(k), network=net) for net in ("x", "y") for name, k in (("a", 20), ("b", 60))]
    assert [one.network for one in judged(rows)] == ["x", "y"]
    (there, gone) = judged([*rows[:2], rows[2]])
    assert there.verdict == YES and (gone.network, gone.verdict) == ("y", MISSING)
    assert [one.verdict for one in judged([*rows[:2], rows[2]], [("b", "a")])] == [NO, MISSING]
    starts = [row(name, range(k), start=start) for start in "pq" for name, k in (("a", 20), ("b", 60))]
    assert [one.change.seeds for one in judged(starts)] == [1, 1]
    data = [row(name, range(k), data=data, n=n) for data, n in (("d", N), ("e", 100))
            for name, k in (("a", 20), ("b", 60))]
    assert [one.n_test for one in judged(data)] == [N, 100]


def test_seeds_that_only_one_row_has_are_said():
    rows = [row("a", range(20)), row("a", range(90), 1), row("a", range(90), 2), row("b", range(60))]
    (one,) = judged(rows)
    assert (one.change.seeds, one.seeds) == (1, 3) and one.change.change == pytest.approx(4.0)
    assert lines_of([one])[0]["seeds"] == "1 seed of 3"


def test_the_ratio_is_that_of_the_seed_where_sizes_differ_most():
    rows = [row("a", range(20), seed, size=size) for seed, size in enumerate((100, 50, 150))]
    rows += [row("b", range(60), seed) for seed in range(3)]
    assert judged(rows)[0].ratio == 0.5


def found(*words, seeds=3):
    change = Change(0.0, 0.0, 1.0, 1.0, seeds)
    return [Found("a", "b", "n", word, None if word in (MISSING, UNLIKE) else change, seeds=seeds) for word in words]


@pytest.mark.parametrize("words, answer", [
    ((YES, CANNOT_TELL, MISSING), YES), ((NO, CANNOT_TELL), NO), ((YES, NO), MIXED), ((CANNOT_TELL,), CANNOT_TELL),
    ((MISSING, MISSING), MISSING), ((CANNOT_TELL, MISSING), CANNOT_TELL), ((UNLIKE, UNLIKE), UNLIKE),
    ((UNLIKE, MISSING), MISSING), ((), MISSING)])
def test_the_answer_of_a_claim(words, answer):
    assert verdict(found(*words)) == answer


@pytest.mark.parametrize("words, answer", [
    ((YES, YES), YES), ((YES, CANNOT_TELL), CANNOT_TELL), ((YES, MISSING), CANNOT_TELL), ((YES, NO), NO),
    ((CANNOT_TELL, NO), NO), ((MISSING, MISSING), MISSING)])
def test_what_is_best_is_better_than_each_of_the_others(words, answer):
    assert verdict(found(*words), every=True) == answer


@pytest.mark.parametrize("words, said", [
    ((YES, CANNOT_TELL, MISSING), "told in 1 of 2 pairs, 2 of 3 pairs have rows"),
    ((NO, CANNOT_TELL), "told in 1 of 2 pairs"),
    ((YES, NO), ""), ((CANNOT_TELL,), ""), ((MISSING, MISSING), ""), ((UNLIKE, UNLIKE), ""),
    ((CANNOT_TELL, MISSING), "1 of 2 pairs have rows"), ((YES, UNLIKE), "1 not comparable"),
    ((NO, CANNOT_TELL, UNLIKE, MISSING), "told in 1 of 2 pairs, 3 of 4 pairs have rows, 1 not comparable")])
def test_how_many_pairs_are_behind_an_answer(words, said):
    assert told_of(found(*words)) == said


def test_an_answer_from_one_seed_says_so():
    assert told_of(found(YES, seeds=1)) == "on one seed" and told_of(found(CANNOT_TELL, seeds=1)) == ""
    assert told_of([*found(YES, seeds=2), *found(NO, seeds=1)]) == "on one seed"
    one = "on one seed"
    for needs, said in ((("none", "calibration"), ""), (("none", "train"), one), (("train", "none"), one)):
        rows = [row("a", range(20), needs=needs[0]), row("b", range(60), needs=needs[1])]
        assert told_of(judged(rows)) == said


def test_what_a_page_says_of_a_claim(tmp_path):
    path = tmp_path / "claims.toml"
    path.write_text("[[claim]]\ntext = 'x'\ntable = 't'\npairs = [['a', 'b'], ['a', 'c'], ['a', 'd']]")
    rows = [row("a", range(20), size=48), row("b", range(60)), row("d", range(60), seed=1)]
    (one,) = in_words({"t": rows}, path)
    assert (one["verdict"], one["pairs"]) == (YES, "on one seed, 2 of 3 pairs have rows, 1 not comparable")
    assert [line["verdict"] for line in one["lines"]] == [YES, MISSING, UNLIKE]
    assert [line["unequal"] for line in one["lines"]] == ["0.48", "", ""]
    assert [line["on"] for line in one["lines"]] == ["digits, net, 1,000 inputs, 1 seed", "", ""]
    path.write_text(path.read_text() + "\nall = true")
    assert in_words({"t": rows}, path)[0]["verdict"] == CANNOT_TELL
    (whole,) = in_words({"t": [*rows[:2], row("c", range(60)), row("d", range(60), size=47)]}, path)
    assert whole["pairs"] == "on one seed" and whole["lines"][2]["unequal"] == ""


def test_the_shipped_claims_name_rows_that_their_tables_have():
    names = {table.name: {job.name for job in table.rows} for table in all_tables()}
    claims = read_claims()
    assert len(claims) > 10 and len({claim.text for claim in claims}) == len(claims)
    for claim in claims:
        missing = {name for pair in claim.pairs for name in pair} - names[claim.table]
        assert not missing, f"{claim.table}: {missing}"


def test_the_readme_shows_answers_and_counts_the_rest():
    line = {"better": "a", "than": "b", "network": "n", "change": "+1.00", "interval": "", "bytes": "", "seeds": "1",
            "unequal": "", "on": "digits | net"}
    text = claim_lines([
        {"text": "First | claim", "verdict": YES, "pairs": "2 of 3 pairs", "note": "of a kind",
         "lines": [{**line, "verdict": YES}, {**line, "verdict": CANNOT_TELL, "unequal": "0.48"},
                   {**line, "verdict": MISSING}]},
        {"text": "Second", "verdict": MISSING, "pairs": "", "note": "not seen",
         "lines": [{**line, "verdict": MISSING}]}])
    assert "| First \\| claim | yes (2 of 3 pairs) | +1.00, (+1.00) at 0.48x bytes | digits \\| net |" in text
    other = claim_lines([{"text": "Two", "verdict": NO, "pairs": "", "note": "", "lines": [
        {**line, "better": name, "verdict": word} for name, word in (("A, 20x", NO), ("B, 20x", CANNOT_TELL),
                                                                    ("A, 40x", NO))]}])
    assert "| Two | no | A +1.00, +1.00; B (+1.00) |" in other
    orders = claim_lines([{"text": "Three", "verdict": NO, "pairs": "", "note": "", "lines": [
        {**line, "better": name, "verdict": NO} for name in ("order: x, y", "order: y, x")]}])
    assert "| Three | no | +1.00, +1.00 |" in orders
    assert "- First \\| claim: of a kind\n" in text and "Second" not in text and "not seen" not in text
    assert "1 more claim without rows yet." in text


@pytest.mark.parametrize("text, fault", [
    ("[[claim]]\ntext = 'x'\ntable = 't'\npairs = []", "needed are a text and pairs"),
    ("[[claim]]\ntext = 'x'\ntable = 't'\npairs = [['a']]", "needed are 2 values"),
    ("[[claim]]\ntext = 'x'\npairs = [['a', 'b']]", "lacks the keys table"),
    ("[[claim]]\ntext = 'x'\nrows = 3", "unknown key"), ("claim = 3", "allowed are tables"),
    ("other = 3", "allowed are tables")])
def test_a_mistake_is_one_line(tmp_path, text, fault):
    path = tmp_path / "claims.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=fault):
        read_claims(path)
