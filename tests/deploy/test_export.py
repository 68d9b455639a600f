from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn.utils import prune

from deploy.cli import main
from deploy.export import export
from deploy.onnxruntime_api import open_session
from exporters.checkpoint import LoadOptions
from exporters.signature import Input
from profiles.errors import GpusqError
from students.fashion_vit.sample import student_path

X = Input("x", (1, 3, 8))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.functional.gelu(self.fc(self.norm(x)))
        return y


@pytest.fixture
def users_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The spec of a factory of the user's own, whose network is `Net`."""
    source = Path(__file__).read_text(encoding="utf-8")
    body = source[source.index("class Net(") : source.index("@pytest.fixture")]
    (tmp_path / "users_net.py").write_text(f"from torch import Tensor, nn\n\n\n{body}")
    monkeypatch.syspath_prepend(tmp_path)
    return "users_net:Net"


def test_a_pruned_state_dict_becomes_a_graph_with_exact_zeros(tmp_path: Path, users_net: str) -> None:
    net = Net().eval()
    prune.l1_unstructured(net.fc, "weight", amount=0.5)  # type: ignore[no-untyped-call]
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, tmp_path / "pruned.bin")
    done = export(tmp_path / "pruned.bin", tmp_path / "net.onnx", LoadOptions(users_net, (X,), ("x:0",)))
    assert (done.kind, done.way, done.failed) == ("torch.save file", "torch.export", ())
    assert any("mask of fc.weight folded" in note for note in done.notes)
    assert [(tensor.name, tensor.shape) for tensor in done.inputs] == [("x", ("batch", 3, 8))]
    held = {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(done.files[0]).graph.initializer}
    assert np.count_nonzero(held["fc.weight"] == 0) == 16
    x = np.random.default_rng(0).standard_normal((5, 3, 8), np.float32)
    with torch.inference_mode():
        expected = net(torch.from_numpy(x)).numpy()
    assert np.abs(open_session(done.files[0]).run(None, {"x": x})[0] - expected).max() <= 1e-6


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, result.output


def test_the_hint_about_dynamic_activations_names_the_option_that_cures_it(tmp_path: Path, users_net: str) -> None:
    net = Net()
    state = net.state_dict() | {"fc.weight": torch.ones(4, 8, dtype=torch.int8), "fc.weight_scale": torch.ones(4, 1)}
    torch.save(state, tmp_path / "net.pth")
    activations = {"num_bits": 8, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": {"num_bits": 8}, "input_activations": activations}
    config = {"quant_method": "compressed-tensors", "config_groups": {"all": group}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    command = ["export", str(tmp_path / "net.pth"), "--model", users_net, "--input", "x=1x3x8", "-o"]
    code, said = run(*command, str(tmp_path / "net.onnx"))
    assert (code, "--drop-dynamic" in said) == (1, True)
    code, said = run(*command, str(tmp_path / "net.onnx"), "--drop-dynamic")
    assert code == 0
    assert "they stay float" in said
    assert [node.op_type for node in ir.load(tmp_path / "net.onnx").graph if "Linear" in node.op_type] == [
        "DequantizeLinear"
    ]


def test_bits_tell_the_width_of_packed_weights_that_nothing_else_tells(tmp_path: Path, users_net: str) -> None:
    net = Net()
    packed = torch.full((4, 1), 0x11111111, dtype=torch.int32)
    state = {name: tensor for name, tensor in net.state_dict().items() if name != "fc.weight"} | {
        "fc.weight_packed": packed, "fc.weight_shape": torch.tensor([4, 8]), "fc.weight_scale": torch.ones(4, 1) / 8
    }  # fmt: skip
    torch.save(state, tmp_path / "net.pth")
    code, said = run("inspect", str(tmp_path / "net.pth"))
    assert (code, "say --bits 1 or 2 or 3 or 4" in said) == (1, True)
    code, said = run("inspect", str(tmp_path / "net.pth"), "--bits", "4", "--json")
    (weight,) = [weight for weight in json.loads(said)["weights"] if weight["name"] == "fc.weight"]
    assert (code, weight["bits"], weight["scales"]) == (0, 4, "channel")
    options = LoadOptions(users_net, (X,), bits=4)
    model = ir.load(export(tmp_path / "net.pth", tmp_path / "net.onnx", options).files[0])
    (dequantize,) = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    held = None if dequantize.inputs[0] is None else dequantize.inputs[0].const_value
    assert held is not None
    assert held.dtype == ir.DataType.INT4
    assert (held.numpy().astype(int) == 1 - 8).all()  # stored is the integer plus 8


def test_a_whole_model_takes_no_bits(tmp_path: Path) -> None:
    first = export(student_path(), tmp_path / "net.onnx").files[0]
    with pytest.raises(GpusqError, match="names its own inputs, axes and bits"):
        export(first, tmp_path / "again.onnx", LoadOptions(bits=4))


def test_axes_are_fixed_unless_they_are_asked_for(tmp_path: Path, users_net: str) -> None:
    torch.save(Net().state_dict(), tmp_path / "net.pth")
    done = export(tmp_path / "net.pth", tmp_path / "net.onnx", LoadOptions(users_net, (X,)))
    assert [tensor.shape for tensor in (*done.inputs, *done.outputs)] == [(1, 3, 8), (1, 3, 4)]


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_the_opset_is_the_one_that_was_asked_for(tmp_path: Path, users_net: str, opset: int) -> None:
    torch.save(Net().state_dict(), tmp_path / "net.pth")
    done = export(tmp_path / "net.pth", tmp_path / "net.onnx", LoadOptions(users_net, (X,)), opset=opset)
    model = ir.load(done.files[0])
    assert done.opset == model.opset_imports[""] == opset
    assert ("Gelu" in {node.op_type for node in model.graph}) == (opset >= 20)


def test_exporting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first.onnx", "second.onnx"):
        export(student_path(), tmp_path / name)
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()


def test_a_graph_goes_through_as_it_is_and_again(tmp_path: Path) -> None:
    first = export(student_path(), tmp_path / "first.onnx")
    again = export(tmp_path / "first.onnx", tmp_path / "second.onnx")
    assert (again.quantized, again.nodes, again.inputs) == (first.quantized, first.nodes, first.inputs)
    assert again.way == "the file itself"


def test_prints_what_the_python_api_returns(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["export", str(student_path()), "-o", str(tmp_path / "net.onnx"), "--json"])
    assert result.exit_code == 0
    printed: dict[str, Any] = json.loads(result.stdout)
    assert printed == json.loads(export(student_path(), tmp_path / "net.onnx").model_dump_json(by_alias=True))
    assert (printed["schema"], printed["quantized"], printed["kind"]) == (1, 26, "gpusq student file")


def test_says_what_it_took_the_file_for(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["export", str(student_path()), "-o", str(tmp_path / "net.onnx")])
    assert "a gpusq student file, by torch.export" in result.stdout
    assert "trained scales of 26 weights kept as Q/DQ" in result.stdout


def test_a_folder_is_no_place_for_the_file(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match="is a folder"):
        export(student_path(), tmp_path)


def test_an_older_file_stays_whole_when_the_export_fails(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"older")
    (tmp_path / "broken.pth").write_bytes(b"")
    with pytest.raises(GpusqError):
        export(tmp_path / "broken.pth", tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.pth", "net.onnx"]
