"""Kill a conversion at random moments and run it again: is it the same bundle, and is the cache sound? By hand:

    python -m tests.deploy.measure_kills CHECKPOINT --profile a100 --kills 20

Each round starts with an empty folder and an empty cache, is killed with SIGKILL after a random share of the time that
a whole conversion takes, and is run again. It fails if a bundle is not the bytes of the one that nothing killed, if a
lock or something half-made stays, or if what the cache keeps is damaged.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deploy.bundle import hash_file, hash_files
from deploy.cached_entry import ENTRY_FILE, parsed

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "SOURCE_DATE_EPOCH": "0"}


def command(checkpoint: str, profile: str, folder: Path) -> list[str]:
    """The conversion; the name of its folder is in the bundle, so that it is the same for all."""
    given = ["--profile", profile, "--out", "out", "--cache", str(folder / "cache"), "--explain"]
    return [sys.executable, "-m", "deploy", "convert", checkpoint, *given]


def convert(checkpoint: str, profile: str, folder: Path, seconds: float | None = None) -> str:
    """Run it, or kill it after `seconds`; return what it explained."""
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        command(checkpoint, profile, folder), cwd=folder, env=ENVIRONMENT, text=True,
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


def content(folder: Path, profile: str) -> dict[str, object]:
    """Every file of the bundle by its hash, the manifest with them; there must be nothing beside the bundle."""
    assert [path.name for path in (folder / "out").iterdir()] == [profile]
    bundle = folder / "out" / profile
    return {**hash_files(bundle), "manifest.json": hash_file(bundle / "manifest.json")}


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
    parser.add_argument("checkpoint")
    parser.add_argument("--profile", default="a100")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    checkpoint, rng = str(Path(given.checkpoint).resolve()), random.Random(given.seed)
    with tempfile.TemporaryDirectory() as temporary:
        start = time.monotonic()
        convert(checkpoint, given.profile, Path(temporary) / "whole")
        seconds = time.monotonic() - start
        whole = content(Path(temporary) / "whole", given.profile)
        for number in range(given.kills):
            folder, after = Path(temporary) / str(number), rng.uniform(0, seconds)
            killed = convert(checkpoint, given.profile, folder, after) == "killed"
            said = convert(checkpoint, given.profile, folder)
            assert content(folder, given.profile) == whole, f"round {number} gave another bundle"
            entries = check_cache(folder / "cache")
            kept = f"{said.count(': hit ')} of {entries} stages from the cache"
            done = "killed" if killed else "done"
            print(f"{number:3}  {done} at {after:5.1f} of {seconds:.1f} s, then {kept}, the same bundle", flush=True)


if __name__ == "__main__":
    main()
