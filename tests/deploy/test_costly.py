from __future__ import annotations

from calibration.costly_layers import Costly, Found
from deploy.costly import advice


def found(*names: str) -> Found:
    return Found(1.0, 5.0, 0.5, tuple(Costly(name, 0.1, 0.1) for name in names))


def test_names_the_layers_and_the_option_that_leaves_them_float() -> None:
    assert advice(found("a", "b")) == "quantizing a, b costs most of it: convert with --target-drop 1 leaves them float"


def test_many_layers_are_counted() -> None:
    assert "a, b, c, d, e and 2 more" in advice(found(*"abcdefg"))
