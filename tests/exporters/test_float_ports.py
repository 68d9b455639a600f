from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from exporters.float_ports import may_give, may_read, reads_any
from exporters.graph_student import read_graph
from exporters.passes.type_floats import TypeFloats
from exporters.surgery import Target, surgery
from profiles.device import load_device

Run = Callable[..., npt.NDArray[np.float32]]
FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16


@pytest.mark.parametrize(
    ("op_type", "dtype", "inputs", "outputs"),
    [
        ("Resize", FLOAT16, (True, True, False), (True,)),
        ("Range", FLOAT16, (False, False, False), (False,)),
        ("MatMul", FLOAT16, (True, True), (True,)),
        ("Concat", FLOAT16, (True, True, True, True), (True,)),
        ("LayerNormalization", FLOAT16, (True, True, True), (True, False, False)),
        ("LayerNormalization", BFLOAT16, (True, True, True), (True, False, False)),
        ("NonMaxSuppression", FLOAT16, (False, False), ()),
        ("ConstantOfShape", FLOAT16, (), (False,)),
        ("DequantizeLinear", FLOAT16, (False, True), (True,)),
    ],
)
def test_tells_what_onnx_allows(
    op_type: str, dtype: ir.DataType, inputs: tuple[bool, ...], outputs: tuple[bool, ...]
) -> None:
    node = ir.node(op_type, [ir.Value(name=str(index)) for index in range(4)], num_outputs=3)
    assert tuple(may_read(node, index, dtype, 23) for index in range(len(inputs))) == inputs
    assert tuple(may_give(node, index, dtype, 23) for index in range(len(outputs))) == outputs


def test_an_operator_that_is_not_onnxs_takes_any() -> None:
    node = ir.node("Mine", [ir.Value(name="x")], domain="mine")
    assert may_read(node, 0, FLOAT16, 23)
    assert may_give(node, 0, FLOAT16, 23)
    assert not reads_any(node)


RESIZED = """
    <ir_version: 11, opset_import: ["": 19]>
    g (float[1,1,2,2] x) => (float[1,1,4,4] y)
    <float[0] roi = {}, float[4] scales = {1, 1, 2, 2}, float[4] more = {1, 1, 2, 3}, float half = {0.5}>
    {
        [resize] r = Resize<mode = "nearest">(x, roi, scales)
        [fill] f = ConstantOfShape<value = float[1] {0.25}>(SHAPE)
        [add] a = Add(r, f)
        [out] y = Mul(a, half)
    }
""".replace("float half", "int64[4] SHAPE = {1, 1, 4, 4}, float half")


def test_keeps_the_scales_of_a_resize_and_what_an_attribute_types(run: Run) -> None:
    model = ir.from_onnx_text(RESIZED)
    TypeFloats("float16")(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert model.graph.initializers["scales"].dtype == FLOAT
    assert {node.name: node.outputs[0].dtype for node in model.graph}["resize"] == FLOAT16
    x = np.array([[[[1, 2], [3, 4]]]], np.float32)
    assert run(model, x=x).tolist() == run(ir.from_onnx_text(RESIZED), x=x).tolist()
    assert TypeFloats("float16")(model).changed == 0


def test_a_constant_read_in_both_types_is_there_twice(run: Run) -> None:
    text = RESIZED.replace("Add(r, f)", "Add(r, scales)")
    model = ir.from_onnx_text(text)
    TypeFloats("float16")(model)
    held = {name: value.dtype for name, value in model.graph.initializers.items()}
    assert (held["scales"], held["scales_float32"]) == (FLOAT16, FLOAT)
    x = np.array([[[[1, 2], [3, 4]]]], np.float32)
    assert run(model, x=x).tolist() == run(ir.from_onnx_text(text), x=x).tolist()


def test_a_yolo_that_scales_up_answers_in_float16_as_in_float32(run: Run) -> None:
    spec = importlib.util.find_spec("nudenet")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("nudenet is not installed")
    path = Path(spec.submodule_search_locations[0]) / "320n.onnx"
    model = read_graph(path).export().model
    (name,) = [value.name or "" for value in model.graph.inputs]
    x = {name: np.random.default_rng(0).random((1, 3, 320, 320), np.float32)}
    expected = run(model, **x)
    surgery(model, Target(load_device("a100"), "float16"))
    resize = next(node for node in model.graph if node.op_type == "Resize")
    assert resize.inputs[2] is not None
    assert (resize.inputs[2].dtype, resize.outputs[0].dtype) == (FLOAT, FLOAT16)
    found = run(model, **x)
    # Boxes are in pixels, up to 320, and scores below 1; float16 has a step of 0.25 there and of 0.0005 here.
    assert np.abs(found[:, :4] - expected[:, :4]).max() <= 1
    assert np.abs(found[:, 4:] - expected[:, 4:]).max() <= 5e-3
