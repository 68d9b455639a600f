from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from deploy.cli import main
from deploy.finish import check_files
from deploy.manifest import FILE_NAME, read_manifest
from deploy.write_report import ReportSpec, write_report
from profiles.errors import GpusqError
from tests.deploy.report_history import long_history

QUIET = ReportSpec(predict=False)
CLAIMS = """title = "Ours"

[[claim]]
id = "ours-size"
what = "size ratio"
model = "{model}"
format = "2:4 INT8"
weight_bits = 8
scope = "pruned layers"
formula = "values and indices"
baseline = "the dense FP32 model"
baseline_precision = "fp32"
value = 6.4
source = "the tests"

[[claim]]
id = "ours-latency"
what = "latency"
model = "{model}"
format = "2:4 INT8"
device = "a100"
batch = 1
baseline = "none"
baseline_precision = "none"
value = 1.0
source = "the tests"
"""


@pytest.fixture
def bundle(bundles: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles["a100"], tmp_path / "a100"))


def test_a_bundle_is_refreshed_and_stays_whole(bundle: Path) -> None:
    before = read_manifest(bundle)
    written = write_report([str(bundle)], spec=ReportSpec(batches=(1,)))
    assert written.page == bundle / "report.html"
    assert "not measured: needs the device" in (bundle / "report.md").read_text(encoding="utf-8")
    check_files(bundle, read_manifest(bundle))
    after = read_manifest(bundle)
    changed = {name for name in after.files if after.files[name] != before.files[name]}
    assert changed == {"report.html", "report.md"}


def test_a_second_run_changes_nothing(bundle: Path) -> None:
    write_report([str(bundle)], spec=QUIET)
    first = (bundle / FILE_NAME).read_bytes()
    write_report([str(bundle)], spec=QUIET)
    assert (bundle / FILE_NAME).read_bytes() == first


def test_a_signed_bundle_is_left_as_it_is(bundle: Path, tmp_path: Path) -> None:
    (bundle / "manifest.json.sig").write_bytes(b"a signature")
    before = (bundle / "report.html").read_bytes()
    with pytest.raises(GpusqError, match="is signed"):
        write_report([str(bundle)], spec=QUIET)
    assert (bundle / "report.html").read_bytes() == before
    assert write_report([str(bundle)], tmp_path / "x.html", QUIET).markdown == tmp_path / "x.md"


def test_a_claim_on_speed_stands_beside_what_is_predicted(bundle: Path, tmp_path: Path) -> None:
    claims = tmp_path / "claims.toml"
    claims.write_text(CLAIMS.format(model=read_manifest(bundle).student.model), encoding="utf-8")
    written = write_report([str(bundle)], tmp_path / "x.html", ReportSpec(batches=(1,), claims=str(claims)))
    lines = {line.split(":")[0]: line for line in written.verdicts}
    assert "confirmed (computed)" in lines["ours-size"]
    assert "not testable here" in lines["ours-latency"]
    assert "predicted, not measured" in lines["ours-latency"]


def test_a_history_shows_the_runs_of_the_model_and_its_forerunners(bundles: dict[str, Path], tmp_path: Path) -> None:
    model = bundles["cpu"] / "engine.onnx"
    history = long_history(tmp_path / "gpusq.db", model, 12)
    text = write_report([str(model)], tmp_path / "x.html", ReportSpec(history=history)).markdown.read_text("utf-8")
    assert "p50 of 12 runs at batch 8" in text
    assert "Samples per second, measured on" in text
    assert "Nothing was predicted: no device was named" in text
    of_all = write_report([str(history)], tmp_path / "db.html", QUIET).markdown.read_text("utf-8")
    assert "p50 of 12 runs at batch 1" in of_all


def test_two_are_compared_and_what_is_otherwise_is_said(bundles: dict[str, Path], tmp_path: Path) -> None:
    paths = [str(bundles["cpu"] / "model.onnx"), str(bundles["cpu"])]
    written = write_report(paths, tmp_path / "x.html", QUIET)
    assert written.verdicts[0].startswith("All metrics: Pass")
    assert "What is otherwise" in written.markdown.read_text("utf-8")


def test_what_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match="neither a bundle, an ONNX file nor a history"):
        write_report([str(tmp_path / "none.onnx")], spec=QUIET)
    with pytest.raises(GpusqError, match="no history"):
        write_report(["x.onnx"], spec=ReportSpec(history=tmp_path / "none.db"))


def test_another_profile_than_the_bundle_s_is_refused(bundle: Path) -> None:
    with pytest.raises(GpusqError, match="was made for"):
        write_report([str(bundle)], spec=ReportSpec(profile="agx-orin"))


def test_the_command_prints_verdicts_and_refuses_three(bundle: Path, tmp_path: Path) -> None:
    arguments = ["report", str(bundle), "--no-predict", "-o", str(tmp_path / "x.html"), "--json"]
    found = json.loads(CliRunner().invoke(main, arguments).stdout)
    assert (found["schema"], found["page"]) == (1, str(tmp_path / "x.html"))
    assert any("fused-attention=100%: met (compiled)" in line for line in found["verdicts"])
    assert CliRunner().invoke(main, ["report", "a", "b", "c"]).exit_code == 2
