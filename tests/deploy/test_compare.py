from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from deploy.bench_models import BenchSpec, bench_models
from deploy.cli import main
from deploy.compare import compare, compare_subjects
from deploy.comparison.formats import to_junit, to_markdown
from deploy.comparison.metrics import Gate, MetricName, newcombe
from deploy.comparison.subject import Subject, read_subject
from deploy.comparison.timings import Timings
from deploy.manifest import FILE_NAME, read_manifest
from deploy.timing.history import open_history
from deploy.timing.interleave import Budget
from deploy.timing.statistics import Resampling
from profiles.errors import GpusqError
from tests.deploy.timing.small_models import save_model

NONE = Subject("none")
QUICK = Gate(resampling=Resampling(resamples=400))
SPEC = BenchSpec(budget=Budget(0.02, 20, 40), resampling=Resampling(resamples=50))


def timings(slower: float, seed: int = 0, *, paired: bool = True, pairs: int = 400) -> Timings:
    """Samples of a machine with 5 % of noise, on which the candidate is `slower` times as slow."""
    random = np.random.default_rng(seed)
    latency = 3 * random.lognormal(0, 0.05, (2, pairs))
    rates = 300 * random.lognormal(0, 0.005, (2, 30))
    before = {"latency_ms": latency[0], "throughput_qps": rates[0]}
    after = {"latency_ms": slower * latency[1], "throughput_qps": rates[1] / slower}
    return Timings(paired, before, after, device="a machine", batch=1, runs=1)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("slower", "verdict"), [(1.2, "regression"), (1.01, "pass"), (0.8, "improvement")])
def test_judges_the_median_and_the_throughput(slower: float, verdict: str, paired: bool) -> None:
    gate = replace(QUICK, metrics=("p50", "throughput"))
    found = compare_subjects(NONE, NONE, gate, timings(slower, paired=paired))
    assert [metric.verdict for metric in found.metrics] == [verdict, verdict]
    assert found.verdict == verdict


def test_equals_are_no_regression_in_two_hundred_comparisons() -> None:
    gate = replace(QUICK, max_regression=0.0, metrics=("p50", "p99", "throughput"))
    found = [compare_subjects(NONE, NONE, gate, timings(1.0, seed, pairs=200)) for seed in range(200)]
    assert sum(one.verdict == "regression" for one in found) <= 10


def test_what_lies_on_both_sides_of_the_threshold_is_inconclusive() -> None:
    found = compare_subjects(NONE, NONE, replace(QUICK, metrics=("p50",)), timings(1.03, pairs=50))
    assert found.verdict == "inconclusive"


def test_several_metrics_make_each_harder_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 resamples 7 of p50 show no change: p = 8/401; beside two more metrics it counts three times."""
    changed, unchanged = np.r_[np.zeros(7), np.full(393, 0.1)], np.zeros(400)
    monkeypatch.setattr(Timings, "worse", lambda self, name, how: (0.1, changed) if name == "p50" else (0.0, unchanged))
    alone = compare_subjects(NONE, NONE, replace(QUICK, metrics=("p50",)), timings(1.0)).metrics[0]
    gate = replace(QUICK, metrics=("p50", "p99", "throughput"))
    beside = compare_subjects(NONE, NONE, gate, timings(1.0)).metrics[0]
    assert (alone.verdict, beside.verdict) == ("regression", "inconclusive")
    assert alone.p_value == pytest.approx(8 / 401)
    assert beside.p_value == pytest.approx(24 / 401)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 5000))
def test_the_interval_of_a_drop_holds_it(first: float, second: float, count: int) -> None:
    found = newcombe(first, second, (count, count))
    assert found.low <= found.value + 1e-9
    assert found.value <= found.high + 1e-9
    assert -1 - 1e-9 <= found.low <= found.high <= 1 + 1e-9


def test_newcombes_own_example() -> None:
    """Newcombe 1998, table II, example (a): 56/70 − 48/80 = 0.2, by method 10 from 0.0524 to 0.3339."""
    found = newcombe(56 / 70, 48 / 80, (70, 80))
    assert found.low == pytest.approx(0.0524, abs=1e-4)
    assert found.high == pytest.approx(0.3339, abs=1e-4)


def test_a_metric_that_was_asked_for_and_is_not_known_is_inconclusive(tmp_path: Path) -> None:
    model = str(save_model(tmp_path / "model.onnx", 1))
    asked: tuple[MetricName, ...] = ("p50", "accuracy", "kernels")
    found = compare(model, model, replace(QUICK, metrics=asked), db=tmp_path / "none.db")
    assert found.verdict == "inconclusive"
    assert [metric.reasons for metric in found.metrics] == [
        (f"no history in {tmp_path / 'none.db'}: run gpusq bench",),
        (f"no verification of {model} and {model}",),
        (f"no plan of {model} and {model}",),
    ]


@pytest.fixture
def benched(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A small and a large model, and a history that timed one beside the other; its conditions called good."""
    small, large = save_model(tmp_path / "small.onnx", 1, 96), save_model(tmp_path / "large.onnx", 12, 96)
    db = tmp_path / "gpusq.db"
    (result,) = bench_models([large], small, SPEC).results
    quiet = result.model_copy(update={"conditions": result.conditions.model_copy(update={"broken": ()})})
    random = np.random.default_rng(0)
    raw = [
        {"latency_ms": scale * random.lognormal(0, 0.05, 200), "throughput_qps": random.lognormal(0, 0.01, 10) / scale}
        for scale in (1.0, 5.0)
    ]
    with open_history(db, create=True) as history:
        history.add(quiet, raw)
    return small, large, db


def test_finds_the_pairs_of_two_models_in_the_history(benched: tuple[Path, Path, Path]) -> None:
    small, large, db = benched
    found = compare(str(small), str(large), replace(QUICK, metrics=("p50",)), db=db)
    assert found.verdict == "regression"
    assert "pair by pair" in found.metrics[0].reasons[0]
    assert found.metrics[0].worse is not None
    assert found.metrics[0].worse.value == pytest.approx(4, rel=0.1)
    named = compare(f"{db}:{large}", f"{db}:{small}", replace(QUICK, metrics=("p50", "throughput")))
    assert named.verdict == "improvement"


def test_runs_that_broke_a_condition_are_not_used(benched: tuple[Path, Path, Path], tmp_path: Path) -> None:
    small, large, db = benched
    with open_history(db) as history:
        (result,) = history.results()
    broken = result.conditions.model_copy(update={"broken": ("other processes used 60 % of the cores",)})
    with open_history(tmp_path / "loud.db", create=True) as history:
        history.add(result.model_copy(update={"conditions": broken}), [{}, {}])
    found = compare(str(small), str(large), replace(QUICK, metrics=("p50",)), db=tmp_path / "loud.db")
    assert found.verdict == "inconclusive"
    assert "no usable result" in found.metrics[0].reasons[0]


def test_runs_of_two_histories_are_compared_without_pairs(benched: tuple[Path, Path, Path], tmp_path: Path) -> None:
    small, large, db = benched
    other = Path(shutil.copy(db, tmp_path / "other.db"))
    found = compare(f"{db}:{small}", f"{other}:{large}", replace(QUICK, metrics=("p50",)))
    assert found.verdict == "regression"
    assert "runs of their own" in found.metrics[0].reasons[0]


def test_a_bundle_is_as_good_as_itself_and_a_worse_one_is_not(bundles: dict[str, Path], tmp_path: Path) -> None:
    """The bundle's manifest is given fewer right answers and a plan with an attention that fell apart."""
    good = bundles["a100"]
    worse = tmp_path / "worse"
    shutil.copytree(good, worse)
    manifest = read_manifest(good)
    assert manifest.verified is not None
    assert manifest.plan is not None
    first, *rest = manifest.plan.attentions
    broken = manifest.plan.model_copy(update={"attentions": (first.model_copy(update={"fused": False}), *rest)})
    verified = manifest.verified.model_copy(update={"onnx_top1": 0.7, "count": 1000})
    changed = manifest.model_copy(update={"plan": broken, "verified": verified})
    (worse / FILE_NAME).write_text(changed.to_json(), encoding="utf-8")
    none = tmp_path / "none.db"
    assert compare(str(good), str(good), QUICK, db=none).verdict == "pass"
    found = compare(str(good), str(worse), QUICK, db=none)
    assert {metric.metric for metric in found.metrics if metric.verdict == "regression"} == {"accuracy", "kernels"}
    with pytest.raises(GpusqError, match="compiled for"):
        compare(str(good), str(bundles["agx-orin"]), QUICK, db=none)


def test_says_the_same_in_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = save_model(tmp_path / "small.onnx", 1), save_model(tmp_path / "large.onnx", 1, 48)
    found = compare(str(small), str(large), QUICK, db=tmp_path / "none.db")
    suite = ElementTree.fromstring(to_junit(found))
    assert suite.get("tests") == str(len(found.metrics))
    assert to_markdown(found).startswith(f"## {found.verdict.capitalize()}: ")
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.chdir(tmp_path)
    arguments = ["compare", "--baseline", "small.onnx", "--candidate", "small.onnx", "--junit", "j.xml", "--json"]
    done = CliRunner().invoke(main, [*arguments, "--metric", "size", "--metric", "p50"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["verdict"] == "inconclusive"
    assert summary.read_text(encoding="utf-8").startswith("## Inconclusive: small.onnx beside small.onnx")
    assert ElementTree.parse(tmp_path / "j.xml").getroot().get("skipped") == "1"


def test_leaves_with_3_after_a_regression(benched: tuple[Path, Path, Path]) -> None:
    small, large, db = benched
    arguments = ["compare", "--baseline", str(small), "--candidate", str(large), "--db", str(db)]
    assert CliRunner().invoke(main, arguments).exit_code == 3
    assert CliRunner().invoke(main, [*arguments, "--max-regression", "much"]).exit_code == 2


def test_refuses_what_is_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match="neither a bundle"):
        read_subject(str(tmp_path))
