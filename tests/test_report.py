"""Reports on the terminal: the comparison, ours beside the paper, and plots of what methods noted."""

import io
import re

import pytest
from rich.console import Console

from benchmarks.report import against_paper, courses, table
from tests.made_rows import EVIL, row

# --- the table ---------------------------------------------------------------------------------------------


def test_columns_stand_along_three_axes():
    assert list(dict.fromkeys(column.axis for column in table.COLUMNS)) == [
        "", "capability kept", "hardware efficiency", "difficulty"]
    assert len({column.header for column in table.COLUMNS}) == len(table.COLUMNS)


def test_cells():
    shown = dict(zip([c.header for c in table.COLUMNS], table.cells(row("a", size=1_234_567)), strict=True))
    assert shown["file"] == "1.23 MB" and shown["top-1 float"] == "90.25" and shown["density"] == "0.5"
    assert shown["BOPs"] == "16 K" and shown["CPU seconds"] == "1.2" and shown["smaller"] == "0.0x"


@pytest.mark.parametrize("n, text", [(0, "0 B"), (0.4, "0.4 B"), (999, "999 B"), (999.6, "1 KB"), (1000, "1 KB"),
                                     (12_345, "12.3 KB"), (999_499, "999 KB"), (999_600, "1 MB"), (5e9, "5 GB")])
def test_units(n, text):
    assert table.short_bytes(n) == text
    counts = {"KB": "K", "MB": "M", "GB": "G", "B": ""}
    assert table.short_count(n) == f"{text.split()[0]} {counts[text.split()[1]]}".strip()


def test_baseline_is_dense_float32():
    base = table.baseline_row(row("a"))
    assert base["top1_float"] == 95.5 and base["bytes"] == 4000 and base["cost"]["density"] == 1
    assert base["cost"]["macs"] == 700 and base["cost"]["bops"] == base["cost"]["sparse_bops"] == 700 * 1024
    assert "—" in table.cells(base) and "None" not in "".join(table.cells(base))


def test_rows_stand_under_their_own_baseline():
    rows = [row("a"), row("b", network="wide", baseline_top1=97.0, checkpoint={"digest": "e"}), row("a", seed=1),
            row("c")]
    assert [r["name"] for r in table.listed(rows)] == [
        "float32 baseline, net", "a", "c", "float32 baseline, wide", "b"]
    assert [r["top1_float"] for r in table.listed(rows) if r["method"] == "none"] == [95.5, 97.0]
    assert [r["name"] for r in table.listed([row("a")])] == ["float32 baseline", "a"]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_terminal_fits_and_loses_nothing(width):
    out = io.StringIO()
    rows = table.listed([row(EVIL), row("prune then quantize, no training", size=123_456)])
    Console(file=out, width=width, markup=False, emoji=False).print(table.terminal(rows, "net on digits", width))
    text = out.getvalue()
    lines = text.splitlines()
    assert max(map(len, lines)) <= width and lines[0].strip() == "net on digits"
    for cell in ("90.00", "123 KB", "95.50", "0.5", "1.2", "train"):
        assert cell in text
    assert "…" not in text and "[bold]" in text.replace("\n", "")
    assert text.count("float32") == (1 if width == 200 else 3)


# --- beside the paper --------------------------------------------------------------------------------------


def test_compared_with_the_paper():
    ours = row("a", paper={"error_float": 9.0, "cost": {"density": 0.4}, "accounting.ratios.data_only": 12,
                           "top1_5": 3, "layers": {"conv1": {"density": 0.25, "rate": 1}, "gone": {"bits": 2}}})
    assert against_paper.compared(ours) == [
        ("error_float", 9.0, 9.75), ("cost.density", 0.4, 0.5), ("accounting.ratios.data_only", 12, 12.5),
        ("top1_5", 3, None), ("conv1 density", 0.25, 0.5), ("conv1 rate", 1, None), ("gone bits", 2, None)]
    lines = against_paper.texts(ours)
    assert lines[0] == ("error_float", "9", "9.75", "+0.75") and lines[3] == ("top1_5", "3", "—", "")
    assert ("bytes", "—", "1000", "") in lines  # what only we report
    assert against_paper.lookup(ours, "cost") is None and against_paper.lookup(ours, "name") is None
    markdown = against_paper.markdown([ours, row(EVIL)]).splitlines()
    assert {len(re.split(r"(?<!\\)\|", line)) for line in markdown} == {7}
    out = io.StringIO()
    Console(file=out, width=80, markup=False).print(against_paper.terminal([ours, row(EVIL)], "t"))
    assert max(map(len, out.getvalue().splitlines())) <= 80 and "…" not in out.getvalue()



# --- courses -----------------------------------------------------------------------------------------------


def trace(*objectives):
    return [{"p": 0.1 * i, "bits": 2 + i, "error": 0.0, "saved": 0.0, "objective": value}
            for i, value in enumerate(objectives)]


def searched(name, traces, network="net"):
    return {"method": "clip_q", "name": name, "network": network, "notes": {"trace": traces}}


def test_a_search_is_drawn_as_the_best_so_far():
    rows = [searched("bayes", {"a": trace(3, 1, 2), "b": trace(5, 4, 0)}), searched("random", {"a": trace(2, 2, 1)}),
            searched("uniform", {}), {"method": "udfc", "name": "other", "network": "net", "notes": {}}]
    figure = courses.search_plot(rows)
    drawn = {axes.get_title(): {line.get_label(): list(line.get_ydata()) for line in axes.lines}
             for axes in figure.axes}
    assert drawn == {"a": {"bayes": [3, 1, 1], "random": [2, 2, 1]}, "b": {"bayes": [5, 4, 0], "random": []}}
    assert courses.search_plot(rows[2:]) is None


@pytest.mark.parametrize("method, notes, titles", [
    ("clip_q", {"trace": {"conv": trace(2, 1), "fc": trace(1, 3)}}, ["conv", "fc"]), ("clip_q", {"trace": {}}, None),
    ("admm", {"residuals": {"prune.1": {"conv": [0.5, 0.1]}, "quantize.1": {}}}, ["prune.1"]),
    ("annc", {"kept": {"conv": 3}, "trace": [[{"bits": [2], "kept": [4], "gap": 0.1}],
                                             [{"bits": [3], "kept": [3], "gap": 0.2}]]},
     ["gap", "bits", "kept weights"]),
    ("bayesian_bits", {"bops_percent": [3.0, 1.0]}, ["bit operations"]), ("bayesian_bits", {"bops_percent": []}, None),
    ("width_search", {"trace": {"errors": [0.5, 0.2, 0.3], "fits": [True, False, True], "mac_ratio": [0.2, 0.9, 0.4]}},
     ["best so far", "front: mac_ratio"]),
    ("udfc", {"channels": {}}, None)])
def test_courses(method, notes, titles):
    figure = courses.course_plot({"method": method, "name": "row", "notes": notes})
    assert (None if figure is None else [axes.get_title() for axes in figure.axes if axes.axison]) == titles
    if method == "width_search":
        best, front = figure.axes[:2]
        assert list(best.lines[0].get_ydata()) == [0.5, 0.5, 0.3]
        assert list(front.lines[0].get_ydata()) == [0.5, 0.3, 0.2]  # by rising cost
    if method == "annc":
        assert [list(line.get_ydata()) for line in figure.axes[1].lines] == [[2, 3]]


def test_rows_of_one_name_are_told_apart_by_what_differs():
    """Rows of two networks by these, of two baselines of one network by these; a mean over seeds says so."""
    other = {"checkpoint": {"digest": "e"}}
    rows = [row("a"), row("a", network="wide"), row("b"), row("b", **other), row("c"), row("c", seed=1), row("d"),
            row("d", network="wide"), row("d", network="wide", **other)]
    assert [found["name"] for found in table.told_apart(rows)] == [
        "a, net", "a, wide", "b, baseline d", "b, baseline e", "c", "d, net", "d, wide, baseline d",
        "d, wide, baseline e"]
