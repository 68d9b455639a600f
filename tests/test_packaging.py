from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_wheel_has_exactly_these_top_level_names_and_the_shipped_data(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("gpusq-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"calibration", "deploy", "exporters", "profiles", "students"}
    for path in (
        "deploy/report/report.html.j2",
        "profiles/architectures.toml",
        "profiles/claims/gpusq-vit.toml",
        "profiles/devices/a100-sxm-80gb.toml",
        "profiles/runtimes.toml",
        "students/fashion_vit/data/student.safetensors",
        "students/fashion_vit/data/test-1000.npz",
    ):
        assert path in names


def test_shipped_data_is_small() -> None:
    data = ROOT / "students" / "fashion_vit" / "data"
    sizes = {path.name: path.stat().st_size for path in data.iterdir()}
    assert sizes.keys() == {"student.safetensors", "teacher.safetensors", "test-1000.npz", "train-256.npz"}
    assert sizes["student.safetensors"] + sizes["teacher.safetensors"] <= 4_000_000
    assert sizes["test-1000.npz"] + sizes["train-256.npz"] <= 1_000_000


def test_code_for_the_device_imports_without_torch() -> None:
    modules = (
        "deploy.build",
        "deploy.bench",
        "deploy.bench_models",
        "deploy.verify",
        "deploy.finish",
        "deploy.inspect",
        "deploy.doctor",
        "deploy.engine",
        "deploy.tensorrt_engine",
        "deploy.cuda_bindings_api",
        "deploy.pycuda_api",
        "deploy.trtexec",
    )
    code = f"import sys; sys.modules['torch'] = None; import {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
