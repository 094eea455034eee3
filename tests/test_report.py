"""Reports: tables that parse back, fronts against brute force, and a page that loads nothing."""

import copy
import csv
import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from benchmarks.report import against_paper, courses, plots, readme, scores, table
from benchmarks.report.page import page, searches
from methods.core.errors import CompressError

EVIL = 'a|b <script>alert("x")</script> & [bold]x[/] \\ `c` ünï 中'
LAYER = {"weights": 10, "density": 0.5, "bits": 4, "macs": 90}


def row(name, method="m", top1=90.0, size=1000, **more):
    cost = {"macs": 500, "bops": 16_000, "sparse_bops": 8_000 * size / 1000, "bops_float_activations": 64_000,
            "weights": 100, "kept_weights": 50, "density": 0.5, "mean_bits": 4.0}
    return {"name": name, "method": method, "task": "digits", "network": "net", "seed": 0, "top1_float": top1 + 0.25,
            "top1_integer": top1, "baseline_top1": 95.5, "bytes": size, "float32_bytes": 4000, "dense_macs": 700,
            "bytes_split": {"codes": size - 10, "header": 10}, "cost": cost, "paper": {},
            "accounting": {"bits": {}, "ratios": {"data_only": 12.5, "prune_quantize_huffman": 9.0}},
            "layers": {"conv1": dict(LAYER), "fc": {**LAYER, "index_bits": 5, "levels": 15}}, "paper_mode_bytes": 900,
            "difficulty": {"data": "train", "knobs": 3, "lines": 60, "cpu_seconds": 1.25}, "notes": {},
            "checkpoint": {"digest": "d", "source": "s"}, **more}


# --- Pareto ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_front_by_brute_force(seed):
    """On the front: no other point is at least as cheap and as accurate, and better in one of them."""
    import random

    draw = random.Random(seed)
    points = [(draw.randint(1, 6), draw.randint(1, 6)) for _ in range(draw.randint(1, 15))]
    best = {(c, a) for c, a in points
            if not any((x <= c and y >= a) and (x, y) != (c, a) for x, y in points)}
    front = plots.pareto_front(points)
    assert set(front) == best and len(front) == len(best) and front == sorted(front)
    assert [a for _, a in front] == sorted(a for _, a in front)


def test_no_points_no_front():
    assert plots.pareto_front([]) == []


def test_plot_shows_every_row_once():
    rows = [row("a", "x", 90, 1000), row("b", "x", 92, 1500), row("c", "y", 80, 2000), row("d", "z", 70, 10)]
    for axis in plots.AXES:
        panel = plots.pareto_plot(rows, axis).axes[0]
        lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in panel.lines}
        cost = [1000, 1500, 2000, 10] if axis == "bytes" else [8_000, 12_000, 16_000, 80]
        assert lines["x"] == [(cost[0], 90), (cost[1], 92)] and lines["y"] == [(cost[2], 80)]
        assert lines["Pareto front"] == [(cost[3], 70), (cost[0], 90), (cost[1], 92), (cost[2], 92)]
        assert panel.get_xscale() == "log" and set(lines["float32 baseline"]) == {(0, 95.5), (1, 95.5)}
    several = [rows[0], {**row("e", baseline_top1=50.0), "checkpoint": {"digest": "another"}}]
    lines = {line.get_label(): line.get_data()[1] for line in plots.pareto_plot(several, "bytes").axes[0].lines}
    tops = {label: data[0] for label, data in lines.items() if label.startswith("float32 baseline")}
    assert sorted(tops.values()) == [50.0, 95.5]
    assert all(label.endswith(f" of {top:.2f} %") for label, top in tops.items())
    assert sum(label.startswith("Pareto front, ") for label in lines) == 2


@pytest.mark.parametrize("sizes", [[1000], [1000, 1010], [72_000, 469_000], [10, 10**9]])
def test_ticks_are_few_and_in_units(sizes):
    figure = plots.pareto_plot([row(str(i), size=size) for i, size in enumerate(sizes)], "bytes")
    figure.canvas.draw()
    low, high = figure.axes[0].get_xlim()
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels() if low <= label.get_position()[0] <= high]
    assert 1 <= len(shown) <= 12 and all(re.fullmatch(r"[\d.]+ (B|KB|MB|GB)", text) for text in shown)


def test_svg_is_the_same_every_time_and_holds_text():
    one, two = (plots.as_svg(plots.pareto_plot([row("a")], "bytes")) for _ in range(2))
    assert one == two and one.startswith("<svg") and "size of the file" in one


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
        "float32 baseline, net", "a, net, seed 0", "a, net, seed 1", "c", "float32 baseline, wide", "b"]
    assert [r["top1_float"] for r in table.listed(rows) if r["method"] == "none"] == [95.5, 97.0]
    assert [r["name"] for r in table.listed([row("a")])] == ["float32 baseline", "a"]


@pytest.mark.parametrize("name", ["a", EVIL, "*x* _y_", "line\nbreak"])
def test_markdown_parses_back(name):
    lines = table.markdown(table.listed([row(name)])).splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert len(lines) == 4 and {len(line) for line in cells} == {len(table.COLUMNS)}
    assert "<script>" not in "".join(lines)


def test_csv_parses_back():
    rows = table.listed([row(EVIL + '"\n', top1=90 / 7)])
    head, base, ours = csv.reader(io.StringIO(table.comma_separated(rows)))
    assert head == [column.header for column in table.COLUMNS]
    assert ours[0] == EVIL + '"\n' and float(ours[2]) == 90 / 7 and float(ours[3]) == 1000
    assert base[2] == "" and len(base) == len(ours) == len(head)


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


def test_readme_blocks_are_filled_again_and_again():
    rows_of = {"one": [row("a")], "two": [row("b", paper={"error_float": 1})]}
    text = "x\n<!-- rows: one -->\nold\n<!-- end -->\ny\n<!-- paper: two -->\n<!-- end -->\n"
    once = readme.filled(text, rows_of)
    assert readme.filled(once, rows_of) == once and "old" not in once
    assert "| a |" in once and "| b | error_float |" in once
    trained = {"task": "t", "network": "n", "test_top1": 91.239, "held_out_top1": 92.0, "seed": 3,
               "commit": "0123456789", "setup": {"recipe": {"epochs": 7}}}
    block = readme.filled("<!-- baselines: shipped -->\n<!-- end -->", {"shipped": [trained]})
    assert "\n| t | n | 91.24 | 92.00 | 7 | 3 | 0123456 |\n" in block
    with pytest.raises(CompressError, match="'two'"):
        readme.filled(text, {"one": rows_of["one"]})


# --- the page ----------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that what is opened is closed."""

    VOID = {"meta", "path", "use", "br", "link", "img"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.open = set(), [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_self_contained():
    rows = [row(EVIL, note=EVIL, commit="abc", budget={"bits": EVIL}), row("b", paper={"error_float": 1.0})]
    text = page(rows, EVIL, f"python -m benchmarks {EVIL}")
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert not reader.tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    loads = [value for _, name, value in reader.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert all(value.startswith("#") for value in loads)
    assert not any(name.startswith("on") for _, name, _ in reader.attributes)
    styles = re.findall(r"url\(([^)]*)\)|@import", text)
    assert all(value.startswith("#") for value in styles)
    shown = "".join(reader.text)
    assert shown.count(EVIL) >= 4 and "beside the paper" in shown and "charset=utf-8" in text
    assert {column.meaning for column in table.COLUMNS} <= set(reader.text)


def test_details_show_columns_that_the_first_layer_lacks():
    text = page([row("a")], "t", "c")
    assert "<th>index bits</th>" in text and "<th>levels</th>" in text
    assert text.count("<tr><td>conv1</td>") == 1


def test_pages_of_rows_of_an_older_harness():
    """A row without what later versions added is still shown."""
    old = copy.deepcopy(row("a"))
    del old["dense_macs"], old["paper_mode_bytes"]
    assert "a</summary>" in page([old], "t", "c") and against_paper.texts(old)


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
    assert [network for network, _ in searches([*rows, searched("c", {"a": trace(1)}, "second")])] \
        == ["net", "second"]


@pytest.mark.parametrize("method, notes, titles", [
    ("clip_q", {"trace": {"conv": trace(2, 1), "fc": trace(1, 3)}}, ["conv", "fc"]), ("clip_q", {"trace": {}}, None),
    ("admm", {"residuals": {"prune.1": {"conv": [0.5, 0.1]}, "quantize.1": {}}}, ["prune.1"]),
    ("annc", {"kept": {"conv": 3}, "trace": [[{"bits": [2], "kept": [4], "gap": 0.1}],
                                             [{"bits": [3], "kept": [3], "gap": 0.2}]]},
     ["gap", "bits", "kept weights"]),
    ("bayesian_bits", {"bops_percent": [3.0, 1.0]}, ["bit operations"]), ("bayesian_bits", {"bops_percent": []}, None),
    ("udfc", {"channels": {}}, None)])
def test_courses(method, notes, titles):
    figure = courses.course_plot({"method": method, "name": "row", "notes": notes})
    assert (None if figure is None else [axes.get_title() for axes in figure.axes if axes.axison]) == titles
    if method == "annc":
        assert [list(line.get_ydata()) for line in figure.axes[1].lines] == [[2, 3]]


# --- scores ------------------------------------------------------------------------------------------------


def test_scores():
    rows = [row("same", paper={"top1_float": 90.24}), row("worse", paper={"error_float": 9.0}),
            row("near", paper={"cost": {"macs": 3}, "top1_integer": 90.05}),
            row("other", paper={"accounting.ratios.data_only": 5}, note="a|b", top1_float_bn_reestimated=91.128)]
    assert scores.verdict(rows[0]) == (90.24, 0.01, "the same")
    assert scores.verdict(rows[1]) == (91.0, -0.75, "not reached")
    assert scores.verdict(rows[2]) == (90.05, -0.05, "reached")
    assert scores.verdict(rows[3]) is None
    lines = scores.markdown(rows).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == 10 and r"a\|b" in lines[5] and "91.13" in lines[5]
    assert lines[2] == "| same | 90.24 | 90.25 | 90.00 | +0.01 | the same |  | 1 KB |  |"
    twice = scores.markdown([row("x"), {**row("x"), "network": "other"}])
    assert "| x, other, seed" in twice and "| x |" not in twice
    bare = scores.markdown([row("x")]).splitlines()
    assert bare == ["| row | top-1 float | top-1 integer | file |", "| --- | ---: | ---: | ---: |",
                    "| x | 90.25 | 90.00 | 1 KB |"]
    assert "| x | 90.25" in readme.filled("<!-- scores: t -->\n<!-- end -->", {"t": [row("x")]})
