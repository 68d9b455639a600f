from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from profiles.device import DEVICES_DIR, Device, list_devices, load_device
from profiles.errors import GpusqError

OWN = """
title = "my board"
runtime = "tensorrt"
runtime_version = "10.3"

[onnx]
opset = 20
attention = "matmul"
float_type = "float16"
source = "its data sheet"

[ahead_of_time]
compute_capability = "SM86"
nearest = true
source = "its data sheet"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "my-board.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(DEVICES_DIR.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_profile_loads_by_its_name_and_its_aliases(path: Path) -> None:
    device = load_device(path.stem)
    assert device.name == path.stem
    assert device.title
    for alias in device.aliases:
        assert load_device(alias) is device


def test_every_figure_of_a_shipped_profile_has_a_source() -> None:
    for device in list_devices():
        parts = (device.onnx, device.ahead_of_time, device.sparse, device.architecture, device.gpu, device.memory)
        more = (device.dla, device.published, device.power, *(line.onnx for line in device.runtimes))
        assert all(part.source for part in (*parts, *more) if part)


def test_names_and_aliases_are_unique() -> None:
    names = [name for device in list_devices() for name in (device.name, *device.aliases)]
    assert len(set(names)) == len(names)


def test_lists_the_profiles_by_name() -> None:
    names = [device.name for device in list_devices()]
    assert names == sorted(names)
    assert {
        "a10", "a100-pcie-80gb", "a100-sxm-40gb", "a100-sxm-80gb", "a2", "a30", "agx-orin-32gb", "agx-orin-64gb",
        "b200", "cpu", "gb10", "h100-pcie-80gb", "h100-sxm-80gb", "l4", "l40s", "orin-nano-super-8gb", "orin-nx-16gb",
        "rtx-3090", "rtx-4090", "rtx-5080", "rtx-5090", "t4", "thor-t4000", "thor-t5000",
    } == set(names)  # fmt: skip


def test_every_gpu_has_the_figures_that_a_latency_needs() -> None:
    for device in list_devices():
        parts = (device.architecture, device.gpu, device.memory, device.published, device.gpu_name)
        assert all(part is not None for part in parts) == (device.name != "cpu")


def test_figures_of_an_architecture_are_written_once() -> None:
    by_capability: dict[str | None, Device] = {}
    for device in list_devices():
        first = by_capability.setdefault(device.compute_capability, device)
        assert (device.architecture, device.ahead_of_time, device.sparse) == (
            first.architecture,
            first.ahead_of_time,
            first.sparse,
        )


def test_the_shipped_runtime_comes_first() -> None:
    for device in list_devices():
        first = device.runtimes[0]
        assert (first.runtime, first.version, first.onnx) == (device.runtime, device.runtime_version, device.onnx)
    assert load_device("a100").runtime_version == "11.x"
    assert load_device("agx-orin").runtime_version == "10.3 (JetPack 6)"


def test_a_profile_survives_json() -> None:
    for device in list_devices():
        assert Device.model_validate_json(device.model_dump_json()) == device


@pytest.mark.parametrize(
    ("gpu", "names"),
    [
        ("NVIDIA A100-SXM4-80GB", ["a100-sxm-80gb"]),
        ("A100-SXM4-40GB", ["a100-sxm-40gb"]),
        ("NVIDIA A100 80GB PCIe", ["a100-pcie-80gb"]),
        ("NVIDIA A10", ["a10"]),
        ("NVIDIA A10G", []),
        ("NVIDIA A2", ["a2"]),
        ("NVIDIA L4", ["l4"]),
        ("NVIDIA L40S", ["l40s"]),
        ("NVIDIA L40", []),
        ("Tesla T4", ["t4"]),
        ("NVIDIA H100 80GB HBM3", ["h100-sxm-80gb"]),
        ("NVIDIA H100 PCIe", ["h100-pcie-80gb"]),
        ("NVIDIA B200", ["b200"]),
        ("NVIDIA GB200", []),
        ("NVIDIA GB10", ["gb10"]),
        ("NVIDIA GeForce RTX 4090", ["rtx-4090"]),
        ("NVIDIA GeForce RTX 4090 D", []),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", []),
        ("NVIDIA GeForce RTX 3090 Ti", []),
        ("NVIDIA Jetson AGX Orin Developer Kit", ["agx-orin-32gb", "agx-orin-64gb"]),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", ["orin-nano-super-8gb"]),
        ("NVIDIA Thor", ["thor-t4000", "thor-t5000"]),
    ],
)
def test_a_gpu_is_told_by_its_whole_name(gpu: str, names: list[str]) -> None:
    assert [device.name for device in list_devices() if device.is_called(gpu)] == names


def test_the_two_gpus_take_different_graphs() -> None:
    a100, orin, cpu = (load_device(name) for name in ("a100", "agx-orin", "cpu"))
    assert (a100.onnx.opset, a100.onnx.attention) == (23, "op")
    assert (orin.onnx.opset, orin.onnx.attention) == (20, "matmul")
    assert a100.sparse is not None
    assert a100.sparse.int8_k_multiple == 32
    assert (cpu.sparse, cpu.ahead_of_time) == (None, None)


def test_a_profile_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_device("a100").runtime = "onnxruntime"


@pytest.mark.parametrize(("name", "near"), [("agx-orn", "agx-orin"), ("A100", "a100"), ("cpus", "cpu")])
def test_an_unknown_name_suggests_the_nearest(name: str, near: str) -> None:
    with pytest.raises(GpusqError) as caught:
        load_device(name)
    assert caught.value.message == f"no device profile '{name}' (did you mean '{near}'?)"
    assert "gpusq profiles" in caught.value.hint


def test_a_name_that_resembles_none_suggests_none() -> None:
    with pytest.raises(GpusqError) as caught:
        load_device("zzz")
    assert caught.value.message == "no device profile 'zzz'"


def test_a_users_own_file_is_read_by_its_path(tmp_path: Path) -> None:
    device = load_device(str(written(tmp_path, OWN)))
    assert isinstance(device, Device)
    assert (device.name, device.title, device.sparse) == ("my-board", "my board", None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "my board"', 'title = "my board"\nvram = 8', "vram: extra inputs are not permitted"),
        ("opset = 20", "opset = 20\nops = 1", "onnx.ops: extra inputs are not permitted"),
        ("opset = 20", 'opset = "twenty"', "onnx.opset: input should be a valid integer"),
        ("opset = 20", "opset = 9", "onnx.opset: input should be greater than or equal to 13"),
        ("opset = 20\n", "", "onnx.opset: field required"),
        ('title = "my board"', "", "title: field required"),
        ('"tensorrt"', '"tensorflow"', "runtime: input should be 'tensorrt' or 'onnxruntime'"),
        ('"SM86"', '"8.6"', r"ahead_of_time.compute_capability: string should match pattern '^SM\d+$'"),
        ("nearest = true", 'nearest = "perhaps"', "ahead_of_time.nearest: input should be a valid boolean"),
    ],
)
def test_a_file_that_does_not_fit_names_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in OWN
    path = written(tmp_path, OWN.replace(old, new))
    with pytest.raises(GpusqError) as caught:
        load_device(str(path))
    assert caught.value.message.startswith(f"{path}: {message}")
    assert "profiles/device.py" in caught.value.hint


@pytest.mark.parametrize("content", [b"title: my board", b'title = "\xff"'], ids=["YAML", "not UTF-8"])
def test_what_is_not_toml_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "board.toml"
    path.write_bytes(content)
    with pytest.raises(GpusqError, match=r"board\.toml is not TOML: ") as caught:
        load_device(str(path))
    assert "gpusq profiles" in caught.value.hint


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match=r"^no such file: .*none\.toml$") as caught:
        load_device(str(tmp_path / "none.toml"))
    assert "TOML" in caught.value.hint


def test_a_users_own_file_names_what_it_shares(tmp_path: Path) -> None:
    text = 'title = "my card"\narchitecture = "sm89"\nruntimes = ["tensorrt-10.16", "onnxruntime"]\n'
    device = load_device(str(written(tmp_path, text)))
    assert (device.compute_capability, device.runtime, device.onnx.opset) == ("8.9", "tensorrt", 23)
    assert device.ahead_of_time == load_device("l4").ahead_of_time
    assert (device.gpu, device.rates) == (None, None)


def test_a_users_own_file_inherits_what_it_does_not_say(tmp_path: Path) -> None:
    device = load_device(str(written(tmp_path, 'title = "my board"\ninherits = "agx-orin"\npower_mode = "MAXN"\n')))
    orin = load_device("agx-orin")
    assert (device.name, device.title, device.aliases) == ("my-board", "my board", ())
    assert device.model_dump(exclude={"name", "title", "aliases"}) == orin.model_dump(
        exclude={"name", "title", "aliases"}
    )


def test_a_gpu_of_ones_own_inherits_neither_published_rates_nor_power_modes(tmp_path: Path) -> None:
    gpu = '[gpu]\nsms = 16\nboost_clock_mhz = 1100\nsource = "measured"\n'
    device = load_device(str(written(tmp_path, f'inherits = "agx-orin"\n{gpu}')))
    assert (device.published, device.power, device.power_mode) == (None, None, None)
    assert device.memory == load_device("agx-orin").memory
    assert device.rates is not None
    assert device.rates.dense.int8 == pytest.approx(16 * 4096 * 1100e6 / 1e12)


def test_a_profile_kept_by_an_older_release_is_read() -> None:
    kept = {
        "name",
        "title",
        "aliases",
        "runtime",
        "runtime_version",
        "compute_capability",
        "gpu_name",
        "onnx",
        "sparse",
    }
    old = load_device("a100").model_dump_json(include={*kept, "ahead_of_time"})
    assert Device.model_validate_json(old).rates is None


def test_what_a_file_says_itself_wins_over_what_it_shares(tmp_path: Path) -> None:
    path = written(tmp_path, 'inherits = "a100"\nruntimes = ["tensorrt-10.3"]\nruntime_version = "10.3, patched"\n')
    device = load_device(str(path))
    assert (device.runtime_version, device.onnx.opset, device.title) == ("10.3, patched", 20, "NVIDIA A100 SXM 80 GB")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('architecture = "sm81"', "architecture: there is no 'sm81' (did you mean 'sm"),  # several are as near
        ('runtimes = ["tensorrt-12"]', "runtimes: there is no 'tensorrt-12' (did you mean 'tensorrt-11'?)"),
        ('inherits = "agx-orn"', "inherits: no device profile 'agx-orn' (did you mean 'agx-orin'?)"),
        ('inherits = "a100"\narchitecture = 80', "architecture: input should be an object"),
        ('inherits = "a100"\n[gpu]\nsms = 1', "gpu.boost_clock_mhz: field required"),
        ('inherits = "a100"\n[gpu]\nsms = -1', "gpu.sms: input should be greater than 0"),
        ('inherits = "a100"\n[memory]\nsize = 1', "memory.size_gb: field required"),
        ('inherits = "a100"\n[published]\ndense = { fp6 = 1 }', "published.dense.fp6: extra inputs are not permitted"),
        ('inherits = "agx-orin"\n[power]\nmodes = []\nsource = "-"', "power.modes: tuple should have at least 1 item"),
    ],
)
def test_what_is_shared_is_checked_as_strictly(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(GpusqError) as caught:
        load_device(str(path))
    assert caught.value.message.startswith(f"{path}: {message}")
    assert caught.value.hint
