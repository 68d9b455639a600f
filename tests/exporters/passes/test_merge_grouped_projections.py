from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from deploy.compiled_kernels import read_kernels
from deploy.tensorrt_api import ShapeRange, build_engine
from exporters.linears import find_linears
from exporters.passes.fold_constants import FoldConstants
from exporters.passes.inserter import Inserter
from exporters.passes.lower_fake_quantize import LowerFakeQuantize
from exporters.passes.merge_grouped_projections import MergeGroupedProjections
from exporters.passes.place_quantizers import PlaceQuantizers
from exporters.passes.type_floats import TypeFloats

Run = Callable[..., npt.NDArray[np.float32]]
WIDTHS = {"q": 64, "k": 32, "v": 32}

# A step of a decoder: 4 query heads share 2 key heads; q and k are rotated, k and v appended to a cache.
DECODER = """
<ir_version: 10, opset_import: ["" : 23]>
decoder (float[batch, {tokens}, 64] x, float[batch, {tokens}, 8] cos, float[batch, {tokens}, 8] sin,
  float[batch, 2, past, 16] keys, float[batch, 2, past, 16] values) =>
 (float[batch, 4, {tokens}, 16] y, float[batch, 2, total, 16] new_keys, float[batch, 2, total, 16] new_values)
<int64[4] heads = {{0, 0, -1, 16}}>
{{
   q2 = MatMul(x, q_weight)
   q3 = Reshape(q2, heads)
   q4 = Transpose<perm = [0, 2, 1, 3]>(q3)
   q = RotaryEmbedding(q4, cos, sin)
   k2 = MatMul(x, k_weight)
   {biased}
   k3 = Reshape({k}, heads)
   k4 = Transpose<perm = [0, 2, 1, 3]>(k3)
   k = RotaryEmbedding(k4, cos, sin)
   new_keys = Concat<axis = 2>(keys, k)
   v2 = MatMul({source}, v_weight)
   v3 = Reshape(v2, heads)
   v4 = Transpose<perm = [0, 2, 1, 3]>(v3)
   new_values = Concat<axis = 2>(values, v4)
   y = Attention(q, new_keys, new_values)
}}
"""


def graph(*, tokens: str = "tokens", biased: str = "", source: str = "x", text: str = DECODER) -> ir.Model:
    model = ir.from_onnx_text(text.format(tokens=tokens, biased=biased, k="kb" if biased else "k2", source=source))
    random = np.random.default_rng(0)
    arrays = {f"{name}_weight": random.standard_normal((64, width), np.float32) for name, width in WIDTHS.items()}
    arrays["k_bias"] = random.standard_normal(32, np.float32)
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is not None and value.name in arrays and not value.is_initializer():
                name = value.name
                if name not in model.graph.initializers:
                    new = ir.Value(name=name, const_value=ir.tensor(arrays[name], name=name))
                    new.type, new.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(arrays[name].shape)
                    model.graph.register_initializer(new)
                node.replace_input_with(index, model.graph.initializers[name])
    FoldConstants()(model)  # infers shapes
    return model


def inputs(tokens: int = 1) -> dict[str, npt.NDArray[np.float32]]:
    random = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {"x": (2, tokens, 64), "cos": (2, tokens, 8), "sin": (2, tokens, 8)}
    shapes |= {"keys": (2, 2, 5, 16), "values": (2, 2, 5, 16)}
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def count(model: ir.Model, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph)


@pytest.mark.parametrize("tokens", ["tokens", "3"])
@pytest.mark.parametrize("biased", ["", "kb = Add(k_bias, k2)"])
def test_projections_of_a_decoder_become_one_with_the_same_numbers(tokens: str, biased: str, run: Run) -> None:
    model = graph(tokens=tokens, biased=biased)
    expected = run(model, **inputs(3))
    assert MergeGroupedProjections()(model).changed == 1
    assert (count(model, "MatMul"), count(model, "Split"), count(model, "Transpose")) == (1, 1, 1)
    assert np.abs(run(model, **inputs(3)) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert [value.name for value in model.graph.outputs] == ["y", "new_keys", "new_values"]
    assert MergeGroupedProjections()(model).changed == 0


def quantized(*, per_channel: bool = True, scales: tuple[float, float, float] = (0.05, 0.05, 0.05)) -> ir.Model:
    """The decoder as another tool writes it: a quantizer ahead of each projection, `scales` those of q, k and v."""
    model = graph(tokens="3")
    inserter = Inserter(model.graph)
    zero = inserter.initializer("zero", np.zeros((), np.int8))
    for node, name, scale in zip([n for n in model.graph if n.op_type == "MatMul"], WIDTHS, scales, strict=True):
        x, weight = node.inputs
        assert x is not None
        assert weight is not None
        assert weight.const_value is not None
        array = weight.const_value.numpy()
        step = (np.abs(array).max(axis=0 if per_channel else None) / 127).astype(np.float32)
        stored = inserter.initializer(f"{name}_int8", np.round(array / step).astype(np.int8))
        step_value = inserter.initializer(f"{name}_step", step)
        zeros = inserter.initializer(f"{name}_zero", np.zeros(step.shape, np.int8))
        add = functools.partial(inserter.node, module="", before=node)
        weight = add("DequantizeLinear", [stored, step_value, zeros], dtype=ir.DataType.FLOAT, attributes={"axis": 1})
        node.replace_input_with(1, weight)
        s = inserter.initializer(f"{name}_x_scale", np.asarray(scale, np.float32))
        integers = add("QuantizeLinear", [x, s, zero], dtype=ir.DataType.INT8)
        node.replace_input_with(0, add("DequantizeLinear", [integers, s, zero], dtype=ir.DataType.FLOAT))
    FoldConstants()(model)
    return model


@pytest.mark.parametrize("per_channel", [True, False])
def test_quantized_projections_become_one_with_the_scales_that_they_have(per_channel: bool, run: Run) -> None:
    model = quantized(per_channel=per_channel)
    expected = run(model, **inputs(3))
    given = {name: scale_of(model, f"{name}_step") for name in WIDTHS}
    assert MergeGroupedProjections()(model).changed == 1
    (linear,) = find_linears(model.graph)
    joined = np.concatenate([np.broadcast_to(given[name], width) for name, width in WIDTHS.items()])
    assert linear.weight_scale is not None
    assert linear.weight_scale.tobytes() == joined.tobytes()
    assert linear.input_scale == np.float32(0.05)
    assert count(model, "QuantizeLinear") == 1
    assert np.abs(run(model, **inputs(3)) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert MergeGroupedProjections()(model).changed == 0


def scale_of(model: ir.Model, name: str) -> npt.NDArray[np.float32]:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return np.asarray(value.numpy(), np.float32)


def test_projections_with_inputs_of_different_scales_are_left_alone_with_the_reason() -> None:
    outcome = MergeGroupedProjections()(quantized(scales=(0.05, 0.05, 0.06)))
    assert outcome.changed == 0
    assert [left.why for left in outcome.left_alone] == ["the inputs of its projections have different scales"]


def test_a_projection_that_is_not_quantized_keeps_the_others_apart() -> None:
    model = quantized()
    first = next(node for node in model.graph if node.op_type == "MatMul")
    first.replace_input_with(0, model.graph.inputs[0])
    outcome = MergeGroupedProjections()(model)
    assert [left.why for left in outcome.left_alone] == ["some of its projections are quantized and some are not"]


def test_only_projections_of_one_tensor_are_merged(run: Run) -> None:
    model = graph(biased="kb = Identity(k2) z = Neg(x)", source="z")
    FoldConstants()(model)
    expected = run(model, **inputs())
    assert MergeGroupedProjections()(model).changed == 1
    assert count(model, "MatMul") == 2
    assert np.abs(run(model, **inputs()) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_projection_that_is_read_elsewhere_stays() -> None:
    text = DECODER.replace(
        "float[batch, 2, total, 16] new_keys", "float[batch, 2, total, 16] new_keys, float[A, B, C] v2"
    )
    model = graph(text=text)
    assert MergeGroupedProjections()(model).changed == 1
    assert count(model, "MatMul") == 2
    assert "v2" in [value.name for value in model.graph.outputs]


def test_heads_of_an_unknown_number_are_left_alone_with_the_reason() -> None:
    model = graph()
    for node in model.graph:
        if node.op_type == "Reshape":
            node.outputs[0].shape = None
    outcome = MergeGroupedProjections()(model)
    assert outcome.changed == 0
    why = "its projections are not known to be [batch, tokens, heads, head size]"
    assert [left.why for left in outcome.left_alone] == [why]


def test_tensorrt_needs_fewer_kernels_for_int8(tmp_path: Path) -> None:
    merged, apart = graph(), graph()
    MergeGroupedProjections()(merged)
    assert kernels(merged, tmp_path) < kernels(apart, tmp_path)


def kernels(model: ir.Model, folder: Path) -> int:
    PlaceQuantizers("w8a8-linear", lambda _, names: dict.fromkeys(names, 4.0), "float16")(model)
    LowerFakeQuantize()(model)
    TypeFloats("float16")(model)
    ir.save(model, folder / "model.onnx")
    usual = {name: array.shape for name, array in inputs().items()}
    built = build_engine(
        folder / "model.onnx", "tensorrt-rtx", compute_capability="SM80", batch=ShapeRange(2, 2, 2), usual=usual
    )
    return len(list(read_kernels(built.log)))
