from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from calibration.samples import SampleSource
from deploy.ahead_of_time import compile_ahead
from deploy.cli import main
from deploy.conversion import convert
from deploy.surgery import operate
from exporters.linears import find_linears
from exporters.placement import Placement
from exporters.save_onnx import save_onnx
from profiles.device import load_device
from profiles.errors import GpusqError


@pytest.fixture(scope="session")
def float_onnx(exported_student: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small student as a float ONNX file."""
    path = tmp_path_factory.mktemp("float") / "student.onnx"
    save_onnx(exported_student, path)
    return path


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "calib.npz"
    np.savez(path, image=np.random.default_rng(0).standard_normal((64, 1, 28, 28), np.float32))
    return path


@pytest.mark.parametrize(
    ("placement", "profile", "kernels_per_block"),
    [
        ("w8a8-linear", "a100", 10),
        ("w8a8-mha", "a100", 9),
        ("sparse-int8", "a100", 10),
        ("w8a8-linear", "agx-orin", 10),
    ],
)
def test_a_float_graph_becomes_int8_kernels(
    float_onnx: Path, samples: Path, tmp_path: Path, placement: Placement, profile: str, kernels_per_block: int
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="compiling ahead of time needs tensorrt-rtx")
    done = operate(float_onnx, tmp_path / "out.onnx", profile=profile, placement=placement, data=samples)
    ahead = load_device(profile).ahead_of_time
    assert ahead is not None
    plan = compile_ahead(done.files[0], ahead).plan
    assert (plan.linear_gemms_int8, plan.linear_gemms) == (9, 10)  # the head has ten outputs: too few for INT8
    assert all(attention.fused for attention in plan.attentions)
    assert max(plan.kernels_per_block.values()) <= kernels_per_block


def test_every_quantizer_and_every_merged_gemm_is_told(float_onnx: Path, samples: Path, tmp_path: Path) -> None:
    done = operate(float_onnx, tmp_path / "out.onnx", profile="a100", precision="int8", data=samples)
    placed = next(step for step in done.passes if step.name == "place quantizers (w8a8-linear)")
    assert placed.changed == len(placed.changes) == 18  # an activation and a weight for each linear but the head
    assert [left.where for left in placed.left_alone] == ["head"]
    assert {"blocks.0.mlp.fc1.input", "blocks.0.mlp.fc1.weight"} <= {change.where for change in placed.changes}


def test_a_quantized_graph_keeps_its_scales_and_gets_no_more(
    quantized_student: ir.Model, tmp_path: Path, samples: Path
) -> None:
    save_onnx(quantized_student, tmp_path / "trained.onnx")
    done = operate(tmp_path / "trained.onnx", tmp_path / "o.onnx", profile="cpu", placement="w8a8-linear", data=samples)
    before = {linear.module: linear for linear in find_linears(quantized_student.graph)}
    after = {linear.module: linear for linear in find_linears(ir.load(done.files[0]).graph)}
    assert next(step.changed for step in done.passes if step.name.startswith("place")) == 0
    for module, linear in before.items():
        assert after[module].input_scale == linear.input_scale
        assert np.array_equal(np.asarray(after[module].weight_scale), np.asarray(linear.weight_scale))


def test_a_float_onnx_file_goes_the_whole_way(float_onnx: Path, samples: Path, tmp_path: Path) -> None:
    done = convert(float_onnx, profiles=["cpu"], out=tmp_path / "dist", precision="int8", data=samples)
    (bundle,) = done.bundles
    assert bundle.manifest.precision == "int8"
    verified = bundle.manifest.verified
    assert verified is not None
    assert verified.agreement is not None
    assert verified.agreement >= 0.9  # of the classes of random weights, near ties


def test_images_are_chosen_and_told(float_onnx: Path, tmp_path: Path) -> None:
    """Photos become what the graph takes by the user's file; grey ones, since the model is grey."""
    images = importlib.import_module("PIL.Image")
    for level in range(6):
        images.new("RGB", (40, 30), (40 * level, 0, 0)).save(tmp_path / f"{level}.png")
    (tmp_path / "grey.toml").write_text('resize = 28\ncrop = 28\ncolours = "grey"\nmean = [0.286]\nstd = [0.353]\n')
    source = SampleSource(str(tmp_path), count=4, seed=1, preprocessing=tmp_path / "grey.toml")
    done = operate(float_onnx, tmp_path / "out.onnx", profile="cpu", precision="int8", data=source)
    assert done.samples is not None
    assert (done.samples.count, done.samples.available, done.samples.seed) == (4, 6, 1)
    assert done.samples.preprocessing is not None
    assert done.samples.preprocessing["crop"] == 28
    assert "4 samples are few to measure ranges on: give 128 to 512" in done.samples.notes
    assert "4 of 4 images are coloured: made grey" in done.samples.notes


def test_samples_are_made_of_the_model_alone(float_onnx: Path, tmp_path: Path) -> None:
    source = SampleSource("synthetic", count=2, seed=3)
    done = convert(float_onnx, profiles=["cpu"], out=tmp_path / "dist", precision="int8", data=source)
    manifest = done.bundles[0].manifest
    assert manifest.samples is not None
    assert manifest.samples.source == "2 synthetic inputs (the patch diversity of 2 attentions, seed 3)"
    assert manifest.samples.notes == ("the samples are synthetic: ranges and agreement on real ones differ",)
    assert manifest.verified is not None
    assert manifest.verified.samples == manifest.samples.source


def test_without_samples_nothing_can_be_measured(float_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match="has layers without trained scales") as caught:
        operate(float_onnx, tmp_path / "out.onnx", profile="a100", placement="w8a8-linear")
    assert "--data" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_four_bit_weights_need_no_samples(float_onnx: Path, tmp_path: Path) -> None:
    done = operate(float_onnx, tmp_path / "out.onnx", profile="a100", placement="w4")
    kinds = {linear.weight_type for linear in find_linears(ir.load(done.files[0]).graph)}
    assert "int4" in kinds
    assert done.precision == "w4"


def test_a_placement_and_a_precision_that_contradict_each_other_are_refused(float_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match="contradict each other"):
        operate(float_onnx, tmp_path / "out.onnx", profile="a100", precision="fp32", placement="w8a8-linear")


def test_the_command_tells_what_each_pass_did(float_onnx: Path, samples: Path, tmp_path: Path) -> None:
    arguments = ["surgery", str(float_onnx), "--profile", "a100", "--placement", "w8a8-linear", "--data", str(samples)]
    out = ["-o", str(tmp_path / "out.onnx")]
    said = CliRunner().invoke(main, [*arguments, *out])
    assert said.exit_code == 0
    assert "place quantizers (w8a8-linear): 18" in said.stdout
    told = json.loads(CliRunner().invoke(main, [*arguments, *out, "--json"]).stdout)
    assert (told["schema"], told["placement"], told["precision"]) == (1, "w8a8-linear", "int8")
    assert [step["name"] for step in told["passes"]][-2] == "set opset"


def test_a_bfloat16_bundle_is_verified_and_compiled(float_onnx: Path, tmp_path: Path) -> None:
    """Within 5 % of the largest output: bfloat16 has a step of 2^-8, and rounds behind every operator."""
    done = convert(float_onnx, profiles=["a100"], out=tmp_path / "dist", precision="bf16", io_types="graph")
    manifest = done.bundles[0].manifest
    assert (manifest.precision, manifest.float_type) == ("bf16", "bfloat16")
    assert manifest.verified is not None
    assert manifest.verified.relative_difference is not None
    assert 0 < manifest.verified.relative_difference <= 0.05
    assert manifest.plan is not None
    assert manifest.plan.gemms_by_type.keys() == {"BFloat16"}
    assert manifest.gates_missed == ()


def test_bfloat16_is_refused_where_the_device_has_none(float_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match=r"^cpu has no bfloat16 kernels$"):
        operate(float_onnx, tmp_path / "out.onnx", profile="cpu", precision="bf16")


def test_io_types_and_precision_are_options_of_the_command(float_onnx: Path, tmp_path: Path) -> None:
    arguments = ["surgery", str(float_onnx), "--profile", "a100", "--precision", "fp16", "--io-types", "graph"]
    said = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "out.onnx")])
    assert said.exit_code == 0
    graph = ir.load(tmp_path / "out.onnx").graph
    assert {value.dtype for value in (*graph.inputs, *graph.outputs)} == {ir.DataType.FLOAT16}
    assert "Cast" not in {node.op_type for node in graph}


def test_a_bundle_whose_input_is_float16_is_verified_and_measured(float_onnx: Path, tmp_path: Path) -> None:
    done = convert(float_onnx, profiles=["cpu"], out=tmp_path / "dist", precision="fp16", io_types="graph")
    manifest = done.bundles[0].manifest
    assert manifest.verified is not None
    assert manifest.verified.float16 is not None
    assert manifest.verified.float16.finite
    assert manifest.measured is not None


def test_improvements_run_in_their_order_and_leave_a_valid_graph(
    float_onnx: Path, samples: Path, tmp_path: Path
) -> None:
    done = operate(
        float_onnx,
        tmp_path / "s.onnx",
        profile="a100",
        placement="w8a8-linear",
        data=samples,
        improve=("mse-weights", "bias-correction", "error-feedback", "smooth-quant", "equalize"),
    )
    names = [step.name for step in done.passes]
    order = ["smooth activations", "equalize channels", "place quantizers (w8a8-linear)"]
    order += ["round with error feedback", "correct biases", "lower fake quantizers"]
    assert [name for name in names if name in order] == order


def test_improvements_need_quantizers_to_place_and_samples(float_onnx: Path, samples: Path, tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match="quantizes nothing"):
        operate(float_onnx, tmp_path / "s.onnx", profile="a100", data=samples, improve=("smooth-quant",))
    with pytest.raises(GpusqError, match="error-feedback looks at what the model does on samples"):
        operate(float_onnx, tmp_path / "s.onnx", profile="a100", placement="w4", improve=("error-feedback",))
