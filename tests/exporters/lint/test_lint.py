from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from deploy.manifest import Plan
from deploy.plan import read_plan
from deploy.tensorrt_api import ShapeRange, build_engine
from exporters.lint import RULES, Rule, lint
from exporters.lint.operators import QUANTIZED_OPERATORS, UNPARSED_OPERATORS
from exporters.passes.lower_attention import LowerAttention
from profiles.device import Device, load_device
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


CONVOLUTION = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,2,4,4] x) => (float[N,2,4,4] y)
    <float s = {0.5}, int8 z = {0}, float[2] ws = {0.5, 0.25}, int8[2] wz = {0, 0}, int8[2,2,1,1] w = {1, 2, 3, 4}>
    {
        [q] xq = QuantizeLinear(x, s, z)
        [dq] xd = DequantizeLinear(xq, s, z)
        [w_dq] wd = DequantizeLinear<axis=0>(w, ws, wz)
        [conv] y = Conv(xd, wd)
    }
"""
INT4_BLOCKS = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4] x) => (float[N,2] y)
    <float s = {0.5}, int8 z = {0}, float[2,2] ws = {0.5, 0.25, 1, 2}, int4[4,2] w = {1, 0, 0, 2, 3, 0, 0, 4}>
    {
        [q] xq = QuantizeLinear(x, s, z)
        [dq] xd = DequantizeLinear(xq, s, z)
        [w_dq] wd = DequantizeLinear<axis=0, block_size=2>(w, ws)
        [fc] y = MatMul(x, wd)
    }
"""
STACKED_BLOCKS = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,1,2] x) => (float[A,B,C] y)
    <float[1,2,2] ws = {0.5, 0.25, 1, 2}, int4[2,2,2] w = {1, 0, 0, 2, 3, 0, 0, 4}>
    {
        [w_dq] wd = DequantizeLinear<axis=0, block_size=2>(w, ws)
        [fc] y = MatMul(x, wd)
    }
"""
PRODUCT = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,64,64] x) => (float[N,64,64] y)
    <float s = {0.5}, int8 z = {0}>
    {
        [q] xq = QuantizeLinear(x, s, z)
        [dq] xd = DequantizeLinear(xq, s, z)
        r = Relu(x)
        [scores] y = MatMul(xd, r)
    }
"""
OTHER_TYPE = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4] x) => (float[N,4] y) <float s = {0.5}>
    {
        [q] xq = QuantizeLinear<output_dtype=5>(x, s)
        [dq] y = DequantizeLinear(xq, s)
    }
"""
BRANCH = """
    <ir_version: 11, opset_import: ["": 23, "com.microsoft": 1]>
    g (float[4,4] x, bool c) => (float[4,4] y)
    {
        [choice] y = If(c) <
            then_branch = t () => (float[4,4] a) { [inner] a = com.microsoft.FusedMatMul(x, x) },
            else_branch = e () => (float[4,4] b) { b = Relu(x) }
        >
    }
"""
INTEGERS = """
    <ir_version: 11, opset_import: ["": 23]>
    g (int8[N,2] x) => (int32[N,2] y) <int32[2,2] v = {1, 2, 3, 4}>
    { w = Cast<to=3>(v) [node] y = MatMulInteger(x, w) }
"""
DYNAMIC = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4] x) => (float[N,4] y)
    { [node] q, s, z = DynamicQuantizeLinear(x) [dq] y = DequantizeLinear(q, s, z) }
"""
OVERFLOW = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float16[N,4] x) => (float16[N,4] y) <float[4] c = {-100000, 1, 2, 3}>
    { [node] h = Cast<to=10>(c) y = Add(x, h) }
"""
ATTENTION = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,2,8,16] q, float[N,2,8,16] k, float[N,2,8,16] v) => (float[N,2,8,16] y)
    { [node] y = Attention(q, k, v) }
"""

SAME = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float16[N,2,8,16] x, float16[N,2,8,16] v) => (float16[N,2,8,16] y) <float16[N,2,8,16] r, float16[N,2,8,16] s>
    { r = Relu(x) i = Identity(x) s = Relu(i) [node] y = Attention(r, s, v) }
"""


def one_node(kind: str, nodes: str, result: str = "") -> str:
    """A graph of `nodes`, the first of which is called `node`."""
    header = '<ir_version: 11, opset_import: ["": 23]>'
    return f"{header} g ({kind}[N,4] x) => ({result or kind}[N,4] y) {{ [node] {nodes} }}"


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
    "Q001 output type": (
        changed(("xq = QuantizeLinear(x, s, z)", "xq = QuantizeLinear<output_dtype=2>(x, s)"), ("xq, s, z", "xq, s")),
        ["Q001 q", "Q001 dq"],
    ),
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
    "Q005 convolution": (CONVOLUTION.replace("axis=0", "axis=1"), ["Q005 w_dq"]),
    "Q006 transpose": (
        changed(
            ("int8[4,2] w", "int8[2,4] v"),
            ("[w_dq]", "[turn] w = Transpose<perm=[1,0]>(v)\n[w_dq]"),
            ("float[2] ws = {0.5, 0.25}", "float ws = {0.5}"),
            ("int8[2] wz = {0, 0}", "int8 wz = {0}"),
        ),
        ["Q006 turn"],
    ),
    "Q006 cast": (changed(("DequantizeLinear<axis=1>(w, ws, wz)", "Cast<to=1>(w)")), ["Q006 w_dq", "Q015 fc"]),
    "Q007": (
        changed(
            ("float[2] b = {0.3, -0.7}", "int32[2] bi = {1, -3}, float bs = {0.25}, int32 bz = {0}"),
            ("[add]", "[b_dq] b = DequantizeLinear(bi, bs, bz)\n[add]"),
        ),
        ["Q007 b_dq"],
    ),
    "Q008": (
        HALF_SCALES.replace("Cast<to=10>(x)", "Identity(x)").replace("float16[N,4] h", "float[N,4] h"),
        ["Q008 q"],
    ),
    "Q009": (changed(("(float[N,4] x)", "(float[N,4] x, float s)"), ("float s = {0.5}, ", "")), ["Q009 q", "Q009 dq"]),
    "Q010 axis": (changed(('"": 23', '"": 12')), ["Q010 w_dq"]),
    "Q010 blocks": (INT4_BLOCKS.replace('"": 23', '"": 20'), ["Q010 w_dq"]),
    "Q011": (
        changed(
            ("float[2] ws = {0.5, 0.25}", "float[2,2] ws = {0.5, 0.25, 1, 2}"),
            ("int8[2] wz = {0, 0}", "int8[2,2] wz = {0, 0, 0, 0}"),
            ("<axis=1>(w,", "<axis=0, block_size=2>(w,"),
        ),
        ["Q011 w_dq"],
    ),
    "Q012": (INT4_BLOCKS.replace("MatMul(x,", "MatMul(xd,"), ["Q012 w_dq"]),
    "Q013 int16": (OTHER_TYPE, ["Q013 q", "Q013 dq"]),
    "Q013 uint4": (INT4_BLOCKS.replace("int4", "uint4"), ["Q013 w_dq"]),
    "Q014": (STACKED_BLOCKS, ["Q014 w_dq"]),
    "Q015 weight": (
        changed(
            ("int8[4,2] w = {1, 0, 0, 2, 3, 0, 0, -4}", "float[4,2] wd = {1, 0, 0, 2, 3, 0, 0, -4}"),
            ("[w_dq] wd = DequantizeLinear<axis=1>(w, ws, wz)", ""),
        ),
        ["Q015 fc"],
    ),
    "Q015 product": (PRODUCT, ["Q015 scores"]),
    "Q016 FP8": (OTHER_TYPE.replace("output_dtype=5", "output_dtype=17"), ["Q016 q", "Q016 dq"]),
    "Q016 FP4": (OTHER_TYPE.replace("output_dtype=5", "output_dtype=23"), ["Q016 q", "Q016 dq"]),
    "G001": (changed(("= MatMul(", "= com.microsoft.FusedMatMul(")), ["G001 fc"]),
    "G001 in a branch": (BRANCH, ["G001 inner"]),
    "G002": (one_node("float", "y = Bernoulli(x)"), ["G002 node"]),
    "G003 MatMulInteger": (INTEGERS, ["G003 node"]),
    "G003 DynamicQuantizeLinear": (DYNAMIC, ["Q009 dq", "G003 node"]),
    "G005 Cast": (one_node("float", "h = Cast<to=5>(x) y = Cast<to=1>(h)"), ["G005 node"]),
    "G005 uint8": (one_node("float", "h = Cast<to=2>(x) y = Cast<to=1>(h)"), ["G005 node"]),
    "G005 input": (one_node("uint16", "y = Cast<to=1>(x)", "float"), ["G005 x"]),
    "G006": (one_node("double", "y = Relu(x)"), ["G006 x", "G006 node"]),
    "G007": (OVERFLOW, ["G007 node"]),
    "A001": (ATTENTION, ["A001 node"]),
    "A003": (SAME.replace("(r, s, v)", "(x, x, v)"), ["A003 node"]),
    "A003 two chains": (SAME, ["A003 node"]),
}
# What TensorRT-RTX does with each: the words with which it refuses the graph …
REFUSED = {
    "Q001 output type": "TensorRT only allows FP8, INT8, INT4, and FP4 quantization",
    "Q002 activation": "Non-zero zero point is not supported",
    "Q002 one channel": "Non-zero zero point is not supported",
    "Q003 zero": "Scale coefficients must all be positive",
    "Q003 negative": "Scale coefficients must all be positive",
    "Q006 transpose": "is only allowed before DQ",
    "Q006 cast": "is only allowed before DQ",
    "Q007": "Invalid Node - b_dq",
    "Q013 int16": "specifies an unsupported data type",
    "Q013 uint4": "Failed to import initializer: w",
    "Q014": "Invalid Node - w_dq",
    "Q016 FP8": "the model contains HW-specific datatypes: fp8_e4m3",
    "Q016 FP4": "the model contains HW-specific datatypes: fp4_e2m1",
    "G001": "Plugin not found",
    "G001 in a branch": "Plugin not found",
    "G002": "cannot parse",
    "G003 MatMulInteger": "cannot parse",
    "G003 DynamicQuantizeLinear": "cannot parse",
    "G005 Cast": "Unsupported data type for the Cast operator",
    "G005 uint8": "does not support UINT8 types for intermediate tensors",
    "G005 input": "Failed to convert ONNX date type",
    "A001": "Attention operation was not supported by a dedicated kernel",
}
# … or the GEMMs and convolutions by type that it makes of it and says nothing.
ACCEPTED: dict[str, dict[str, int]] = {
    "Q001 without a zero-point": {"Int8": 1},  # signed, where ONNX says uint8
    "Q001 uint8": {"Int8": 1},
    "Q004": {},  # no GEMM is left: a generated kernel multiplies dequantized values
    "Q005": {},
    "Q005 convolution": {"Float": 1},
    "Q008": {},  # there is nothing but Q/DQ in it
    "Q009": {},
    "Q010 axis": {"Int8": 1},  # of a file that onnxruntime refuses
    "Q010 blocks": {},  # a generated kernel dequantizes and multiplies
    "Q011": {"Int8": 1},  # one GEMM over all of K, which has two blocks
    "Q012": {"Int8": 1},
    "Q015 weight": {},
    "Q015 product": {"Float": 1},
    "G006": {},
    "G007": {},
}
# … or the graphs with which its process ends by a signal …
CRASHED = {"A003", "A003 two chains"}
# … or what shows it where TensorRT-RTX cannot be asked: the parser meant is another, or the file is not read that far.
ELSEWHERE = {"A002", "G004"}
A100 = load_device("a100")


def parsed(text: str) -> ir.Model:
    """The model of `text`; the parser of ONNX text leaves 4-bit integers unpacked."""
    proto = onnx.parser.parse_model(text)
    for tensor in proto.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
            values = list(tensor.int32_data)
            tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, values))
    return ir.from_proto(proto)


def found_in(text: str, device: Device | None = A100) -> list[str]:
    return [f"{finding.rule.id} {finding.where}" for finding in lint(parsed(text), device)]


@pytest.mark.parametrize(("text", "findings"), BROKEN.values(), ids=BROKEN)
def test_finds_the_nodes_that_break_a_rule(text: str, findings: list[str]) -> None:
    assert found_in(text) == findings


# What breaks no rule, and the GEMMs and convolutions that TensorRT-RTX makes of it.
SOUND_GRAPHS: dict[str, tuple[str, dict[str, int]]] = {
    "W8A8": (SOUND, {"Int8": 1}),
    "float16": (HALF_SCALES, {}),
    "other operators": (
        changed(("[q]", "[scaled] v = Mul(x, b2)\n[q]"), ("float[2] b =", "float b2 = {2}, float[2] b =")),
        {"Int8": 1},
    ),
    "weight per tensor": (changed(("<axis=1>(w, ws, wz)", "(w, s, z)")), {"Int8": 1}),
    "weight without a zero-point": (changed(("w, ws, wz", "w, ws")), {"Int8": 1}),
    "int8 as the output's type": (
        changed(("xq = QuantizeLinear(x, s, z)", "xq = QuantizeLinear<output_dtype=3>(x, s)"), ("xq, s, z", "xq, s")),
        {"Int8": 1},
    ),
    "a scale that is folded": (
        changed(("[q]", "[half] s2 = Mul(s, s)\n[q]"), ("(x, s, z)", "(x, s2, z)")),
        {"Int8": 1},
    ),
    "a scale read twice": (
        changed(("float[2] ws", "float[2] ws2 = {1, 1}, float[2] ws"), ("[fc]", "[spare] u = Mul(ws, ws2)\n[fc]")),
        {"Int8": 1},
    ),
    "a weight that is turned and quantized": (
        changed(
            ("int8[4,2] w = {1, 0, 0, 2, 3, 0, 0, -4}", "float[2,4] f = {1, 0, 0, 2, 3, 0, 0, -4}"),
            ("[w_dq]", "[turn] t2 = Transpose<perm=[1,0]>(f)\n[w_q] w = QuantizeLinear<axis=1>(t2, ws, wz)\n[w_dq]"),
        ),
        {"Int8": 1},
    ),
    "convolution": (CONVOLUTION, {"Int8": 1}),
    "blocks of INT4, weight only": (INT4_BLOCKS, {}),
    "weight only, read twice": (
        changed(("xd, wd", "x, wd"), ("[q] xq = QuantizeLinear(x, s, z)", ""), ("[dq] xd", "[v_dq] vd"), ("xq", "w")),
        {},
    ),
}


@pytest.mark.parametrize("name", SOUND_GRAPHS)
def test_finds_nothing_in_a_sound_graph(name: str) -> None:
    assert found_in(SOUND_GRAPHS[name][0]) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_every_rule_has_a_graph_that_breaks_it_and_tensorrts_answer(rule: Rule) -> None:
    graphs = {name for name, (_, findings) in BROKEN.items() if any(f.startswith(rule.id) for f in findings)}
    assert rule.id in ELSEWHERE or graphs & (REFUSED.keys() | ACCEPTED.keys() | CRASHED)
    assert rule.sentence
    assert rule.cure


def test_tensorrt_was_asked_about_every_broken_graph() -> None:
    assert REFUSED.keys() | ACCEPTED.keys() | CRASHED == BROKEN.keys()
    assert len(REFUSED) + len(ACCEPTED) + len(CRASHED) == len(BROKEN)
    assert len({rule.id for rule in RULES}) == len(RULES)


def test_a_finding_reads_as_one_sentence_and_names_the_module() -> None:
    model = parsed(BROKEN["Q002 one channel"][0])
    next(node for node in model.graph if node.name == "w_dq").metadata_props["gpusq.module"] = "blocks.0.fc"
    finding = lint(model)[0]
    assert str(finding) == "Q002 w_dq: TensorRT quantizes symmetrically: the zero-point must be 0"
    assert finding.module == "blocks.0.fc"


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[[str], Plan]:
    """Compile a graph with TensorRT-RTX for sm80, without a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT's own answer needs tensorrt-rtx")

    def compiled(text: str) -> Plan:
        model = parsed(text)
        ir.save(model, tmp_path / "model.onnx")
        built = build_engine(
            tmp_path / "model.onnx", "tensorrt-rtx", compute_capability="SM80", batch=ShapeRange(1, 2, 4)
        )
        return read_plan(built.log, model, source="tensorrt-rtx", target="SM80")

    return compiled


def products(plan: Plan) -> dict[str, int]:
    return plan.gemms_by_type | plan.convolutions_by_type


@pytest.mark.parametrize(("name", "words"), REFUSED.items(), ids=REFUSED)
def test_tensorrt_refuses(compiled: Callable[[str], Plan], name: str, words: str) -> None:
    with pytest.raises(GpusqError) as caught:
        compiled(BROKEN[name][0])
    assert words in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(("name", "gemms"), ACCEPTED.items(), ids=ACCEPTED)
def test_tensorrt_accepts_in_silence(compiled: Callable[[str], Plan], name: str, gemms: dict[str, int]) -> None:
    assert products(compiled(BROKEN[name][0])) == gemms


@pytest.mark.parametrize(("name", "gemms"), [(name, gemms) for name, (_, gemms) in SOUND_GRAPHS.items()])
def test_tensorrt_takes_a_sound_graph(compiled: Callable[[str], Plan], name: str, gemms: dict[str, int]) -> None:
    assert products(compiled(SOUND_GRAPHS[name][0])) == gemms


COMPILE = """
import sys
from pathlib import Path
from deploy.tensorrt_api import ShapeRange, build_engine
build_engine(Path(sys.argv[1]), "tensorrt-rtx", compute_capability="SM80", batch=ShapeRange(1, 2, 4))
"""


@pytest.mark.parametrize("name", sorted(CRASHED))
def test_tensorrt_crashes(tmp_path: Path, name: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT's own answer needs tensorrt-rtx")
    ir.save(parsed(BROKEN[name][0]), tmp_path / "model.onnx")
    done = subprocess.run([sys.executable, "-c", COMPILE, str(tmp_path / "model.onnx")], capture_output=True)
    assert done.returncode == -signal.SIGSEGV


def test_tensorrt_takes_the_cure_of_a_crash(compiled: Callable[[str], Plan]) -> None:
    model = parsed(SAME)
    LowerAttention(crashing=True)(model)
    assert lint(model, A100) == []
    assert [attention.fused for attention in compiled(ir.to_onnx_text(model)).attentions] == [True]


def test_tensorrts_parser_lacks_what_the_rules_say_it_lacks() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT's own answer needs tensorrt-rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    parser = trt.OnnxParser(builder.create_network(0), logger)
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    lacking = {name for name in standard if not parser.supports_operator(name)} - {"DeformConv"}
    assert lacking == (UNPARSED_OPERATORS | QUANTIZED_OPERATORS) & standard
    # an older onnx may not know the newest of them
    assert UNPARSED_OPERATORS - standard <= {"BitCast", "CumProd", "SwiGLU"}


def test_onnx_means_uint8_without_a_zero_point(run: Callable[..., npt.NDArray[np.float32]]) -> None:
    x = np.full((1, 4), -1, np.float32)
    assert run(parsed(SOUND), x=x).tolist() != [[np.float32(0.3), np.float32(-0.7)]]
    without = parsed(BROKEN["Q001 without a zero-point"][0])
    assert run(without, x=x).tolist() == [[np.float32(0.3), np.float32(-0.7)]]  # the bias: what is negative became 0


@pytest.mark.parametrize("name", ["Q010 axis", "Q010 blocks"])
def test_onnxruntime_refuses_an_opset_older_than_its_quantizers(
    run: Callable[..., npt.NDArray[np.float32]], name: str
) -> None:
    with pytest.raises(Exception, match="INVALID_GRAPH"):
        run(parsed(BROKEN[name][0]), x=np.zeros((1, 4), np.float32))


@pytest.mark.parametrize("name", ["Q011", "Q012"])
def test_blocks_beside_int8_lose_the_sum_of_each_block(compiled: Callable[[str], Plan], name: str) -> None:
    """The plan has one INT8 GEMM over all of K: the sums of the two blocks, with a scale each, are not told apart."""
    (gemm,) = (kernel for kernel in compiled(BROKEN[name][0]).kernels if kernel.kind in ("gemm", "fused-gemm"))
    assert gemm.operands == ("Int8", "Int8")


def test_float64_is_computed_in_float32(compiled: Callable[[str], Plan]) -> None:
    (kernel,) = compiled(BROKEN["G006"][0]).kernels
    assert (kernel.types, kernel.outputs) == (("Float",), ("Float",))


def test_a_constant_beyond_float16_becomes_infinite(run: Callable[..., npt.NDArray[np.float32]]) -> None:
    assert np.isneginf(run(parsed(OVERFLOW), x=np.zeros((1, 4), np.float16))[0, 0])


def test_a_parser_without_the_attention_operator_is_known_by_its_profile() -> None:
    orin = load_device("agx-orin")
    half = ATTENTION.replace("float", "float16")
    assert "no Attention operator" in orin.onnx.source
    assert (found_in(half, A100), found_in(half, orin)) == ([], ["A002 node"])


def test_a_sparse_initializer_is_a_value_that_nothing_gives() -> None:
    values = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [2], [1.0, 2.0])
    indices = onnx.helper.make_tensor("i", onnx.TensorProto.INT64, [2], [0, 3])
    proto = onnx.parser.parse_model(one_node("float", "y = MatMul(x, w)"))
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [4, 4]))
    (finding,) = lint(ir.from_proto(proto), A100)
    assert (finding.rule.id, finding.where) == ("G004", "node")


def test_looks_into_local_functions_and_leaves_the_model_as_it_is() -> None:
    text = """
        <ir_version: 11, opset_import: ["": 23, "local": 1]>
        g (float[N,4] x) => (float[N,4] y) <float s = {0.5}, int8 z = {0}> { [call] y = local.f(x, s, z) }
        <domain: "local", opset_import: ["": 23]>
        f (a, s, z) => (b) { q = QuantizeLinear(a, s, z) d = DequantizeLinear(q, s, z) [inner] b = Unique(d) }
    """
    model = ir.from_onnx_text(text)
    before = ir.to_proto(model)
    assert [finding.rule.id for finding in lint(model, A100)] == ["G002"]  # and the scale is no computed one
    assert ir.to_proto(model) == before


def test_for_onnxruntime_only_the_rules_of_onnx_hold() -> None:
    cpu = load_device("cpu")
    broken = {name: {f.split()[0] for f in found_in(text, cpu)} for name, (text, _) in BROKEN.items()}
    assert {name: found for name, found in broken.items() if found} == {
        "Q003 zero": {"Q003"},
        "Q003 negative": {"Q003"},
        "Q010 axis": {"Q010"},
        "Q010 blocks": {"Q010"},
    }


def test_rules_of_a_device_wait_for_one() -> None:
    for name in ("Q016 FP8", "A001"):
        assert found_in(BROKEN[name][0], None) == []


def test_reads_no_weight_of_a_model_with_external_data(tmp_path: Path) -> None:
    model = parsed(SOUND)
    big = model.graph.initializers["w"]
    big.const_value = ir.tensor(np.ones((4, 2), np.int8), name="w")
    half = ir.Value(name="table", const_value=ir.tensor(np.ones((600, 600), np.float32), name="table"))
    half.shape, half.dtype = ir.Shape((600, 600)), ir.DataType.FLOAT
    model.graph.register_initializer(half)
    cast = ir.node("Cast", [half], {"to": 10}, name="typed")
    model.graph.append(cast)
    ir.save(model, tmp_path / "model.onnx", external_data="model.data", size_threshold_bytes=0)
    loaded = ir.load(tmp_path / "model.onnx")
    assert lint(loaded, A100) == []
    tensors = {name: value.const_value for name, value in loaded.graph.initializers.items()}
    read = {
        name for name, tensor in tensors.items() if isinstance(tensor, ir.ExternalTensor) and tensor.raw is not None
    }
    assert read == {"s", "z", "ws", "wz"}
