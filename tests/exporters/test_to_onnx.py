from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from exporters.linears import array_of
from exporters.module_names import MODULE_KEY
from exporters.signature import Input
from exporters.student_file import StudentFile
from exporters.to_onnx import to_onnx
from exporters.torch_student import build_module
from profiles.errors import GpusqError


class AppliedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        applied: Tensor = self.fc(torch.relu(self.fc(x)))
        return applied


class AlsoReadAsItIs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.fc(x) @ self.fc.weight
        return product


class DependsOnItsData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class NeedsTwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


X = Input("x", (2, 2, 4), dynamic={0: "batch"})


def linear_weights(model: ir.Model) -> dict[str, str]:
    """The name of each linear node → the name of its weight."""
    nodes = [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]
    return {node.name or "": value.name or "" for node in nodes if (value := node.inputs[1])}


def test_names_every_linear_and_its_weight_after_the_module(
    exported_student: ir.Model, student_file: StudentFile
) -> None:
    weights = linear_weights(exported_student)
    assert weights["blocks.0.attn.qkv/MatMul"] == "blocks.0.attn.qkv.weight"
    assert set(weights.values()) == {f"{module}.weight" for module in student_file.weight_scales}


def test_stores_a_matmul_weight_transposed_under_its_name(
    exported_student: ir.Model, student_file: StudentFile
) -> None:
    module = build_module(student_file)
    stored = array_of(exported_student.graph.initializers["blocks.1.mlp.fc1.weight"])
    assert np.array_equal(stored, module.get_parameter("blocks.1.mlp.fc1.weight").detach().numpy().T)


def test_node_and_tensor_names_are_unique_and_carry_the_module(exported_student: ir.Model) -> None:
    nodes = list(exported_student.graph)
    assert len({node.name for node in nodes}) == len(nodes)
    for node in nodes:
        module = node.metadata_props.get(MODULE_KEY, "")
        assert (node.name or "").startswith(f"{module}/{node.op_type}" if module else node.op_type)
        assert node.outputs[0].name in (f"{node.name}:0", "logits")


@pytest.mark.parametrize(("op_type", "count"), [("LayerNormalization", 5), ("Gelu", 2), ("Attention", 2)])
def test_keeps_it_as_a_single_operator(exported_student: ir.Model, op_type: str, count: int) -> None:
    assert sum(node.op_type == op_type for node in exported_student.graph) == count


def test_leaves_nothing_of_the_exporter_and_its_machine(exported_student: ir.Model) -> None:
    content = ir.to_proto(exported_student).SerializeToString()
    here = [str(Path(__file__).parents[2]), str(Path(torch.__file__).parents[1]), str(Path.home())]
    assert not [trace for trace in ("pkg.torch", ".py", *here) if trace.encode() in content]


def test_names_its_producer_and_not_the_version_of_torch(exported_student: ir.Model) -> None:
    assert (exported_student.producer_name, exported_student.producer_version) == ("gpusq", None)
    assert exported_student.graph.name == "student"


def test_batch_is_the_only_dynamic_axis(exported_student: ir.Model) -> None:
    (image,), (logits,) = exported_student.graph.inputs, exported_student.graph.outputs
    assert (image.name, str(image.shape), image.dtype) == ("image", "[batch,1,28,28]", ir.DataType.FLOAT)
    assert (logits.name, str(logits.shape), logits.dtype) == ("logits", "[batch,10]", ir.DataType.FLOAT)


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_as_torch_does_for_any_batch(
    exported_student: ir.Model,
    student_file: StudentFile,
    run: Callable[..., npt.NDArray[np.float32]],
    batch: int,
) -> None:
    image = np.random.default_rng(0).standard_normal((batch, 1, 28, 28), np.float32)
    with torch.inference_mode():
        expected = build_module(student_file)(torch.from_numpy(image)).numpy()
    assert np.abs(run(exported_student, image=image) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_does_not_rename_a_weight_that_two_nodes_share() -> None:
    first, second = linear_weights(to_onnx(AppliedTwice(), (X,), ["y"]).model).values()
    assert first == second != "fc.weight"


def test_does_not_rename_onto_a_weight_that_is_also_read_untransposed() -> None:
    weights = linear_weights(to_onnx(AlsoReadAsItIs(), (X,), ["y"]).model)
    assert weights["MatMul"] == "fc.weight"
    assert weights["fc/MatMul"] != "fc.weight"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (DependsOnItsData(), "Could not guard on data-dependent expression"),
        (NeedsTwoInputs(), "missing a required argument: 'y'"),
    ],
)
def test_a_module_that_torch_cannot_export_is_an_error_in_torchs_words(module: nn.Module, reason: str) -> None:
    with pytest.raises(GpusqError, match="torch could not export the model: ") as caught:
        to_onnx(module, (X,), ["y"])
    assert reason in caught.value.message
    assert "traceable by torch.export" in caught.value.hint
