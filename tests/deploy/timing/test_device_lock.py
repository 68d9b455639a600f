from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from deploy.timing.device_lock import device_lock
from profiles.errors import GpusqError

ROOT = Path(__file__).parents[3]
HOLDER = """
import sys
from deploy.timing.device_lock import device_lock
with device_lock("a device"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def holder() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_says_who_holds_the_device_to_who_does_not_wait() -> None:
    with holder() as process:
        with pytest.raises(GpusqError, match=f"process {process.pid}"), device_lock("a device", wait=False):
            pass
        with device_lock("another device", wait=False):
            pass
        process.kill()
    with device_lock("a device", wait=False):
        pass


def test_waits_for_the_device_and_says_so() -> None:
    said: list[str] = []
    with holder() as process:

        def end_it(text: str) -> None:
            said.append(text)
            process.kill()

        with device_lock("a device", say=end_it):
            pass
    assert said == [f"another bench is running on a device (process {process.pid}); waiting for it"]
