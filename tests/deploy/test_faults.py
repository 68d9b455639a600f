"""What happens to a folder of bundles when the process does not end well. Real processes, signals and a full disk."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from deploy.bundle import hash_files
from deploy.manifest import read_manifest
from exporters.student_file import read_student, write_student
from students.fashion_vit.sample import student_path

GPUSQ = [sys.executable, "-m", "deploy"]


def command(checkpoint: Path, out: Path, *options: str) -> list[str]:
    return [*GPUSQ, "convert", str(checkpoint), "--profile", "a100", "--out", str(out), *options]


def run(checkpoint: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(checkpoint, out, *options), capture_output=True, text=True, check=False, timeout=300)


def assert_whole(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.files == hash_files(bundle)
    assert manifest.verified is not None
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def truncated(path: Path) -> None:
    path.write_bytes(student_path().read_bytes()[:100_000])


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": [1.0]}))


def wrong_shapes(path: Path) -> None:
    student = read_student(student_path())
    tensors = dict(student.tensors)
    tensors["pos_embed"] = tensors["pos_embed"][:, :-1]
    tensors["norm.weight"] = tensors["norm.weight"][:-1]
    write_student(path, type(student)(**{**vars(student), "tensors": tensors}))


def torch_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("student/data.pkl", b"\x80\x02.")


def cut_archive(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 cut")


CHECKPOINTS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "truncated": (truncated, ["student.safetensors is cut short"]),
    "a plain pickle": (plain_pickle, ["is a pickle", "nothing was run"]),
    "tensors that do not fit": (wrong_shapes, ["pos_embed", "norm.weight"]),
    "a torch.save file": (torch_archive, ["is not a whole torch.save file"]),
    "a zip that is cut off": (cut_archive, ["is a zip file that was cut short"]),
    "an empty file": (lambda path: path.touch(), ["is empty"]),
    "missing": (lambda path: None, ["no such file"]),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_bad_checkpoint_is_one_error_with_a_hint_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    make, words = CHECKPOINTS[case]
    checkpoint = tmp_path / "student.safetensors"
    make(checkpoint)
    done = run(checkpoint, tmp_path / "out")
    first, second = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert first.startswith("Error: ")
    assert all(word in first for word in words)
    assert second.startswith("Hint: ")
    assert not (tmp_path / "out").exists()


@pytest.fixture(params=["256k", "700k"])
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system that is full before the model is written, or between the model and its engine."""
    mount = tmp_path / "disk"
    mount.mkdir()
    arguments = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(mount)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("profile", ["a100", "cpu"])
def test_full_disk_is_one_error_and_leaves_nothing(small_disk: Path, profile: str) -> None:
    arguments = [*GPUSQ, "convert", str(student_path()), "--profile", profile, "--out", str(small_disk / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "there is no space left on the disk" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code", "stage"),
    [(signal.SIGINT, 1, "."), (signal.SIGINT, 1, "a100/model.onnx"), (signal.SIGTERM, 143, "a100/model.onnx")],
)
def test_interrupted_it_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int, stage: str) -> None:
    out = tmp_path / "out"
    # A shell that runs the tests in the background has them ignore Ctrl-C, and children inherit that.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command(student_path(), out), stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    wait_for(lambda: (out / ".gpusq-staging" / stage).exists())
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_killed_at_any_stage_and_run_again_it_finishes(tmp_path: Path) -> None:
    """tests/deploy/measure_kills.py does it at random moments, and compares the bundles."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    kept = ["--cache", str(cache), "--explain"]
    for appears in (".", "a100", "a100/model.onnx", "a100/engine.sm80.rtx"):
        kill_when(appears, command(student_path(), out, *kept), out)
    done = run(student_path(), out, *kept)
    assert done.returncode == 0
    assert_whole(out / "a100")
    assert done.stderr.startswith("a100: surgery: hit ")
    assert not list(cache.glob("*.making"))


def test_of_two_into_one_folder_one_refuses_and_neither_corrupts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = subprocess.Popen(command(student_path(), out), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (out / ".gpusq-staging").exists())
    second = run(student_path(), out)
    assert second.returncode == 1
    assert "another gpusq is writing to" in second.stderr
    first.communicate(timeout=300)
    assert first.returncode == 0
    assert_whole(out / "a100")


def test_folder_that_holds_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    done = run(student_path(), tmp_path)
    assert done.returncode == 1
    assert "holds something else: thesis.tex" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_changed_file_in_a_bundle_is_found_before_it_is_built_on(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "a100"
    shutil.copytree(bundles["a100"], bundle)
    with (bundle / "model.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(bytes([file.read(1)[0] ^ 1]))
    done = subprocess.run([*GPUSQ, "build", str(bundle)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "model.onnx is not the file that the manifest names" in done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2, "from_the_future": 1}, "has schema 2, this gpusq reads 1"),
        ({"profil": 1}, "profil: extra inputs"),
    ],
)
def test_newer_or_changed_manifest_is_refused(
    bundles: dict[str, Path], tmp_path: Path, change: dict[str, int], words: str
) -> None:
    bundle = tmp_path / "a100"
    shutil.copytree(bundles["a100"], bundle)
    fields = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**fields, **change}))
    done = subprocess.run([*GPUSQ, "inspect", str(bundle)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert words in done.stderr


def kill_when(appears: str, arguments: list[str], out: Path) -> None:
    """Kill the process as soon as that file is in the half-made bundle."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (out / ".gpusq-staging" / appears).exists())
    assert process.poll() is None
    process.kill()
    process.wait()
    assert (out / ".gpusq-staging" / appears).exists()


def wait_for(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
