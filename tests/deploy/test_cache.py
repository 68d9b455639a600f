from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.cache import Cache, cache_root
from deploy.cache_key import Key
from deploy.cached_entry import parsed
from deploy.progress import Progress
from profiles.errors import GpusqError
from profiles.record import Record

KEY = Key("build", {"model": "a" * 64, "device": {"compute_capability": "8.0"}, "versions": {"rtx": "1.7.1"}})


class Made(Record):
    """What a stage returns."""

    layers: int


class Told(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def found(self, stage: str, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "model.onnx").write_text("not the stage's own")
    return folder


def work(into: Path, times: list[int] | None = None) -> Callable[[], Made]:
    """A stage that writes two files and counts how often it worked."""

    def make() -> Made:
        (into / "engine").write_bytes(bytes(range(256)) * 100)
        (into / "logs").mkdir(exist_ok=True)
        (into / "logs" / "build.log").write_text("done")
        if times is not None:
            times.append(1)
        return Made(layers=12)

    return make


def fetch(cache: Cache, into: Path, times: list[int] | None = None, key: Key = KEY) -> Made:
    for name in ("engine", "logs/build.log"):
        (into / name).unlink(missing_ok=True)
    return cache.fetch(key, into, work(into, times), Made, bundle="a100")


def entry(root: Path, key: Key = KEY) -> Path:
    return root / f"{key.stage}-{key.digest}"


def test_what_was_made_once_is_taken_the_second_time(tmp_path: Path, into: Path) -> None:
    cache, times = Cache(tmp_path / "cache"), list[int]()
    assert fetch(cache, into, times) == fetch(cache, into, times) == Made(layers=12)
    assert len(times) == 1
    assert (into / "engine").read_bytes() == bytes(range(256)) * 100
    assert (into / "logs" / "build.log").read_text() == "done"
    assert not (entry(tmp_path / "cache") / "files" / "model.onnx").exists()
    assert [answer.hit for answer in cache.answers] == [False, True]


def test_a_miss_names_the_part_that_differs_from_the_nearest_entry(tmp_path: Path, into: Path) -> None:
    cache = Cache(tmp_path / "cache")
    far = Key("build", {"model": "b" * 64, "device": {"compute_capability": "9.0"}, "versions": {"rtx": "1.6"}})
    for key in (KEY, far):
        fetch(cache, into, key=key)
    newer = Key("build", {**KEY.parts, "versions": {"rtx": "1.8"}})
    fetch(cache, into, key=newer)
    assert cache.answers[-1].why == "the nearest entry differs in versions.rtx: 1.7.1 → 1.8"
    assert cache.answers[-1].to_text().startswith(f"build: miss {newer.digest[:12]}, the nearest")


def test_without_a_folder_everything_is_made(into: Path) -> None:
    cache, times = Cache(None), list[int]()
    fetch(cache, into, times)
    fetch(cache, into, times)
    assert len(times) == 2


def test_what_failed_is_not_kept(tmp_path: Path, into: Path) -> None:
    cache = Cache(tmp_path / "cache")

    def fails() -> Made:
        (into / "engine").write_text("half")
        raise GpusqError("no", hint="no")

    with pytest.raises(GpusqError):
        cache.fetch(KEY, into, fails, Made, bundle="a100")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["locks"]


@pytest.mark.parametrize("name", ["files/engine", "files/logs/build.log", "entry.json"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_flipped_bit_is_told_and_the_entry_made_again(tmp_path: Path, into: Path, name: str, place: int) -> None:
    fetch(Cache(tmp_path / "cache"), into)
    path = entry(tmp_path / "cache") / name
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    told, times = Told(), list[int]()
    cache = Cache(tmp_path / "cache", told)
    assert fetch(cache, into, times) == Made(layers=12)
    assert len(times) == 1
    assert "was damaged" in told.lines[0]
    assert "was damaged" in cache.answers[0].why
    assert fetch(cache, into, times) == Made(layers=12)
    assert len(times) == 1
    assert (into / "engine").read_bytes() == bytes(range(256)) * 100


def test_a_missing_file_is_damage(tmp_path: Path, into: Path) -> None:
    fetch(Cache(tmp_path / "cache"), into)
    (entry(tmp_path / "cache") / "files" / "engine").unlink()
    cache, times = Cache(tmp_path / "cache"), list[int]()
    fetch(cache, into, times)
    assert len(times) == 1
    assert "engine is missing" in cache.answers[0].why


def test_an_entry_under_another_keys_name_is_damage(tmp_path: Path, into: Path) -> None:
    fetch(Cache(tmp_path / "cache"), into)
    other = Key("build", {"model": "c"})
    entry(tmp_path / "cache").rename(entry(tmp_path / "cache", other))
    cache = Cache(tmp_path / "cache")
    fetch(cache, into, key=other)
    assert "another key" in cache.answers[0].why


def test_an_entry_that_names_a_file_elsewhere_is_damage(tmp_path: Path, into: Path) -> None:
    fetch(Cache(tmp_path / "cache"), into)
    path = entry(tmp_path / "cache") / "entry.json"
    known = parsed(path)
    files = {"../evil": known.files["engine"]}
    path.write_text(known.model_copy(update={"files": files}).sealed().model_dump_json())
    cache = Cache(tmp_path / "cache")
    fetch(cache, into)
    assert "names a file elsewhere" in cache.answers[0].why
    assert not (tmp_path / "evil").exists()


def test_of_two_at_once_one_works_and_one_waits(tmp_path: Path, into: Path) -> None:
    root, other, times = tmp_path / "cache", tmp_path / "other", list[int]()
    other.mkdir()
    started, go_on = threading.Event(), threading.Event()

    def slow() -> Made:
        started.set()
        assert go_on.wait(60)
        return work(into, times)()

    class Waiter(Told):
        def found(self, stage: str, text: str) -> None:
            super().found(stage, text)
            go_on.set()

    first = threading.Thread(target=lambda: Cache(root).fetch(KEY, into, slow, Made, bundle="a100"))
    first.start()
    assert started.wait(60)
    waiter = Waiter()
    cache = Cache(root, waiter)
    assert fetch(cache, other, times) == Made(layers=12)
    first.join()
    assert len(times) == 1
    assert waiter.lines == ["waiting for another gpusq that is at work on the same build"]
    assert cache.answers[0].hit
    assert (other / "engine").read_bytes() == (into / "engine").read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from deploy.cache import Cache
from deploy.cache_key import Key
from profiles.record import Record
import deploy.cache

class Made(Record):
    layers: int

def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "keeping":
    kept = deploy.cache.write_entry
    deploy.cache.write_entry = lambda *given: (kept(*given), killed())

def make():
    if sys.argv[2] == "making":
        killed()
    return Made(layers=1)

root = Path(sys.argv[1])
Cache(root).fetch(Key("build", {"model": "a"}), root.parent / "bundle", make, Made, bundle="x")
"""


@pytest.mark.parametrize("moment", ["making", "keeping"])
def test_a_killed_process_leaves_no_lock_and_nothing_half_made(tmp_path: Path, into: Path, moment: str) -> None:
    root = tmp_path / "cache"
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(root), moment], check=False, env=path)
    assert done.returncode == -9
    assert list(root.glob("*.making")) if moment == "keeping" else not list(root.glob("*.making"))
    told = Told()
    fetch(Cache(root, told), into)  # of another key: it clears all the same
    assert told.lines == []
    assert sorted(path.name for path in root.iterdir()) == [entry(root).name, "locks"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_is_told_and_costs_only_what_would_be_kept(small_disk: Path, into: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(48 << 10))
    told = Told()
    cache = Cache(small_disk / "cache", told)
    assert fetch(cache, into) == Made(layers=12)
    assert told.lines == [f"nothing is kept in {small_disk / 'cache'}: no space left on device"]
    assert told.lines[0] in cache.answers[0].why
    assert [path.name for path in (small_disk / "cache").iterdir()] == ["locks"]


def test_a_read_only_cache_is_read(small_disk: Path, into: Path) -> None:
    fetch(Cache(small_disk / "cache"), into)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    told, times = Told(), list[int]()
    cache = Cache(small_disk / "cache", told)
    fetch(cache, into, times)
    assert (times, told.lines) == ([], [])
    fetch(cache, into, times, Key("build", {"model": "b"}))
    assert len(times) == 1
    assert told.lines == [f"nothing is kept in {small_disk / 'cache'}: read-only file system"]


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path, into: Path) -> None:
    keys = [Key("build", {"model": name}) for name in "abc"]
    cache = Cache(tmp_path / "cache")
    for age, key in enumerate(keys[:2]):
        fetch(cache, into, key=key)
        os.utime(entry(tmp_path / "cache", key), (age, age))
    fetch(cache, into, key=keys[0])  # used again
    cache.most_bytes = 60_000  # two of them
    fetch(cache, into, key=keys[2])
    assert [entry(tmp_path / "cache", key).exists() for key in keys] == [True, False, True]
    cache.most_bytes = 1
    fetch(cache, into, key=keys[1])
    assert [entry(tmp_path / "cache", key).exists() for key in keys] == [False, True, False]


def test_an_unusable_cache_is_told_and_is_no_error(tmp_path: Path, into: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "locks").touch()  # a file where a folder must be
    cache = Cache(tmp_path / "cache")
    assert fetch(cache, into) == Made(layers=12)
    assert f"nothing is kept in {tmp_path / 'cache'}: file exists" in cache.answers[0].why


def test_finds_its_folder(tmp_path: Path) -> None:
    assert cache_root(None, {"XDG_CACHE_HOME": "/x", "GPUSQ_CACHE": "/mine"}) == Path("/mine")
    assert cache_root(None, {"XDG_CACHE_HOME": "/x"}) == Path("/x/gpusq")
    assert cache_root(None, {}) == Path.home() / ".cache" / "gpusq"
    assert cache_root(None, {"GPUSQ_CACHE": "off"}) is None
    assert cache_root(tmp_path, {"GPUSQ_CACHE": "off"}) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(GpusqError, match="is a file"):
        cache_root(tmp_path / "file")
