from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.slow
def test_an_export_holds_the_weights_little_more_than_once() -> None:
    """By the measuring script, on a ViT-B: its 330 MiB of weights stand out from what the exporter itself takes."""
    spec = importlib.util.spec_from_file_location("measure_export", Path(__file__).with_name("measure_export.py"))
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    ours, theirs = (script.measure("vit_base_patch16_224", way) for way in ("gpusq", "torch"))
    assert ours["peak_mib"] <= 1.25 * theirs["peak_mib"]
    assert ours["added_mib"] <= ours["weights_mib"]  # they are there once already
