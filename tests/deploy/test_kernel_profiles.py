from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from deploy.build_options import BuildOptions, parse_shapes
from deploy.compiled_kernels import read_kernels
from deploy.kernel_profiles import by_profile
from deploy.tensorrt_api import build_engine

pytest.importorskip("tensorrt_rtx", reason="these compile ahead of time")
# A GEMM, which names its node, and a softmax, whose kernel names only what it does.
TEXT = """<ir_version: 10, opset_import: ["": 20]> g (float16[N,64,64] x, float16[64,64] w) => (float16[N,64,64] y) {
    a = MatMul(x, w)
    b = Softmax(a)
    c = MatMul(b, w)
    y = Softmax(c)
}"""


def kernels(folder: Path, *shapes: str) -> list[list[tuple[str, tuple[str, ...], tuple[str, ...]]]]:
    """Of each profile, the kinds, operands and nodes of its kernels."""
    model = folder / "model.onnx"
    ir.save(ir.from_onnx_text(TEXT), model)
    options = BuildOptions(shapes=tuple(map(parse_shapes, shapes)))
    built = build_engine(model, "tensorrt-rtx", compute_capability="SM80", options=options)
    found = by_profile(list(read_kernels(built.log)))
    return [[(each.kind, each.operands, each.nodes) for each in profile] for profile in found]


def test_the_kernels_of_each_profile_are_those_of_an_engine_with_it_alone(tmp_path: Path) -> None:
    fixed, dynamic = "x:2x64x64", "x:1x64x64:8x64x64:32x64x64"
    (one,), (other,) = kernels(tmp_path, fixed), kernels(tmp_path, dynamic)
    assert len(one) == 4
    assert kernels(tmp_path, fixed, dynamic, fixed) == [one, other, one]


def test_an_engine_without_kernels_has_one_profile() -> None:
    assert by_profile([]) == [[]]
