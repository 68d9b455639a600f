from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy import doctor, environment
from deploy.text_table import text_table


def fake_tool(folder: Path, script: str, *, name: str = "nvidia-smi") -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_reads_the_gpus_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(tmp_path, "echo 'NVIDIA A100-SXM4-80GB, 8.0, 580.65.06'; echo 'NVIDIA L4, 8.9, 580.65.06'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(environment, "jetson", lambda: None)
    assert environment.gpus() == (
        environment.Gpu("NVIDIA A100-SXM4-80GB", "8.0", "580.65.06"),
        environment.Gpu("NVIDIA L4", "8.9", "580.65.06"),
    )


def test_asks_only_for_the_gpus_that_cuda_may_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(tmp_path, 'echo "$@, 8.0, 580"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setattr(environment, "jetson", lambda: None)
    assert "--id=1" in environment.gpus()[0].name


def test_driver_that_does_not_answer_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(tmp_path, "echo 'NVIDIA-SMI has failed'; exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(environment, "jetson", lambda: None)
    assert environment.gpus() == ()


@pytest.mark.parametrize(
    ("model", "capability"),
    [
        ("NVIDIA Jetson AGX Orin Developer Kit\0", "8.7"),
        ("NVIDIA Jetson AGX Thor Developer Kit\0", "11.0"),
        ("NVIDIA Jetson Nano Developer Kit\0", ""),
    ],
)
def test_knows_a_jetson_by_its_device_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, capability: str
) -> None:
    (tmp_path / "model").write_text(model)
    (tmp_path / "release").write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic")
    monkeypatch.setattr(environment, "_DEVICE_TREE", tmp_path / "model")
    monkeypatch.setattr(environment, "_L4T_RELEASE", tmp_path / "release")
    (gpu,) = environment.gpus()
    assert (gpu.name, gpu.compute_capability, gpu.driver) == (model.strip("\0"), capability, "36.4.3")
    assert doctor.diagnose().host["jetson linux"] == "36.4.3"


def test_knows_a_jetson_in_a_container_by_what_was_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").write_text("NVIDIA Jetson AGX Orin Developer Kit\0")
    monkeypatch.setattr(environment, "_DEVICE_TREE", tmp_path / "hidden")
    monkeypatch.setattr(environment, "_MOUNTED_MODEL", tmp_path / "model")
    assert environment.jetson() == "NVIDIA Jetson AGX Orin Developer Kit"


def test_other_boards_are_no_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").write_text("Raspberry Pi 5\0")
    monkeypatch.setattr(environment, "_DEVICE_TREE", tmp_path / "model")
    assert environment.jetson() is None


def test_reads_the_cuda_release_from_its_file_or_its_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = tmp_path / "version.json"
    monkeypatch.setattr(environment, "_CUDA_VERSION", version)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.cuda_release() is None
    fake_tool(tmp_path, "echo 'Cuda compilation tools, release 13.0, V13.0.88'", name="nvcc")
    assert environment.cuda_release() == "13.0"
    version.write_text('{"cuda": {"name": "CUDA SDK", "version": "12.6.2"}}')
    assert environment.cuda_release() == "12.6.2"


def test_table_columns_are_as_wide_as_their_content() -> None:
    table = text_table([("a", "long heading"), ("longer", "b")])
    assert table.splitlines() == ["a       long heading", "──────  ────────────", "longer  b"]
