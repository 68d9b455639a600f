from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from deploy.cache import Cache
from deploy.cli import main
from deploy.conversion import convert
from deploy.surgery import operate
from exporters.linears import find_linears
from profiles.errors import GpusqError

MODEL = """<ir_version: 8, opset_import: ["": 17]>
    g (float[batch, 64] x, float[64, 64] w1, float[64, 64] w2, float[64, 64] w3) => (float[batch, 64] y)
    { a = MatMul(x, w1) b = Relu(a) c = MatMul(b, w2) d = Relu(c) y = MatMul(d, w3) }"""


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers; the last reads one channel that is 5000 times as large as the others, and of no weight."""
    folder, random = tmp_path_factory.mktemp("hard"), np.random.default_rng(0)
    model = ir.from_onnx_text(MODEL)
    weights = {name: random.standard_normal((64, 64), np.float32) / 8 for name in ("w1", "w2", "w3")}
    weights["w2"][:, 5] *= 5000
    weights["w3"][5] /= 5000
    for value in [value for value in model.graph.inputs if value.name != "x"]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(weights[str(value.name)], name=value.name)
        model.graph.register_initializer(value)
    for name, node in zip(("first", "relu1", "second", "relu2", "third"), model.graph, strict=True):
        node.name = name
    ir.save(model, folder / "m.onnx")
    np.savez(folder / "x.npz", x=random.standard_normal((40, 64)).astype(np.float32))
    return folder


def test_surgery_leaves_the_hard_layer_float_and_says_so(hard: Path, tmp_path: Path) -> None:
    asked = ["surgery", str(hard / "m.onnx"), "--profile", "cpu", "--placement", "w8a8-linear", "--target-drop", "0.5"]
    asked += ["--data", str(hard / "x.npz"), "-o", str(tmp_path / "o.onnx")]
    said = CliRunner().invoke(main, asked)
    assert said.exit_code == 0, said.output
    assert "left float, 33.3 % of the products: third" in said.output
    types = {linear.module: linear.weight_type for linear in find_linears(ir.load(tmp_path / "o.onnx").graph)}
    assert types == {"first": "int8", "second": "int8", "third": "float32"}


def test_the_surgery_of_the_result_keeps_it_float(hard: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "o.onnx", tmp_path / "p.onnx"
    operate(hard / "m.onnx", first, profile="cpu", placement="w8a8-linear", data=hard / "x.npz", target_drop=0.5)
    operate(first, second, profile="cpu", placement="w8a8-linear", data=hard / "x.npz")
    once, twice = (ir.load(path).graph for path in (first, second))
    assert [node.op_type for node in once] == [node.op_type for node in twice]
    assert [linear.weight_type for linear in find_linears(twice)] == ["int8", "int8", "float32"]


def test_the_manifest_and_the_report_name_it_with_the_evidence(hard: Path, tmp_path: Path) -> None:
    done = convert(
        hard / "m.onnx", profiles=["cpu"], out=tmp_path / "b", precision="int8", data=hard / "x.npz", target_drop=0.5
    )
    manifest = json.loads((done.bundles[0].path / "manifest.json").read_text())
    (left,) = manifest["mixed_precision"]["left"]
    assert left["name"] == "third"
    assert left["error"] > 0.01
    assert manifest["mixed_precision"]["after"] <= 0.5 < manifest["mixed_precision"]["before"]
    assert manifest["ranges_by"].startswith("least-loss: ")
    for name in ("report.html", "report.md"):
        assert "Left float for the accuracy" in (done.bundles[0].path / name).read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"placement": "fp16"}, "quantizes nothing"),
        ({"placement": "w4"}, "nothing to judge a drop on"),
    ],
)
def test_a_target_that_nothing_can_be_done_for_is_refused(
    given: dict[str, str], message: str, hard: Path, tmp_path: Path
) -> None:
    with pytest.raises(GpusqError, match=message):
        operate(hard / "m.onnx", tmp_path / "o", profile="cpu", target_drop=0.5, **given)  # type: ignore[arg-type]


def test_a_conversion_that_misses_the_agreement_names_the_layer_that_costs_it(hard: Path, tmp_path: Path) -> None:
    done = convert(hard / "m.onnx", profiles=["cpu"], out=tmp_path / "b", precision="int8", data=hard / "x.npz")
    missed = done.bundles[0].manifest.gates_missed
    assert any(gate.startswith("the model and the student agree on") for gate in missed)
    assert "quantizing third costs most of it: convert with --target-drop 0.5 leaves them float" in missed


def test_what_the_cache_has_names_it_as_well(hard: Path, tmp_path: Path) -> None:
    first, again = (
        convert(
            hard / "m.onnx",
            profiles=["cpu"],
            out=tmp_path / name,
            precision="int8",
            data=hard / "x.npz",
            target_drop=0.5,
            cache=Cache(tmp_path / "cache"),
        )
        for name in ("a", "b")
    )
    assert first.bundles[0].manifest.mixed_precision is not None
    assert first.bundles[0].manifest.mixed_precision == again.bundles[0].manifest.mixed_precision
