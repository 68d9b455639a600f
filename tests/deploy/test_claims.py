"""Every verdict comes from real data: graphs, a bundle, timings of this host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from deploy.bench_models import BenchSpec, bench_models
from deploy.claim_checks.evidence import Evidence, read_evidence
from deploy.claims import claims, judge
from deploy.cli import main
from deploy.timing.history import open_history
from deploy.timing.interleave import Budget
from deploy.timing.results import BenchResult
from deploy.timing.statistics import Resampling
from profiles.claim import Claim, read_claims
from tests.deploy.timing.small_models import save_model

SPEC = BenchSpec(budget=Budget(0.05, 40, 60), resampling=Resampling(resamples=100))
SIZE = Claim(
    id="size",
    what="size ratio",
    model="student",
    format="2:4 INT8",
    weight_bits=8,
    activation_bits=8,
    scope="pruned layers",
    baseline="the dense model",
    baseline_precision="fp32",
    value=6.4,
    source="a test",
)
TIMING = {"format": "fp32", "device": "cpu", "batch": 1, "baseline_precision": "as written", "source": "a test"}


def test_sizes_of_the_shipped_student_are_decided_by_arithmetic(bundles: dict[str, Path]) -> None:
    """32/5 = 6.4 for what is pruned; of all parameters less, because the rest stays at 32 bits."""
    evidence = read_evidence([f"student={bundles['a100']}"])
    pruned = judge(SIZE, evidence)
    everything = judge(SIZE.model_copy(update={"scope": "all parameters"}), evidence)
    assert (pruned.verdict, everything.verdict) == ("confirmed", "refuted")
    assert pruned.found is not None
    assert pruned.found.value == pytest.approx(6.4)
    assert everything.found is not None
    assert 5 < everything.found.value < 6.4
    assert everything.origin == "computed"


def test_flops_fall_with_the_scope(bundles: dict[str, Path]) -> None:
    """2·32·32/(8·8) = 32 for what is pruned, 2·32·32/(8·4) = 64 with 4-bit weights; less with what stays dense."""
    evidence = read_evidence([f"student={bundles['a100']}"])
    claim = SIZE.model_copy(update={"what": "FLOPs ratio", "value": 31.0})
    values = []
    for scope in ("pruned layers", "linear layers", "all products"):
        found = judge(claim.model_copy(update={"scope": scope, "dense": ("head",)}), evidence).found
        assert found is not None
        values.append(found.value)
    assert values[0] == pytest.approx(32)
    assert values[0] > values[1] > values[2] > 16
    int4 = judge(claim.model_copy(update={"weight_bits": 4}), evidence).found
    assert int4 is not None
    assert int4.value == pytest.approx(64)


def test_counts_the_attention_of_the_shipped_student_by_hand(bundles: dict[str, Path]) -> None:
    """Of the first layer, K·N weights for each of 49 patches; of an attention, 2 · tokens² · width."""
    (cost,) = read_evidence([str(bundles["a100"])]).graphs.values()
    patch = next(layer for layer in cost.layers if layer.module == "patch_embed.proj")
    tokens, rest = divmod(patch.macs, patch.weights)
    width = patch.weights // patch.k
    blocks = len({layer.module.split(".")[1] for layer in cost.layers if layer.module.startswith("blocks.")})
    assert rest == 0
    assert cost.product_macs == blocks * 2 * tokens**2 * width


def test_a_drop_is_confirmed_by_verification_or_refuted(bundles: dict[str, Path]) -> None:
    evidence = read_evidence([f"student={bundles['a100']}"])
    claim = Claim.model_validate(
        {
            "id": "drop",
            "what": "accuracy drop",
            "model": "student",
            "format": "2:4 INT8",
            "baseline": "the student",
            "baseline_precision": "2:4 INT8",
            "value": 0.02,
            "source": "a test",
        }
    )
    assert judge(claim, evidence).verdict == "confirmed"
    assert judge(claim.model_copy(update={"value": -0.2}), evidence).verdict == "refuted"
    other = judge(claim.model_copy(update={"baseline": "the dense model"}), evidence)
    assert (other.verdict, other.found) == ("not testable here", None)


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    """A large and a small model beside another small one, measured here; the conditions are called good."""
    folder = tmp_path_factory.mktemp("timed")
    small, large = save_model(folder / "small.onnx", 2, 96), save_model(folder / "large.onnx", 30, 96)
    (result,) = bench_models([large, small], small, SPEC).results
    return result.model_copy(update={"conditions": result.conditions.model_copy(update={"broken": ()})})


def speedup(model: str, value: float, **changed: object) -> Claim:
    fields = {"id": "speed", "what": "latency speed-up", "model": model, "baseline": "small", "value": value}
    return Claim.model_validate({**TIMING, **fields, **changed})


def test_timings_confirm_refute_and_leave_open(timed: BenchResult) -> None:
    """The large model takes 15 times the products; the small one beside itself is exactly as fast as it was found."""
    evidence = Evidence(timings=[timed])
    _, large, same = (engine.name for engine in timed.engines)
    assert judge(speedup(large, 0.01), evidence).verdict == "confirmed"
    assert judge(speedup(large, 0.9), evidence).verdict == "refuted"
    found = judge(speedup(large, 0.01), evidence).found
    assert found is not None
    middle = judge(speedup(large, found.value), evidence)
    assert middle.verdict == "inconclusive"
    assert middle.origin == "measured"
    assert same.endswith("small.onnx")


def test_a_run_that_broke_a_condition_decides_nothing(timed: BenchResult) -> None:
    broken = timed.conditions.model_copy(update={"broken": ("others used the cores",)})
    evidence = Evidence(timings=[timed.model_copy(update={"conditions": broken})])
    found = judge(speedup(timed.engines[1].name, 0.01), evidence)
    assert found.verdict == "inconclusive"
    assert found.why[1:] == ("others used the cores",)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"device": "a100"}, "nothing among the results was measured on a100"),
        ({"batch": 8}, "no result of"),
        ({"baseline_precision": "fp16"}, "beside a baseline in fp16"),
        ({"what": "energy"}, "reads no energy"),
    ],
)
def test_says_what_is_missing(timed: BenchResult, changed: dict[str, object], why: str) -> None:
    found = judge(speedup(timed.engines[1].name, 1.0, **changed), Evidence(timings=[timed]))
    assert found.verdict == "not testable here"
    assert why in found.why[0]


def test_an_absolute_latency_is_claimed_as_at_most(timed: BenchResult) -> None:
    claim = speedup(timed.engines[0].name, 1e6, what="latency", batch=None)
    assert judge(claim, Evidence(timings=[timed])).verdict == "confirmed"
    assert judge(claim.model_copy(update={"value": 1e-6}), Evidence(timings=[timed])).verdict == "refuted"


def test_shipped_claims_of_the_paper_need_graphs_or_devices() -> None:
    for name in ("gpusq-vit", "yolov8-aerial"):
        assert {judged.verdict for judged in claims(name).claims} == {"not testable here"}
    assert {claim.value for claim in read_claims("gpusq-vit").claims if claim.what == "size ratio"} == {6.4, 12.7}


def test_claims_on_the_command_line(bundles: dict[str, Path], timed: BenchResult, tmp_path: Path) -> None:
    with open_history(tmp_path / "gpusq.db", create=True) as history:
        history.add(timed, [{}, {}, {}])
    results = ["--results", str(tmp_path / "gpusq.db"), "--results", f"DeiT-Tiny 224={bundles['a100']}"]
    done = CliRunner().invoke(main, ["claims", "gpusq-vit", *results])
    assert done.exit_code == 3
    assert "bit-operations = " in done.stdout
    assert CliRunner().invoke(main, ["claims", "yolov8-aerial", "--json"]).exit_code == 0
    wrong = CliRunner().invoke(main, ["claims", "nothing"])
    assert "one of those shipped: gpusq-vit, yolov8-aerial" in wrong.stderr
    as_json = CliRunner().invoke(main, ["claims", "gpusq-vit", *results, "--json"])
    assert {judged["verdict"] for judged in json.loads(as_json.stdout)["claims"]} == {
        "confirmed",
        "refuted",
        "not testable here",
    }
