"""What engineers really bring: broken files, each refused in one line that names the place, with the cure."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from deploy.cli import main

ONNX_LINEAR = """
    <ir_version: 10, opset_import: ["": 21]>
    g (float[2,4] x) => (float[2,2] y)
    <float[4,2] w = {1, 2, 3, 4, 5, 6, 7, 8}>
    { [fc] y = MatMul(x, w) }
"""
ONNX_ASYMMETRIC = """
    <ir_version: 10, opset_import: ["": 21]>
    g (float[2,4] x) => (float[2,4] y)
    <float s = {0.1}, uint8 z = {3}>
    { [blocks_0_fc_q] q = QuantizeLinear(x, s, z) [dq] y = DequantizeLinear(q, s, z) }
"""
ONNX_CYCLE = """
    <ir_version: 10, opset_import: ["": 21]>
    g (float[2,4] x) => (float[2,4] y)
    { [first] a = Add(x, b) [second] b = Relu(a) [third] y = Relu(b) }
"""
ONNX_UNDEFINED = """
    <ir_version: 10, opset_import: ["": 21]>
    g (float[2,4] x) => (float[2,4] y)
    { [first] y = Add(x, nowhere) }
"""


class Net(nn.Module):
    """What `--model test_broken_checkpoints:net` builds."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)
        self.example_inputs = (torch.zeros(1, 8),)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y


class RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("it ran",)


def state(**more: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"fc.weight": torch.randn(4, 8), "fc.bias": torch.randn(4), **more}


def safetensors(path: Path) -> Path:
    save_file(state(), path / "net.safetensors")
    return path / "net.safetensors"


def zipped(path: Path) -> Path:
    torch.save(state(), path / "net.pth")
    return path / "net.pth"


def graph(path: Path, text: str = ONNX_LINEAR) -> Path:
    ir.save(ir.from_onnx_text(text), path / "net.onnx")
    return path / "net.onnx"


def program(path: Path) -> Path:
    torch.export.save(torch.export.export(Net().eval(), (torch.zeros(1, 8),)), path / "net.pt2")
    return path / "net.pt2"


def cut(write: Callable[[Path], Path], share: float = 0.6) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = write(folder)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        return path

    return make


def saved(make: Callable[[], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(make(), folder / "net.pth")
        return folder / "net.pth"

    return write


def text(content: str, name: str = "net.safetensors") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return write


def pickled(folder: Path) -> Path:
    (folder / "net.pkl").write_bytes(pickle.dumps(RunsCode()))
    return folder / "net.pkl"


def without_a_shard(folder: Path) -> Path:
    save_file({"fc.weight": state()["fc.weight"]}, folder / "model-1.safetensors")
    index = {"weight_map": {"fc.weight": "model-1.safetensors", "fc.bias": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json"


def without_external_data(folder: Path) -> Path:
    model = ir.from_onnx_text(ONNX_LINEAR)
    ir.save(model, folder / "net.onnx", external_data="net.data", size_threshold_bytes=0)
    (folder / "net.data").unlink()
    return folder / "net.onnx"


def outside_its_folder(folder: Path) -> Path:
    path = without_external_data(folder)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].external_data[0].value = "../../etc/passwd"
    path.write_bytes(proto.SerializeToString())
    return path


def too_old(folder: Path) -> Path:
    proto = onnx.load(graph(folder))
    proto.opset_import[0].version = 1
    (folder / "net.onnx").write_bytes(proto.SerializeToString())
    return folder / "net.onnx"


def misfitting_mask() -> dict[str, Tensor]:
    layer = Net()
    prune.l1_unstructured(layer.fc, "weight", amount=0.5)  # type: ignore[no-untyped-call]
    found: dict[str, Tensor] = layer.state_dict()
    found["fc.weight_mask"] = found["fc.weight_mask"][:, :4]
    return found


def mask_alone() -> dict[str, Tensor]:
    found = misfitting_mask()
    del found["fc.weight_orig"]
    return found


def amax(weight: Tensor, activation: Tensor) -> Callable[[], dict[str, Tensor]]:
    names = {"fc._weight_quantizer._amax": weight, "fc._input_quantizer._amax": activation}
    return lambda: state(**names)


@dataclass(frozen=True)
class Broken:
    """A broken checkpoint, what the error must name, and what the hint must say."""

    name: str
    make: Callable[[Path], Path]
    names: str
    cures: str
    model: str | None = "tests_net:Net"


ONE = torch.tensor(1.0)
BROKEN = (
    Broken("a truncated safetensors file", cut(safetensors), "net.safetensors", "again"),
    Broken("a truncated torch.save file", cut(zipped), "net.pth", "again"),
    Broken("a truncated program", cut(program), "net.pt2", "", model=None),
    Broken("a truncated ONNX file", cut(graph), "net.onnx", "again", model=None),
    Broken("an empty file", text(""), "empty", "again"),
    Broken(
        "a pointer of Git LFS", text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "LFS", "lfs pull"
    ),
    Broken("a web page", text("<!DOCTYPE html><html>not found</html>"), "web page", "fetch the file"),
    Broken("weights of no named architecture", zipped, "net.pth", "--model", model=None),
    Broken(
        "weights of another architecture", saved(lambda: {"conv.weight": torch.ones(1, 1, 1, 1)}), "fc.weight", "model"
    ),
    Broken(
        "an unknown architecture",
        zipped,
        "did you mean 'deit_small_patch16_224'",
        "",
        model="timm:deit_smal_patch16_224",
    ),
    Broken("a missing shard", without_a_shard, "model-2.safetensors", "same folder"),
    Broken(
        "weights that are NaN", saved(lambda: {**state(), "fc.bias": torch.full((4,), torch.nan)}), "fc.bias", "finite"
    ),
    Broken("a mask that does not fit", saved(misfitting_mask), "fc", "together"),
    Broken("a mask without its weight", saved(mask_alone), "fc", "together"),
    Broken("scales of the wrong shape", saved(amax(torch.ones(3, 1), ONE)), "fc", ""),
    Broken("negative scales", saved(amax(-torch.ones(4, 1), ONE)), "fc", "amax"),
    Broken("scales that are NaN", saved(amax(torch.ones(4, 1), torch.tensor(torch.nan))), "fc", ""),
    Broken("a pickle with code in it", pickled, "print", ""),
    Broken("a whole module in a pickle", saved(Net), "Net", "--trust-code"),
    Broken("an ONNX file without its external data", without_external_data, "net.data", "", model=None),
    Broken("external data outside of its folder", outside_its_folder, "passwd", "", model=None),
    Broken("a cyclic graph", lambda folder: graph(folder, ONNX_CYCLE), "first", "", model=None),
    Broken("an input that nothing makes", lambda folder: graph(folder, ONNX_UNDEFINED), "nowhere", "", model=None),
    Broken("an opset of the stone age", too_old, "opset", "", model=None),
    Broken(
        "asymmetric activations", lambda folder: graph(folder, ONNX_ASYMMETRIC), "blocks_0_fc_q", "ymmetric", model=None
    ),
)


@pytest.fixture(autouse=True)
def users_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's own, as `--model tests_net:Net` names it."""
    source = Path(__file__).read_text(encoding="utf-8")
    start = source.index("class Net(")
    body = source[start : source.index("class RunsCode")]
    (tmp_path / "tests_net.py").write_text(f"import torch\nfrom torch import Tensor, nn\n\n\n{body}")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: str(broken.name))
def test_is_refused_in_one_line_with_the_place_and_the_cure(broken: Broken, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    checkpoint = broken.make(folder)
    model = [] if broken.model is None else ["--model", broken.model]
    result = CliRunner().invoke(main, ["export", str(checkpoint), *model, "-o", str(tmp_path / "out" / "model.onnx")])
    assert (result.exit_code, result.stdout) == (1, "")
    error, hint, *more = result.stderr.splitlines()
    assert not more
    assert error.startswith("Error: ")
    assert broken.names in error + hint
    assert hint.startswith("Hint: ")
    assert broken.cures in hint
    assert not (tmp_path / "out").exists()


def test_the_same_files_whole_are_exported(tmp_path: Path) -> None:
    for write, model in ((safetensors, "tests_net:Net"), (zipped, "tests_net:Net"), (graph, None), (program, None)):
        checkpoint = write(tmp_path)
        given = [] if model is None else ["--model", model]
        result = CliRunner().invoke(main, ["export", str(checkpoint), *given, "-o", str(tmp_path / "out.onnx")])
        assert result.exit_code == 0, result.output
        exported = onnx.load(tmp_path / "out.onnx")
        onnx.checker.check_model(exported, full_check=True)
        (weight,) = (w for w in map(onnx.numpy_helper.to_array, exported.graph.initializer) if w.ndim == 2)
        assert np.isfinite(weight).all()
