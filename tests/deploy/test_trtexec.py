from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from deploy.build_options import BuildOptions, parse_shapes
from deploy.trtexec import Files, build_with_trtexec, command, commands, version_of
from profiles.device import load_device
from profiles.errors import GpusqError

TEXT = (
    '<ir_version: 10, opset_import: ["": 20]> g (float16[N,64] x, float16[2,64] z) => (float16[N,64] y) { y = Relu(x) }'
)
V10_3, V10_16, V11 = (10, 3), (10, 16), (11, 0)
# Stands in for trtexec, which comes with TensorRT alone: its banner, its two files, its exit code.
STAND_IN = """#!/bin/sh
echo '&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec'
for word in "$@"; do case "$word" in
  --saveEngine=*) printf engine > "${word#*=}";;
  --exportLayerInfo=*) printf '{"Layers": []}' > "${word#*=}";;
  --onnx=*broken*) echo '[E] [TRT] ModelImporter.cpp: Failed to parse'; exit 1;;
esac; done
echo '[V] [TRT] (Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b'
echo "$@" > "$(dirname "$0")/words"
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    ir.save(ir.from_onnx_text(TEXT), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def trtexec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "trtexec").write_text(STAND_IN)
    (folder / "trtexec").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


def flags(model: Path, version: tuple[int, int], **options: Any) -> list[str]:
    return command(model, Files(Path("e")), BuildOptions(**options), version)


@pytest.mark.parametrize(
    ("text", "version"), [("10.3 (JetPack 6)", (10, 3)), ("10.16 (JetPack 7.2)", (10, 16)), ("11.x", (11, 0))]
)
def test_the_lines_have_versions(text: str, version: tuple[int, int]) -> None:
    assert version_of(text) == version


def test_strong_typing_is_asked_for_where_it_is_not_the_default(model: Path) -> None:
    assert "--stronglyTyped" in flags(model, V10_3)
    assert "--stronglyTyped" in flags(model, V10_16)
    assert "--stronglyTyped" not in flags(model, V11)


def test_only_dynamic_inputs_get_shapes_and_by_default_the_adapters(model: Path) -> None:
    found = flags(model, V11)
    assert [flag for flag in found if "Shapes" in flag] == [
        "--minShapes=x:1x64",
        "--optShapes=x:8x64",
        "--maxShapes=x:32x64",
    ]
    given = flags(model, V11, shapes=(parse_shapes("x:2x64:3x64:4x64"),))
    assert "--optShapes=x:3x64" in given


def test_several_profiles_are_numbered(model: Path) -> None:
    found = flags(model, V11, shapes=(parse_shapes("x:1x64"), parse_shapes("x:2x64:3x64:4x64")))
    assert [flag for flag in found if "Shapes" in flag or "--profile=" in flag] == [
        "--profile=0",
        "--minShapes=x:1x64",
        "--optShapes=x:1x64",
        "--maxShapes=x:1x64",
        "--profile=1",
        "--minShapes=x:2x64",
        "--optShapes=x:3x64",
        "--maxShapes=x:4x64",
    ]


def test_every_option_is_a_flag(model: Path) -> None:
    found = flags(
        model,
        V11,
        sparse=False,
        optimization_level=5,
        workspace_mib=64,
        tiling="full",
        dla_core=1,
        gpu_fallback=True,
        hardware_compatibility="same-compute-capability",
        version_compatible=True,
        weight_streaming=True,
        refit=True,
    )
    for flag in (
        "--sparsity=disable",
        "--builderOptimizationLevel=5",
        "--memPoolSize=workspace:64",
        "--tilingOptimizationLevel=3",
        "--useDLACore=1",
        "--allowGPUFallback",
        "--hardwareCompatibilityLevel=sameComputeCapability",
        "--versionCompatible",
        "--allowWeightStreaming",
        "--refit",
    ):
        assert flag in found


@pytest.mark.parametrize(
    ("version", "options"),
    [
        (V10_3, {"tiling": "full"}),
        (V10_3, {"hardware_compatibility": "same-compute-capability"}),
        (V10_16, {"dla_core": 0}),
    ],
)
def test_what_a_line_lacks_is_refused(model: Path, version: tuple[int, int], options: dict[str, Any]) -> None:
    with pytest.raises(GpusqError, match=r"TensorRT 10\.\d+ lacks --"):
        flags(model, version, **options)


def test_a_device_has_one_command_for_each_of_its_lines(model: Path) -> None:
    found = commands(load_device("agx-orin"), model, BuildOptions(dla_core=0))
    assert [line.version.split()[0] for line, _ in found] == ["10.3", "10.16", "11.x"]
    assert found[1][1] == "# TensorRT 10.16 lacks --dla"
    assert all("--useDLACore=0" in found[index][1] for index in (0, 2))
    assert commands(load_device("cpu"), model, BuildOptions()) == []
    with pytest.raises(GpusqError, match="has no DLA"):
        commands(load_device("a100"), model, BuildOptions(dla_core=0))


def test_the_trtexec_on_the_path_builds_and_its_log_and_layers_are_read(
    model: Path, tmp_path: Path, trtexec: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    built = build_with_trtexec(model, out, BuildOptions(), tmp_path / "timing" / "a.timing")
    assert (built.engine, built.runtime, built.runtime_version) == (b"engine", "tensorrt", "10.3.0")
    assert json.loads(built.layers or "") == {"Layers": []}
    assert any("Found 2 layer(s)" in line for line in built.log)
    assert "--stronglyTyped" in (trtexec / "words").read_text()
    assert list(out.iterdir()) == []


def test_its_first_error_is_in_the_message_and_the_command_in_the_hint(tmp_path: Path, trtexec: Path) -> None:
    ir.save(ir.from_onnx_text(TEXT), tmp_path / "broken.onnx")
    with pytest.raises(GpusqError, match="Failed to parse") as caught:
        build_with_trtexec(tmp_path / "broken.onnx", tmp_path, BuildOptions(), None)
    assert caught.value.hint.startswith("trtexec --onnx=")


def test_without_trtexec_one_error_says_where_it_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GpusqError, match="no trtexec on PATH") as caught:
        build_with_trtexec(model, tmp_path, BuildOptions(), None)
    assert "/usr/src/tensorrt/bin" in caught.value.hint
