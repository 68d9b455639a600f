from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from deploy import tensorrt_api
from deploy.cache import Cache
from deploy.cli import main
from deploy.conversion import Conversion, convert
from deploy.surgery import operate
from exporters.linears import find_linears
from profiles.errors import GpusqError

pytestmark = pytest.mark.skipif(not tensorrt_api.has_api("tensorrt-rtx"), reason="tensorrt-rtx is not installed")

WIDTH = 256
MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[batch, 256] x, float[256, 256] w1, float[256, 256] w2) => (float[batch, 256] y)
{ a = MatMul(x, w1) b = Relu(a) y = MatMul(b, w2) }"""


def save(folder: Path, *, pruned: bool = False, hard: bool = False) -> tuple[Path, Path]:
    """Two layers and samples; `hard`: the second reads a channel 5000 times as large as the others, of no weight."""
    random, model = np.random.default_rng(0), ir.from_onnx_text(MODEL)
    weights = {name: random.standard_normal((WIDTH, WIDTH), np.float32) / 16 for name in ("w1", "w2")}
    if pruned:
        for weight in weights.values():
            weight.reshape(WIDTH // 4, 4, WIDTH)[:, :2] = 0
    if hard:
        weights["w1"][:, 5] *= 5000
        weights["w2"][5] /= 5000
    for value in [value for value in model.graph.inputs if value.name != "x"]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(weights[str(value.name)], name=value.name)
        model.graph.register_initializer(value)
    for name, node in zip(("first", "relu", "second"), model.graph, strict=True):
        node.name = name
    ir.save(model, folder / "m.onnx")
    np.savez(folder / "x.npz", x=random.standard_normal((40, WIDTH)).astype(np.float32))
    return folder / "m.onnx", folder / "x.npz"


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save(tmp_path_factory.mktemp("easy"), pruned=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def large(easy: tuple[Path, Path], cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """For a batch at which there is work for the tensor cores."""
    model, data = easy
    out = tmp_path_factory.mktemp("out")
    return convert(
        model, profiles=["agx-orin"], out=out, placement="best", for_batch=65536, target_drop=1, data=data, cache=cache
    )


def test_int8_is_taken_where_it_is_predicted_faster_and_loses_little(large: Conversion) -> None:
    (bundle,) = large.bundles
    choice = bundle.manifest.placements
    assert choice is not None
    assert [trial.placement for trial in choice.trials] == ["fp16", "w8a8-linear", "sparse-int8", "w8a8-mha"]
    latency = {trial.placement: trial.latency_ms or 0.0 for trial in choice.trials}
    assert latency[choice.taken] < latency["fp16"]
    assert choice.taken != "fp16"
    assert bundle.manifest.precision == "int8"
    graph = ir.load(bundle.path / "model.onnx").graph
    assert {linear.weight_type for linear in find_linears(graph)} == {"int8"}


def test_the_manifest_the_report_and_the_terminal_tell_the_choice(large: Conversion) -> None:
    (bundle,) = large.bundles
    told = json.loads((bundle.path / "manifest.json").read_text())["placements"]
    assert told["taken"] in ("w8a8-linear", "sparse-int8")
    assert f"Placement: {told['taken']} taken: " in large.to_text()
    for name in ("report.html", "report.md"):
        assert "Placements tried at batch 65536" in (bundle.path / name).read_text()


def test_another_target_takes_another_placement_from_the_same_trials(
    easy: tuple[Path, Path], cache: Cache, large: Conversion, tmp_path: Path
) -> None:
    (bundle,) = large.bundles
    assert bundle.manifest.placements is not None
    model, data = easy
    asked = ["convert", str(model), "--profile", "agx-orin", "--placement", "best", "--for-batch", "65536"]
    asked += ["--target-drop", "0.001", "--data", str(data), "--out", str(tmp_path), "--cache", str(cache.root)]
    said = CliRunner().invoke(main, [*asked, "--explain"])
    assert said.exit_code == 0, said.output
    assert said.output.count("trial: hit") == len(bundle.manifest.placements.trials)
    told = json.loads((tmp_path / "agx-orin" / "manifest.json").read_text())["placements"]
    assert told["taken"] == "fp16"
    assert "points lost, 0.001 allowed" in told["trials"][1]["refused"]


def test_fp16_is_taken_where_int8_loses_too_much(tmp_path: Path) -> None:
    model, data = save(tmp_path, hard=True)
    done = operate(model, tmp_path / "o.onnx", profile="agx-orin", placement="best", for_batch=65536, data=data)
    assert done.placements is not None
    assert (done.placement, done.precision) == ("fp16", "fp16")
    latency = {trial.placement: trial.latency_ms or 0.0 for trial in done.placements.trials}
    assert latency["w8a8-linear"] < latency["fp16"]
    assert "points lost, 0.5 allowed" in done.placements.trials[1].refused
    assert "fp16 taken" in done.to_text()


def test_trained_scales_are_tried_beside_fp16(easy: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = easy
    operate(model, tmp_path / "q.onnx", profile="cpu", placement="w8a8-linear", data=data)
    done = operate(tmp_path / "q.onnx", tmp_path / "o.onnx", profile="agx-orin", placement="best", data=data)
    assert done.placements is not None
    assert [trial.placement for trial in done.placements.trials] == ["as-trained", "fp16"]
    assert done.placement == "as-trained"
    assert done.placements.trials[0].drop == pytest.approx(0, abs=0.01)
    assert "its float weights are not in it" in done.placements.trials[1].refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"profile": "cpu"}, "is no GPU that the model of latency knows"),
        ({"precision": "int8"}, "chooses the precision"),
        ({"data": None}, "nothing to judge the placements on"),
        ({"scales": "s.json"}, "is of one placement"),
    ],
)
def test_what_no_best_can_be_told_for_is_refused(
    given: dict[str, str], message: str, easy: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = easy
    asked = {"profile": "a100", "data": data, **given}
    with pytest.raises(GpusqError, match=message):
        operate(model, tmp_path / "o.onnx", placement="best", **asked)  # type: ignore[arg-type]


def test_a_batch_without_best_is_a_usage_error(easy: tuple[Path, Path], tmp_path: Path) -> None:
    asked = ["surgery", str(easy[0]), "--profile", "a100", "--for-batch", "8", "-o", str(tmp_path / "o.onnx")]
    said = CliRunner().invoke(main, asked)
    assert said.exit_code == 2
    assert "--placement best" in said.output
