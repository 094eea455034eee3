"""Result rows: whole or not at all, whatever the disk does and whoever else writes."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import subprocess

import pytest

from benchmarks import rows
from benchmarks.rows import REPORTED, append_row, provenance, read_rows
from methods.core.errors import CompressError


def row(name, **more):
    return {**dict.fromkeys(REPORTED), "name": name, **more}


def test_append_and_read(tmp_path):
    path = tmp_path / "new" / "ünï.jsonl"
    written = [row("a", layers={"z": 1, "a": [0.1, None]}), row("é\u2028 \x85\n"), row("c" * 100_000)]
    for one in written:
        append_row(path, one)
    assert read_rows(path) == written
    assert list(read_rows(path)[0]["layers"]) == ["z", "a"]  # in the order of the network
    assert len(path.read_bytes().splitlines()) == 3


def test_an_open_last_line_is_closed_first(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("a")))
    append_row(path, row("b"))
    assert [one["name"] for one in read_rows(path)] == ["a", "b"]


def test_lines_of_another_program(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row("ä\u2028"), ensure_ascii=False) + "\n\n  \n", encoding="utf-8")
    assert [one["name"] for one in read_rows(path)] == ["ä\u2028"]


@pytest.mark.parametrize("line, fault", [(b"{", "line 2, is not a row"), (b"3", "it is no JSON object"),
                                         (b'"\xff"', "line 2, is not a row"), (b'{"name": "b"}', "it lacks .*bytes"),
                                         (b'{"name": "half', "line 2, is not a row")])
def test_malformed_lines_are_named(tmp_path, line, fault):
    path = tmp_path / "rows.jsonl"
    append_row(path, row("a"))
    with open(path, "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(CompressError, match=fault) as caught:
        read_rows(path)
    assert "rows.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CompressError, match="cannot read the rows .*absent.jsonl: No such file"):
        read_rows(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x"])
def test_what_is_not_json_is_refused_before_writing(tmp_path, value):
    path = tmp_path / "rows.jsonl"
    append_row(path, row("a"))
    before = path.read_bytes()
    with pytest.raises(CompressError, match="not JSON"):
        append_row(path, row("b", note=value))
    assert path.read_bytes() == before


@pytest.mark.parametrize("open_line", [False, True])
@pytest.mark.parametrize("written", [0, 1, 50, None])
def test_a_full_disk_leaves_earlier_rows(tmp_path, monkeypatch, written, open_line):
    """`written` bytes reach the file before the disk is full; None: all, but the flush fails."""
    path = tmp_path / "rows.jsonl"
    append_row(path, row("a"))
    if open_line:
        path.write_bytes(path.read_bytes().rstrip())
    before, write, calls = path.read_bytes(), os.write, []

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def part(descriptor, data):
        calls.append(data)
        return write(descriptor, data[:written]) if len(calls) == 1 and written else full()

    monkeypatch.setattr(rows.os, "fsync" if written is None else "write", full if written is None else part)
    with pytest.raises(CompressError, match="rows.jsonl: No space left on device; earlier rows are intact"):
        append_row(path, row("b"))
    monkeypatch.undo()
    assert path.read_bytes() == before
    append_row(path, row("c"))
    assert [one["name"] for one in read_rows(path)] == ["a", "c"]


def test_an_interruption_leaves_earlier_rows(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    append_row(path, row("a"))
    before, write, calls = path.read_bytes(), os.write, []

    def interrupted(descriptor, data):
        calls.append(data)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return write(descriptor, data[:30])

    monkeypatch.setattr(rows.os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        append_row(path, row("b"))
    assert path.read_bytes() == before


def forked(function, *given):
    """A process of its own without the seconds that importing torch takes."""
    process = multiprocessing.get_context("fork").Process(target=function, args=given)
    process.start()
    return process


def append_under_a_limit(path, size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with pytest.raises(CompressError, match="earlier rows are intact"):
        append_row(path, row("x" * 5000))


def test_a_real_limit_leaves_earlier_rows(tmp_path):
    """The system itself cuts the write after the first bytes of the row."""
    path = tmp_path / "rows.jsonl"
    append_row(path, row("a"))
    before = path.read_bytes()
    process = forked(append_under_a_limit, path, len(before) + 1000)
    process.join()
    assert process.exitcode == 0 and path.read_bytes() == before


def append_many(path, writer, count):
    whole = os.write
    rows.os.write = lambda descriptor, data: whole(descriptor, data[:7000])  # a slow disk takes a row in parts
    for i in range(count):
        append_row(path, row(f"{writer}-{i}", note="x" * 20_000))


def test_processes_append_at_once(tmp_path):
    path, count = tmp_path / "rows.jsonl", 20
    processes = [forked(append_many, path, writer, count) for writer in range(3)]
    for process in processes:
        process.join()
    names = [one["name"] for one in read_rows(path)]
    for i in range(3):  # each one's rows in its own order
        assert [name for name in names if name.startswith(f"{i}-")] == [f"{i}-{j}" for j in range(count)]
    assert len(names) == 3 * count


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CompressError, match="could not be appended"):
        append_row(tmp_path / "file" / "rows.jsonl", row("a"))


# --- provenance --------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    def git(*words):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True,
                              capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-qm", "first")
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    return tmp_path, git


def test_commit_and_dirty_flag(repository):
    folder, git = repository
    assert provenance()["commit"] == git("rev-parse", "HEAD") and provenance()["dirty"] is False
    (folder / "results").mkdir()
    (folder / "results" / "rows.jsonl").write_text("{}")
    assert provenance()["dirty"] is False  # what a run writes does not make the next run dirty
    (folder / "new.py").write_text("")
    assert provenance()["dirty"] is True


def test_a_changed_file_is_dirty(repository):
    (repository[0] / "code.py").write_text("2")
    assert provenance()["dirty"] is True


def test_without_git_the_environment_speaks(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("JOINTCOMPRESS_COMMIT", raising=False)
    assert (provenance()["commit"], provenance()["dirty"]) == (None, None)
    monkeypatch.setenv("JOINTCOMPRESS_COMMIT", "abc")
    assert (provenance()["commit"], provenance()["dirty"]) == ("abc", False)
    assert json.dumps(provenance())
