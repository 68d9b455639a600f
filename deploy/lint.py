"""Check a model against the hard rules of a device's compiler, and say it to people, programs and CI."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import onnx_ir as ir
from pydantic import Field

from deploy.graph_file import read_graph
from exporters.lint import Finding, Severity
from exporters.lint import lint as breaches
from profiles.device import Device, load_device
from profiles.errors import GpusqError
from profiles.record import Record

SCHEMA = 1


class Breach(Record):
    """A node or value that breaks a rule."""

    rule: str
    severity: Severity
    sentence: str
    cure: str
    node: str = Field(description="The node at fault, or the input or constant.")
    module: str = Field(description="The module that the node belongs to; empty where that is not known.")


class LintReport(Record):
    """What is wrong with a model for a device."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    model: str
    profile: str
    findings: tuple[Breach, ...]

    @property
    def errors(self) -> int:
        """How often a rule is broken so that the compiler refuses or computes something else."""
        return sum(finding.severity == "error" for finding in self.findings)

    def to_text(self) -> str:
        """The report for the terminal: each broken rule with its cure and the nodes that break it."""
        warnings = len(self.findings) - self.errors
        return "\n".join(
            [*self._rules(), f"{self.model} for {self.profile}: {self.errors} errors, {warnings} warnings"]
        )

    def _rules(self) -> Iterator[str]:
        for _, group in groupby(self.findings, key=lambda finding: finding.rule):
            first, *rest = group
            yield f"{first.rule} {first.severity}: {first.sentence}"
            yield f"     cure: {first.cure}"
            yield from (f"     {_where(finding)}" for finding in (first, *rest))
            yield ""


def lint(path: Path, profile: str) -> LintReport:
    """Check the ONNX model at `path` for the device of `profile`, as the device's parser would read it.

    Raises:
        GpusqError: there is no such file or profile, or it is no sound ONNX model.
    """
    device = load_device(profile)
    model = read_graph(path, sparse=True)
    return LintReport(model=path.name, profile=device.name, findings=tuple(map(_breach, breaches(model, device))))


def _breach(finding: Finding) -> Breach:
    rule = finding.rule
    return Breach(
        rule=rule.id,
        severity=rule.severity,
        sentence=rule.sentence,
        cure=rule.cure,
        node=finding.where,
        module=finding.module,
    )


def check_rules(model: ir.Model, device: Device) -> None:
    """Raise GpusqError where a graph breaks a hard rule of the device's compiler."""
    found = [finding for finding in breaches(model, device) if finding.rule.severity == "error"]
    if found:
        more = f" (and {len(found) - 1} more)" if found[1:] else ""
        raise GpusqError(f"{device.title}: {found[0]}{more}", hint=found[0].rule.cure)


def _where(finding: Breach) -> str:
    return f"{finding.node} in {finding.module}" if finding.module else finding.node
