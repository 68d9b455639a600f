from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import onnx
import pytest

SCRIPT = Path(__file__).with_name("measure_sparsity.py")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    import importlib.util

    spec = importlib.util.spec_from_file_location("measure_sparsity", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
@pytest.mark.parametrize("k_axis", [0, 1])
def test_measures_a_sound_model(script: ModuleType, dtype: str, k_axis: int) -> None:
    onnx.checker.check_model(script.two_four_model((16, 32), dtype, k_axis), full_check=True)
    found = script.measure((16, 32), dtype, k_axis, 2)
    assert len(found.gpusq_ms) == 2
    assert len(found.polygraphy_ms) == (2 if script.has_polygraphy() and dtype != "int8" else 0)


def test_a_check_that_is_wrong_is_no_measurement(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "gpusq_check", lambda _: lambda: False)
    with pytest.raises(AssertionError, match="gpusq did not find"):
        script.measure((16, 32), "float32", 1, 1)


def test_prints_a_line_for_each_type_and_axis() -> None:
    command = [sys.executable, str(SCRIPT), "--shapes", "16x32", "--rounds", "1"]
    printed = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=SCRIPT.parents[2], env=_environment()
    ).stdout
    assert printed.count(" ms [") >= 6
    assert printed.count("16x32") == 6


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}


def test_is_fifty_times_as_fast_as_polygraphy(script: ModuleType) -> None:
    pytest.importorskip("polygraphy", reason="the comparison needs polygraphy")
    for k_axis in (0, 1):
        assert script.measure((256, 768), "float32", k_axis, 3).ratio >= 50
