"""Runs on disk: states survive an interruption, resume to the bytes of an uninterrupted run, and say little."""

import io
import os
import re

import pytest
import torch
from rich.console import Console

from benchmarks import runs
from benchmarks.locks import locked
from benchmarks.runs import Clock, DiskRun, Screen, run_key
from methods import deep_compression, prune_then_quantize
from methods.core.budget import Budget
from methods.core.errors import CompressError
from methods.core.file import container
from methods.core.file.storage import to_bytes
from methods.core.train.finetune import Hooks, Recipe, train

SHORT = Recipe(epochs=1, lr=0.02)


class Silent:
    """A screen that shows nothing."""

    said: list = []

    def update(self, label, step, total, metrics):
        pass

    def say(self, line):
        self.said.append(line)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(Silent, "said", [])
    monkeypatch.setattr(runs, "origin", lambda: ("commit", False))


def disk(folder, resume=True, **fields):
    return DiskRun(folder / "run", "label", Silent(), resume=resume, **fields)


class Breaking(DiskRun):
    """Breaks off, as Ctrl-C would, instead of answering the call number `left`."""

    left = [0]

    def _count(self):
        self.left[0] -= 1
        if self.left[0] < 0:
            raise KeyboardInterrupt

    def report(self, step, total, **metrics):
        self._count()

    def save(self, state):
        self._count()
        super().save(state)

    def stage(self, name):
        stage = super().stage(name)
        stage.__class__ = Breaking
        return stage


# --- states ------------------------------------------------------------------------------------------------


def test_save_load_forget(tmp_path):
    run = disk(tmp_path)
    assert run.load() is None
    for count in (1, 2):
        run.save({"count": count, "w": torch.arange(3.0), "nested": {"a": [None, "b", (1, 2.5)]}})
    state = disk(tmp_path).load()
    assert state["count"] == 2 and torch.equal(state["w"], torch.arange(3.0))
    assert state["nested"] == {"a": [None, "b", (1, 2.5)]}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"state.pt", "before.pt"}
    run.forget()
    assert disk(tmp_path).load() is None and not (tmp_path / "run").exists()
    run.forget()  # nothing is there: not an error


def test_without_resume_old_states_are_gone(tmp_path):
    old = disk(tmp_path)
    old.save({"a": 1})
    old.stage("b").save({"b": 1})
    fresh = disk(tmp_path, resume=False)
    assert fresh.load() is None and fresh.stage("b").load() is None


def test_stages_have_states_of_their_own(tmp_path):
    run = disk(tmp_path)
    run.stage("retrain").save({"n": 1})
    run.stage("layer1/ünï 2").save({"n": 2})
    run.save({"n": 3})
    again = disk(tmp_path)
    assert [r.load()["n"] for r in (again.stage("retrain"), again.stage("layer1/ünï 2"), again)] == [1, 2, 3]
    assert again.stage("other").load() is None
    assert again.stage("retrain").label == "label: retrain"


def flips(size):
    """Bits all over a state: of its digest, its head, its middle, its end."""
    return [*range(0, 256, 31), *range(256, 8 * size, size // 3 * 8 + 5), 8 * size - 1]


def test_a_flipped_bit_is_never_resumed(tmp_path):
    """The state before it goes on; where that is bad too, nothing does, and it is said."""
    run = disk(tmp_path)
    run.save({"n": 1, "w": torch.arange(50.0)})
    run.save({"n": 2, "w": torch.arange(50.0)})
    path = tmp_path / "run" / "state.pt"
    whole = path.read_bytes()
    for bit in flips(len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert disk(tmp_path).load()["n"] == 1 and "state.pt is damaged" in Silent.said.pop(), bit
    for content in (b"", whole[:300], b"garbage"):
        path.write_bytes(content)
        assert disk(tmp_path).load()["n"] == 1
    (tmp_path / "run" / "before.pt").write_bytes(b"x")
    assert disk(tmp_path).load() is None and "this part starts again" in Silent.said[-1]
    assert not any("\n" in line for line in Silent.said)


def test_a_cut_between_the_two_files_goes_on_from_the_one_before(tmp_path, monkeypatch):
    run = disk(tmp_path)
    run.save({"n": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save({"n": 2})
    monkeypatch.undo()
    assert disk(tmp_path).load() == {"n": 1}


def test_a_state_of_another_version_is_refused(tmp_path):
    run = disk(tmp_path)
    run.save({"n": 1})
    buffer = io.BytesIO()
    torch.save({"state": {}}, buffer)
    path = tmp_path / "run" / "state.pt"
    path.write_bytes(runs.hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    assert disk(tmp_path).load() is None and "of another version" in Silent.said[0]


def test_states_say_which_code_made_them(tmp_path, monkeypatch):
    """A state of uncommitted code, gone on with after a checkout, does not pass as clean; all stages know it."""
    monkeypatch.setattr(runs, "origin", lambda: ("old", True))
    disk(tmp_path).stage("a").save({})
    monkeypatch.setattr(runs, "origin", lambda: ("new", False))
    again = disk(tmp_path)
    assert again.origins == [("new", False)]
    again.stage("b").load()
    assert again.origins == [("new", False)]
    again.stage("a").load()
    assert again.origins == [("old", True), ("new", False)]
    again.stage("b").save({})
    third = disk(tmp_path)
    third.stage("b").load()
    assert third.origins == [("old", True), ("new", False)]


def test_a_full_disk_keeps_the_last_state(tmp_path, monkeypatch):
    run = disk(tmp_path)
    run.save({"n": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(container.os, "fsync", full)
    with pytest.raises(CompressError, match="No space left on device"):
        run.save({"n": 2})
    monkeypatch.undo()
    assert run.load()["n"] == 1 and len(list((tmp_path / "run").iterdir())) == 1


def test_seconds_add_up_over_interruptions(tmp_path, monkeypatch):
    now = [100.0, 900.0]
    monkeypatch.setattr(runs, "_now", lambda: tuple(now))

    def later(cpu, wall):
        now[:] = [now[0] + cpu, now[1] + wall]

    run = disk(tmp_path, clock=Clock())
    later(30, 40)
    run.stage("a").save({})
    later(1000, 2000)  # lost with the interruption: nothing was saved
    again = disk(tmp_path, clock=Clock())
    again.stage("a").load()
    later(12, 13)
    assert again.clock.seconds() == (42, 53)
    again.stage("b").save({})
    third = disk(tmp_path, clock=Clock())
    assert third.stage("a").load() == third.stage("b").load() == {}
    assert third.clock.seconds() == (42, 53)
    fourth = disk(tmp_path, clock=Clock())
    assert fourth.stage("b").load() == fourth.stage("a").load() == {}  # the older state comes last
    assert fourth.clock.seconds() == (42, 53)


def test_leftovers_are_removed(tmp_path, monkeypatch):
    """Parts of files and states of finished rows go; what is young, locked or not ours stays."""
    states, now = tmp_path / "runs", runs.time.time()
    for name in ("done", "done.settings", "again", "cut", "old", "locked"):
        disk(states / name).save({})
        (states / f"{name}.lock").write_text("")
    for path in (tmp_path / ".part.tmp", states / ".young.tmp", tmp_path / "own.tmp"):
        path.write_text("x")
    month = runs.time.time() - 31 * 86_400
    os.utime(tmp_path / ".part.tmp", (month, month))
    os.utime(tmp_path / "own.tmp", (month, month))
    os.utime(states / "old" / "run" / "state.pt", (month, month))
    with locked(states / "locked.lock"):
        runs.clean_up(tmp_path, {"done": now + 60, "done.settings": now + 60, "again": now - 60,
                                   "locked": now + 60}, Silent())
        assert {path.name for path in states.iterdir()} == {"again", "cut", "locked", "locked.lock", ".young.tmp"}
    assert (tmp_path / "own.tmp").exists() and not (tmp_path / ".part.tmp").exists()
    assert len(Silent.said) == 1 and "old, not continued for 30 days" in Silent.said[0]


def test_keys_depend_on_all_facts_and_not_on_their_order():
    facts = {"a": 1, "b": {"x": [1.5, None], "y": "ü"}}
    assert run_key(facts) == run_key({"b": {"y": "ü", "x": [1.5, None]}, "a": 1})
    assert len({run_key(facts), run_key({**facts, "a": 2}), run_key({**facts, "c": 0})}) == 3
    assert re.fullmatch("[0-9a-f]{16}", run_key(facts))


# --- training through the disk -----------------------------------------------------------------------------


def test_what_train_saves_is_plain(tiny, tmp_path):
    """torch.load(weights_only=True), which runs no code, reads it back; hooks may keep tensors and numbers."""

    class Counting(Hooks):
        steps = torch.zeros(1)

        def state(self):
            return {"steps": self.steps, "note": "a", "list": [1, 2.0, None]}

    run = disk(tmp_path)
    train(tiny.model(), tiny.task(), Recipe(epochs=2, lr=0.02, ema=0.9), torch.Generator().manual_seed(0), run=run,
          hooks=Counting())
    data = (tmp_path / "run" / "state.pt").read_bytes()[runs.DIGEST:]
    state = torch.load(io.BytesIO(data), weights_only=True)["state"]
    assert len(state["history"]) == 2 and state["hooks"][0]["list"] == [1, 2.0, None]
    assert state["model"].keys() == tiny.model().state_dict().keys()


@pytest.mark.parametrize("recipe", [Recipe(epochs=3, lr=0.02), Recipe(epochs=3, lr=0.01, optimizer="adam", ema=0.9)],
                         ids=["sgd", "adam, average"])
def test_training_resumes_to_the_same_bytes(tiny, tmp_path, recipe):
    whole = tiny.model()
    log = train(whole, tiny.task(), recipe, torch.Generator().manual_seed(0), run=disk(tmp_path / "whole"))
    for calls in (0, 2, 4, 7):  # before the first step, at the first save, in the second epoch, at the last save
        Breaking.left[0] = calls
        with pytest.raises(KeyboardInterrupt):
            train(tiny.model(), tiny.task(), recipe, torch.Generator().manual_seed(0),
                  run=Breaking(tmp_path / f"{calls}", "label", Silent(), resume=False))
        model = tiny.model()
        again = train(model, tiny.task(), recipe, torch.Generator().manual_seed(0),
                      run=DiskRun(tmp_path / f"{calls}", "label", Silent(), resume=True))
        assert tiny.same(dict(model.state_dict()), dict(whole.state_dict())) and again == log


@pytest.mark.parametrize("method, config", [
    (deep_compression, deep_compression.Config(rounds=2, retrain=SHORT, tune=SHORT)),
    (prune_then_quantize, prune_then_quantize.Config(retrain=SHORT, aware=SHORT)),
], ids=["deep_compression", "prune_then_quantize"])
def test_methods_resume_to_the_same_bytes(tiny, tmp_path, method, config):
    def compressed(run):
        found = method.compress(tiny.model(), tiny.task(), Budget(density=0.4, bits=4), config,
                                torch.Generator().manual_seed(0), run=run)
        return to_bytes(found)[0]

    whole = compressed(disk(tmp_path))
    for calls in (1, 2, 3, 5):
        Breaking.left[0] = calls
        folder = tmp_path / f"{calls}"
        with pytest.raises(KeyboardInterrupt):
            compressed(Breaking(folder, "label", Silent(), resume=False))
        assert compressed(DiskRun(folder, "label", Silent(), resume=True)) == whole


# --- the screen --------------------------------------------------------------------------------------------


def test_quiet_output_without_a_terminal(capsys):
    with Screen() as screen:
        for step in range(1, 501):
            screen.update("näme [bold]x[/]", step, 500, {"loss": 0.123456, "train_top1": 99.0})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # the first and the last; one in half a minute between them
    assert lines[-1] == "näme [bold]x[/]: 500/500  loss 0.1235  train_top1 99"


def test_a_line_every_half_minute(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    with Screen() as screen:
        for step in range(1, 100):
            now[0] += 10
            screen.update("a", step, 1000, {})
    assert 20 <= len(capsys.readouterr().err.splitlines()) <= 34


def test_bars_on_a_terminal(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(runs, "Console", lambda **_: Console(file=out, force_terminal=True, width=120))
    with Screen() as screen:
        for step in (1, 2):
            screen.update("[odd] name", step, 2, {"loss": 0.5})
        screen.say("a line with [brackets]")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "[odd] name" in text and "2/2" in text and "loss 0.5" in text and "a line with [brackets]" in text
