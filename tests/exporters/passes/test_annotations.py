"""Every pass keeps the annotations of the layers, whatever it does to the graph around them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import get_args

import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

import exporters.passes
from exporters.linears import find_linears
from exporters.passes.annotate_sparsity import KEY, AnnotateSparsity
from exporters.passes.outcome import Pass
from exporters.surgery import Target, passes_for
from profiles.device import FloatType, list_devices

# What passes mend: a float weight before its Q, a Transpose before a DQ, uint8, a GELU in pieces.
TO_BE_MENDED = """
    <ir_version: 11, opset_import: ["": 21]>
    g (float[N,4] x) => (float[N,4] y)
    <float s = {0.25}, uint8 z = {128}, int8 i = {0}, float[4,4] w = {1, 0, 5, 0, 0, 2, 6, 3, 3, 0, 0, 1, 0, 4, 0, 9},
     int8[4,4] v = {1, 0, 5, 0, 0, 2, 6, 3, 3, 0, 0, 1, 0, 4, 0, 9}, float root = {1.4142135}, float half = {0.5},
     float one = {1}>
    {
        [q] xq = QuantizeLinear(x, s, z)
        [dq] xd = DequantizeLinear(xq, s, z)
        [w_q] wq = QuantizeLinear(w, s, i)
        [w_dq] wd = DequantizeLinear(wq, s, i)
        [first] t = MatMul(xd, wd)
        [div] a = Div(t, root)
        [erf] b = Erf(a)
        [add] c = Add(b, one)
        [mul] d = Mul(t, c)
        [gelu] e = Mul(d, half)
        [move] vt = Transpose<perm=[1,0]>(v)
        [v_dq] vd = DequantizeLinear(vt, s, i)
        [second] y = Gemm<transB=1>(e, vd)
    }
"""


def sequences() -> Iterator[tuple[str, list[Pass]]]:
    """The passes of each target, and alone whatever in `exporters.passes` needs no parameters."""
    float_types: tuple[FloatType, ...] = get_args(FloatType)
    for device in list_devices():
        for float_type in float_types:
            yield f"{device.name} {float_type}", passes_for(Target(device, float_type))
    for module in pkgutil.iter_modules(exporters.passes.__path__, "exporters.passes."):
        for found in vars(importlib.import_module(module.name)).values():
            if isinstance(found, type) and found.__module__ == module.name and _is_pass(found):
                yield found.__name__, [found()]


def _is_pass(found: type) -> bool:
    if not is_dataclass(found) or "__call__" not in vars(found):
        return False
    return all(field.default is not MISSING or field.default_factory is not MISSING for field in fields(found))


def annotated(model: ir.Model) -> dict[str | None, dict[str, str]]:
    return {
        node.name: found
        for node in model.graph
        if (found := {key: value for key, value in node.metadata_props.items() if key.startswith(KEY)})
    }


SEQUENCES = dict(sequences())


def test_all_of_them_are_looked_at() -> None:
    found = {type(step).__name__ for steps in SEQUENCES.values() for step in steps}
    assert found >= {"LowerAttention", "TypeFloats", "SetOpset", "FoldQuantized", "SymmetricQdq", "RepairSparsity"}


@pytest.mark.parametrize("name", SEQUENCES)
def test_keeps_the_annotations(name: str, quantized_student: ir.Model) -> None:
    mended = ir.from_onnx_text(TO_BE_MENDED)
    ShapeInferencePass()(mended)
    for model in (quantized_student.clone(), mended):
        AnnotateSparsity(None)(model)
        before = annotated(model)
        assert len(before) == len(list(find_linears(model.graph))) > 1
        for step in SEQUENCES[name]:
            step(model)
            if isinstance(step, AnnotateSparsity):  # the one that may change what they say
                assert annotated(model).keys() == before.keys()
                before = annotated(model)
            assert annotated(model) == before
