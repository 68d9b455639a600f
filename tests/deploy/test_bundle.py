from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
from pathlib import Path

import onnx_ir as ir
import pytest

from deploy.bundle import hash_checkpoint, hash_file, hash_files, staged, staged_copy
from deploy.manifest import is_bundle
from profiles.errors import GpusqError

SUM = "sha256sum -- {} | sha256sum"
MANIFEST = '{"schema": 1, "gpusq": "0", "profile": "cpu"}'


def make_bundle(folder: Path, content: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(MANIFEST)
    (folder / "model.onnx").write_text(content)
    return folder


def sha256sum(folder: Path, *names: str) -> str:
    """What coreutils make of the files."""
    shown = subprocess.run(
        SUM.format(" ".join(names)), shell=True, cwd=folder, capture_output=True, text=True, check=True
    )
    return shown.stdout.split()[0]


def test_the_hash_of_an_index_covers_the_shards_that_it_names(tmp_path: Path) -> None:
    shards = {"fc.weight": "model-2.safetensors", "fc.bias": "model-1.safetensors", "fc.scale": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for name in ("model-1.safetensors", "model-2.safetensors", "other.safetensors"):
        (tmp_path / name).write_text(name)
    index = tmp_path / "model.safetensors.index.json"
    before = hash_checkpoint(index)
    assert before == sha256sum(tmp_path, "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json")
    (tmp_path / "other.safetensors").write_text("changed")
    assert hash_checkpoint(index) == before
    (tmp_path / "model-2.safetensors").write_text("changed")
    assert hash_checkpoint(index) != before


def test_the_hash_of_an_onnx_file_covers_its_external_data(tmp_path: Path) -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[2,4] x) => (float[2,2] y) <float[4,2] w = {1, 2, 3, 4, 5, 6, 7, 8}> { y = MatMul(x, w) }""")
    ir.save(model, tmp_path / "net.onnx", external_data="net.data", size_threshold_bytes=0)
    assert hash_checkpoint(tmp_path / "net.onnx") == sha256sum(tmp_path, "net.data", "net.onnx")
    ir.save(model, tmp_path / "one.onnx")
    assert hash_checkpoint(tmp_path / "one.onnx") == hash_file(tmp_path / "one.onnx").sha256


def content(bundle: Path) -> str:
    return (bundle / "model.onnx").read_text()


def test_bundles_take_their_places_together(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged(out, ["a", "b"]) as staging:
        make_bundle(staging / "a", "new a")
        make_bundle(staging / "b", "new b")
        assert sorted(path.name for path in out.iterdir()) == [".gpusq-staging"]
    assert (content(out / "a"), content(out / "b")) == ("new a", "new b")
    assert sorted(path.name for path in out.iterdir()) == ["a", "b"]


def test_replaces_an_old_bundle_and_keeps_its_neighbour(tmp_path: Path) -> None:
    make_bundle(tmp_path / "a")
    make_bundle(tmp_path / "b")
    with staged(tmp_path, ["a"]) as staging:
        make_bundle(staging / "a", "new")
    assert (content(tmp_path / "a"), content(tmp_path / "b")) == ("new", "old")


@pytest.mark.parametrize("failure", [RuntimeError("bug"), KeyboardInterrupt(), SystemExit(143)])
def test_failure_leaves_nothing_behind(tmp_path: Path, failure: BaseException) -> None:
    out = tmp_path / "deep" / "out"
    with pytest.raises(type(failure)), staged(out, ["a"]) as staging:
        make_bundle(staging / "a")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_old_bundle(tmp_path: Path) -> None:
    make_bundle(tmp_path / "a")
    with pytest.raises(RuntimeError), staged(tmp_path, ["a"]) as staging:
        make_bundle(staging / "a", "new")
        raise RuntimeError
    assert content(tmp_path / "a") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
def test_refuses_a_folder_that_holds_something_else(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(GpusqError, match=f"holds something else: {name}") as caught, staged(tmp_path, ["a"]):
        pass
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(GpusqError, match="is a file"), staged(tmp_path / "out", ["a"]):
        pass


def test_refuses_while_another_process_writes(tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(GpusqError, match="another gpusq is writing"), staged(tmp_path, ["a"]):
            pass
    finally:
        os.close(handle)


def test_clears_what_a_killed_process_left(tmp_path: Path) -> None:
    make_bundle(tmp_path / ".gpusq-staging" / "a", "half")
    make_bundle(tmp_path / ".gpusq-replaced-a", "old a")
    make_bundle(tmp_path / ".gpusq-replaced-b", "old b")
    make_bundle(tmp_path / "b", "new b")
    with pytest.raises(RuntimeError), staged(tmp_path, ["a"]):
        raise RuntimeError
    assert (content(tmp_path / "a"), content(tmp_path / "b")) == ("old a", "new b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_full_disk_is_an_error_that_the_user_can_mend(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match="no space left") as caught, staged(tmp_path / "out", ["a"]):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_other_os_errors_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="broken"), staged(tmp_path / "out", ["a"]):
        raise OSError(errno.EIO, "broken")


def test_copy_takes_the_bundles_place_or_changes_nothing(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "a")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RuntimeError), staged_copy(bundle) as copy:
        (copy / "model.onnx").write_text("new")
        raise RuntimeError
    assert content(bundle) == "old"
    with staged_copy(bundle) as copy:
        (copy / "model.onnx").write_text("new")
    assert content(bundle) == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "notes.txt"]


def test_hashes_every_file_but_the_manifest(tmp_path: Path) -> None:
    hashes = hash_files(make_bundle(tmp_path / "a", ""))
    assert hashes.keys() == {"model.onnx"}
    assert hashes["model.onnx"].bytes == 0
    assert hashes["model.onnx"].sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_knows_a_bundle_from_another_tools_manifest(tmp_path: Path) -> None:
    assert is_bundle(make_bundle(tmp_path / "a"))
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    assert not is_bundle(tmp_path)
