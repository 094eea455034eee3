"""Citations of methods without a paper of their own: this project, as CITATION.cff names it."""

import re

import pytest

from benchmarks.citations import bibtex, entries
from benchmarks.rows import ROOT
from methods import method_names
from methods.core.errors import ConfigError


def test_a_method_without_a_paper_is_cited_as_this_project():
    software = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    own = set(method_names()) - set(entries())
    assert {"rptq", "rptq_train", "pipeline", "prune_then_quantize", "sequential_reconstruction"} <= own
    for name in own:
        found = dict(re.findall(r"^  (\w+) = \{+(.*?)\}+,?$", bibtex([name]), re.MULTILINE))
        assert bibtex([name]).startswith(f"@software{{{name},\n") and bibtex([name]).endswith("\n}\n")
        assert f'title: "{found["title"]}"' in software and f'name: "{found["author"]}"' in software
        assert f"version: {found['version']}\n" in software and f"date-released: {found['year']}-" in software
        assert found["note"].replace("\\", "") == f"The method {name}"
        assert bibtex([name]) in bibtex([])
    with pytest.raises(ConfigError, match="no reference for 'x'; there are: .*width_search.*, rptq, rptq_train"):
        bibtex(["clip_q", "x"])


def test_the_command_prints_it(run):
    code, out, _ = run("cite", "rptq", "clip_q")
    assert code == 0 and out == bibtex(["rptq", "clip_q"]) and "@software{rptq" in out
    code, _, err = run("cite", "rptk")
    assert code and "no reference for 'rptk'" in err and "rptq" in err.split("there are")[1]
