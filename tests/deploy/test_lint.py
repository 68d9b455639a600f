from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest
from click.testing import CliRunner

from deploy.cli import main
from deploy.lint import LintReport, lint
from deploy.sarif import to_sarif
from exporters.lint import RULES
from profiles.errors import GpusqError

ROOT = Path(__file__).parents[2]
BROKEN = """
    <ir_version: 11, opset_import: ["": 23]>
    g (float[N,4] x) => (float[N,4] y) <float s = {0.5}, float[4,4] w = {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1}> {
        [/blocks.0/q] q = QuantizeLinear(x, s)
        [/blocks.0/dq] d = DequantizeLinear(q, s)
        m = MatMul(d, w)
        [odd] y = Bernoulli(m)
    }
"""


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    proto = onnx.parser.parse_model(BROKEN.replace("[/blocks.0/q]", "[a]").replace("[/blocks.0/dq]", "[b]"))
    names = {"a": "/blocks.0/QuantizeLinear", "b": "/blocks.0/DequantizeLinear"}
    for node in proto.graph.node:
        node.name = names.get(node.name, node.name)
    onnx.save(proto, tmp_path / "my model.onnx")
    return tmp_path / "my model.onnx"


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    text = '<ir_version: 11, opset_import: ["": 23]> g (float[N,4] x) => (float[N,4] y) {y = Relu(x)}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "sound.onnx")
    return tmp_path / "sound.onnx"


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["lint", *arguments], catch_exceptions=False)
    return result.exit_code, result.stdout


def test_errors_lead_to_exit_code_3_and_name_rule_node_and_module(broken: Path) -> None:
    code, out = run(str(broken), "--profile", "a100")
    assert code == 3
    assert "Q001 error: quantize to int8" in out
    assert "cure: give the quantizer an explicit int8 zero-point of 0" in out
    assert "/blocks.0/QuantizeLinear in blocks.0" in out
    assert out.endswith("my model.onnx for a100-sxm-80gb: 3 errors, 1 warnings\n")


def test_json_is_the_report(broken: Path) -> None:
    code, out = run(str(broken), "--profile", "a100", "--json")
    assert code == 3
    assert json.loads(out)["schema"] == 1
    report = LintReport.model_validate_json(out)
    assert report == lint(broken, "a100")
    found = [(finding.rule, finding.severity, finding.node) for finding in report.findings]
    assert found == [
        ("Q001", "error", "/blocks.0/QuantizeLinear"),
        ("Q001", "error", "/blocks.0/DequantizeLinear"),
        ("Q015", "warning", "node_of_m"),
        ("G002", "error", "odd"),
    ]


def test_a_sound_model_is_0_errors_and_exit_code_0(sound: Path) -> None:
    assert run(str(sound), "--profile", "a100") == (0, "sound.onnx for a100-sxm-80gb: 0 errors, 0 warnings\n")


def test_warnings_alone_are_exit_code_0(tmp_path: Path) -> None:
    text = '<ir_version: 11, opset_import: ["": 23]> g (double[N,4] x) => (double[N,4] y) {y = Relu(x)}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    code, out = run(str(tmp_path / "m.onnx"), "--profile", "a100")
    assert (code, "G006 warning" in out) == (0, True)


def test_sparse_weights_are_a_finding_and_no_failure(tmp_path: Path) -> None:
    text = '<ir_version: 11, opset_import: ["": 23]> g (float[N,4] x) => (float[N,4] y) {[fc] y = MatMul(x, w)}'
    proto = onnx.parser.parse_model(text)
    values = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [1.0])
    indices = onnx.helper.make_tensor("i", onnx.TensorProto.INT64, [1], [3])
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [4, 4]))
    onnx.save(proto, tmp_path / "m.onnx")
    assert [(finding.rule, finding.node) for finding in lint(tmp_path / "m.onnx", "a100").findings] == [("G004", "fc")]


@pytest.mark.parametrize(
    ("name", "profile", "message"),
    [
        ("nowhere.onnx", "a100", "no such file"),
        (".", "a100", "is a folder"),
        ("text.onnx", "a100", "is no ONNX model"),
        ("text.onnx", "a1000", "no device profile 'a1000'"),
    ],
)
def test_one_error_for_what_cannot_be_read(tmp_path: Path, name: str, profile: str, message: str) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(GpusqError, match=message):
        lint(tmp_path / name, profile)


def test_sarif_is_written_beside_the_text(broken: Path, tmp_path: Path) -> None:
    code, out = run(str(broken), "--profile", "a100", "--sarif", str(tmp_path / "lint.sarif"))
    assert (code, "Q001" in out) == (3, True)
    check_sarif(json.loads((tmp_path / "lint.sarif").read_text(encoding="utf-8")))


def test_sarif_holds_every_rule_and_every_finding(broken: Path) -> None:
    report = lint(broken, "a100")
    log = json.loads(to_sarif(report, Path("models/my model.onnx"), "1.2.3"))
    check_sarif(log)
    (sarif,) = log["runs"]
    assert [rule["id"] for rule in sarif["tool"]["driver"]["rules"]] == [rule.id for rule in RULES]
    assert [(result["ruleId"], result["level"]) for result in sarif["results"]] == [
        (finding.rule, finding.severity) for finding in report.findings
    ]
    location = sarif["results"][0]["locations"][0]
    assert location["physicalLocation"]["artifactLocation"]["uri"] == "models/my%20model.onnx"
    assert location["logicalLocations"][0]["fullyQualifiedName"] == "blocks.0//blocks.0/QuantizeLinear"


def check_sarif(log: dict[str, Any]) -> None:
    """What the schema of SARIF 2.1.0 requires of the objects that are used: keys, types, and no unknown key."""
    only(log, required={"version", "runs"}, allowed={"$schema"})
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-schema-2.1.0.json")
    for sarif in log["runs"]:
        only(sarif, required={"tool"}, allowed={"artifacts", "results", "columnKind", "properties"})
        assert sarif["columnKind"] in ("utf16CodeUnits", "unicodeCodePoints")
        only(sarif["tool"], required={"driver"})
        driver = sarif["tool"]["driver"]
        only(driver, required={"name"}, allowed={"version", "rules"})
        assert len({rule["id"] for rule in driver["rules"]}) == len(driver["rules"])
        for rule in driver["rules"]:
            only(rule, required={"id"}, allowed={"shortDescription", "help", "defaultConfiguration"})
            only(rule["shortDescription"], required={"text"})
            only(rule["help"], required={"text"})
            assert rule["defaultConfiguration"]["level"] in ("none", "note", "warning", "error")
        for result in sarif["results"]:
            check_result(result, sarif)


def check_result(result: dict[str, Any], sarif: dict[str, Any]) -> None:
    only(result, required={"message"}, allowed={"ruleId", "ruleIndex", "level", "locations"})
    assert sarif["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
    assert result["level"] in ("none", "note", "warning", "error")
    assert result["message"]["text"]
    for location in result["locations"]:
        only(location, allowed={"physicalLocation", "logicalLocations"})
        artifact = location["physicalLocation"]["artifactLocation"]
        assert sarif["artifacts"][artifact["index"]]["location"]["uri"] == artifact["uri"]
        assert " " not in artifact["uri"]
        for logical in location["logicalLocations"]:
            only(logical, allowed={"name", "kind", "fullyQualifiedName"})


def only(fields: dict[str, Any], *, required: Set[str] = frozenset(), allowed: Set[str] = frozenset()) -> None:
    assert required <= fields.keys() <= required | allowed


def test_the_page_has_every_rule_as_it_is() -> None:
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    rows = [f"| {rule.id} | {rule.severity} | {rule.sentence} | {rule.cure} |" for rule in RULES]
    assert [row for row in page.splitlines() if row.startswith(("| Q0", "| G0", "| A0"))] == rows
