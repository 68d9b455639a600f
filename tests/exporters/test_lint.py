from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from deploy.plan import read_plan
from deploy.tensorrt_api import ShapeRange, build_engine
from exporters.lint import RULES, lint
from profiles.errors import GpusqError

SOUND = """
    <ir_version: 11, opset_import: ["": 23, "com.microsoft": 1]>
    g (float[N,4] x) => (float[N,2] y)
    <float s = {0.5}, int8 z = {0}, float[2] ws = {0.5, 0.25}, int8[2] wz = {0, 0},
     int8[4,2] w = {1, 0, 0, 2, 3, 0, 0, -4}, float[2] b = {0.3, -0.7}>
    {
        [q] xq = QuantizeLinear(x, s, z)
        [dq] xd = DequantizeLinear(xq, s, z)
        [w_dq] wd = DequantizeLinear<axis=1>(w, ws, wz)
        [fc] t = MatMul(xd, wd)
        [add] y = Add(t, b)
    }
"""
HALF_SCALES = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4] x) => (float16[N,4] y)
    <float16 s = {14336}, int8 z = {0}, float16[N,4] h>
    {
        [cast] h = Cast<to=10>(x)
        [q] xq = QuantizeLinear(h, s, z)
        [dq] y = DequantizeLinear(xq, s, z)
    }
"""


def changed(*replacements: tuple[str, str]) -> str:
    """SOUND with each of `replacements` made."""
    text = SOUND
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return text


# What breaks each rule, and the nodes at fault.
BROKEN = {
    "Q001 without a zero-point": (changed(("x, s, z", "x, s"), ("xq, s, z", "xq, s")), ["Q001 q", "Q001 dq"]),
    "Q001 uint8": (changed(("int8 z", "uint8 z")), ["Q001 q", "Q001 dq"]),
    "Q001 weight": (changed(("w, ws, wz", "w, ws")), ["Q001 w_dq"]),
    "Q002 activation": (changed(("z = {0}", "z = {3}")), ["Q002 q", "Q002 dq"]),
    "Q002 one channel": (changed(("wz = {0, 0}", "wz = {0, 1}")), ["Q002 w_dq"]),
    "Q003 zero": (changed(("ws = {0.5, 0.25}", "ws = {0.5, 0}")), ["Q003 w_dq"]),
    "Q003 negative": (changed(("s = {0.5}", "s = {-0.5}")), ["Q003 q", "Q003 dq"]),
    "Q004": (
        changed(
            ("float s = {0.5}", "float[4] s = {0.5, 0.25, 1, 0.5}"),
            ("int8 z = {0}", "int8[4] z = {0, 0, 0, 0}"),
            ("= QuantizeLinear", "= QuantizeLinear<axis=1>"),
            ("xd = DequantizeLinear", "xd = DequantizeLinear<axis=1>"),
        ),
        ["Q004 q", "Q004 dq"],
    ),
    "Q005": (
        changed(
            ("float[2] ws = {0.5, 0.25}", "float[4] ws = {0.5, 0.25, 1, 0.5}"),
            ("int8[2] wz = {0, 0}", "int8[4] wz = {0, 0, 0, 0}"),
            ("<axis=1>(w,", "<axis=0>(w,"),
        ),
        ["Q005 w_dq"],
    ),
    "Q006 transpose": (
        changed(
            ("int8[4,2] w", "int8[2,4] v"),
            ("[w_dq]", "[turn] w = Transpose<perm=[1,0]>(v)\n[w_dq]"),
            ("float[2] ws = {0.5, 0.25}", "float ws = {0.5}"),
            ("int8[2] wz = {0, 0}", "int8 wz = {0}"),
        ),
        ["Q006 turn"],
    ),
    "Q006 cast": (changed(("DequantizeLinear<axis=1>(w, ws, wz)", "Cast<to=1>(w)")), ["Q006 w_dq"]),
    "Q007": (
        changed(
            ("float[2] b = {0.3, -0.7}", "int32[2] bi = {1, -3}, float bs = {0.25}, int32 bz = {0}"),
            ("[add]", "[b_dq] b = DequantizeLinear(bi, bs, bz)\n[add]"),
        ),
        ["Q001 b_dq", "Q007 b_dq"],
    ),
    "Q008": (
        HALF_SCALES.replace("Cast<to=10>(x)", "Identity(x)").replace("float16[N,4] h", "float[N,4] h"),
        ["Q008 q"],
    ),
    "Q009": (changed(("(float[N,4] x)", "(float[N,4] x, float s)"), ("float s = {0.5}, ", "")), ["Q009 q", "Q009 dq"]),
    "G001": (changed(("= MatMul(", "= com.microsoft.FusedMatMul(")), ["G001 fc"]),
}

# What TensorRT-RTX does with each: the words with which it refuses the graph …
REFUSED = {
    "Q002 activation": "Non-zero zero point is not supported",
    "Q002 one channel": "Non-zero zero point is not supported",
    "Q003 zero": "Scale coefficients must all be positive",
    "Q003 negative": "Scale coefficients must all be positive",
    "Q006 transpose": "is only allowed before DQ",
    "Q006 cast": "is only allowed before DQ",
    "Q007": "Invalid Node - b_dq",
    "G001": "Plugin not found",
}
# … or the GEMMs by type that it makes of it and says nothing.
ACCEPTED: dict[str, dict[str, int]] = {
    "Q001 without a zero-point": {"Int8": 1},  # signed, where ONNX says uint8
    "Q001 uint8": {"Int8": 1},
    "Q001 weight": {"Int8": 1},
    "Q004": {},  # no GEMM is left: a generated kernel multiplies dequantized values
    "Q005": {},
    "Q009": {},
    "Q008": {},  # there is nothing but Q/DQ in it
}


def found_in(text: str) -> list[str]:
    return [f"{finding.rule.id} {finding.where}" for finding in lint(ir.from_onnx_text(text))]


@pytest.mark.parametrize(("text", "findings"), BROKEN.values(), ids=BROKEN)
def test_finds_the_nodes_that_break_a_rule(text: str, findings: list[str]) -> None:
    assert found_in(text) == findings


@pytest.mark.parametrize(
    "text",
    [
        SOUND,
        HALF_SCALES,
        changed(("[q]", "[scaled] v = Mul(x, b2)\n[q]"), ("float[2] b =", "float b2 = {2}, float[2] b =")),
        changed(("<axis=1>(w, ws, wz)", "(w, s, z)")),
        changed(("float[2] ws", "float[2] ws2 = {1, 1}, float[2] ws"), ("[fc]", "[spare] u = Mul(ws, ws2)\n[fc]")),
        changed(("xd, wd", "x, wd"), ("[q] xq = QuantizeLinear(x, s, z)", ""), ("[dq] xd", "[v_dq] vd"), ("xq", "w")),
    ],
    ids=["W8A8", "float16", "other operators", "weight per tensor", "a scale read twice", "weight only, read twice"],
)
def test_finds_nothing_in_a_sound_graph(text: str) -> None:
    assert found_in(text) == []


def test_every_rule_has_a_graph_that_breaks_it() -> None:
    assert {finding.split()[0] for _, findings in BROKEN.values() for finding in findings} == {r.id for r in RULES}


def test_a_finding_reads_as_one_sentence() -> None:
    finding = lint(ir.from_onnx_text(BROKEN["Q002 one channel"][0]))[0]
    assert str(finding) == "Q002 w_dq: TensorRT quantizes symmetrically: the zero-point must be 0"
    assert all(rule.cure for rule in RULES)


@pytest.fixture
def compile_gemms(tmp_path: Path) -> Callable[[str], dict[str, int]]:
    """Compile a graph with TensorRT-RTX for sm80, without a GPU; return its GEMMs by type."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT's own answer needs tensorrt-rtx")

    def compile_gemms(text: str) -> dict[str, int]:
        model = ir.from_onnx_text(text)
        ir.save(model, tmp_path / "model.onnx")
        built = build_engine(
            tmp_path / "model.onnx", "tensorrt-rtx", compute_capability="SM80", batch=ShapeRange(1, 2, 4)
        )
        return read_plan(built.log, model, source="tensorrt-rtx", target="SM80").gemms_by_type

    return compile_gemms


@pytest.mark.parametrize(("name", "words"), REFUSED.items(), ids=REFUSED)
def test_tensorrt_refuses(compile_gemms: Callable[[str], dict[str, int]], name: str, words: str) -> None:
    with pytest.raises(GpusqError) as caught:
        compile_gemms(BROKEN[name][0])
    assert words in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(("name", "gemms"), ACCEPTED.items(), ids=ACCEPTED)
def test_tensorrt_accepts_in_silence(
    compile_gemms: Callable[[str], dict[str, int]], name: str, gemms: dict[str, int]
) -> None:
    assert compile_gemms(BROKEN[name][0]) == gemms


@pytest.mark.parametrize("text", [SOUND, HALF_SCALES], ids=["W8A8", "float16"])
def test_tensorrt_takes_a_sound_graph(compile_gemms: Callable[[str], dict[str, int]], text: str) -> None:
    assert compile_gemms(text) == ({"Int8": 1} if text is SOUND else {})


def test_tensorrt_was_asked_about_every_broken_graph() -> None:
    assert REFUSED.keys() | ACCEPTED.keys() == BROKEN.keys()


def test_onnx_means_uint8_without_a_zero_point(run: Callable[..., npt.NDArray[np.float32]]) -> None:
    x = np.full((1, 4), -1, np.float32)
    assert run(ir.from_onnx_text(SOUND), x=x).tolist() != [[np.float32(0.3), np.float32(-0.7)]]
    without = ir.from_onnx_text(BROKEN["Q001 without a zero-point"][0])
    assert run(without, x=x).tolist() == [[np.float32(0.3), np.float32(-0.7)]]  # the bias: what is negative became 0
