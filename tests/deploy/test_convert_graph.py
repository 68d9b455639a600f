"""Models that somebody else made, as an ONNX file or a folder, through `gpusq convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn.utils import prune

from deploy.bundle import hash_checkpoint
from deploy.cli import main
from deploy.conversion import convert
from deploy.manifest import read_manifest
from deploy.progress import Progress
from deploy.report.verdicts import cards
from exporters.checkpoint import LoadOptions
from exporters.signature import Input
from profiles.errors import GpusqError

TOKENS = """
    <ir_version: 10, opset_import: ["": 20]>
    g (float[3,4,8] x) => (float[3,4,8] y)
    <float[8,8] w = {1,0,0,0,0,0,0,0, 0,2,0,0,0,0,0,0, 0,0,1,0,0,0,0,0, 0,0,0,3,0,0,0,0,
                     0,0,0,0,1,0,0,0, 0,0,0,0,0,1,0,0, 0,0,0,0,0,0,1,0, 0,0,0,0,0,0,0,1}>
    { [fc] y = MatMul(x, w) }
"""
QUANTIZED = """
    <ir_version: 10, opset_import: ["": 21]>
    g (float[N,8] x) => (float[N,8] y)
    <float s = {0.1}, int8 z = {0}>
    { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }
"""


class Told(Progress):
    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def found(self, stage: str, text: str) -> None:
        self.said.append((stage, text))


def written(folder: Path, text: str) -> Path:
    ir.save(ir.from_onnx_text(text), folder / "net.onnx")
    return folder / "net.onnx"


def test_a_graph_without_classes_and_with_a_fixed_batch_is_verified_by_its_values(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["convert", str(written(tmp_path, TOKENS)), "--profile", "cpu", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    assert "Accuracy: Output within" in result.stdout
    manifest = convert(tmp_path / "net.onnx", profiles=["cpu"], out=tmp_path / "out").bundles[0].manifest
    assert manifest.verified is not None
    assert (manifest.verified.agreement, manifest.verified.count) == (None, 64)
    assert manifest.verified.relative_difference is not None
    assert manifest.verified.relative_difference <= 1e-6
    assert manifest.measured is not None
    assert manifest.measured.batch == 3
    accuracy = next(card for card in cards(manifest) if card.title == "Accuracy")
    assert "the output has no classes: no accuracy was checked" in accuracy.lines


def test_a_quantized_graph_has_no_float_weights_to_go_back_to(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match="its float weights are not in it"):
        convert(written(tmp_path, QUANTIZED), profiles=["cpu"], out=tmp_path / "out", precision="fp32")
    assert not (tmp_path / "out").exists()


def test_int8_cannot_be_had_from_a_float_graph(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match="has layers without trained scales"):
        convert(written(tmp_path, TOKENS), profiles=["cpu"], out=tmp_path / "out", precision="int8")


@pytest.mark.filterwarnings("ignore::Warning")  # by transformers about others
def test_a_hugging_face_folder_is_converted_and_told_apart_by_the_hash_of_its_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    size: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **size)).save_pretrained(tmp_path / "vit")
    capfd.readouterr()
    options = LoadOptions(dynamic=("*:0",))
    source = convert(tmp_path / "vit", profiles=["cpu"], out=tmp_path / "out", options=options).bundles[0].manifest
    assert source.verified is not None
    assert source.verified.relative_difference is not None
    assert source.verified.relative_difference <= 1e-4
    assert source.student.file == "vit"
    assert "Loading weights" not in capfd.readouterr().err
    (tmp_path / "vit" / "README.md").write_text("another")
    assert hash_checkpoint(tmp_path / "vit") != source.student.sha256


class Pruned(nn.Module):
    """Seven masked layers, and a way through the length of the batch that torch.export does not find."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(7)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x if len(x) < 7 else x + 0)
        return y


def test_what_was_folded_and_how_it_was_exported_is_told_and_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Pruned().eval()
    for layer in net.layers:
        assert isinstance(layer, nn.Linear)
        prune.l1_unstructured(layer, "weight", amount=0.5)  # type: ignore[no-untyped-call]
    torch.save(net.state_dict(), tmp_path / "net.pth")
    progress = Told()
    options = LoadOptions(f"{__name__}:Pruned", (Input("x", (2, 8)),), ("x:0",))
    bundle = convert(tmp_path / "net.pth", profiles=["cpu"], out=tmp_path / "out", options=options, progress=progress)
    source = read_manifest(bundle.bundles[0].path).student
    assert source.kind == "torch.save file"
    masks = [note for note in source.notes if note.startswith("mask of layers.")]
    assert len(masks) == 7
    assert [text for stage, text in progress.said if stage == "checkpoint"][1:-1] == masks[:5]
    assert progress.said[6][1] == "and 2 more: all are in the report, and here with -v"
    (failed,) = source.failed
    assert ("export", f"not by {failed.way}: {failed.reason}") in progress.said
    report = (tmp_path / "out" / "cpu" / "report.md").read_text()
    for words in (f"not by {failed.way}", source.way, source.kind, *masks):
        assert words in report


def test_a_manifest_of_before_the_notes_still_reads(bundles: dict[str, Path], tmp_path: Path) -> None:
    manifest = json.loads((bundles["cpu"] / "manifest.json").read_text())
    for name in ("kind", "notes", "way", "failed"):
        del manifest["student"][name]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert read_manifest(tmp_path).student.notes == ()
