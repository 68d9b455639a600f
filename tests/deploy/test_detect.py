from __future__ import annotations

from pathlib import Path

import pytest

from deploy import environment
from deploy.detect import detect
from profiles.device import list_devices, load_device

NVIDIA_SMI = "echo '{name}, {capability}, 580.65.06'"


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the whole PATH of a host that is no Jetson."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(environment, "_DEVICE_TREE", tmp_path / "model")
    monkeypatch.setattr(environment, "_L4T_RELEASE", tmp_path / "release")
    monkeypatch.setattr(environment, "_MEMORY", tmp_path / "meminfo")
    return folder


def jetson(folder: Path, model: str, memory_kib: int, mode: str | None) -> None:
    (folder.parent / "model").write_text(f"{model}\0")
    (folder.parent / "release").write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic")
    (folder.parent / "meminfo").write_text(f"MemTotal:       {memory_kib} kB\nMemFree:        1 kB\n")
    if mode is not None:
        tool(folder, "nvpmodel", f"echo 'NV Power Mode: {mode}'; echo 2")


@pytest.mark.parametrize(
    ("name", "capability", "profile"),
    [
        ("NVIDIA A100-SXM4-80GB", "8.0", "a100-sxm-80gb"),
        ("NVIDIA A100 80GB PCIe", "8.0", "a100-pcie-80gb"),
        ("NVIDIA L4", "8.9", "l4"),
        ("NVIDIA L40S", "8.9", "l40s"),
        ("Tesla T4", "7.5", "t4"),
        ("NVIDIA GeForce RTX 5090", "12.0", "rtx-5090"),
        ("NVIDIA GB10", "12.1", "gb10"),
    ],
)
def test_a_gpu_is_known_by_its_name(tools: Path, name: str, capability: str, profile: str) -> None:
    tool(tools, "nvidia-smi", NVIDIA_SMI.format(name=name, capability=capability))
    found = detect()
    assert (found.profile, found.gpu, found.power_mode) == (profile, name, None)
    assert name in found.why


@pytest.mark.parametrize(
    ("model", "memory_kib", "mode", "profile", "power_mode"),
    [
        ("NVIDIA Jetson AGX Orin Developer Kit", 64349184, "MODE_30W", "agx-orin-64gb", "30W"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 31457280, "MAXN", "agx-orin-32gb", "MAXN"),
        (
            "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
            16000000,
            "MAXN_SUPER",
            "orin-nx-16gb",
            "MAXN_SUPER",
        ),
        ("NVIDIA Jetson Orin Nano Developer Kit", 7800000, "25W", "orin-nano-super-8gb", "25W"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 128000000, "120W", "thor-t5000", None),
        ("NVIDIA Jetson AGX Orin Developer Kit", 64349184, None, "agx-orin-64gb", None),
    ],
)
def test_a_jetson_is_known_by_its_name_and_its_memory(
    tools: Path, model: str, memory_kib: int, mode: str | None, profile: str, power_mode: str | None
) -> None:
    jetson(tools, model, memory_kib, mode)
    found = detect()
    assert (found.profile, found.gpu, found.power_mode) == (profile, model, power_mode)
    assert power_mode is not None or mode is None or "none of the profile's" in found.why


def test_a_host_without_a_gpu_is_the_cpu(tools: Path) -> None:
    assert (detect().profile, detect().gpu) == ("cpu", None)


@pytest.mark.parametrize(
    ("name", "capability"),
    [("NVIDIA L40", "8.9"), ("NVIDIA A100-SXM4-80GB", "9.9"), ("NVIDIA GeForce RTX 4090 Laptop GPU", "8.9")],
)
def test_a_gpu_without_a_profile_is_told(tools: Path, name: str, capability: str) -> None:
    tool(tools, "nvidia-smi", NVIDIA_SMI.format(name=name, capability=capability))
    found = detect()
    assert (found.profile, found.gpu) == ("cpu", name)
    assert found.why == f"no profile is for {name} of compute capability {capability}; write one, see docs/profiles.md"


def test_of_several_gpus_the_first_is_taken(tools: Path) -> None:
    tool(tools, "nvidia-smi", "echo 'NVIDIA L4, 8.9, 580'; echo 'NVIDIA A30, 8.0, 580'")
    assert detect().profile == "l4"
    assert "the first of 2 GPUs" in detect().why


def test_a_users_own_profile_can_be_found(tools: Path, tmp_path: Path) -> None:
    own = tmp_path / "lab-card.toml"
    own.write_text('inherits = "l4"\ngpu_name = "L40"\n')
    tool(tools, "nvidia-smi", NVIDIA_SMI.format(name="NVIDIA L40", capability="8.9"))
    assert detect([*list_devices(), load_device(str(own))]).profile == "lab-card"


def test_memory_that_is_not_known_is_none(tools: Path) -> None:
    assert environment.memory_gib() == 0
