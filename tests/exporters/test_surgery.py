from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from deploy.manifest import Plan
from deploy.plan import read_plan
from deploy.tensorrt_api import build_engine
from exporters.linears import find_linears
from exporters.lint import lint
from exporters.module_names import MODULE_KEY
from exporters.passes.outcome import Pass
from exporters.passes.type_floats import IoTypes
from exporters.student_file import StudentFile
from exporters.surgery import Target, passes_for, surgery
from exporters.torch_student import fake_quant_module
from profiles.device import FloatType, load_device

DEVICES: dict[str, FloatType] = {"a100": "float16", "agx-orin": "float16", "cpu": "float32"}
TENSORRT = ("a100", "agx-orin")
CANONICAL = [
    "RaiseOpset",
    "FixShapes",
    "FoldConstants",
    "RemoveNoOps",
    "RepairQdq",
    "FoldBatchNorm",
    "FuseLayerNorm",
    "FuseRmsNorm",
    "FuseGelu",
    "FuseSilu",
    "LowerEinsum",
    "FuseAttention",
    "MergeProjections",
    "MergeGroupedProjections",
    "SelectEarly",
    "SelectQueries",
]


@pytest.fixture(scope="session")
def operated(quantized_student: ir.Model) -> dict[str, ir.Model]:
    models = {}
    for name, float_type in DEVICES.items():
        models[name] = quantized_student.clone()
        surgery(models[name], Target(load_device(name), float_type))
    return models


@pytest.fixture(scope="session")
def plans(operated: dict[str, ir.Model], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    pytest.importorskip("tensorrt_rtx", reason="compiling ahead of time needs tensorrt-rtx")
    return {name: compile_ahead(operated[name], name, tmp_path_factory.mktemp(name)) for name in TENSORRT}


def compile_ahead(model: ir.Model, device: str, folder: Path) -> Plan:
    ahead = load_device(device).ahead_of_time
    assert ahead is not None
    ir.save(model, folder / "model.onnx")
    built = build_engine(folder / "model.onnx", "tensorrt-rtx", compute_capability=ahead.compute_capability)
    return read_plan(built.log, model, source=built.runtime, target=ahead.compute_capability)


@pytest.mark.parametrize("device", TENSORRT)
def test_compiles_every_linear_to_an_int8_gemm(plans: dict[str, Plan], device: str) -> None:
    plan = plans[device]
    assert (plan.linear_gemms, plan.linear_gemms_int8) == (10, 10)
    assert plan.gemms_by_type.keys() == {"Int8"}


@pytest.mark.parametrize("device", TENSORRT)
def test_compiles_every_attention_to_one_kernel(plans: dict[str, Plan], device: str) -> None:
    attentions = plans[device].attentions
    assert [(a.module, a.fused) for a in attentions] == [("blocks.0.attn", True), ("blocks.1.attn", True)]


@pytest.mark.parametrize("device", TENSORRT)
def test_compiles_a_block_to_at_most_ten_kernels(plans: dict[str, Plan], device: str) -> None:
    kernels = plans[device].kernels_per_block
    assert kernels.keys() == {"blocks.0", "blocks.1"}
    assert max(kernels.values()) <= 10


@pytest.mark.parametrize("device", DEVICES)
def test_keeps_trained_scales_and_integers_bit_for_bit(
    operated: dict[str, ir.Model], student_file: StudentFile, device: str
) -> None:
    linears = {linear.module: linear for linear in find_linears(operated[device].graph)}
    assert linears.keys() == student_file.weight_scales.keys()
    for module, linear in linears.items():
        weight_scale, input_scale = linear.weight_scale, linear.input_scale
        assert weight_scale is not None
        assert weight_scale.dtype == np.dtype(DEVICES[device])
        assert weight_scale.astype(np.float32).tobytes() == student_file.weight_scales[module].tobytes()
        assert np.float32(input_scale).tobytes() == student_file.input_scales[module].tobytes()
        stored = linear.values if linear.k_axis == 1 else linear.values.T
        assert np.array_equal(stored, student_file.tensors[f"{module}.weight"])


@pytest.mark.parametrize("device", DEVICES)
def test_running_it_twice_changes_nothing(operated: dict[str, ir.Model], device: str) -> None:
    model = operated[device].clone()
    before = ir.to_proto(model)
    outcomes = surgery(model, Target(load_device(device), DEVICES[device]))
    assert [outcome.changed for outcome in outcomes] == [0] * len(outcomes)
    assert ir.to_proto(model) == before


@pytest.mark.parametrize("device", DEVICES)
def test_breaks_no_hard_rule(operated: dict[str, ir.Model], device: str) -> None:
    assert lint(operated[device]) == []


@pytest.mark.parametrize(("device", "opset"), [("a100", 23), ("agx-orin", 20), ("cpu", 23)])
def test_declares_the_opset_of_the_target(operated: dict[str, ir.Model], device: str, opset: int) -> None:
    assert operated[device].opset_imports == {"": opset}


@pytest.mark.parametrize("device", DEVICES)
def test_keeps_names_modules_and_the_dynamic_batch(
    operated: dict[str, ir.Model], quantized_student: ir.Model, device: str
) -> None:
    before, after = quantized_student.graph, operated[device].graph
    rewritten = set() if device == "cpu" else {"Attention", "Slice", "Squeeze"}
    modules = {node.name: node.metadata_props.get(MODULE_KEY) for node in after}
    for node in before:
        if node.op_type not in rewritten:
            assert modules[node.name] == node.metadata_props.get(MODULE_KEY)
    for old, new in zip((*before.inputs, *before.outputs), (*after.inputs, *after.outputs), strict=True):
        assert (new.name, new.dtype, new.shape) == (old.name, old.dtype, old.shape)


@pytest.mark.parametrize(("device", "tolerance"), [("cpu", 1e-4), ("a100", 0.02), ("agx-orin", 0.02)])
def test_answers_as_the_fake_quantized_student(
    operated: dict[str, ir.Model],
    student_file: StudentFile,
    run: Callable[..., npt.NDArray[np.float32]],
    device: str,
    tolerance: float,
) -> None:
    import torch

    image = np.random.default_rng(0).standard_normal((8, 1, 28, 28), np.float32)
    with torch.inference_mode():
        expected = fake_quant_module(student_file)(torch.from_numpy(image)).numpy()
    assert np.abs(run(operated[device], image=image) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(
    ("device", "float_type", "steps"),
    [
        (
            "a100",
            "float16",
            [
                *("LowerAttention", "ShareKeyHeads", "LowerAttention"),
                *("QuantizePools", "ShareConcatScales", "SplitPacked", "FoldConstants", "ClampMasks", "TypeFloats"),
            ],
        ),
        ("a100", "float32", ["LowerAttention", "QuantizePools", "ShareConcatScales", "SplitPacked", "FoldConstants"]),
        (
            "agx-orin",
            "float16",
            [
                *("LowerAttention", "LowerRmsNorm", "LowerRotary"),
                *("QuantizePools", "ShareConcatScales", "SplitPacked", "FoldConstants", "ClampMasks", "TypeFloats"),
            ],
        ),
        ("cpu", "float32", ["LowerAttention", "ShareKeyHeads", "ShareConcatScales", "SplitPacked", "FoldConstants"]),
    ],
)
def test_order_of_the_passes(device: str, float_type: FloatType, steps: list[str]) -> None:
    target = Target(load_device(device), float_type)
    assert names(passes_for(target)) == [*CANONICAL, *steps, "AnnotateSparsity", "SetOpset", "NameAxes"]


def test_quantizers_are_placed_on_repaired_float_weights_in_the_form_that_is_compiled() -> None:
    target = Target(load_device("a100"), "float16", "w8a8-mha", repair_sparsity=True)
    placing = ["LowerAttention", "RepairSparsity", "AbsorbBias", "PlaceQuantizers", "LowerFakeQuantize", "RepairQdq"]
    shaped = [
        *placing,
        "QuantizePools",
        "ShareConcatScales",
        "SplitPacked",
        "FoldConstants",
        "ClampMasks",
        "TypeFloats",
    ]
    assert names(passes_for(target)) == [*CANONICAL, *shaped, "AnnotateSparsity", "SetOpset", "NameAxes"]


def names(passes: Sequence[Pass]) -> list[str]:
    return [type(step).__name__ for step in passes]


@pytest.mark.parametrize(
    ("float_type", "io_types", "gemm"),
    [("float16", "keep", "Half"), ("float16", "graph", "Half"), ("bfloat16", "keep", "BFloat16")],
)
def test_every_type_compiles_to_its_gemms_with_fused_attention(
    exported_student: ir.Model, tmp_path: Path, float_type: FloatType, io_types: IoTypes, gemm: str
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="compiling ahead of time needs tensorrt-rtx")
    model = exported_student.clone()
    surgery(model, Target(load_device("a100"), float_type, io_types=io_types))
    plan = compile_ahead(model, "a100", tmp_path)
    assert plan.gemms_by_type.keys() == {gemm}
    assert all(attention.fused for attention in plan.attentions)
    assert len(plan.kernels) <= 23
