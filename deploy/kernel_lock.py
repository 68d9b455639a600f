"""The kernel's lock of an open file (flock): a process that is killed leaves none behind."""

from __future__ import annotations

import fcntl
from collections.abc import Callable


def take(handle: int, busy: Callable[[], None]) -> None:
    """Hold the lock until `handle` is closed; where another process has it, call `busy`, which may refuse, and wait.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        busy()
        fcntl.flock(handle, fcntl.LOCK_EX)
