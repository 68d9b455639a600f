from __future__ import annotations

import pytest

from exporters.module_names import parameter_name, without_machinery


@pytest.mark.parametrize(
    ("name", "root", "expected"),
    [
        ("blocks.0.attn.qkv", "", "blocks.0.attn.qkv"),
        ("blocks.0.fc.parametrizations.weight.0", "", "blocks.0.fc"),
        ("blocks.0.fc.input_quantizer", "", "blocks.0.fc"),
        ("model.encoder.fc", "model", "encoder.fc"),
        ("model", "model", ""),
        ("modelling.fc", "model", "modelling.fc"),
    ],
)
def test_a_node_belongs_to_the_module_and_not_to_its_machinery(name: str, root: str, expected: str) -> None:
    assert without_machinery(name, root) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fc.weight", "fc.weight"),
        ("model.fc.parametrizations.weight.original", "fc.weight"),
        ("fc.original", "fc.original"),
    ],
)
def test_a_parameter_keeps_its_name(name: str, expected: str) -> None:
    assert parameter_name(name, "model") == expected
