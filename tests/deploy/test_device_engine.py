"""What is read back from an engine that TensorRT built.

A trtexec of a few lines stands in: it prints and writes what recorded logs and inspectors say.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path

import onnx_ir as ir
import pytest

from deploy import device_engine, environment
from deploy.build_options import BuildOptions
from deploy.device_engine import build_on_device
from deploy.gates import missed_requirements
from deploy.requirements import parse_requirement
from profiles.device import load_device

TEXT = """<ir_version: 10, opset_import: ["": 20]>
g (float16[N,4] x) => (float16[N,4] y) <float16[4,4] w = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}> {
    [fc] y = MatMul (x, w)
}"""
LAYERS = {
    "Layers": [
        {
            "Name": "fc",
            "LayerType": "gemm",
            "Inputs": [{"Name": "x", "Dimensions": [8, 4], "Format/Datatype": "Half"}],
            "Constants": [{"Name": "w", "Dimensions": [4, 4], "Format/Datatype": "Half"}],
            "Outputs": [{"Name": "y", "Dimensions": [8, 4], "Format/Datatype": "Half"}],
            "TacticName": "sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tt_t_tilesize128x128x64_stage3_sptensor16x8x32",
            "Metadata": "[ONNX Layer: fc]",
        }
    ]
}
STAND_IN = f"""#!/bin/sh
echo '&&&& RUNNING TensorRT.trtexec [TensorRT v101603] # trtexec'
for word in "$@"; do case "$word" in
  --saveEngine=*) printf engine > "${{word#*=}}";;
  --exportLayerInfo=*) printf '%s' '{json.dumps(LAYERS)}' > "${{word#*=}}";;
esac; done
echo '[V] [TRT] (Sparsity) Found 2 layer(s) eligible to use sparse tactics: fc, fc2'
echo '[V] [TRT] (Sparsity) Chose 1 layer(s) using sparse tactics: fc'
echo '[W] [TRT] UNSUPPORTED_STATE: Skipping tactic 33 due to insufficient memory on requested size of 6291456 detected.'
"""


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "trtexec").write_text(STAND_IN)
    (tmp_path / "bin" / "trtexec").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(device_engine, "gpus", lambda: (environment.Gpu("NVIDIA A100-SXM4-80GB", "8.0", "580.65"),))
    folder = tmp_path / "a100"
    folder.mkdir()
    ir.save(ir.from_onnx_text(TEXT), folder / "model.onnx")
    return folder


def test_engine_log_and_layers_are_kept_and_read(bundle: Path) -> None:
    engine, plan = build_on_device(bundle, load_device("a100"), BuildOptions(workspace_mib=64), via="trtexec")
    assert sorted(path.name for path in bundle.iterdir()) == [
        "engine.tensorrt",
        "engine.tensorrt.layers.json",
        "engine.tensorrt.log",
        "model.onnx",
    ]
    assert (engine.runtime, engine.runtime_version, engine.target) == ("tensorrt", "10.16.3", "SM80")
    assert (engine.sparse_eligible, engine.sparse_chosen, engine.tactics_skipped) == (2, 1, 1)
    assert engine.options == {"workspace_mib": 64}
    assert plan is not None
    assert plan.source == "TensorRT 10.16.3, inspector"
    assert plan.sparse_kernels == 1
    (layer,) = plan.layers
    assert (layer.compiled, layer.sparse) == (("Half", "Half"), True)


def test_gates_are_held_to_what_was_read_back(bundle: Path) -> None:
    engine, plan = build_on_device(bundle, load_device("a100"), via="trtexec")

    def sentences(*texts: str) -> list[str]:
        required = tuple(map(parse_requirement, texts))
        found = missed_requirements(plan, (engine,), float_type="float16", placement="sparse-int8", required=required)
        return [each.sentence for each in found]

    assert sentences() == []
    assert sentences("sparse>=2", "all-tactics") == [
        "TensorRT chose sparse kernels for 1 layers, not for 2",
        "1 kernels were not tried for want of memory: build on a quiet device",
    ]


def test_the_timings_are_of_this_gpu_and_version(bundle: Path) -> None:
    build_on_device(bundle, load_device("a100"), via="trtexec")
    assert (bundle.parent / "cache" / "gpusq" / "timing").is_dir()
