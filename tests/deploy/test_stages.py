from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from calibration.methods import Method
from calibration.samples import SampleSource
from deploy.bundle import hash_files
from deploy.cache import Cache
from deploy.cache_key import differences
from deploy.cli import main
from deploy.conversion import convert
from deploy.job import Job
from deploy.manifest import read_manifest
from deploy.progress import Progress
from deploy.stages import build_key, own_code, surgery_key
from exporters.checkpoint import LoadOptions
from exporters.student_file import StudentFile, write_student
from profiles.device import load_device

A100 = load_device("a100")
STAGES = ["surgery", "build", "verify"]


@pytest.fixture
def small(student_file: StudentFile, tmp_path: Path) -> Path:
    write_student(tmp_path / "small.safetensors", student_file)
    return tmp_path / "small.safetensors"


def test_a_second_conversion_makes_nothing_and_gives_the_same_bundle(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    arguments = ["convert", str(small), "--profile", "a100", "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(main, [*arguments, "--cache", str(tmp_path / "cache"), "--explain"])
    assert [line.split()[:3] for line in shown.stderr.splitlines()] == [
        ["a100:", f"{name}:", "miss"] for name in STAGES
    ]
    before = read_manifest(tmp_path / "out" / "a100")
    assert before.files == hash_files(tmp_path / "out" / "a100")
    again = convert(small, profiles=["a100"], out=tmp_path / "out", cache=Cache(tmp_path / "cache"))
    assert [(answer.stage, answer.hit) for answer in again.stages] == [(stage, True) for stage in STAGES]
    assert read_manifest(tmp_path / "out" / "a100") == before
    other = convert(small, profiles=["a100"], out=tmp_path / "other", cache=Cache(tmp_path / "cache"))
    assert all(answer.hit for answer in other.stages)
    assert other.bundles[0].manifest.missing[0].how == f"gpusq build {tmp_path / 'other' / 'a100'}"


def job(small: Path, **given: Any) -> Job:
    asked = {"options": LoadOptions(), "precision": "auto", "asked_placement": None, "data": None, "baseline": None}
    made = Job(**{"checkpoint": small, "out": Path("out"), "progress": Progress(), **asked, **given})
    made.load([A100])
    made.note_sources()
    return made


def job_with(small: Path, options: LoadOptions) -> Job:
    made = job(small)
    made.options = options
    return made


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"precision": "fp16"}, {"precision", "placement"}),
        ({"options": LoadOptions(bits=8)}, {"options.bits"}),
        ({"repair_sparsity": True}, {"repair sparsity"}),
        ({"io_types": "graph"}, {"io types"}),
        ({"method": Method("percentile", 99.0)}, {"method", "method.name", "method.percentile"}),
    ],
)
def test_every_option_decides_about_the_surgery(small: Path, given: dict[str, Any], part: set[str]) -> None:
    before, now = (surgery_key(job(small, **options), A100) for options in ({}, given))
    assert part >= differences(before.parts, now.parts).keys() > set()


def test_samples_labels_and_profile_decide_about_the_surgery(small: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((8, 1, 28, 28)).astype(np.float32)
    for name, labels in (("a", np.arange(8)), ("b", np.arange(8)[::-1])):
        np.savez(tmp_path / f"{name}.npz", image=images, label=labels)
    keys = [surgery_key(job(small, data=SampleSource(str(tmp_path / name))), A100) for name in ("a.npz", "b.npz")]
    assert "samples.labels" in differences(keys[0].parts, keys[1].parts)
    none = surgery_key(job(small), A100)
    assert any(name.startswith("samples") for name in differences(none.parts, keys[0].parts))
    orin = differences(none.parts, surgery_key(job(small), load_device("agx-orin")).parts)
    assert "profile.compute_capability" in orin


def test_methods_that_were_chosen_on_the_first_device_decide_about_the_next(small: Path) -> None:
    made = job(small)
    before = surgery_key(made, A100)
    made.ranging.chosen = {"h": Method("entropy")}
    assert "chosen method.h.name" in differences(before.parts, surgery_key(made, A100).parts)


def test_the_target_and_the_model_decide_about_the_build_and_clocks_do_not(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"one")
    before = build_key(tmp_path / "model.onnx", A100)
    assert build_key(tmp_path / "model.onnx", A100.model_copy(update={"gpu": None})).digest == before.digest
    orin = build_key(tmp_path / "model.onnx", load_device("agx-orin"))
    assert "device.compute_capability" in differences(before.parts, orin.parts)
    options = build_key(tmp_path / "model.onnx", A100, LoadOptions())
    assert "options.bits" in differences(before.parts, options.parts)
    (tmp_path / "model.onnx").write_bytes(b"two")
    assert differences(before.parts, build_key(tmp_path / "model.onnx", A100).parts).keys() == {"model"}


def test_what_the_users_own_code_decides_is_always_made(small: Path) -> None:
    assert not own_code(job(small))
    for options in (LoadOptions(trust_code=True), LoadOptions(model="mine.net:factory")):
        assert own_code(job_with(small, options))
    assert not own_code(job_with(small, LoadOptions(model="timm:resnet18")))


def test_a_cache_and_none_contradict_each_other(tmp_path: Path) -> None:
    arguments = ["convert", "student.safetensors", "--profile", "a100", "--out", str(tmp_path / "out"), "--no-cache"]
    result = CliRunner().invoke(main, [*arguments, "--cache", str(tmp_path)])
    assert result.exit_code == 2
    assert "--cache and --no-cache contradict each other" in result.stderr
