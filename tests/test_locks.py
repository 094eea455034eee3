"""Locks: one process at a time, and none after its end."""

import multiprocessing

from benchmarks.locks import locked, tried


def hold(path, started, release, order):
    with locked(path):
        started.set()
        release.wait(30)
        order.put("first")


def test_a_lock_is_held_by_one_process_and_ends_with_it(tmp_path):
    context, path = multiprocessing.get_context("fork"), tmp_path / "deep" / "a.lock"
    for killed in (False, True):
        started, release, order, waited = context.Event(), context.Event(), context.Queue(), []
        process = context.Process(target=hold, args=(path, started, release, order))
        process.start()
        assert started.wait(30)
        with tried(path) as held:
            assert not held

        def waiting(seen=waited, end=release, kill=killed, held_by=process):
            seen.append(1)
            held_by.kill() if kill else end.set()

        with locked(path, waiting) as had_to_wait:
            assert had_to_wait and waited == [1]
            if not killed:
                assert order.get(timeout=30) == "first"
        process.join()
        assert not path.exists()
        with tried(path) as held:
            assert held and path.exists()
            with tried(path) as again:
                assert not again
        assert not path.exists()
        with locked(path) as had_to_wait:
            assert not had_to_wait
