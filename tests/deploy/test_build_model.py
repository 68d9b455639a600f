from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
from click.testing import CliRunner

from deploy.cli import main
from deploy.gates import missed_requirements
from deploy.plan import read_plan
from deploy.tensorrt_api import build_engine
from profiles.device import list_devices

pytest.importorskip("tensorrt_rtx", reason="these compile ahead of time")

TEXT = '<ir_version: 10, opset_import: ["": 20]> g (float16[N,64,64] x) => (float16[N,64,64] y) { y = MatMul(x, x) }'


@pytest.fixture
def model(tmp_path: Path) -> Path:
    ir.save(ir.from_onnx_text(TEXT), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def gpusq(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(word) for word in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_writes_engine_plan_and_options(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, _ = gpusq("build", model, "--profile", "a100", "--out", out, "--shapes", "x:1x64x64:2x64x64:4x64x64")
    assert code == 0
    assert "engine.sm80.rtx" in said
    done = json.loads((out / "build.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["build.json", "engine.sm80.rtx"]
    assert done["files"]["engine.sm80.rtx"]["bytes"] == (out / "engine.sm80.rtx").stat().st_size
    assert done["options"]["shapes"][0]["usual"] == [2, 64, 64]
    assert done["plan"]["sizes"] == {"x": [2, 64, 64]}


@pytest.mark.skipif("__import__('deploy.environment').environment.gpus()", reason="this host has a GPU")
def test_what_cannot_be_built_here_is_said_with_the_command_for_the_device(model: Path, tmp_path: Path) -> None:
    code, said, _ = gpusq("build", model, "--profile", "agx-orin", "--out", tmp_path / "out", "--refit")
    assert code == 0
    assert f"run `gpusq build {model} --profile agx-orin --out {tmp_path / 'out'} --refit` there" in said
    assert "--refit: for TensorRT on the device alone" in said


def test_a_gate_that_is_missed_is_exit_code_3_and_json_stays_json(model: Path, tmp_path: Path) -> None:
    code, said, errors = gpusq(
        "build", model, "--profile", "a100", "--out", tmp_path / "out", "--require", "int8-gemms=100%", "--json"
    )
    assert code == 3
    done = json.loads(said)
    assert done["gates_missed"][0]["requirement"] == "int8-gemms=100%"
    assert all(each["how"].endswith(" --require int8-gemms=100%") for each in done["missing"])
    assert "no layer of the model is quantized to INT8" in errors


def test_a_missed_gate_has_a_table_of_its_layers(tmp_path: Path) -> None:
    """The activation has a quantizer, but it is not what the product reads: the compiler dequantizes the weight."""
    eye = ",".join("1" if row == column else "0" for row in range(32) for column in range(32))
    text = f"""<ir_version: 10, opset_import: ["": 21]>
    g (float16[8,32] x) => (float16[8,32] y) <float16 s = {{12288}}, int8 z = {{0}}, int8[32,32] w = {{{eye}}}> {{
        v = DequantizeLinear (w, s, z)
        [fc] y = MatMul (x, v)
    }}"""
    ir.save(ir.from_onnx_text(text), tmp_path / "model.onnx")
    words = ("--profile", "a100", "--out", tmp_path / "out", "--require", "int8-gemms", "--require", "fused-attention")
    code, said, _ = gpusq("build", tmp_path / "model.onnx", *words)
    assert code == 3
    assert "Gate missed: fused-attention=100%: no attention was found in the model" in said
    assert "Gate missed: int8-gemms=100%: no layer of the model is quantized to INT8" in said
    (layer,) = json.loads((tmp_path / "out" / "build.json").read_text())["plan"]["layers"]
    assert (layer["asked"], layer["compiled"]) == (["float16", "int8"], ["Half", "Int8"])


@pytest.mark.parametrize(
    ("words", "code"),
    [([], 2), (["--profile", "a100"], 2), (["--profile", "cpu", "--out", "OUT", "--refit"], 1)],
)
def test_what_does_not_fit_is_refused(model: Path, tmp_path: Path, words: list[str], code: int) -> None:
    assert gpusq("build", model, *[str(tmp_path / "out") if word == "OUT" else word for word in words])[0] == code


def test_prints_trtexecs_command_for_each_line(model: Path) -> None:
    code, said, _ = gpusq("build", model, "--profile", "agx-orin", "--print-trtexec")
    assert code == 0
    assert [line for line in said.splitlines() if line.startswith("#")] == [
        "# TensorRT 10.3 (JetPack 6)",
        "# TensorRT 10.16 (JetPack 7.2)",
        "# TensorRT 11.x",
    ]
    assert said.count("--stronglyTyped") == 2


def test_a_bundle_takes_no_profile(bundles: dict[str, Path]) -> None:
    assert gpusq("build", bundles["a100"], "--profile", "a100")[0] == 2
    code, said, _ = gpusq("build", bundles["a100"], "--print-trtexec")
    assert code == 0
    assert f"--onnx={bundles['a100'] / 'model.onnx'}" in said


TARGETS = {
    device.ahead_of_time.compute_capability: device for device in list_devices() if device.ahead_of_time is not None
}


@pytest.mark.parametrize("target", sorted(TARGETS.keys() - {"SM80", "SM86"}))
def test_the_shipped_student_passes_its_gates_on_every_target(bundles: dict[str, Path], target: str) -> None:
    """What two profiles of one compute capability have apart is not the compiler's; the demo has the other two."""
    path = bundles["a100"] / "model.onnx"
    built = build_engine(path, "tensorrt-rtx", compute_capability=target)
    plan = read_plan(built.log, ir.load(path), source="", target=target)
    assert missed_requirements(plan, (), float_type="float16", placement="as-trained", required=()) == ()
    assert plan.linear_gemms == plan.linear_gemms_int8 > 0
    assert plan.attentions


def test_what_was_built_before_is_taken_and_a_changed_option_is_named(model: Path, tmp_path: Path) -> None:
    kept = ("--cache", tmp_path / "cache", "--explain")
    explained = []
    for out, options in (("one", ()), ("two", ()), ("three", ("--refit",))):
        code, said, errors = gpusq("build", model, "--profile", "a100", "--out", tmp_path / out, *options, *kept)
        assert code == 0
        assert f"--out {tmp_path / out}" in said or "missing" not in said
        explained.append(errors.splitlines()[0])
    assert explained[0].endswith("no build is in the cache")
    assert explained[1].startswith("model.onnx: build: hit ")
    assert explained[2].endswith("the nearest entry differs in options.refit: false → true")
    one, two = ((tmp_path / out / "engine.sm80.rtx").read_bytes() for out in ("one", "two"))
    assert one == two
