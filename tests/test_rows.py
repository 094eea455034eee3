"""Result rows: one file each, whole or not at all, whatever the disk does and whoever else writes."""

import errno
import json
import multiprocessing
import os
import subprocess

import pytest

from benchmarks import provenance as origins
from benchmarks.jobs import all_tables, prepare
from benchmarks.networks import label
from benchmarks.provenance import joined, provenance
from benchmarks.report.seeds import over_seeds
from benchmarks.rows import FORM, RESULTS, SUPERSEDED, Row, finished, read_row, read_rows, stem, tables, write_row
from benchmarks.settings import plain, same_settings
from methods.core.errors import CompressError
from methods.core.file import container

EXAMPLES = {int: 3, str: "x", (int, float): 1.5, (str, type(None)): "key", (int, float, type(None)): None}


def filled(form):
    return {key: filled(part) if isinstance(part, dict) else EXAMPLES[part] for key, part in form.items()}


def row(name, **more):
    return Row({**filled(FORM), "schema": 2, "name": name, "checkpoint": {"digest": "0123456789abcdef", "source": "s"},
                **more})


def silent(line):
    raise AssertionError(line)


def test_write_and_read(tmp_path):
    written = [row("a", order=2, layers={"z": 1, "a": [0.1, None]}), row("é\u2028 \x85\n", order=0),
               row("c" * 100, order=1, note="\x1b[31m")]
    for one in written:
        path = write_row(tmp_path / "new", one)
        assert read_row(path) == one and path.stem == one.stem
    found = read_rows(tmp_path / "new", silent)
    assert found == [written[1], written[2], written[0]]  # by their order, not by name
    assert list(found[2]["layers"]) == ["z", "a"]  # in the order of the network
    with pytest.raises(TypeError):
        found[0]["name"] = "other"


def test_names_of_files():
    assert row("4-bit, 10 %", network="Net", seed=3).stem == "4-bit-10-net-seed3-01234567"
    names = {stem("a", "n", 0, "1" * 16), stem("a", "n", 0, "2" * 16), stem("a", "n", 1, "1" * 16),
             stem("a", "m", 0, "1" * 16), stem("b", "n", 0, "1" * 16)}
    assert len(names) == 5


def test_a_row_of_another_job_is_kept_aside(tmp_path):
    for job, top1 in (("one", 1), ("one", 2), ("two", 3), ("three", 4)):
        path = write_row(tmp_path, row("a", job=job, top1_float=top1))
    assert read_row(path)["top1_float"] == 4 and len(list(tmp_path.glob("*.json"))) == 1
    aside = {one["job"]: one["top1_float"] for one in map(read_row, (tmp_path / SUPERSEDED).iterdir())}
    assert aside == {"one": 2, "two": 3} and [one["job"] for one in read_rows(tmp_path, silent)] == ["three"]


def test_finished(tmp_path):
    one = row("a", job="key")
    assert finished(tmp_path, one.stem, "key") is None
    path = write_row(tmp_path, one)
    assert finished(tmp_path, one.stem, "key") == one and finished(tmp_path, one.stem, "other") is None
    path.write_bytes(path.read_bytes()[:200])
    assert finished(tmp_path, one.stem, "key") is None


TORN = [b"{", b"3", b'"\xff"', b'{"name": "b"}', b"", b"[" * 100_000, b'{"schema": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("data", TORN, ids=[repr(data[:8]) for data in TORN])
def test_what_is_no_row_is_said_and_does_not_stop_the_others(tmp_path, data):
    write_row(tmp_path, row("b"))
    torn = tmp_path / f"{row('a').stem}.json"
    torn.write_bytes(data)
    said = []
    assert [one["name"] for one in read_rows(tmp_path, said.append)] == ["b"]
    assert len(said) == 1 and torn.name in said[0] and "\n" not in said[0] and len(said[0]) < 1000
    assert torn.read_bytes() == data
    write_row(tmp_path, row("a"))  # and is kept where its row is made again
    assert [path.read_bytes() for path in (tmp_path / SUPERSEDED).iterdir()] == [data]


@pytest.mark.parametrize("change, fault", [
    ({"schema": 1}, "schema 1; read here is 2"), ({"bytes": "3"}, "has bytes = '3'"), ({"bytes": True}, "bytes = True"),
    ({"cost": 3}, "has cost = 3, no table"), ({"cost": {}}, "lacks cost.bops, cost.density"),
    ({"top1_float": float("nan")}, "top1_float = nan"), ({"x": {"deep": [10**400]}}, "x.deep = a number beyond"),
    ({"note": "a\ud800"}, "half a letter .* in note"), ({"checkpoint": {"digest": 3, "source": "s"}}, "digest = 3"),
])
def test_faults_are_named(change, fault):
    with pytest.raises(CompressError, match=f"not a row: it .*{fault}"):
        row("a", **change)


def test_a_folder_that_is_none_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("absent", "file"):
        with pytest.raises(CompressError, match=f"there are no rows .*{name}"):
            read_rows(tmp_path / name, silent)
    with pytest.raises(CompressError, match="cannot be written|File exists"):
        write_row(tmp_path / "file", row("a"))


@pytest.mark.parametrize("value", [{1, 2}, b"x"])
def test_what_is_not_json_is_refused_before_writing(tmp_path, value):
    path = write_row(tmp_path, row("a"))
    before = path.read_bytes()
    with pytest.raises(CompressError, match="not JSON"):
        write_row(tmp_path, row("a", note=value))
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_earlier_row(tmp_path, monkeypatch):
    path = write_row(tmp_path, row("a", job="one"))
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(container.os, "fsync", full)
    with pytest.raises(CompressError, match="No space left on device"):
        write_row(tmp_path, row("a", job="two"))
    monkeypatch.undo()
    assert path.read_bytes() == before and not list(tmp_path.rglob("*.tmp"))


def write_many(folder, writer, count):
    for i in range(count):
        write_row(folder, row(f"{writer}-{i}", notes={"x": "x" * 20_000}))
        write_row(folder, row("shared", job="key", bytes=writer))


def test_processes_write_at_once(tmp_path):
    context = multiprocessing.get_context("fork")  # without the seconds that importing torch takes
    processes = [context.Process(target=write_many, args=(tmp_path, writer, 10)) for writer in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    names = {one["name"] for one in read_rows(tmp_path, silent)}
    assert names == {f"{writer}-{i}" for writer in range(3) for i in range(10)} | {"shared"}


def test_committed_rows_are_rows():
    folders = tables(RESULTS)
    rows = [(path, read_row(path)) for folder in folders for path in folder.rglob("*.json")]
    assert len(rows) >= 100 and all(one["table"] == path.relative_to(RESULTS / "rows").parts[0] for path, one in rows)
    assert all(path.stem == one.stem for path, one in rows if path.parent.name != SUPERSEDED)
    assert all(one.clean for _, one in rows)


def test_committed_rows_have_the_settings_of_their_tables():
    """A row of settings that its table had once belongs into `superseded`: comparisons would take it for today's."""
    shipped = {table.name: {(job.name, label(job.network)): job for job in table.rows} for table in all_tables()}
    seen = 0
    for folder in tables(RESULTS):
        for path in folder.glob("*.json"):
            one = read_row(path)
            job = shipped.get(one["table"], {}).get((one["name"], one["network"]))
            if job is None:
                assert one["table"] not in shipped, f"{path.name}: no row of {one['table']} has this name"
                continue
            _, budget, config = prepare(job)
            asked, seen = plain(budget), seen + 1
            assert same_settings(config, one["config"]), path.name
            assert {**dict.fromkeys(asked), **one["budget"]} == asked, path.name
            assert one.get("densities", "uniform") == job.densities and one["method"] == job.method, path.name
    assert seen >= 100


# --- provenance --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts, dirty, mixed, clean", [
    ([("a", False)], False, False, True), ([("a", False), ("a", False)], False, False, True),
    ([("a", True), ("a", False)], True, True, False), ([("a", False), ("b", False)], False, True, False),
    ([(None, None)], None, False, False), ([("a", False), (None, None)], None, True, False),
    ([("a", True), (None, None)], True, True, False), ([("a", True)], True, False, False)])
def test_all_code_that_worked_on_a_row_counts(parts, dirty, mixed, clean):
    said = joined(parts)
    assert (said["dirty"], said["mixed"], said["commit"]) == (dirty, mixed, parts[-1][0])
    assert row("a", **said).clean is clean


def test_a_dirty_baseline_makes_no_clean_row():
    start = {"digest": "0" * 16, "source": "s", "dirty": True}
    assert not row("a", **joined([("a", False)]), checkpoint=start).clean
    assert row("a", **joined([("a", False)]), checkpoint={**start, "dirty": False}).clean


@pytest.fixture
def repository(tmp_path, monkeypatch):
    def git(*words):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True,
                              capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-qm", "first")
    monkeypatch.setattr(origins, "ROOT", tmp_path)
    return tmp_path, git


def test_commit_and_dirty_flag(repository):
    folder, git = repository
    assert provenance()["commit"] == git("rev-parse", "HEAD") and provenance()["dirty"] is False
    (folder / "results").mkdir()
    (folder / "results" / "row.json").write_text("{}")
    assert provenance()["dirty"] is False  # what a run writes does not make the next run dirty
    (folder / "new.py").write_text("")
    assert provenance()["dirty"] is True


def test_a_changed_file_is_dirty(repository):
    (repository[0] / "code.py").write_text("2")
    assert provenance()["dirty"] is True


def test_without_git_the_environment_speaks(tmp_path, monkeypatch):
    monkeypatch.setattr(origins, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("JOINTCOMPRESS_COMMIT", raising=False)
    assert (provenance()["commit"], provenance()["dirty"]) == (None, None)
    monkeypatch.setenv("JOINTCOMPRESS_COMMIT", "abc")
    assert (provenance()["commit"], provenance()["dirty"]) == ("abc", False)
    assert json.dumps(provenance())


def test_committed_seeds_of_a_row_are_one_row():
    """Names of a table, on one network, baseline and data set: whatever seeds there are, they make one line."""
    for folder in tables(RESULTS):
        rows = read_rows(folder, silent)
        wanted = {(one["name"], one["network"], one["checkpoint"]["digest"], one["data"]) for one in rows}
        assert len(over_seeds(rows)) == len(wanted), folder.name
