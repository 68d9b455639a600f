"""One bench at a time on one device: two that run at once measure each other.

The lock is the kernel's (flock on a file in the system's temporary folder), so a killed process leaves none behind. It
holds between the users of one host; a container sees only its own temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from deploy.kernel_lock import take
from profiles.errors import GpusqError


@contextlib.contextmanager
def device_lock(device: str, *, wait: bool = True, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Hold `device` while the block runs.

    Args:
        device: its name.
        wait: whether to wait for another bench; `say` is told that it does.
        say: takes one sentence.

    Raises:
        GpusqError: another bench runs on the device, and nobody wants to wait.
    """
    handle = _open(Path(tempfile.gettempdir()) / f"gpusq-{re.sub(r'[^a-z0-9]+', '-', device.lower())}.lock")
    try:
        _take(handle, device, wait, say)
        with contextlib.suppress(OSError):  # another user's file cannot be written, and its lock holds all the same
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _take(handle: int, device: str, wait: bool, say: Callable[[str], None]) -> None:
    def busy() -> None:
        holder = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
        told = f"another bench is running on {device} (process {holder})"
        if not wait:
            raise GpusqError(told, hint="wait until it is done, or leave out --no-wait") from None
        say(f"{told}; waiting for it")

    take(handle, busy)
