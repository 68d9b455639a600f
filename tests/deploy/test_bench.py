from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from deploy.bench import bench, summary
from deploy.bench_models import BenchSpec
from deploy.manifest import Measurement
from deploy.progress import Advance, Progress
from deploy.timing.engine import Model, model_at
from deploy.timing.interleave import Budget
from deploy.timing.statistics import Resampling, log_ratio, percentile
from deploy.timing.taken import verdict_of

Samples = npt.NDArray[np.float64]
MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[batch, 128, 128] x) => (float[batch, 128, 128] y) {{ {body} }}"""
QUICK = BenchSpec(budget=Budget(0.2, 40, 200), resampling=Resampling(resamples=200))


def model(folder: Path, name: str, body: str) -> Model:
    path = folder / f"{name}.onnx"
    ir.save(ir.from_onnx_text(MODEL.format(body=body)), path)
    return model_at(path, name, "fp32")


def taken(folder: Path, *models: Model) -> Measurement:
    return bench(*models, batch=1, raw=folder / "raw.csv", spec=QUICK)


def test_tells_a_faster_model_from_a_slower_one(tmp_path: Path) -> None:
    once = model(tmp_path, "once", "y = MatMul(x, x)")
    thrice = model(tmp_path, "thrice", "a = MatMul(x, x) b = MatMul(a, x) y = MatMul(b, x)")
    faster, slower = taken(tmp_path, once, thrice), taken(tmp_path, thrice, once)
    assert faster.speedup is not None
    assert slower.speedup is not None
    assert slower.speedup.high < 1 < faster.speedup.low
    assert faster.verdict == ("inconclusive" if faster.broken else "faster")
    assert slower.verdict == ("inconclusive" if slower.broken else "slower")


def test_says_nothing_of_speed_without_a_baseline(tmp_path: Path) -> None:
    one = model(tmp_path, "one", "y = MatMul(x, x)")
    alone = taken(tmp_path, one)
    assert (alone.verdict, alone.speedup, alone.baseline) == ("no baseline", None, None)
    assert alone.noise_floor is None


def pairs_of_drifting_machine(seed: int, speedup: float) -> tuple[Samples, Samples]:
    """200 pairs in ms on a machine whose clock halves half-way and whose calls are now and then interrupted."""
    random = np.random.default_rng(seed)
    drift = np.where(np.arange(200) < 100, 1.0, 2.0)
    noise = random.lognormal(0, 0.1, (2, 200)) + 5 * (random.random((2, 200)) < 0.02)
    student, baseline = 3.0 * drift * noise
    return speedup * baseline, student


def test_finds_no_difference_between_equals_but_for_the_share_that_its_interval_allows() -> None:
    """Of 200 intervals of 95 % ten miss 1; more than 18 do in one experiment of a hundred."""
    found = [log_ratio(*pairs_of_drifting_machine(seed, 1.0), QUICK.resampling) for seed in range(200)]
    assert sum(verdict_of(ratio, 0.0) != "inconclusive" for ratio in found) <= 18


def test_finds_a_tenth_of_difference_on_a_machine_that_drifts_by_half() -> None:
    found = [log_ratio(*pairs_of_drifting_machine(seed, 1.1), QUICK.resampling) for seed in range(50)]
    assert [verdict_of(ratio, 0.0) for ratio in found] == ["faster"] * 50


def test_says_in_one_line_what_was_compared(tmp_path: Path) -> None:
    same = model(tmp_path, "same", "y = MatMul(x, x)")
    assert "than same (fp32)" in summary(taken(tmp_path, same, same))


def test_keeps_every_sample(tmp_path: Path) -> None:
    same = model(tmp_path, "same", "y = MatMul(x, x)")
    found = taken(tmp_path, same, same)
    head, *rows = (line.split(",") for line in (tmp_path / "raw.csv").read_text().splitlines())
    assert head == ["pair", "model", "latency_ms"]
    student = [float(latency) for _, name, latency in rows if name == "student"]
    assert len(student) == found.pairs == len(rows) // 2
    assert found.student.p50_ms.value == pytest.approx(float(percentile(np.asarray(student), 50)), abs=1e-6)


def test_reports_the_share_that_is_done(tmp_path: Path) -> None:
    shares: list[float] = []

    class Kept(Progress):
        @contextmanager
        def working(self, label: str) -> Iterator[Advance]:
            yield shares.append

    one = model(tmp_path, "one", "y = MatMul(x, x)")
    spec = replace(QUICK, budget=Budget(0.3, 2, 1_000_000))
    bench(one, batch=1, raw=tmp_path / "raw.csv", spec=spec, progress=Kept())
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1
