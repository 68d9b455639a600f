from __future__ import annotations

from students.fashion_vit.report import table


def cards(seed: int, dense: float, sparse: float, quantized: float) -> tuple[dict[str, float], ...]:
    return tuple({"seed": seed, "seconds": 600.0, "test_accuracy": a} for a in (dense, sparse, quantized))


def test_has_a_row_per_seed_and_the_spread() -> None:
    lines = table([cards(0, 0.91, 0.905, 0.9075), cards(1, 0.92, 0.915, 0.9125)]).splitlines()
    assert lines[2] == "| 0 | 91.00 | 90.50 | 90.75 | -0.25 | 10.00 |"
    assert lines[3] == "| 1 | 92.00 | 91.50 | 91.25 | -0.75 | 10.00 |"
    assert lines[4] == "| mean ± s | 91.50 ± 0.71 | 91.00 ± 0.71 | 91.00 ± 0.35 | -0.50 ± 0.35 | 10.00 ± 0.00 |"


def test_one_run_has_no_spread() -> None:
    assert table([cards(0, 0.91, 0.9, 0.9)]).splitlines()[-1].startswith("| mean ± s | 91.00 | 90.00")
