"""The workflow that users copy: it is YAML, and its commands are ones that gpusq takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from deploy.cli import main

WORKFLOW = Path(__file__).parents[1] / ".github" / "workflows" / "latency-regression.yml"


def commands() -> list[list[str]]:
    """The words behind each `gpusq` of the workflow."""
    text = re.sub(r"\\\n\s*|>\n\s*|\n\s+(?=--)", " ", WORKFLOW.read_text(encoding="utf-8"))
    found = re.findall(r"^ +(?:\.venv/bin/)?gpusq ((?:convert|bench|compare|build)\b.*)$|run: +gpusq (.*)$", text, re.M)
    return [shlex.split(one or other) for one, other in found]


def test_every_command_of_the_workflow_is_one_that_gpusq_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("cpu-candidate/cpu", "cpu-baseline/cpu"):
        Path(folder).mkdir(parents=True)
    names = []
    for name, *arguments in commands():
        command = main.commands[name]
        command.make_context(name, list(arguments), parent=click.Context(main))
        names.append(name)
    assert names == ["convert", "compare", "convert", "bench", "compare"]


def test_the_workflow_is_yaml_with_both_jobs() -> None:
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    assert set(jobs) == {"plan", "latency"}
