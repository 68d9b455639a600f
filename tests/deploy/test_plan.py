from __future__ import annotations

import onnx_ir as ir
import pytest

from deploy.plan import read_plan
from profiles.errors import GpusqError

MODEL = """<ir_version: 10, opset_import: ["": 21]>
g (float16[batch, 64] x) => (float16[batch, 64] z)
<int8[64, 64] w, int8[64, 64] v, float16 s, int8 zero> {
    [proj_dq] a = DequantizeLinear(w, s, zero)
    [proj] y = MatMul(x, a)
    [soft] p = Softmax(y)
    [values] q = MatMul(p, y)
    [fc_dq] b = DequantizeLinear(v, s, zero)
    [fc] z = MatMul(q, b)
}"""


def tensor(datatype: str) -> str:
    shape = "Dimensions: [-1,64], Strides: [64,1]"
    return f"{{ Name: {datatype}, {shape}, Datatype: {datatype}, Format: (Linear) Row major }}"


def layer(name: str, kind: str, inputs: list[str], constants: list[str], nodes: list[str]) -> str:
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {', '.join(map(tensor, inputs))}], "
        f"Constants: [ {', '.join(map(tensor, constants))}], Outputs: [ {tensor('Half')}], "
        f"TacticName: stub, StreamId: 0, Metadata: {''.join(f'[ONNX Layer: {node}]' for node in nodes)}"
    )


LOG = [
    "Layers: an earlier listing",
    "Total Weights Memory: 8192 bytes",
    "Max Scratch Memory: 512 bytes",
    "\n".join(
        [
            "Layers:",
            layer("__shapes", "shape_call", [], [], []),
            layer("__quantize", "kgen", ["Half"], ["Float"], ["proj"]),
            layer("proj_gemm", "gemm", ["Int8"], ["Int8", "Float"], ["proj", "proj_dq"]),
            layer("_gemm_mha_v2_0", "kgen", ["Half", "Half", "Half"], [], ["soft"]),
            layer("__fused", "runtime_fusion", ["Half"], ["Int8"], ["fc", "fc_dq"]),
            layer("__conv", "correlation", ["Int8"], ["Int8"], ["elsewhere"]),
            layer("__signal", "signal", [], [], []),
            "I/O Tensors:",
        ]
    ),
]


@pytest.fixture
def model() -> ir.Model:
    model = ir.from_onnx_text(MODEL)
    for node in model.graph:
        if node.name in ("proj", "soft", "fc"):
            node.metadata_props["gpusq.module"] = f"blocks.0.{node.name}"
    for name in ("w", "v"):
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor([[0] * 64] * 64, dtype=ir.DataType.INT8, name=name)
        model.graph.inputs.remove(value) if value.is_graph_input() else None
        model.graph.register_initializer(value)
    return model


def test_reads_kinds_types_and_modules_of_the_kernels(model: ir.Model) -> None:
    plan = read_plan(LOG, model, source="a log", target="SM80")
    assert [(kernel.kind, kernel.types[:2], kernel.modules) for kernel in plan.kernels] == [
        ("pointwise", ("Half", "Float"), ("blocks.0.proj",)),
        ("gemm", ("Int8", "Int8"), ("blocks.0.proj",)),
        ("attention", ("Half", "Half"), ("blocks.0.soft",)),
        ("fused-gemm", ("Half", "Int8"), ("blocks.0.fc",)),
        ("convolution", ("Int8", "Int8"), ()),
    ]


def test_counts_gemms_by_type_and_does_not_call_a_weight_only_gemm_int8(model: ir.Model) -> None:
    plan = read_plan(LOG, model, source="a log", target="SM80")
    assert plan.gemms_by_type == {"Int8": 1, "Half×Int8": 1}
    assert plan.convolutions_by_type == {"Int8": 1}
    assert (plan.linear_gemms, plan.linear_gemms_int8) == (2, 1)


def test_finds_attention_memory_and_kernels_per_block(model: ir.Model) -> None:
    plan = read_plan(LOG, model, source="a log", target="SM80")
    assert [(attention.module, attention.fused) for attention in plan.attentions] == [("blocks.0.soft", True)]
    assert plan.kernels_per_block == {"blocks.0": 4}
    assert (plan.weights_bytes, plan.scratch_bytes) == (8192, 512)


def test_says_that_an_attention_was_not_fused(model: ir.Model) -> None:
    unfused = [message.replace("_gemm_mha_v2_0", "__softmax") for message in LOG]
    assert [a.fused for a in read_plan(unfused, model, source="a log", target="SM80").attentions] == [False]


def of_second_profile(line: str) -> str:
    """The same kernel as the compiler lists it for the second optimization profile."""
    return line.replace(", LayerType", " [profile 1]_myl1_0, LayerType", 1)


def test_of_two_profiles_the_kernels_are_the_firsts_and_a_layer_is_what_it_is_in_both(model: ir.Model) -> None:
    listing = LOG[-1].splitlines()[1:-1]
    alone = read_plan(LOG, model, source="a log", target="SM80")
    for worse in (("Datatype: Int8", "Datatype: Half"), ("_gemm_mha_v2_0", "__softmax")):
        second = [of_second_profile(line.replace(*worse)) for line in listing]
        log = [*LOG[:-1], "\n".join(["Layers:", *listing, *second])]
        plan = read_plan(log, model, source="a log", target="SM80")
        assert plan.kernels == alone.kernels
        proj, fc = (layer.compiled for layer in plan.layers)
        assert (proj, fc) == ((("Half", "Half") if "Int8" in worse[0] else ("Int8", "Int8")), fc)
        assert [attention.fused for attention in plan.attentions] == ["Int8" in worse[0]]
    same = [*LOG[:-1], "\n".join(["Layers:", *listing, *map(of_second_profile, listing)])]
    assert read_plan(same, model, source="a log", target="SM80") == alone


def test_refuses_a_log_without_a_layer_list(model: ir.Model) -> None:
    with pytest.raises(GpusqError, match="no layer list"):
        read_plan(["nothing"], model, source="a log", target="SM80")


def test_counts_the_convolutions_of_the_graph() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["": 21]>
        g (float[batch, 4, 8, 8] x) => (float[batch, 4, 8, 8] z) <float[4, 4, 1, 1] w> {
            [first] y = Conv(x, w)
            [second] z = Conv(y, w)
        }""")
    log = ["\n".join(["Layers:", layer("a", "correlation", ["Int8"], ["Int8"], ["first"])])]
    plan = read_plan(log, model, source="a log", target="SM80")
    assert (plan.convolutions, plan.convolutions_int8) == (1, 1)


def test_a_window_transformers_block_is_inside_its_stage(model: ir.Model) -> None:
    next(node for node in model.graph if node.name == "fc").metadata_props["gpusq.module"] = "layers.2.blocks.5.mlp"
    plan = read_plan(LOG, model, source="a log", target="SM80")
    assert plan.kernels_per_block == {"blocks.0": 3, "layers.2.blocks.5": 1}


def test_tells_two_attentions_of_one_module_apart(model: ir.Model) -> None:
    soft = next(node for node in model.graph if node.name == "soft")
    soft.metadata_props["gpusq.module"] = "attn"
    again = ir.node("Softmax", [soft.inputs[0]], name="again", metadata_props={"gpusq.module": "attn"})
    model.graph.insert_after(soft, [again, ir.node("MatMul", [again.outputs[0], soft.inputs[0]], name="product")])
    attentions = read_plan(LOG, model, source="a log", target="SM80").attentions
    assert [(a.module, a.node, a.fused) for a in attentions] == [("attn", "soft", True), ("attn", "again", False)]


def sized(log: list[str]) -> list[str]:
    """The same log for a batch of 2."""
    return [message.replace("[-1,", "[2,") for message in log]


def test_bytes_of_an_open_size_come_from_the_other_compilation(model: ir.Model) -> None:
    open_ = read_plan(LOG, model, source="a log", target="SM80")
    assert (open_.bytes_moved, {kernel.bytes_in for kernel in open_.kernels}) == (None, {None})
    shapes = {"x": (2, 64)}
    plan = read_plan(LOG, model, source="a log", target="SM80", sized=sized(LOG), sizes=shapes)
    assert plan.sizes == shapes
    float16 = 2 * 64 * 2  # the stub calls every tensor of a type by one name, and a name counts once
    assert [(kernel.bytes_in, kernel.bytes_out) for kernel in plan.kernels] == [
        (float16 + 2 * float16, float16),
        (float16 // 2 + 2 * float16, float16),
        (float16, float16),
        (float16 + float16 // 2, float16),
        (float16 // 2, float16),
    ]
    assert plan.bytes_moved == sum((k.bytes_in or 0) + (k.bytes_out or 0) for k in plan.kernels)


def test_a_kernel_that_the_other_compilation_has_not_has_no_bytes_and_the_sum_is_the_others(model: ir.Model) -> None:
    other = [
        message.replace("Name: __quantize, LayerType: kgen", "Name: q, LayerType: signal") for message in sized(LOG)
    ]
    plan = read_plan(LOG, model, source="a log", target="SM80", sized=other)
    assert [kernel.bytes_in is None for kernel in plan.kernels] == [True, False, False, False, False]
    assert plan.bytes_moved is not None
