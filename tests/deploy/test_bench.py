from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from deploy.bench import BenchOptions, Contender, bench, compare, summary, verdict_of
from deploy.timing.statistics import percentile

Samples = npt.NDArray[np.float64]
FEED = {"x": np.random.default_rng(0).standard_normal((1, 128, 128), np.float32)}
MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[batch, 128, 128] x) => (float[batch, 128, 128] y) {{ {body} }}"""
QUICK = BenchOptions(seconds=0.2, min_pairs=40, max_pairs=200, resamples=200)


def model(folder: Path, name: str, body: str) -> Path:
    path = folder / f"{name}.onnx"
    ir.save(ir.from_onnx_text(MODEL.format(body=body)), path)
    return path


def test_tells_a_faster_model_from_a_slower_one(tmp_path: Path) -> None:
    once = Contender("once", "fp32", model(tmp_path, "once", "y = MatMul(x, x)"))
    thrice = Contender(
        "thrice", "fp32", model(tmp_path, "thrice", "a = MatMul(x, x) b = MatMul(a, x) y = MatMul(b, x)")
    )
    faster = bench(once, thrice, FEED, tmp_path / "raw.csv", QUICK)
    slower = bench(thrice, once, FEED, tmp_path / "raw.csv", QUICK)
    assert (faster.verdict, slower.verdict) == ("faster", "slower")


def test_says_nothing_of_speed_without_a_baseline(tmp_path: Path) -> None:
    one = Contender("one", "fp32", model(tmp_path, "one", "y = MatMul(x, x)"))
    alone = bench(one, None, FEED, tmp_path / "raw.csv", QUICK)
    assert (alone.verdict, alone.speedup, alone.baseline) == ("no baseline", None, None)


def pairs_of_drifting_machine(seed: int, speedup: float) -> tuple[Samples, Samples]:
    """200 pairs in ms on a machine whose clock halves half-way and whose calls are now and then interrupted."""
    random = np.random.default_rng(seed)
    drift = np.where(np.arange(200) < 100, 1.0, 2.0)
    noise = random.lognormal(0, 0.1, (2, 200)) + 5 * (random.random((2, 200)) < 0.02)
    student, baseline = 3.0 * drift * noise
    return student, speedup * baseline


def test_finds_no_difference_between_equals_but_for_the_share_that_its_interval_allows() -> None:
    """Of 200 intervals of 95 % ten miss 1; more than 18 do in one experiment of a hundred."""
    found = [compare(*pairs_of_drifting_machine(seed, 1.0), QUICK) for seed in range(200)]
    assert sum(verdict_of(speedup) != "inconclusive" for speedup in found) <= 18


def test_finds_a_tenth_of_difference_on_a_machine_that_drifts_by_half() -> None:
    found = [compare(*pairs_of_drifting_machine(seed, 1.1), QUICK) for seed in range(50)]
    assert [verdict_of(speedup) for speedup in found] == ["faster"] * 50


def test_says_in_one_line_what_was_compared(tmp_path: Path) -> None:
    same = Contender("same", "fp32", model(tmp_path, "same", "y = MatMul(x, x)"))
    assert "than same (fp32)" in summary(bench(same, same, FEED, tmp_path / "raw.csv", QUICK))


def test_keeps_every_sample(tmp_path: Path) -> None:
    same = Contender("same", "fp32", model(tmp_path, "same", "y = MatMul(x, x)"))
    found = bench(same, same, FEED, tmp_path / "raw.csv", QUICK)
    head, *rows = (line.split(",") for line in (tmp_path / "raw.csv").read_text().splitlines())
    assert head == ["pair", "model", "latency_ms"]
    student = [float(latency) for _, name, latency in rows if name == "student"]
    assert len(student) == found.pairs == len(rows) // 2
    assert found.student.p50_ms.value == pytest.approx(float(percentile(np.asarray(student), 50)), abs=1e-6)


def test_reports_the_share_that_is_done(tmp_path: Path) -> None:
    shares: list[float] = []
    one = Contender("one", "fp32", model(tmp_path, "same", "y = MatMul(x, x)"))
    bench(one, None, FEED, tmp_path / "raw.csv", QUICK, progress=shares.append)
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1
