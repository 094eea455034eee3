"""Claims: paired on the same inputs, over seeds, answered only where rows are there."""

import math

import pytest
import torch

from benchmarks.chance import pack, paired
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
    put_to,
    read_claims,
    told_of,
    verdict,
)
from methods.core.errors import ConfigError

N = 1000


def row(name, wrong, seed=0, network="net", start="a", n=N, data="d", size=100):
    right = torch.ones(n, dtype=torch.bool)
    right[list(wrong)] = False
    return {"name": name, "network": network, "seed": seed, "checkpoint": {"digest": start}, "n_test": n, "data": data,
            "right": {"integer": pack(right)}, "bytes": size, "task": "digits"}


def judged(rows, pairs=(("a", "b"),)):
    return put_to(Claim("text", "t", pairs), {"t": rows})


def test_a_pair_is_judged_on_the_same_inputs():
    (one,) = judged([row("a", range(20), size=50), row("b", range(60))])
    assert one.change == pytest.approx(4.0) and one.low > 0 and one.verdict == YES
    assert (one.network, one.seeds, one.bytes) == ("net", 1, (50, 100))
    (other,) = judged([row("a", range(20)), row("b", range(60))], [("b", "a")])
    assert other.verdict == NO and other.change == -one.change
    (none,) = judged([row("a", range(20)), row("b", range(500, 525))])
    assert none.change == pytest.approx(0.5) and none.verdict == CANNOT_TELL


@pytest.mark.parametrize("other, word", [
    (row("b", range(60), start="z"), UNLIKE), (row("b", range(60), seed=1), UNLIKE),
    (row("b", range(60), data="e"), UNLIKE), (row("b", range(60), n=N + 1), UNLIKE),
    (row("b", range(60), network="other"), MISSING), (row("c", range(60)), MISSING)])
def test_rows_that_do_not_fit_are_no_pair(other, word):
    (one,) = judged([row("a", range(20)), other])
    assert one.verdict == word and one.change is None and verdict([one]) == MISSING
    assert judged([])[0].verdict == MISSING and put_to(Claim("x", "none", (("a", "b"),)), {})[0].verdict == MISSING


def test_seeds_are_averaged_and_their_spread_widens_the_interval():
    """Changes of 4, 2 and 0 points: mean 2, the interval from the variance within and the deviation 2 between, of which
    three seeds know little: 95 % of Student's t with 2 degrees of freedom lie within 4.302653."""
    rows = [row("a", range(20), seed) for seed in range(3)]
    rows += [row("b", range(count), seed) for seed, count in enumerate((60, 40, 20))]
    (one,) = judged(rows)
    assert one.seeds == 3 and one.change == pytest.approx(2.0)
    halves = []
    for count in (60, 40, 20):
        better, than = (torch.arange(N) >= k for k in (20, count))
        pair = paired(than, better)
        halves.append((pair.high - pair.low) / 2 / 1.959964)
    within = sum(half**2 for half in halves) / 3
    assert one.high - one.change == pytest.approx(math.sqrt(1.959964**2 * within + 4.302653**2 * 4 / 3))
    assert one.change - one.low == pytest.approx(one.high - one.change)


def test_each_network_is_a_pair_of_its_own():
    rows = [row(name, range(k), network=net) for net in ("x", "y") for name, k in (("a", 20), ("b", 60))]
    assert [one.network for one in judged(rows)] == ["x", "y"]


def found(*words):
    ends = {YES: (1, 2), NO: (-2, -1), CANNOT_TELL: (-1, 1)}
    return [Found("a", "b") if word == MISSING else Found("a", "b", "n", 0.0, *ends[word], (1, 1), 1) for word in words]


@pytest.mark.parametrize("words, answer", [
    ((YES, CANNOT_TELL, MISSING), YES), ((NO, CANNOT_TELL), NO), ((YES, NO), MIXED), ((CANNOT_TELL,), CANNOT_TELL),
    ((MISSING, MISSING), MISSING), ((CANNOT_TELL, MISSING), CANNOT_TELL)])
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
    ((YES, NO), ""), ((CANNOT_TELL,), ""), ((MISSING, MISSING), ""),
    ((CANNOT_TELL, MISSING), "1 of 2 pairs have rows")])
def test_how_many_pairs_are_behind_an_answer(words, said):
    assert told_of(found(*words)) == said


def test_what_a_page_says_of_a_claim(tmp_path):
    path = tmp_path / "claims.toml"
    path.write_text("[[claim]]\ntext = 'x'\ntable = 't'\npairs = [['a', 'b'], ['a', 'c'], ['a', 'd']]")
    rows = [row("a", range(20), size=48), row("b", range(60)), row("d", range(60), seed=1)]
    (one,) = in_words({"t": rows}, path)
    assert (one["verdict"], one["pairs"]) == (YES, "1 of 3 pairs have rows")
    assert [line["verdict"] for line in one["lines"]] == [YES, MISSING, UNLIKE]
    assert [line["unequal"] for line in one["lines"]] == ["0.48", "", ""]
    assert [line["on"] for line in one["lines"]] == ["digits, net, 1,000 inputs, 1 seed", "", ""]
    path.write_text(path.read_text() + "\nall = true")
    assert in_words({"t": rows}, path)[0]["verdict"] == CANNOT_TELL
    (whole,) = in_words({"t": [*rows[:2], row("c", range(60)), row("d", range(60), size=47)]}, path)
    assert whole["pairs"] == "" and whole["lines"][2]["unequal"] == ""


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
        {"text": "First | claim", "verdict": YES, "pairs": "2 of 3 pairs",
         "lines": [{**line, "verdict": YES}, {**line, "verdict": CANNOT_TELL, "unequal": "0.48"},
                   {**line, "verdict": MISSING}]},
        {"text": "Second", "verdict": MISSING, "pairs": "", "lines": [{**line, "verdict": MISSING}]}])
    assert "| First \\| claim | yes (2 of 3 pairs) | +1.00, (+1.00) at 0.48x bytes | digits \\| net |" in text
    assert "Second" not in text
    assert "1 more claims await their rows." in text


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
