from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from exporters.fake_quantize import attach
from exporters.linears import array_of
from exporters.program import load_program
from exporters.quantized_modules.plain_program import plain_program
from exporters.quantizer import Place
from exporters.signature import Input
from exporters.to_onnx import to_onnx
from profiles.errors import GpusqError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torchao.quantization.pt2e as pt2e
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

BATCH = ({0: torch.export.Dim.DYNAMIC},)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Linear(8 * 16, 16), nn.ReLU())
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(16, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(image)))
        logits: Tensor = self.head(self.drop(self.body(nn.functional.max_pool2d(x, 2).flatten(1))))
        return logits


class Symmetric(Quantizer):  # type: ignore[misc]
    """int8 around 0 for the inputs and the weights of every layer."""

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        act = self.spec(pt2e.MovingAverageMinMaxObserver, -128, qscheme=torch.per_tensor_symmetric)
        weight = self.spec(
            pt2e.MovingAveragePerChannelMinMaxObserver, -127, qscheme=torch.per_channel_symmetric, ch_axis=0
        )
        for node in model.graph.nodes:
            if node.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default):
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    {node.args[0]: act, node.args[1]: weight}, None, _annotated=True
                )
        return model

    def validate(self, model: torch.fx.GraphModule) -> None:
        pass

    def spec(self, observer: Any, low: int, **options: Any) -> Any:
        fake = pt2e.FakeQuantize.with_args(observer=observer)
        return QuantizationSpec(
            dtype=torch.int8, quant_min=low, quant_max=127, observer_or_fake_quant_ctr=fake, **options
        )


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    return patterns[labels] + 0.5 * torch.randn(count, 1, 8, 8, generator=generator), labels


def trained(quantizer: Any, *, evaluate: bool = True) -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    example = (torch.randn(4, 1, 8, 8),)
    module = torch.export.export(Net().train(), example, dynamic_shapes=BATCH).module()
    prepared = prepare_qat_pt2e(module, quantizer)
    optimizer = torch.optim.Adam(prepared.parameters(), 3e-3)
    for step in range(40):
        x, labels = images(32, 100 + step)
        optimizer.zero_grad()
        loss: Any = nn.functional.cross_entropy(prepared(x), labels)
        loss.backward()
        optimizer.step()
    converted = convert_pt2e(prepared)
    if evaluate:
        pt2e.move_exported_model_to_eval(converted)
    return torch.export.export(converted, example, dynamic_shapes=BATCH)


@pytest.fixture(scope="module")
def symmetric(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.export.ExportedProgram]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = trained(Symmetric())
        path = tmp_path_factory.mktemp("pt2") / "student.pt2"
        torch.export.save(program, path)
    return path, program


@pytest.fixture(scope="module")
def saved_float(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "float.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Net().eval(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=BATCH)
        torch.export.save(program, path)
    return path


def test_reads_the_inputs_with_their_dynamic_axes(symmetric: tuple[Path, Any]) -> None:
    assert load_program(symmetric[0]).inputs == (Input("image", (4, 1, 8, 8), "float32", {0: "batch"}),)


def test_a_converted_program_computes_as_torch_does_with_its_very_scales(
    symmetric: tuple[Path, torch.export.ExportedProgram], run: Callable[..., npt.NDArray[np.float32]]
) -> None:
    path, original = symmetric
    inputs, _ = images(256, 1)
    with torch.no_grad():
        expected = original.module()(inputs).numpy()
    loaded = load_program(path)
    found = plain_program(loaded.program)
    attach(found.module, found.quantizers)
    with torch.no_grad():
        attached = found.module(inputs).numpy()
    model = to_onnx(found.module, loaded.inputs, ["logits"], opset=19).model
    answered = run(model, image=inputs.numpy())
    assert np.abs(attached - expected).max() <= 1e-5
    assert (answered.argmax(1) == expected.argmax(1)).all()
    assert scales_of(model) == program_scales(original)
    # onnxruntime adds in another order, so that a tie may fall to the other side: one step of the quantized tensor.
    seen: list[Tensor] = []
    found.module.get_submodule("head.input").register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        found.module(inputs)
    model.graph.outputs[0] = head_input(model)
    step = float(found.quantizers[Place("head.input", "output")].scale)
    moved = np.abs(run(model, image=inputs.numpy()) - seen[0].numpy()) / step
    assert moved.max() <= 1.001
    assert (moved > 0.5).mean() <= 0.01


def test_layers_and_quantizers_carry_the_names_of_the_modules(symmetric: tuple[Path, Any]) -> None:
    loaded = load_program(symmetric[0])
    found = plain_program(loaded.program)
    attach(found.module, found.quantizers)
    graph = to_onnx(found.module, loaded.inputs, ["logits"]).model.graph
    names = {node.name for node in graph}
    assert {"conv/Conv", "body.0/Gemm", "head/Gemm"} <= names
    assert {"conv.weight_int8", "body.0.weight_int8", "head.weight_int8"} <= set(graph.initializers)


def test_a_float_program_keeps_its_names_and_numbers(
    saved_float: Path, run: Callable[..., npt.NDArray[np.float32]]
) -> None:
    loaded = load_program(saved_float)
    found = plain_program(loaded.program)
    assert not found.quantizers
    inputs, _ = images(8, 2)
    with torch.no_grad():
        expected = found.module(inputs).numpy()
    model = to_onnx(found.module, loaded.inputs, ["logits"]).model
    assert {"body.0/Gemm", "body.1/Relu", "head/Gemm"} <= {node.name for node in model.graph}
    assert np.abs(run(model, image=inputs.numpy()) - expected).max() <= 1e-5


def test_loads_modules_without_a_name_of_their_own(tmp_path: Path) -> None:
    """In nn.Sequential, modules and weights are called 0 and 0.weight."""
    module, example = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), (torch.randn(2, 4),)
    torch.export.save(torch.export.export(module, example), tmp_path / "sequential.pt2")
    with torch.no_grad():
        assert torch.equal(load_program(tmp_path / "sequential.pt2").program.module()(*example), module(*example))


def test_refuses_the_affine_activations_of_the_x86_quantizer() -> None:
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    with pytest.raises(GpusqError, match=r"'conv\.input\.output' is quantized asymmetrically") as caught:
        plain_program(trained(quantizer))
    assert "torch.per_tensor_symmetric" in caught.value.hint


def test_dynamic_activations_are_refused_and_left_out_only_when_asked() -> None:
    config = x86.get_default_x86_inductor_quantization_config(is_dynamic=True)
    module, example = nn.Sequential(nn.Linear(8, 4), nn.ReLU()).eval(), (torch.randn(2, 8),)
    prepared = prepare_pt2e(
        torch.export.export(module, example).module(), x86.X86InductorQuantizer().set_global(config)
    )
    prepared(*example)
    program = torch.export.export(convert_pt2e(prepared), example)
    with pytest.raises(
        GpusqError, match=r"'0\.input' is quantized dynamically \(quantized_decomposed\.choose_q"
    ) as caught:
        plain_program(program)
    assert "--drop-dynamic" in caught.value.hint
    found = plain_program(program, drop_dynamic=True)
    assert list(found.quantizers) == [Place("0", "weight")]
    assert found.notes == (
        "0.input stays float: its dynamic quantization (quantized_decomposed.choose_qparams) was dropped",
    )
    weight = found.module.get_parameter("0.weight")
    with torch.no_grad():
        expected = torch.relu(nn.functional.linear(example[0], weight, module.get_parameter("0.bias")))
        assert torch.equal(found.module(*example), expected)


def test_refuses_a_program_that_was_exported_in_training_mode() -> None:
    with pytest.raises(GpusqError, match="was exported in training mode") as caught:
        plain_program(trained(Symmetric(), evaluate=False))
    assert "move_exported_model_to_eval" in caught.value.hint


# --- archives that would run code ---


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def rewritten(source: Path, target: Path, edit: Callable[[str, bytes], bytes], extra: dict[str, bytes]) -> Path:
    """A copy of the archive with other contents."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            copy.writestr(name, edit(name, archive.read(name)))
        root = archive.namelist()[0].partition("/")[0]
        for name, content in extra.items():
            copy.writestr(f"{root}/{name}", content)
    return target


def replace(old: str, new: str) -> Callable[[str, bytes], bytes]:
    def edit(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        changed = content.replace(old.encode(), new.encode())
        assert changed != content
        return changed

    return edit


def no_edit(name: str, content: bytes) -> bytes:
    return content


@pytest.mark.parametrize("code", ["__import__('pathlib').Path(MARK).touch()", "s77.__class__", "9**9**9**9", "exit()"])
def test_refuses_an_expression_that_is_code(saved_float: Path, tmp_path: Path, code: str) -> None:
    mark = tmp_path / "mark"
    tree = json.loads(zipfile.ZipFile(saved_float).read("float/models/model.json"))
    expression = find(tree, "expr_str")
    new = code.replace("MARK", repr(str(mark)))
    edit = replace(json.dumps(expression), json.dumps(new))
    with pytest.raises(GpusqError, match="is no expression of dynamic shapes"):
        load_program(rewritten(saved_float, tmp_path / "bad.pt2", edit, {}))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"image"', "\"image=__import__('os').getcwd()\"", "is no name"),
        ("torch.ops.aten.relu.default", "torch.hub.load", "'torch.hub.load' is no operator"),
        ("torch.ops.aten.relu.default", "torch.ops.load_library.a.b", "is no operator"),
    ],
)
def test_refuses_names_and_operators_that_are_code(
    saved_float: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    with pytest.raises(GpusqError, match=message):
        load_program(rewritten(saved_float, tmp_path / "bad.pt2", replace(old, new), {}))


def test_never_unpickles_example_inputs_with_code(saved_float: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    buffer = io.BytesIO()
    torch.save((Touch(mark),), buffer)

    def edit(name: str, content: bytes) -> bytes:
        return buffer.getvalue() if "sample_inputs" in name else content

    with pytest.raises(GpusqError, match="torch could not load"):
        load_program(rewritten(saved_float, tmp_path / "bad.pt2", edit, {}))
    assert not mark.exists()


@pytest.mark.parametrize("entry", ["data/constants/custom_obj_0", "data/aotinductor/model/a.so", "data/other"])
def test_refuses_entries_that_are_no_tensor(saved_float: Path, tmp_path: Path, entry: str) -> None:
    bad = rewritten(saved_float, tmp_path / "bad.pt2", no_edit, {entry: pickle.dumps(Touch(tmp_path / "mark"))})
    with pytest.raises(GpusqError, match="which is no tensor and no graph") as caught:
        load_program(bad)
    assert entry in caught.value.message


def test_refuses_a_truncated_file_and_a_missing_one(saved_float: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(saved_float.read_bytes()[:2000])
    with pytest.raises(GpusqError, match="is not a whole"):
        load_program(cut)
    with pytest.raises(GpusqError, match="no program file"):
        load_program(tmp_path / "none.pt2")


def find(tree: Any, key: str) -> Any:
    """The first value under `key`, wherever it is."""
    if isinstance(tree, dict):
        if key in tree:
            return tree[key]
        tree = list(tree.values())
    if isinstance(tree, list):
        return next((value for item in tree if (value := find(item, key)) is not None), None)
    return None


def head_input(model: ir.Model) -> ir.Value:
    """The dequantized tensor that the last layer reads."""
    (head,) = [node for node in model.graph if node.name == "head/Gemm"]
    value = head.inputs[0]
    assert value is not None
    assert value.name is not None
    return value


def scales_of(model: ir.Model) -> set[bytes]:
    nodes = [node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return {array_of(value).tobytes() for node in nodes if (value := node.inputs[1]) is not None}


def program_scales(program: torch.export.ExportedProgram) -> set[bytes]:
    """The scales in the arguments of the program's operators, and in its buffers."""
    found = {buffer.numpy().tobytes() for name, buffer in program.named_buffers() if name.startswith("_scale")}
    for node in program.graph.nodes:
        if "quantize_per_tensor" in str(node.target):
            found.add(np.float32(node.args[1]).tobytes())
            assert float(np.float32(node.args[1])) == node.args[1]
    return found
