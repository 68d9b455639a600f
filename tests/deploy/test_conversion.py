"""The main job, on the shipped student and the shipped images."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import deploy
from calibration.rows import all_of
from calibration.samples import load_samples
from deploy.bundle import hash_file, hash_files
from deploy.conversion import Conversion, convert
from deploy.inspect import Inspection, inspect
from deploy.job import Precision
from deploy.manifest import Manifest, read_manifest
from deploy.onnxruntime_api import open_session
from exporters.checkpoint import load_student
from exporters.linears import find_linears
from exporters.student import sample_specs
from exporters.student_file import read_student
from profiles.errors import GpusqError
from students.fashion_vit.sample import labelled_images, student_path, teacher_path

GPU_PROFILES = ("a100", "agx-orin")
ALL_PROFILES = (*GPU_PROFILES, "cpu")
CPU_FLAGS = Path("/proc/cpuinfo").read_text()


@pytest.fixture
def manifests(bundles: dict[str, Path]) -> dict[str, Manifest]:
    return {name: read_manifest(path) for name, path in bundles.items()}


@pytest.mark.parametrize("profile", ALL_PROFILES)
def test_keeps_the_trained_scales_bit_for_bit(bundles: dict[str, Path], profile: str) -> None:
    student = read_student(student_path())
    linears = {linear.module: linear for linear in find_linears(ir.load(bundles[profile] / "model.onnx").graph)}
    assert linears.keys() == student.weight_scales.keys()
    for module, linear in linears.items():
        assert linear.weight_scale is not None
        assert linear.weight_scale.astype(np.float32).tobytes() == student.weight_scales[module].tobytes()
        assert np.float32(linear.input_scale).tobytes() == student.input_scales[module].tobytes()
        stored = linear.values.T if linear.k_axis == 0 else linear.values
        np.testing.assert_array_equal(stored, student.tensors[f"{module}.weight"])


def test_lists_the_samples_that_were_used(bundles: dict[str, Path], manifests: dict[str, Manifest]) -> None:
    for profile, manifest in manifests.items():
        listed = (bundles[profile] / "samples.sha256").read_text()
        assert manifest.samples is not None
        assert (manifest.samples.count, manifest.samples.available, manifest.samples.seed) == (1000, 1000, None)
        assert len(listed.splitlines()) == 1000
        hashes = "".join(f"{line[:64]}\n" for line in listed.splitlines())
        assert hashlib.sha256(hashes.encode()).hexdigest() == manifest.samples.sha256


def test_stores_scales_in_the_type_of_the_graph_where_that_is_exact(bundles: dict[str, Path]) -> None:
    types = {}
    for profile, path in bundles.items():
        scales = [linear.weight_scale for linear in find_linears(ir.load(path / "model.onnx").graph)]
        types[profile] = {scale.dtype.name for scale in scales if scale is not None}
    assert types == {"a100": {"float16"}, "agx-orin": {"float16"}, "cpu": {"float32"}}


def test_float32_model_agrees_with_the_fake_quantized_student(manifests: dict[str, Manifest]) -> None:
    verified = manifests["cpu"].verified
    assert verified is not None
    assert verified.count == 1000
    assert verified.agreement is not None
    assert verified.agreement >= 0.999


@pytest.mark.parametrize("profile", GPU_PROFILES)
def test_float16_model_loses_nothing_measurable(manifests: dict[str, Manifest], profile: str) -> None:
    verified = manifests[profile].verified
    assert verified is not None
    assert verified.agreement is not None
    assert verified.agreement >= 0.99  # what is missing are near ties, as the next test shows
    assert verified.onnx_top1 is not None
    assert verified.student_top1 is not None
    assert abs(verified.onnx_top1 - verified.student_top1) <= 0.003


@pytest.fixture(scope="module")
def logits(bundles: dict[str, Path]) -> dict[str, npt.NDArray[np.float32]]:
    """What each bundle's model answers to the shipped images, [1000, 10]."""
    specs = sample_specs(load_student(student_path()))
    images = {name: all_of(rows) for name, rows in load_samples(labelled_images(), specs).inputs.items()}

    def answers(path: Path) -> npt.NDArray[np.float32]:
        session = open_session(path / "model.onnx")
        batches = ({name: rows[at : at + 50] for name, rows in images.items()} for at in range(0, 1000, 50))
        return np.concatenate([session.run(None, batch)[0] for batch in batches])

    return {profile: answers(path) for profile, path in bundles.items()}


@pytest.mark.parametrize("profile", GPU_PROFILES)
def test_float16_model_differs_in_near_ties_alone(logits: dict[str, npt.NDArray[np.float32]], profile: str) -> None:
    """Rounding moves an answer by 0.015, so it decides where the two best are no more than ten times that apart.

    21 of the 1,000 images have such a margin below 0.2, and 3 to 6 of them get another class, whichever way the
    attention is written and whether its scores are float16 or float32.
    """
    exact, rounded = logits["cpu"], logits[profile]
    assert np.sqrt(np.square(rounded - exact).mean()) < 0.02
    best = np.sort(exact, axis=1)
    margins = best[:, -1] - best[:, -2]
    assert margins[exact.argmax(axis=1) != rounded.argmax(axis=1)].max() < 0.15


def test_verified_accuracy_is_the_one_that_training_wrote_down(manifests: dict[str, Manifest]) -> None:
    verified = manifests["cpu"].verified
    assert verified is not None
    assert verified.student_top1 == pytest.approx(read_student(student_path()).card["test_1000_accuracy"], abs=1e-9)


@pytest.mark.parametrize("profile", GPU_PROFILES)
def test_every_linear_gemm_is_int8_and_every_attention_fused(manifests: dict[str, Manifest], profile: str) -> None:
    plan = manifests[profile].plan
    assert plan is not None
    assert plan.linear_gemms == plan.linear_gemms_int8 == len(manifests[profile].layers)
    assert plan.gemms_by_type == {"Int8": plan.linear_gemms}
    assert plan.attentions
    assert all(attention.fused for attention in plan.attentions)
    assert max(plan.kernels_per_block.values()) <= 10


def test_says_that_the_plan_for_orin_is_its_nearest_relatives(manifests: dict[str, Manifest]) -> None:
    (engine,) = manifests["agx-orin"].engines
    assert (engine.target, engine.nearest) == ("SM86", True)
    assert "SM86" in engine.note
    assert manifests["a100"].engines[0].nearest is False


@pytest.mark.parametrize("profile", GPU_PROFILES)
def test_says_that_the_tensorrt_engine_is_missing_and_how_to_build_it(
    manifests: dict[str, Manifest], bundles: dict[str, Path], profile: str
) -> None:
    (missing,) = manifests[profile].missing
    assert missing.what == "TensorRT engine"
    assert f"gpusq build {bundles[profile]}" in missing.how


def test_finds_every_pruned_layer_2_of_4_on_its_int8_weights(manifests: dict[str, Manifest]) -> None:
    by_module = {layer.module: layer for layer in manifests["a100"].layers}
    assert by_module.pop("head").sparsity.pattern == "dense"
    assert len(by_module) == 25
    for layer in by_module.values():
        assert (layer.sparsity.pattern, layer.sparsity.axis, layer.weight_type) == ("2:4", 0, "int8")
        assert layer.sparsity.broken_groups == 0
        assert layer.sparsity.zeros >= 0.5


def test_compressed_size_is_the_papers_six_point_four(manifests: dict[str, Manifest]) -> None:
    sizes = manifests["a100"].sizes
    student = read_student(student_path())
    pruned = sum(
        array.size for name, array in student.tensors.items() if array.dtype == np.int8 and name != "head.weight"
    )
    assert sizes.pruned_fp32 == 4 * pruned
    assert sizes.pruned_compressed == pruned * 5 // 8
    assert sizes.pruned_ratio == pytest.approx(6.4)


def test_writes_the_sparsity_into_the_nodes(bundles: dict[str, Path]) -> None:
    model = onnx.load(bundles["a100"] / "model.onnx")
    node = next(node for node in model.graph.node if node.name == "blocks.0.attn.qkv/MatMul")
    assert {prop.key: prop.value for prop in node.metadata_props} == {
        "gpusq.module": "blocks.0.attn.qkv",
        "gpusq.sparsity": "2:4",
        "gpusq.sparsity.axis": "0",
        "gpusq.sparsity.eligible": "true",
        "gpusq.sparsity.reason": (
            "NVIDIA reports sparse INT8 kernels chosen only where the output is INT8; no quantizer follows here"
        ),
    }


@pytest.mark.parametrize("profile", ALL_PROFILES)
def test_model_passes_the_onnx_checker_and_names_no_path(bundles: dict[str, Path], profile: str) -> None:
    path = bundles[profile] / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    content = path.read_bytes()
    assert b"site-packages" not in content
    assert str(Path(deploy.__file__).parent.parent).encode() not in content


@pytest.mark.parametrize("profile", ALL_PROFILES)
def test_manifest_names_every_file_with_its_hash(bundles: dict[str, Path], profile: str) -> None:
    manifest = read_manifest(bundles[profile])
    assert manifest.files == hash_files(bundles[profile])
    assert {"model.onnx", "report.html", "report.md"} <= manifest.files.keys()
    assert manifest.student.sha256 == hash_file(student_path()).sha256
    assert {"torch", "onnx", "onnxruntime", "tensorrt-rtx", "python"} <= manifest.versions.keys()
    assert Manifest.model_validate_json(manifest.to_json()) == manifest


def test_measures_the_student_against_its_dense_teacher(
    manifests: dict[str, Manifest], bundles: dict[str, Path]
) -> None:
    measured = manifests["cpu"].measured
    assert measured is not None
    assert measured.baseline is not None
    assert measured.speedup is not None
    assert (measured.student.precision, measured.baseline.precision) == ("int8", "fp32")
    assert measured.speedup.low <= measured.speedup.value <= measured.speedup.high
    assert len((bundles["cpu"] / measured.raw).read_text().splitlines()) == 1 + 2 * measured.pairs
    assert manifests["a100"].measured is None


def test_engine_for_the_cpu_answers_as_the_model_does(bundles: dict[str, Path]) -> None:
    image = np.random.default_rng(0).standard_normal((16, 1, 28, 28), np.float32)
    engine, model = (
        open_session(bundles["cpu"] / name).run(None, {"image": image})[0] for name in ("engine.onnx", "model.onnx")
    )
    # Both quantize the same tensors; a different order of float sums may move a value across a rounding boundary.
    np.testing.assert_allclose(engine, model, atol=0.05)


@pytest.mark.skipif(
    "avx2" not in CPU_FLAGS or "vnni" in CPU_FLAGS, reason="only processors with AVX2 and without VNNI saturate"
)
def test_saturating_int8_kernels_would_not_have_passed(bundles: dict[str, Path]) -> None:
    """Without VNNI, onnxruntime's default kernels saturate: the reason why every session here asks for exact ones."""
    images = np.load(labelled_images())["image"].astype(np.float32)
    specs = read_student(student_path()).inputs["image"]
    feed = {"image": (images * np.float32(specs.scale) - np.float32(specs.mean)) / np.float32(specs.std)}
    model = bundles["cpu"] / "model.onnx"
    exact = open_session(model).run(None, feed)[0]
    unchecked = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"]).run(None, feed)[0]
    assert np.abs(exact - unchecked).max() > 0.05


@pytest.mark.parametrize(
    ("precision", "weight_type", "activation_type"), [("fp32", "float32", "float32"), ("fp16", "float16", "float16")]
)
def test_drops_the_trained_quantization_only_when_told_to(
    tmp_path: Path, precision: Precision, weight_type: str, activation_type: str
) -> None:
    done = convert(student_path(), profiles=["cpu"], out=tmp_path / "out", precision=precision)
    manifest = done.bundles[0].manifest
    assert (manifest.precision_asked, manifest.precision) == (precision, precision)
    assert {layer.weight_type for layer in manifest.layers} == {weight_type}
    assert {layer.activation_type for layer in manifest.layers} == {activation_type}
    assert manifest.verified is not None
    assert manifest.verified.labelled is False
    assert manifest.verified.agreement is not None
    assert manifest.verified.agreement >= 0.98


@pytest.mark.parametrize("first", ["", "import deploy.conversion; "])
def test_python_api_is_a_function_whatever_was_imported_before(first: str) -> None:
    subprocess.run([sys.executable, "-c", f"{first}from deploy import convert; assert callable(convert)"], check=True)


def test_bundle_of_a_users_own_profile_describes_itself(tmp_path: Path) -> None:
    text = (Path(deploy.__file__).parents[1] / "profiles" / "devices" / "cpu.toml").read_text()
    profile = tmp_path / "my-board.toml"
    profile.write_text(text.replace("the CPU of this host", "my board"))
    bundle = convert(student_path(), profiles=[str(profile)], out=tmp_path / "out").bundles[0]
    assert bundle.path.name == "my-board"
    assert bundle.manifest.device_profile.title == "my board"
    found = inspect(bundle.path)
    assert isinstance(found, Inspection)
    assert found.profile == "my-board"


def test_float16_models_stay_finite_with_every_operator_in_float16(manifests: dict[str, Manifest]) -> None:
    for profile in GPU_PROFILES:
        verified = manifests[profile].verified
        assert verified is not None
        assert verified.float16 is not None
        assert verified.float16.finite
        assert verified.float16.agreement is not None
        assert verified.float16.agreement >= 0.95
    assert manifests["cpu"].verified is not None
    assert manifests["cpu"].verified.float16 is None


def test_misses_no_gate(manifests: dict[str, Manifest]) -> None:
    assert [manifest.gates_missed for manifest in manifests.values()] == [(), (), ()]


def test_refuses_int8_for_a_student_without_scales(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match="has layers without trained scales"):
        convert(teacher_path(), profiles=["cpu"], out=tmp_path / "out", precision="int8")
    assert not (tmp_path / "out").exists()


def test_engines_and_models_are_the_same_bytes_twice(
    conversion: Conversion, bundles: dict[str, Path], tmp_path: Path
) -> None:
    again = convert(student_path(), profiles=["a100"], out=tmp_path / "out", data=labelled_images())
    for name in ("model.onnx", "engine.sm80.rtx"):
        assert hash_file(again.bundles[0].path / name) == hash_file(bundles["a100"] / name)
