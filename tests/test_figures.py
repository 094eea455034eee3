"""Plots of rows: each at its loss with its interval, the front by brute force, far ones at the edge."""

import random

import pytest

from benchmarks.docs import figures
from benchmarks.docs.words import METHODS, look
from benchmarks.report.seeds import over_seeds
from tests.made_rows import full


@pytest.mark.parametrize("seed", range(20))
def test_front_by_brute_force(seed):
    """On the front: no other point is at least as cheap and as accurate, and better in one of them."""
    draw = random.Random(seed)
    points = [(draw.randint(1, 6), draw.randint(1, 6)) for _ in range(draw.randint(0, 15))]
    best = {(c, a) for c, a in points if not any((x <= c and y >= a) and (x, y) != (c, a) for x, y in points)}
    front = figures.pareto_front(points)
    assert set(front) == best and len(front) == len(best) and front == sorted(front)


def test_a_plot_has_each_row_at_its_loss_with_its_interval():
    rows = [full("a", "udfc", top1=90, size=1000), full("b", "udfc", top1=92, size=1500), full("c", "dfq", top1=80)]
    panel = figures.front_plot(rows, "bytes").axes[0]
    drawn = {box.get_label(): box for box in panel.containers}
    x, y = drawn["UDFC"].lines[0].get_data()
    assert list(x) == [1000, 1500] and list(y) == [5.5, 3.5] and panel.get_xscale() == "log"
    (_, low), (_, high) = drawn["UDFC"].lines[2][0].get_segments()[0]
    assert high - low == pytest.approx(2 * 100 * 1.959964 * (0.9 * 0.1 / 10_000) ** 0.5)
    bottom, top = panel.get_ylim()
    assert bottom > top  # less lost is higher


def test_points_far_below_are_arrows_at_the_edge_and_no_lines_in_the_legend():
    rows = [full(str(i), "dfq", top1=95 - i / 10, size=1000 + i) for i in range(5)] + [full("far", "udfc", top1=50)]
    figure = figures.front_plot(rows, "bytes")
    panel, (legend,) = figure.axes[0], figure.legends
    assert panel.get_ylim()[0] < 10 and [text.get_text() for text in legend.get_texts()].count("UDFC") == 0
    assert "DFQ" in [text.get_text() for text in legend.get_texts()]
    assert [text.get_text() for text in panel.texts if ":" in text.get_text()] == ["UDFC: 45.5"]


def test_a_line_joins_rows_that_differ_in_size_alone():
    names = ("one way, 20x", "one way, low rate, 20x", "one way, 40x", "one way, low rate, 40x", "5 bits, odd")
    rows = [full(name, "udfc", top1=90 - i, size=1000 + i) for i, name in enumerate(names)]
    panel = figures.front_plot(rows, "bytes").axes[0]
    lines = {tuple(box.lines[0].get_xdata()): box for box in panel.containers}
    assert set(lines) == {(1000, 1002), (1001, 1003), (1004,)}
    assert [box.get_label() for box in panel.containers] == ["UDFC", "_nolegend_", "_nolegend_"]
    assert len({box.lines[0].get_linestyle() for box in lines.values()}) == 3
    assert len({box.lines[0].get_color() for box in lines.values()}) == 1


def test_the_paired_interval_is_taken_where_there_is_one():
    def one(change, half):
        return full("a", against_baseline={"integer": {"change": change, "low": change - half, "high": change + half}})

    assert figures.interval(one(-0.2, 0.3)) == pytest.approx(0.3)
    seeds = [{**one(change, 0.3), "seed": seed} for seed, change in enumerate((-1.0, 0.0, 1.0))]
    (mean,) = over_seeds(seeds)  # a deviation of 1 over three seeds: Student's t with 2 degrees of freedom is 4.302653
    assert figures.interval(mean) == pytest.approx((0.3**2 + (4.302653 / 3**0.5) ** 2) ** 0.5)


def test_methods_never_look_alike():
    looks = [look(method, []) for method in METHODS]
    assert len(set(looks)) == len(looks)
    assert look("mine", ["mine", "udfc"]) not in looks


def test_svg_is_the_same_every_time_and_has_a_text_alternative():
    one, two = (figures.as_svg(figures.front_plot([full("a")], "bytes"), 'x < "y"') for _ in range(2))
    assert one == two and one.startswith("<svg") and 'aria-label="x &lt; &quot;y&quot;"' in one
    assert "size of the file" in one
