"""Rows at equal bytes: sizes that count as one by brute force, every row in one cell, the picture at the numbers."""

import random

import pytest

from benchmarks.docs import equal
from benchmarks.report.seeds import over_seeds
from tests.made_rows import full


def lost(name, method, change, half=0.25, **more):
    """A row that lost `-change` points."""
    paired = {"integer": {"change": change, "low": change - half, "high": change + half}}
    asked = name.rpartition(", ")[2]
    budget = {"size_ratio": 1 / int(asked[:-1])} if asked.endswith("x") else {"bits": 8}
    return full(name, method, top1=95.5 + change, against_baseline=paired, budget=budget, **more)


ROWS = [lost("one, 4x", "udfc", -1.0, size=1000), lost("one, low rate, 4x", "udfc", -0.5, size=990),
        lost("two, 4x", "dfq", -2.0, size=960), lost("three, 4x", "rptq", -3.0, size=920),
        lost("one, 8x", "udfc", -4.0, size=500), lost("two, 8x", "dfq", -2.5, size=490),
        lost("three, 8x", "rptq", 0.5, size=480), lost("two, 6x", "dfq", -0.75, size=650),
        lost("8 bits", "dfq", -9.0, size=2000)]


@pytest.mark.parametrize("seed", range(10))
def test_a_block_is_within_a_tenth_of_its_largest(seed):
    draw = random.Random(seed)
    rows = [full(str(i), size=draw.randint(100, 200), top1=draw.randint(80, 95)) for i in range(draw.randint(1, 12))]
    found = equal.blocks(rows)
    assert sorted(id(row) for block in found for row in block) == sorted(map(id, rows))
    tops = [max(row["bytes"] for row in block) for block in found]
    assert all(10 * row["bytes"] >= 9 * top for block, top in zip(found, tops, strict=True) for row in block)
    assert all(10 * below < 9 * top for top, below in zip(tops, tops[1:], strict=False))
    accuracies = [[row["top1_integer"] for row in block] for block in found]
    assert accuracies == [sorted(block, reverse=True) for block in accuracies]


def test_each_row_is_in_the_cell_of_its_way_and_size():
    found = equal.ways(ROWS)
    assert found.columns == ["4x", "8x"]  # asked for
    names = [name for name, _, _ in found.lines]
    assert names == ["one, low rate", "one", "two", "three", "8 bits"]  # by the size with the most rows, then the rest
    cells = {name: [[row["name"] for row in cell] for cell in [*cells, rest]] for name, cells, rest in found.lines}
    assert cells["one"] == [["one, 4x"], ["one, 8x"], []] and cells["8 bits"] == [[], [], ["8 bits"]]
    assert cells["two"] == [["two, 4x"], ["two, 8x"], ["two, 6x"]]


@pytest.mark.parametrize("sizes, ratios, head", [
    ((120, 110, 115), (None, None, None), "34.8x"), ((98, 97, 96), (0.025, 0.025, None), "40x"),
    ((480, 479, 478), (0.1282, 0.1282, 0.121), "8x")])
def test_a_column_is_named_by_the_size_that_was_asked_for(sizes, ratios, head):
    rows = [full(name, name, size=size, budget={} if ratio is None else {"size_ratio": ratio})
            for name, size, ratio in zip("abc", sizes, ratios, strict=True)]
    assert equal.ways(rows).columns == [head]


def test_seeds_are_named():
    several = [lost("one, 4x", "udfc", change, seed=seed) for seed, change in enumerate((-1.0, -1.5, -0.5))]
    (mean,) = over_seeds(several)
    assert equal._lost(mean).endswith(", 3 seeds)") and "seed" not in equal._lost(several[0])


def test_two_methods_are_no_column():
    assert equal.ways([row for row in ROWS if row["method"] != "rptq"]).columns == []


def test_the_table_says_losses_with_their_intervals_and_the_least_in_bold():
    lines = equal.ways_table(ROWS).splitlines()
    assert lines[0] == "| points of top-1 lost | 4x smaller | 8x smaller | another size | data |"
    assert lines[2] == "| one, low rate | **0.50** (0.25 to 0.75) | — | — | training batches |"
    assert lines[4] == ("| two | 2.00 (1.75 to 2.25) | 2.50 (2.25 to 2.75) | 0.75 (0.50 to 1.00) at 6.15x | "
                        "training batches |")
    assert lines[5].startswith("| three | 3.00 (2.75 to 3.25) | **-0.50** (-0.75 to -0.25) | — |")
    assert len(lines) == 2 + 5
    assert "another size" not in equal.ways_table([row for row in ROWS if row["bytes"] != 650 and row["bytes"] < 2000])


def test_rows_without_pairs_have_no_interval():
    assert "| **5.50** |" in equal.ways_table([full(name, name) for name in "abc"])


def test_the_picture_has_each_row_at_its_loss():
    figure = equal.ways_plot(ROWS)
    panels = {panel.get_title(): panel for panel in figure.axes}
    assert list(panels) == ["4x smaller", "8x smaller", "another size"]
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    drawn = {(title, names[int(line.get_ydata()[0])], tuple(map(float, line.get_xdata())))
             for title, panel in panels.items() for line in panel.lines if line.get_marker() not in ("None", None)}
    assert ("4x smaller", "one", (1.0,)) in drawn and ("8x smaller", "three", (-0.5,)) in drawn
    assert ("another size", "two", (0.75,)) in drawn and len(drawn) == len(ROWS) - 1
    assert (0.75, 1.25) in [tuple(map(float, line.get_xdata())) for line in panels["4x smaller"].lines]
    texts = [text.get_text() for text in panels["another size"].texts]
    assert texts == ["6.15x", "9.0 at 2.00x →"] and figure.axes[0].yaxis_inverted()


def test_the_picture_names_the_seeds_of_a_mean():
    def three(name, change, size):
        return over_seeds([lost(name, "df_mpc", change + shift, size=size, seed=seed)
                           for seed, shift in enumerate((-0.25, 0.0, 0.25))])

    rows = [*ROWS, *three("four, 4x", -1.5, 1000), *three("four", -1.0, 700), *three("five", -15.25, 700)]
    texts = [text.get_text() for panel in equal.ways_plot(rows).axes for text in panel.texts]
    assert sorted(one for one in texts if "seeds" in one) == ["15.2 at 5.71x, 3 seeds →", "3 seeds", "5.71x, 3 seeds"]
