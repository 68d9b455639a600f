"""Kill a conversion or a build at random moments and run it again: is it the same, and is the cache sound? By hand:

    python -m tests.deploy.measure_kills convert student.safetensors --profile a100 --kills 20
    python -m tests.deploy.measure_kills build model.onnx --profile a100 --kills 20

Each round starts with an empty folder and an empty cache, is killed with SIGKILL after a random share of the time that
the whole takes, and is run again; a round that was done before is not counted. It fails if the second run does not
write the bytes that were written where nothing was killed, if something half-made stays, or if what the cache keeps is
damaged.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deploy.bundle import hash_file
from deploy.cached_entry import ENTRY_FILE, parsed
from deploy.manifest import FileEntry

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "SOURCE_DATE_EPOCH": "0"}


def run(words: list[str], folder: Path, seconds: float | None = None) -> str:
    """Run gpusq in `folder`, or kill it after `seconds`; return what it explained.

    The name of its --out is in what it writes, so it is the same in each folder.
    """
    folder.mkdir(exist_ok=True)
    kept = ["--out", "out", "--cache", str(folder / "cache"), "--explain"]
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy", *words, *kept], cwd=folder, env=ENVIRONMENT, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "killed"
    assert process.returncode == 0, said
    return said


def content(folder: Path) -> dict[str, FileEntry]:
    """Every file that was written, by its hash: what is half-made would be one more."""
    files = sorted(path for path in (folder / "out").rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def check_cache(cache: Path) -> int:
    """Check every entry that is kept; return how many there are."""
    assert not list(cache.glob("*.making"))
    entries = list(cache.glob(f"*/{ENTRY_FILE}"))
    for path in entries:
        entry = parsed(path)
        assert {name: hash_file(path.parent / "files" / name) for name in entry.files} == entry.files
    return len(entries)


def main() -> None:
    """Kill and run again, and print a line for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["convert", "build"])
    parser.add_argument("path")
    parser.add_argument("--profile", default="a100")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    words, rng = [given.what, str(Path(given.path).resolve()), "--profile", given.profile], random.Random(given.seed)
    with tempfile.TemporaryDirectory() as temporary:
        start = time.monotonic()
        run(words, Path(temporary) / "whole")
        seconds = time.monotonic() - start
        whole = content(Path(temporary) / "whole")
        kills = 0
        while kills < given.kills:
            folder, after = Path(temporary) / str(kills), rng.uniform(0, seconds)
            if run(words, folder, after) != "killed":
                shutil.rmtree(folder)
                continue
            said = run(words, folder)
            assert content(folder) == whole, f"round {kills} gave something else"
            kept = f"{said.count(': hit ')} of {check_cache(folder / 'cache')} stages from the cache"
            kills += 1
            print(f"{kills:3}  killed at {after:5.1f} of {seconds:.1f} s, then {kept}, the same files", flush=True)


if __name__ == "__main__":
    main()
