from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from deploy import second_opinion as opinion
from deploy.cli import main
from deploy.cuda import Array
from deploy.engine import Engine, OnnxRuntimeEngine
from deploy.second_opinion import Tolerance, second_opinion

pytest.importorskip("polygraphy", reason="the second opinion is Polygraphy's: pip install polygraphy")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:polygraphy.*")


class Wrong(OnnxRuntimeEngine):
    """The engine, but for its answer to one of the two batches."""

    calls = 0

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        answer = super().infer(inputs)
        self.calls += 1
        return {name: array + (self.calls == 2) for name, array in answer.items()}


def test_the_engine_of_the_cpu_agrees_with_its_model(bundles: dict[str, Path], tmp_path: Path) -> None:
    found = second_opinion(bundles["cpu"], tmp_path / "out")
    (engine,) = found.compared
    assert (engine.engine, engine.passed, engine.batches) == ("engine.onnx", 2, 2)
    assert not found.failed
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_inputs_outputs_and_a_command_that_shows_it_again(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: tuple[dict[str, Engine], dict[str, str]] = ({"engine.onnx": Wrong(bundles["cpu"] / "engine.onnx")}, {})
    monkeypatch.setattr(opinion, "_engines", lambda bundle, manifest: engines)
    found = second_opinion(bundles["cpu"], tmp_path / "out", tolerance=Tolerance(0.5, 0.0))
    (engine,) = found.compared
    assert found.failed
    assert (engine.passed, engine.batches) == (1, 2)
    assert 0.9 < engine.max_abs_difference < 1.1
    assert sorted(path.name for path in (tmp_path / "out" / "engine.onnx.1").iterdir()) == [
        "inputs.json",
        "outputs.json",
    ]
    (command,) = engine.again
    words = [sys.executable, "-W", "ignore", "-c", "import sys; from polygraphy.tools import main; sys.exit(main())"]
    done = subprocess.run([*words, *shlex.split(command)[1:]], capture_output=True, text=True, check=False)
    assert "FAILED" in done.stdout + done.stderr
    assert done.returncode != 0


def test_what_this_host_cannot_load_is_told(bundles: dict[str, Path]) -> None:
    result = CliRunner().invoke(main, ["verify", str(bundles["a100"]), "--polygraphy"])
    assert result.exit_code == 1
    assert "can load no engine" in result.stderr


def test_the_command_prints_json_of_its_schema(bundles: dict[str, Path], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(main, ["verify", str(bundles["cpu"]), "--polygraphy", *out])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["schema"] == opinion.SCHEMA
