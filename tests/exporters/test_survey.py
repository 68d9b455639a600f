from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from tests.exporters.survey import Row, survey_pair, table
from tests.exporters.survey_pairs import PAIRS, Pair, dinov2_file, timm_dinov2

# By libraries about each other, and by torch's exporters about themselves.
pytestmark = pytest.mark.filterwarnings("ignore::Warning")


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, id=f"{pair.name}, {pair.kind}") for pair in PAIRS if not pair.slow],
)
def test_is_exported_clean_and_answers_as_pytorch_does(pair: Pair, tmp_path: Path) -> None:
    pair.save(tmp_path)
    row, model = survey_pair(pair, tmp_path)
    assert row.difference <= pair.bound
    assert row.agreement in (None, 1.0)
    assert not leftovers(model)
    assert not traces_of_this_machine(model)
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_the_real_weights_of_dinov2_mean_in_timm_what_they_mean_in_the_file_that_they_are_from() -> None:
    timm = importlib.import_module("timm")
    module = timm.create_model("vit_small_patch14_dinov2", img_size=224).eval()
    module.load_state_dict(timm_dinov2())
    proto, tokens = onnx.load(dinov2_file()), "/backbone/layernorm/Add_1_output_0"
    proto.graph.output.append(onnx.ValueInfoProto(name=tokens))
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = onnxruntime.InferenceSession(proto.SerializeToString()).run([tokens], {"input_image": x.numpy()})
    with torch.inference_mode():
        answered = module.forward_features(x).numpy()
    assert np.abs(answered - expected).max() <= 1e-4 * np.abs(expected).max()


def leftovers(model: ir.Model) -> list[str]:
    """Nodes of training or of export, parts of what is written out, and nodes that nothing reads."""
    unwanted = {"Dropout", "Identity", "Erf", "Constant"}
    dead = [node.name for node in model.graph if not any(out.uses() or out.is_graph_output() for out in node.outputs)]
    return [node.name or "" for node in model.graph if node.op_type in unwanted] + [name or "" for name in dead]


def traces_of_this_machine(model: ir.Model) -> list[str]:
    """Paths and source lines in the graph; its weights are random bytes, which may spell anything."""
    proto = ir.to_proto(model)
    for initializer in proto.graph.initializer:
        initializer.ClearField("raw_data")
    content = proto.SerializeToString()
    here = [str(Path.cwd()), str(Path.home()) + "/", "site-packages", ".py", "pkg.torch"]
    return [trace for trace in here if trace.encode() in content]


def test_there_are_enough_pairs_and_every_looser_bound_is_explained() -> None:
    assert len({(pair.name, pair.kind) for pair in PAIRS}) == len(PAIRS) >= 25
    assert not [pair.name for pair in PAIRS if pair.bound > 1e-4 and not pair.why]


def test_the_table_has_a_line_for_each_row() -> None:
    row = Row("ViT", "state dict .pt", 60, "torch.export", 2.5e-7, 1e-4, "", 1.0, 3.21, 50, 20)
    head, line = table([row]).splitlines()
    assert [cell.strip() for cell in line.split("  ") if cell.strip()] == [
        "ViT", "state dict .pt", "60", "torch.export", "2.5e-07", "100%", "3.2", "50 / 20 = 2.5",
    ]  # fmt: skip
    assert head.index("way") == line.index("torch.export")
