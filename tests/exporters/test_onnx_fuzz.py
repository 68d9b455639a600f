"""Randomly damaged ONNX files either read or raise GpusqError. GPUSQ_FUZZ sets the number of files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporters.lint import lint
from exporters.onnx_file import custom_operators, input_infos, read_onnx
from exporters.passes.qoperator_to_qdq import QOperatorToQdq
from exporters.passes.symmetric_qdq import SymmetricQdq
from profiles.errors import GpusqError

EXAMPLES = int(os.environ.get("GPUSQ_FUZZ", "300"))
SECONDS_PER_FILE = 5

QUANTIZED = """
    <ir_version: 8, opset_import: ["": 17], producer_name: "pytorch", metadata_props: ["task": "detect"]>
    g (float[N,4] x) => (float[N,2] y)
    <float s = {0.25}, uint8 z = {128}, float[2] ws = {0.5, 0.125}, int8[2] wz = {0, 0},
     int8[4,2] w = {1, 0, 0, 2, 3, 0, 0, -4}, float[2] b = {0.5, 1.5}>
    {
        [q] xq = QuantizeLinear(x, s, z)
        [dq] xd = DequantizeLinear(xq, s, z)
        [w_dq] wd = DequantizeLinear<axis=1>(w, ws, wz)
        shape = Constant<value_ints=[-1, 2]>()
        [fc] t = MatMul(xd, wd)
        [add] u = Add(t, b)
        [shape] y = Reshape(u, shape)
    }
"""
BRANCHES = """
    <ir_version: 10, opset_import: ["": 21, "local": 1, "com.microsoft": 1]>
    g (bool on, float[2] x) => (float[2] y)
    {
        [if] t = If<then_branch = then () => (float[2] a) { a = local.twice(x) },
                    else_branch = other () => (float[2] c) <float[2] k = {1, 2}> { c = Mul(x, k) }>(on)
        [gelu] u = com.microsoft.QuickGelu<alpha=1.5>(t)
        [again] y = local.twice(u)
    }
    <domain: "local", opset_import: ["": 21]>
    twice (v) => (w)
    { w = Add(v, v) }
"""
OLD = """
    <ir_version: 6, opset_import: ["": 11]>
    g (float[2,3,4] x) => (float[2,3] y)
    <float low = {-1}, float[3] w = {1, 2, 3}>
    {
        [top] c = Clip(x, low)
        [soft] s = Softmax<axis=1>(c)
        [sum] r = ReduceSum<axes=[2], keepdims=0>(s)
        [open] u = Unsqueeze<axes=[1]>(r)
        [close] v = Squeeze<axes=[1]>(u)
        [mul] y = Mul(v, w)
    }
"""
QOPERATORS = """
    <ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
    g (float[N,4] x) => (float[N,2] y)
    <float s = {0.25}, int8 z = {0}, float[2] ws = {0.5, 0.125}, int8[2] wz = {0, 0},
     int8[4,2] w = {1, 0, 0, 2, 3, 0, 0, -4}, float o = {0.5}, int32[2] b = {7, -9}>
    {
        [q] xq = QuantizeLinear(x, s, z)
        [fc] t = QLinearMatMul(xq, s, z, w, ws, wz, o, z)
        [fc2] u = com.microsoft.QGemm(xq, s, z, w, ws, wz, b, o, z)
        [add] v = com.microsoft.QLinearAdd(t, o, z, u, o, z, s, z)
        [dq] y = DequantizeLinear(v, s, z)
    }
"""


def in_raw_bytes(text: str) -> bytes:
    """The model as exporters write it: tensors as raw bytes, large enough weights among them."""
    model = onnx.parser.parse_model(text)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    large = onnx.numpy_helper.from_array(np.ones(300, np.float32), "large")
    model.graph.initializer.append(large)
    return bytes(model.SerializeToString())


SEEDS = [in_raw_bytes(text) for text in (QUANTIZED, BRANCHES, OLD, QOPERATORS)]


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A sound file with a few bytes changed, removed, repeated or put in, or cut short."""
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.integers(1, 12))
        kind = draw(st.sampled_from(["flip", "set", "put", "drop", "repeat", "cut"]))
        if kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and content:
            content[place] = draw(st.sampled_from([0, 1, 2, 3, 7, 8, 13, 127, 128, 255]))
        elif kind == "put":
            content[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "drop":
            del content[place : place + length]
        elif kind == "repeat":
            content[place:place] = content[place : place + length]
        elif kind == "cut":
            del content[max(place, len(content) // 2) :]
    return bytes(content)


@pytest.mark.parametrize("content", SEEDS)
def test_the_files_to_damage_are_sound(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    assert len(input_infos(read_onnx(tmp_path / "model.onnx"))) in (1, 2)


fuzzing = settings(
    max_examples=EXAMPLES,
    deadline=SECONDS_PER_FILE * 1000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@fuzzing
@given(content=damaged_files())
def test_a_damaged_file_reads_or_raises_a_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    try:
        model = read_onnx(path)
    except GpusqError as error:
        said = error
    else:
        assert not custom_operators(model).keys() - {f"{n.domain}.{n.op_type}" for n in model.graph.all_nodes()}
        assert list(input_infos(model)) == [value.name for value in model.graph.inputs]
        assert all(node.name for node in model.graph)
        return
    assert str(path) in said.message
    assert said.hint
    assert "\n" not in said.message


@fuzzing
@given(content=damaged_files())
def test_what_reads_becomes_symmetric_or_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    try:
        model = read_onnx(path)
        QOperatorToQdq()(model)
        SymmetricQdq()(model)
    except GpusqError as error:
        said = error
    else:
        assert not {finding.rule.id for finding in lint(model)} & {"Q002", "Q003"}
        return
    assert said.hint
    assert "\n" not in said.message
