"""One process at a time: a lock that ends with its process, on this machine or on a disk that several share."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Hold the lock `path` inside the block; yields whether another process held it and had to be waited for.

    waiting  called once, before waiting
    The file is removed at the end: a process that waited for the removed one takes the lock anew.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    waited = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    waiting()
                waited = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is(path, descriptor):
                try:
                    yield waited
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def tried(path: Path) -> Iterator[bool]:
    """Hold the lock `path` inside the block if it is free, without waiting; yields whether it is held. What is done
    inside, nobody else does at the same time: asking whether a lock is free says nothing of the next moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = _is(path, descriptor)
        except BlockingIOError:
            held = False
        try:
            yield held
        finally:
            if held:
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _is(path: Path, descriptor: int) -> bool:
    """Whether `path` still names the open file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)
