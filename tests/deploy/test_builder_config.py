from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from deploy.build_options import BuildOptions, parse_shapes
from deploy.builder_config import WITHOUT_EFFECT
from deploy.tensorrt_api import Built, build_engine
from profiles.errors import GpusqError

tensorrt_rtx = pytest.importorskip("tensorrt_rtx", reason="these compile ahead of time")

TEXT = '<ir_version: 10, opset_import: ["": 20]> g (float16[N,64,64] x) => (float16[N,64,64] y) { y = MatMul(x, x) }'


@pytest.fixture
def model(tmp_path: Path) -> Path:
    ir.save(ir.from_onnx_text(TEXT), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def build(model: Path, **options: Any) -> Built:
    return build_engine(model, "tensorrt-rtx", compute_capability="SM80", options=BuildOptions(**options))


def test_the_shapes_that_are_given_are_the_engines(model: Path) -> None:
    built = build(model, shapes=(parse_shapes("x:2x64x64:3x64x64:5x64x64"),))
    (said,) = (line for message in built.log for line in message.splitlines() if line.startswith(" Name: x, IOMode"))
    assert "MinShape: [2,64,64], OptShape: [3,64,64], MaxShape: [5,64,64]" in said


def test_an_engine_has_every_profile_that_is_given(model: Path) -> None:
    given = ("x:1x64x64", "x:2x64x64:3x64x64:5x64x64")
    built = build(model, shapes=tuple(map(parse_shapes, given)))
    (said,) = (line for message in built.log for line in message.splitlines() if line.startswith(" Name: x, IOMode"))
    assert "MinShape: [1,64,64], OptShape: [1,64,64], MaxShape: [1,64,64]" in said
    assert "MinShape: [2,64,64], OptShape: [3,64,64], MaxShape: [5,64,64]" in said


@pytest.mark.parametrize(
    ("shapes", "message"),
    [("z:1x64x64", "the model has no input 'z'"), ("x:1x32x64", r"the input is \?x64x64"), ("x:1x64", "the input is")],
)
def test_shapes_that_do_not_fit_are_one_error(model: Path, shapes: str, message: str) -> None:
    with pytest.raises(GpusqError, match=message):
        build(model, shapes=(parse_shapes(shapes),))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"optimization_level": 5}, "--optimization-level"),
        ({"tiling": "full"}, "--tiling"),
        ({"hardware_compatibility": "ampere+"}, "--hardware-compatibility"),
        ({"version_compatible": True}, "--version-compatible"),
        ({"refit": True}, "--refit"),
        ({"dla_core": 0}, "drives no DLA on this device: --dla"),
    ],
)
def test_what_this_compiler_lacks_is_refused_by_name(model: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(GpusqError, match=named) as caught:
        build(model, **options)
    assert caught.value.hint


def test_weight_streaming_and_workspace_reach_the_builder(model: Path) -> None:
    assert build(model, weight_streaming=True).engine != build(model).engine
    assert build(model, workspace_mib=1024).engine
    with pytest.raises(GpusqError, match="could not build"):
        build(model, workspace_mib=0)


def test_options_called_without_effect_leave_the_bytes_as_they_are(model: Path) -> None:
    """The one thing that asking the module cannot tell: what it takes and does nothing with."""

    def raw(**attributes: Any) -> bytes:
        builder = tensorrt_rtx.Builder(tensorrt_rtx.Logger(tensorrt_rtx.Logger.INTERNAL_ERROR))
        network = builder.create_network(0)
        parser = tensorrt_rtx.OnnxParser(network, tensorrt_rtx.Logger(tensorrt_rtx.Logger.INTERNAL_ERROR))
        assert parser.parse_from_file(str(model))
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM80, 0)
        profile = builder.create_optimization_profile()
        profile.set_shape("x", (1, 64, 64), (8, 64, 64), (32, 64, 64))
        config.add_optimization_profile(profile)
        for name, value in attributes.items():
            setattr(config, name, value)
        return bytes(builder.build_serialized_network(network, config))

    asked: dict[str, dict[str, Any]] = {
        "optimization_level": {"builder_optimization_level": 5},
        "tiling": {"tiling_optimization_level": tensorrt_rtx.TilingOptimizationLevel.FULL},
        "hardware_compatibility": {"hardware_compatibility_level": tensorrt_rtx.HardwareCompatibilityLevel.AMPERE_PLUS},
    }
    assert asked.keys() == set(WITHOUT_EFFECT)
    plain = raw()
    assert all(raw(**attributes) == plain for attributes in asked.values())
