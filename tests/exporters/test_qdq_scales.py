from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from exporters.qdq_scales import bad_scale, spread

DQ = """
    <ir_version: 10, opset_import: ["": 21]>
    g () => (float[2,4] y)
    <int8[2,4] w = {1,2,3,4,0,0,0,0}, float[%d] s = {%s}, int8[%d] z = {%s}>
    { y = DequantizeLinear<axis=%d>(w, s, z) }
"""


def node(*scale: float, axis: int = 0) -> ir.Node:
    count, zeros = len(scale), ", ".join("0" for _ in scale)
    return ir.from_onnx_text(DQ % (count, ", ".join(map(str, scale)), count, zeros, axis)).graph[0]


def test_sound_scales_and_those_of_dead_channels_pass() -> None:
    assert bad_scale(node(0.5, 0.25)) == ""
    assert bad_scale(node(0.5, 0.0)) == ""


@pytest.mark.parametrize(
    ("scale", "axis", "words"),
    [((0.0, 0.5), 0, "is 0"), ((-1.0, 0.5), 0, "is negative"), ((1.0, 1.0, 1.0), 0, "does not fit"),
     ((1.0, 1.0), 5, "does not fit")],
)  # fmt: skip
def test_anything_else_is_told(scale: tuple[float, ...], axis: int, words: str) -> None:
    assert words in bad_scale(node(*scale, axis=axis))


def test_blocks_are_spread_and_cut_at_the_end() -> None:
    dq = node(1.0, 1.0)
    dq.attributes["axis"], dq.attributes["block_size"] = ir.AttrInt64("axis", 1), ir.AttrInt64("block_size", 3)
    assert spread(np.array([[1, 2]]), dq, (1, 5)).tolist() == [[1, 1, 1, 2, 2]]
