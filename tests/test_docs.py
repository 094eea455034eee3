"""The site: tables that parse back in every form, pages that load nothing else."""

import csv
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from benchmarks.citations import bibtex, entries, link, short
from benchmarks.docs import readme
from benchmarks.docs.content import command_in, story, table_part
from benchmarks.docs.papers import papers, said
from benchmarks.docs.site import build_site, marked, part_of, table_page
from benchmarks.docs.tables import COLUMNS, comma_separated, latex, markdown, table_of
from benchmarks.docs.words import count, metric, plain, size, times
from benchmarks.foreign import in_words
from benchmarks.jobs import CONFIGS, all_tables
from benchmarks.rows import RESULTS, read_rows
from methods import method_names
from methods.core.errors import CompressError, ConfigError
from tests.made_rows import EVIL, full

# --- words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, text", [(0, "0 B"), (999.6, "1 KB"), (12_345, "12.3 KB"), (999_600, "1 MB")])
def test_units(n, text):
    assert size(n) == text and count(n) == text.removesuffix(" B").removesuffix("B")


@pytest.mark.parametrize("value, text", [(3.0, "3"), (3.14159, "3.14"), (0.08, "0.08"), (1234567.0, "1,234,567")])
def test_numbers_have_two_decimals_at_most(value, text):
    assert plain(value) == text
    assert times(39.329) == "39.3x" and times(1910.4) == "1910x" and times(1.256) == "1.26x"
    assert metric("error_float")[0] == "error, float arithmetic, %" and "." not in metric("hardware.some_thing")[0]


# --- tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", EVIL, "*x* _y_", "line\nbreak"])
def test_tables_parse_back_in_every_form(name):
    table = table_of([full(name, top1=90 / 7)], "t", "t")
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown(table).splitlines()]
    assert len(lines) == 4 and {len(line) for line in lines} == {len(table.columns)}
    assert "<script>" not in markdown(table)
    head, base, ours = csv.reader(io.StringIO(comma_separated(table)))
    assert head == [column.header for column in table.columns] and len(base) == len(ours) == len(head)
    assert float(ours[head.index("top-1, integer")]) == 90 / 7 and ours[0] == name
    body = latex(table).split("\\midrule")[1]
    lines = [re.split(r"(?<!\\)&", line) for line in body.splitlines() if line.endswith("\\\\")]
    assert lines and {len(line) for line in lines} == {len(table.columns)}


def test_a_formula_in_a_name_is_text_in_a_spreadsheet():
    ours = list(csv.reader(io.StringIO(comma_separated(table_of([full("=1+1")], "t", "t")))))[2]
    assert ours[0] == "'=1+1"


def test_intervals_turn_round_and_seen_images_are_marked():
    """A change of -0.5 to 0.1 points is a loss of -0.1 to 0.5; a network at 99.9 % on images has seen them."""
    paired = {"integer": {"change": -0.2, "low": -0.5, "high": 0.1}}
    rows = [full("a", against_baseline=paired, held_out_top1=95.0, baseline_held_out_top1=96.0),
            full("b", held_out_top1=97.0, baseline_held_out_top1=99.9)]
    table = table_of(rows, "t", "t")
    cells = [dict(zip([c.header for c in table.columns], line.cells, strict=True)) for line in table.lines[1:]]
    assert [one["95 % interval"].text for one in cells] == ["-0.10 to 0.50", "—"]
    assert [one["held-out"].text for one in cells] == ["95.00", "97.00 (seen)"]


def test_points_lost_and_columns_that_nobody_fills():
    headers = [column.header for column in table_of([full("a", top1=90.0)], "t", "t").columns]
    assert "points lost" in headers and "held-out" not in headers and "printed" not in headers
    assert len({column.header for column in COLUMNS}) == len(COLUMNS)
    table = table_of([full("a", top1=90.0, paper={"error_float": 9.5})], "t", "t")
    cells = dict(zip([c.header for c in table.columns], table.lines[1].cells, strict=True))
    assert cells["points lost"].text == "5.50" and cells["points lost"].key == 5.5 and cells["printed"].text == "9.5"


# --- pages -------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that what is opened is closed."""

    VOID = {"meta", "path", "use", "br", "link", "img", "rect", "input"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.attributes, self.text, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
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


def checked(path):
    """The text of a page that is well formed and loads nothing but what lies beside it."""
    reader, text = Reader(), path.read_text(encoding="utf-8")
    reader.feed(text)
    assert reader.open == []
    loads = {value for _, name, value in reader.attributes if name in ("src", "srcset", "action", "xlink:href")}
    loads |= {value for tag, name, value in reader.attributes if name == "href" and tag == "link"}
    assert {value for value in loads if not value.startswith("#")} <= {"style.css", "tables.js"}
    assert not any(name.startswith("on") for _, name, _ in reader.attributes)
    assert not re.findall(r"url\((?!#)|@import", text)
    for tag, name, value in reader.attributes:
        if tag == "a" and name == "href" and not value.startswith("http") and not value.startswith("api/"):
            assert (path.parent / value).exists(), value
    return "".join(reader.text)


def test_a_table_page_shows_everything_and_is_safe(tmp_path):
    rows = [full(EVIL, note=EVIL, budget={"bits": EVIL}), full("b", paper={"error_float": 12.0, "bytes": 10})]
    text = checked(table_page(rows, "t", EVIL, f"python -m benchmarks {EVIL}", tmp_path))
    assert text.count(EVIL) >= 5 and "1 reached, 1 not reached" in text
    names = {"table_t.html", "t.csv", "t.md", "t.tex", "style.css", "tables.js"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_the_site_has_a_page_a_paper_and_a_table(tmp_path):
    said_ = []
    rows_of = {"udfc_table2": [full("a", "udfc"), full("b", "udfc", size=2000)], "compare_x": [full("c", "dfq")]}
    tried = {"alexnet": {"sparq": {"result": f"refused: {EVIL}"}, "dfq": {"result": "ok, 8 of 8 layers in integers"}}}
    summaries = build_site(rows_of, tmp_path, headline="compare_x", api=False, say=said_.append,
                           networks=in_words(tried))
    text = checked(tmp_path / "networks.html")
    assert "sparq 0 of 1, dfq 1 of 1" in text and "no (1)" in text and EVIL in text
    assert {one["method"] for one in summaries} == set(method_names())
    for path in tmp_path.glob("*.html"):
        checked(path)
    assert {f"{name}.html" for name in method_names()} <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "table_compare_x.html").exists() and len(said_) == len(rows_of) + len(method_names()) + 1
    assert "All methods, net on digits" in checked(tmp_path / "index.html")
    with pytest.raises(ConfigError, match="this is a file"):
        build_site(rows_of, tmp_path / "index.html", headline="", api=False, say=said_.append)


def test_numbers_of_others_and_numbers_that_are_asked_for_do_not_count(tmp_path):
    """"Prune 30% l2" has the paper's numbers of plain pruning; a density that the budget gives is no result."""
    printed = {"top1_float": 80.0, "bytes": 10, "cost.density": 0.5}
    rows = [full("Prune 30% l2", "udfc", paper=printed),
            full("UDFC 30% l2", "udfc", paper=printed, budget={"density": 0.5, "bits": None})]
    (line,) = [one for one in build_site({"udfc_table2": rows}, tmp_path, headline="", api=False, say=lambda line: None)
               if one["method"] == "udfc"]
    assert line["printed"] == 2 and line["tables"] == {"udfc_table2": 2}
    assert {kind: dict(found) for kind, found in line["counts"].items()} == {
        "accuracy": {"reached": 1}, "counted": {"not reached": 1}}
    shown = checked(tmp_path / "udfc.html")
    assert shown.count("kept weights, share") >= 2  # the page shows them all the same


def test_the_rows_that_stand_for_a_paper_are_shown_without_layers_and_what_is_asked_for(tmp_path):
    """`first` of udfc_table2 names "UDFC 30% l2" and not "UDFC 50% l2"; what it prints of neuron merging is among its
    `others`, and no number of that method's authors."""
    printed = {"top1_float": 80.0, "bytes": 10, "cost.density": 0.5, "layers": {"c1": {"density": 0.5}}}
    asked = {"budget": {"density": 0.5, "bits": None}}
    rows = [full("UDFC 30% l2", "udfc", paper=printed, **asked), full("UDFC 50% l2", "udfc", paper=printed, **asked),
            full("NM 30% l2", "neuron_merging", paper={"top1_float": 99.9})]
    lines = {one["method"]: {row: [(line["short"], line["verdict"]) for line in found]
                             for row, found in one["first"].items()}
             for one in build_site({"udfc_table2": rows}, tmp_path, headline="", api=False, say=lambda line: None)}
    assert lines["udfc"] == {"UDFC 30% l2 (net)": [("top-1", "reached"), ("file", "not reached")]}
    assert lines["neuron_merging"] == lines["dfq"] == {}


def test_rows_count_for_the_method_that_made_them(tmp_path):
    """udfc_table2 is UDFC's, but a row of neuron merging in it stands on that method's page, with its verdict."""
    merged = full("nm", "neuron_merging", paper={"top1_float": 80.0})
    rows_of = {"udfc_table2": [full("a", "udfc", paper={"bytes": 10, "top1_float": 99.0}), merged],
               "compare_x": [full("c", "neuron_merging"), full("d", "udfc"), full("e", "udfc")]}
    lines = {one["method"]: one for one in build_site(rows_of, tmp_path, headline="", api=False, say=lambda line: None)}
    assert lines["neuron_merging"]["tables"] == {"udfc_table2": 1, "compare_x": 1}
    counts = {kind: dict(found) for kind, found in lines["neuron_merging"]["counts"].items()}
    assert counts == {"accuracy": {"reached": 1}, "counted": {}} and lines["neuron_merging"]["printed"] == 1
    assert lines["udfc"]["tables"] == {"udfc_table2": 1, "compare_x": 2} and lines["udfc"]["printed"] == 2
    assert lines["dfq"]["rows"] == 0 and "No rows yet" in checked(tmp_path / "dfq.html")
    text = checked(tmp_path / "neuron_merging.html")
    assert "No rows yet" not in text and "1 of 2 rows" in text and "1 of 3 rows" in text
    assert 'href="table_udfc_table2.html"' in (tmp_path / "neuron_merging.html").read_text()


def test_pages_without_a_paper_speak_of_none(tmp_path):
    build_site({"rptq": [full("a", "rptq")]}, tmp_path, headline="", api=False, say=lambda line: None)
    for one in papers():
        text = checked(tmp_path / one.file)
        assert one.link is not None or not re.search("[Tt]he paper (prints|leaves)", text)
        assert f"{one.citation}." in text and not one.citation.endswith(".")


def test_seconds_beside_a_gpu_are_not_shown():
    rows = [full("a"), full("b", device="cpu"), full("c", device="cuda")]
    table = table_of(rows, "t", "t")
    at = [column.header for column in table.columns].index("CPU s")
    assert [line.cells[at].text for line in table.lines] == ["—", "1.25", "1.25", "—"]
    assert "GPU" in table.columns[at].meaning


def test_every_row_gets_a_verdict_on_its_page():
    part = table_part([full("a", paper={"top1_float": 95.0, "bytes": 1000})], "t", "t", "c", "")
    assert [line["verdict"] for line in part["verdicts"]] == ["not reached", "reached"]
    assert part["verdicts"][1]["printed"] == "1 KB"


# --- papers and citations ----------------------------------------------------------------------------------


def test_docstrings_are_taken_apart():
    paragraphs, departures = said("Title (X, 2020).\n\nIt does\nthis.\n\nAlgorithm\n  a\n\nDepartures   First words.\n"
                                  "  * one\n    more\n  * two\n")
    assert paragraphs == ["Title (X, 2020).", "It does this."] and departures == ["First words.", "one more", "two"]
    assert said(None)[1] == []


@pytest.mark.parametrize("heading, first", [
    (" from its specification, and choices that it leaves", []), ("", []),
    ("   The paper was not at hand.", ["The paper was not at hand."]),
    (" (the paper could not be opened)", ["(the paper could not be opened)"])])
def test_the_rest_of_a_heading_over_a_list_is_no_departure(heading, first):
    assert said(f"Title.\n\nDepartures{heading}\n  * one\n    more\n")[1] == [*first, "one more"]


def test_a_text_beside_the_heading_stays():
    assert said("Title.\n\nDepartures  There is no paper. Every\n            layer is pruned.\n")[1] == [
        "There is no paper. Every layer is pruned."]


def test_every_method_of_a_paper_can_be_cited():
    known = entries()
    for one in papers():
        assert one.summary and one.code.startswith("methods/")
        assert one.method in known or one.link is None
    assert {key for key in known} <= set(method_names())
    assert all(link(entry).startswith("https://") and short(entry) for entry in known.values())
    assert bibtex(["clip_q"]).startswith("@inproceedings{clip_q") and len(bibtex([])) > len(bibtex(["admm"]))
    with pytest.raises(ConfigError, match="no reference for 'x'; there are: deep_compression"):
        bibtex(["x"])


def test_stories_are_the_heads_of_configurations():
    text = story(CONFIGS / "sparq_tables.toml")
    assert text.startswith("SPARQ") and "python -m" not in text and "\n" not in text


@pytest.mark.parametrize("entry", all_tables(), ids=lambda entry: entry.name)
def test_no_part_of_the_command_stays_in_a_story(entry):
    left = r"Run[:,]|python|--(row|checkpoint|workers|methods)|\b(FILE|DIR)\b|#"
    assert not re.search(left, story(entry.path))


@pytest.mark.parametrize("command", [
    'Run: python -m x --row "1.0 MB"', "Run: python -m x --checkpoint FILE (see y.toml).",
    "Run, one by one:\n#     python -m x \\\n#         --more\n# where DIR holds files."])
def test_a_story_goes_on_after_the_command(command, tmp_path):
    (tmp_path / "t.toml").write_text(f"# Before #1. {command}\n#   After.\n\nmethod = 1\n# no\n")
    assert story(tmp_path / "t.toml") == "Before #1. After."


def test_the_share_of_trimmed_weights_is_shown():
    column = next(column for column in COLUMNS if column.header == "trimmed")
    shown = column.show(column.value({**full("a"), "notes": {"size": {"knob": "density", "trimmed": 0.025}}}))
    assert shown == "2.50 %"
    for more in ({}, {"notes": {}}, {"notes": {"size": {"trimmed": 0.0}}}):
        assert column.value({**full("a"), **more}) is None


def test_rows_stand_in_the_order_of_their_configuration():
    """Whatever place they had in it when they were made."""
    entry = next(one for one in all_tables() if one.name == "smallest_lenet5")
    rows = read_rows(RESULTS / "rows" / entry.name, lambda line: None)
    names = [row["name"] for row in part_of(entry, rows[::-1])["rows"]]
    assert names == [job.name for job in entry.rows if job.name in names] and len(names) == len(rows) > 3


@pytest.mark.parametrize("name, command", [
    ("orders_resnet20", "sweep paper_configs/orders_resnet20.toml --seeds 3"),
    ("sequential_reconstruction", "reproduce paper_configs/sequential_reconstruction.toml --network resnet56 "
     "--checkpoint FILE"),
    ("rptq_train", "reproduce paper_configs/rptq_train.toml"),
    ("imagenet_sparq", "reproduce paper_configs/imagenet_sparq.toml")])
def test_a_page_says_the_command_of_its_configuration(name, command):
    assert command_in(CONFIGS / f"{name}.toml") == f"python -m benchmarks {command}"


def test_every_key_of_every_row_is_explained():
    """In the first column of results/README.md's table of keys: what nobody explains cannot be read."""
    text = (RESULTS / "README.md").read_text(encoding="utf-8").split("## What a row says")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    named = {path.split(".")[0] for cell in cells for path in re.findall(r"`([^`]+)`", cell)}
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS / "rows").rglob("*.json")]
    assert rows and sorted({key for found in rows for key in found} - named) == []


# --- README ------------------------------------------------------------------------------------------------


def test_readme_blocks_are_filled_again_and_again(tmp_path):
    rows_of = {"one": [full("a"), full("b", size=2000)]}
    trained = {"task": "t", "network": "n", "test_top1": 91.239, "held_out_top1": 92.0, "seed": 3,
               "commit": "0123456789", "setup": {"recipe": {"epochs": 7}}}
    line = {"short": "error", "printed": "1.58", "ours": "1.42", "verdict": "reached"}
    summary = {"name": "UDFC", "who": "X|Y", "link": None, "code": "methods/udfc.py", "data": "no data",
               "rows": 2, "tables": {"one": 2}, "printed": 3, "first": {"a|b": [line, {**line, "short": "P+Q"}]},
               "counts": {"accuracy": Counter({"reached": 2, "not reached": 1}), "counted": Counter({"missing": 1})}}
    text = ("x\n<!-- headline: one -->\nold\n<!-- end -->\n<!-- rows: one -->\n<!-- end -->\n"
            "<!-- papers: all -->\n<!-- end -->\n<!-- baselines: shipped -->\n<!-- end -->\n")
    once = readme.filled(text, rows_of, [summary], [trained])
    assert readme.filled(once, rows_of, [summary], [trained]) == once and "old" not in once
    assert "| a |" in once and "| points lost |" in once and r"X\|Y" in once
    assert (r"| a\|b: error 1.58 → 1.42 reached, P+Q 1.58 → 1.42 reached | 2, 1, 0 | 0, 1, 0 | no data | "
            "2 in [one](results/rows/one) |") in once
    assert "\n| t | n | 91.24 | 92.00 | 7 | 3 | 0123456 |\n" in once
    with pytest.raises(CompressError, match="'one'"):
        readme.filled(text, {}, [summary], [trained])
    (tmp_path / "README.md").write_text(text)
    readme.refresh(tmp_path / "README.md", rows_of, [summary], [trained])
    assert (tmp_path / "results" / "figures" / "one.png").read_bytes()[1:4] == b"PNG"


def test_code_in_texts_is_marked_and_nothing_else_is_html():
    assert marked("a < b in `core/x.py`, ``c`` & `") == "a &lt; b in <code>core/x.py</code>, <code>c</code> &amp; `"
