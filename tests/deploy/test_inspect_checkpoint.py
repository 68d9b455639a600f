from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn.utils import prune

from deploy.cli import main
from deploy.inspect_checkpoint import CheckpointInspection, WeightInfo, inspect_checkpoint
from profiles.errors import GpusqError
from students.fashion_vit.sample import student_path

STATE = {"fc.weight": torch.arange(1.0, 33.0).reshape(4, 8), "fc.bias": torch.zeros(4)}


def the_weight(found: CheckpointInspection) -> WeightInfo:
    (weight,) = found.weights
    return weight


def saved(folder: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, folder / "net.pth")
    return folder / "net.pth"


def test_shows_the_students_scales_bits_and_2_4_weights() -> None:
    found = inspect_checkpoint(student_path())
    assert (found.kind, found.architecture) == (
        "gpusq student file, INT8 weights with their scales",
        "students.fashion_vit.model:fashion_vit",
    )
    assert (found.quantized, found.masked, found.parameters) == (26, 0, 457_642)
    weights = {weight.name: weight for weight in found.weights}
    qkv = weights["blocks.0.attn.qkv.weight"]
    assert (qkv.dtype, qkv.bits, qkv.scales, qkv.two_of_four) == ("int8", 8, "channel", True)
    assert qkv.input_scale is not None
    assert qkv.zeros >= 0.5
    assert not weights["head.weight"].two_of_four


def test_shows_a_mask_and_whose_it_was(tmp_path: Path) -> None:
    net = nn.ModuleDict({"fc": nn.Linear(8, 4)})
    prune.l1_unstructured(net["fc"], "weight", amount=0.25)  # type: ignore[no-untyped-call]
    found = inspect_checkpoint(saved(tmp_path, net.state_dict()))
    weight = the_weight(found)
    assert (weight.name, weight.zeros, weight.bits, weight.scales) == ("fc.weight", 0.25, None, "")
    assert weight.mask
    assert found.masked == 1


def test_shows_scales_by_name_with_no_model(tmp_path: Path) -> None:
    amax = {"fc.weight_quantizer._amax": torch.ones(4, 1) * 40, "fc.input_quantizer._amax": torch.tensor(12.7)}
    found = inspect_checkpoint(saved(tmp_path, STATE | amax))
    weight = the_weight(found)
    assert (weight.bits, weight.scales, found.quantized) == (8, "channel", 1)
    assert weight.input_scale == pytest.approx(float(np.float32(12.7) / np.float32(127)), rel=1e-7)


def test_tells_the_architecture_only_where_the_file_does(tmp_path: Path) -> None:
    assert inspect_checkpoint(saved(tmp_path, STATE)).architecture is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    assert inspect_checkpoint(tmp_path / "net.pth").architecture == "BertModel"


def test_a_program_is_shown_as_a_whole(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(8, 4).eval(), (torch.zeros(1, 8),))
    torch.export.save(program, tmp_path / "net.pt2")
    found = inspect_checkpoint(tmp_path / "net.pt2")
    assert (found.kind, found.parameters, found.weights) == ("torch.export program", 36, ())


def test_prints_a_line_for_each_weight_and_the_same_as_json(tmp_path: Path) -> None:
    path = saved(tmp_path, STATE)
    text = CliRunner().invoke(main, ["inspect", str(path)])
    assert text.exit_code == 0
    assert "architecture: not told by the file: name it with --model" in text.stdout
    assert [line.split() for line in text.stdout.splitlines() if line.startswith("fc.weight")] == [
        ["fc.weight", "4×8", "float32", "0.0", "%", "no"]
    ]
    printed: dict[str, Any] = json.loads(CliRunner().invoke(main, ["inspect", str(path), "--json"]).stdout)
    assert printed["schema"] == 1
    assert [weight["name"] for weight in printed["weights"]] == ["fc.weight"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match=r"no such file: .*nothing\.pt"):
        inspect_checkpoint(tmp_path / "nothing.pt")


@pytest.mark.filterwarnings("ignore::Warning")  # by torchao about itself
def test_tensors_of_torchao_are_counted_and_not_taken_for_plain_ones(tmp_path: Path) -> None:
    library: Any = importlib.import_module("torchao.quantization")
    net = nn.Sequential(nn.Linear(64, 32))
    library.quantize_(net, library.Int8WeightOnlyConfig())
    found = inspect_checkpoint(saved(tmp_path, net.state_dict()))
    assert (found.weights, found.parameters) == ((), 32)
    assert "1 tensors are torchao's own and not shown: its scales are taken with the model" in found.notes
