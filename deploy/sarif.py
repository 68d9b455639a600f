"""A lint report in SARIF 2.1.0, the format in which CI services take findings (OASIS standard, docs.oasis-open.org).

One run; every rule under `tool.driver.rules`; a result points at its rule by index, at the model as an artifact, and at
the node as a logical location, because an ONNX file has no lines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deploy.lint import Breach, LintReport
from exporters.lint import RULES, Rule

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_INDEX = {rule.id: index for index, rule in enumerate(RULES)}


def to_sarif(report: LintReport, model: Path, version: str) -> str:
    """Return `report` as SARIF text.

    Args:
        report: what was found.
        model: the path of the model, as it was given; relative to what CI calls the root of the sources.
        version: of gpusq.
    """
    driver = {"name": "gpusq", "version": version, "rules": [_rule(rule) for rule in RULES]}
    run = {
        "tool": {"driver": driver},
        "artifacts": [{"location": {"uri": quote(model.as_posix())}}],
        "results": [_result(finding, model) for finding in report.findings],
        "columnKind": "unicodeCodePoints",
        "properties": {"profile": report.profile},
    }
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "shortDescription": {"text": rule.sentence},
        "help": {"text": rule.cure},
        "defaultConfiguration": {"level": rule.severity},
    }


def _result(finding: Breach, model: Path) -> dict[str, Any]:
    module = f" in {finding.module}" if finding.module else ""
    logical = {"name": finding.node, "kind": "node"}
    if finding.module:
        logical["fullyQualifiedName"] = f"{finding.module}/{finding.node}"
    return {
        "ruleId": finding.rule,
        "ruleIndex": _INDEX[finding.rule],
        "level": finding.severity,
        "message": {"text": f"{finding.node}{module}: {finding.sentence}. Cure: {finding.cure}."},
        "locations": [
            {
                "physicalLocation": {"artifactLocation": {"uri": quote(model.as_posix()), "index": 0}},
                "logicalLocations": [logical],
            }
        ],
    }
