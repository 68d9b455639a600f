"""What this host is: versions, processor, GPU, JetPack. Read, never guessed."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_PACKAGES = ("gpusq", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt",
             "tensorrt-rtx", "numpy", "safetensors")  # fmt: skip
_DEVICE_TREE = Path("/proc/device-tree/model")
_MOUNTED_MODEL = Path("/etc/jetson-model")  # the same in a container, from which Docker hides the device tree
_CUDA_VERSION = Path("/usr/local/cuda/version.json")
_L4T_RELEASE = Path("/etc/nv_tegra_release")
_MEMORY = Path("/proc/meminfo")
# Compute capabilities of the Jetson modules (CUDA's list of GPUs): they have no nvidia-smi before JetPack 7.
_JETSON = {"orin": "8.7", "thor": "11.0", "xavier": "7.2"}


@dataclass(frozen=True)
class Gpu:
    """A GPU of this host."""

    name: str
    compute_capability: str
    driver: str


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that the driver reports and CUDA_VISIBLE_DEVICES leaves, by PCI bus; a Jetson's from its device tree."""
    if module := jetson():
        capability = next((value for key, value in _JETSON.items() if key in module.lower()), "")
        return (Gpu(module, capability, l4t_release() or ""),)
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible}")
    rows = (line.split(", ") for line in _answer(query).strip().splitlines())
    return tuple(Gpu(*row) for row in rows if len(row) == 3)


def jetson() -> str | None:
    """The name of the Jetson module that this host is; None on anything else."""
    model = (_read(_DEVICE_TREE) or _read(_MOUNTED_MODEL)).strip("\0\n ")
    return model if "jetson" in model.lower() else None


def l4t_release() -> str | None:
    """The release of Jetson Linux, such as `36.4.3`; None where there is none."""
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _read(_L4T_RELEASE))
    return f"{match[1]}.{match[2]}" if match else None


def power_mode() -> str | None:
    """The power mode of this Jetson as nvpmodel calls it, such as `MODE_30W`; None where it cannot be asked."""
    match = re.search(r"NV Power Mode: (\S+)", _answer(["nvpmodel", "-q"]))
    return match[1] if match else None


def memory_gib() -> float:
    """The memory of this host in GiB, without what the firmware keeps; 0 where it is not known."""
    match = re.search(r"^MemTotal:\s*(\d+) kB", _read(_MEMORY), re.MULTILINE)
    return int(match[1]) / 2**20 if match else 0.0


def cuda_release() -> str | None:
    """The release of the CUDA toolkit of this host, such as `12.6`; None where there is none."""
    with contextlib.suppress(ValueError, KeyError):
        return str(json.loads(_read(_CUDA_VERSION))["cuda"]["version"])
    match = re.search(r"release ([\d.]+)", _answer(["nvcc", "--version"]))
    return match[1] if match else None


def versions() -> dict[str, str]:
    """Versions of Python and of every installed package that matters to a bundle."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def host() -> dict[str, str]:
    """Processor, system, GPU, driver, CUDA and JetPack of this host."""
    here = gpus()
    return {
        "machine": platform.machine(),
        "processor": processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "system": platform.platform(),
        "gpu": ", ".join(gpu.name for gpu in here) or "none",
        "compute capability": ", ".join(gpu.compute_capability for gpu in here) or "none",
        "driver": ", ".join(gpu.driver for gpu in here) or "none",
        "cuda toolkit": cuda_release() or "none",
        "jetson linux": (l4t_release() or "release unknown") if jetson() else "none",
    }


def processor() -> str:
    """The processor's name."""
    match = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def _answer(command: list[str]) -> str:
    """What a tool prints; nothing where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return "" if done.returncode else done.stdout


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
