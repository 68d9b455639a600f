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
        parts = (device.onnx, device.ahead_of_time, device.sparse)
        assert all(part.source for part in parts if part)


def test_names_and_aliases_are_unique() -> None:
    names = [name for device in list_devices() for name in (device.name, *device.aliases)]
    assert len(set(names)) == len(names)


def test_lists_the_profiles_by_name() -> None:
    names = [device.name for device in list_devices()]
    assert names == sorted(names)
    assert {"a100-sxm-80gb", "agx-orin-64gb", "cpu"} <= set(names)


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
