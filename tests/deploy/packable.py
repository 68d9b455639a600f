"""A bundle that is made without a conversion: a kept manifest, a model of a few lines, and an engine that is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from deploy.bundle import hash_files
from deploy.manifest import Manifest, read_manifest

KEPT = Path(__file__).parent / "data"


def sparse_model(seed: int = 0) -> ir.Model:
    """Two 2:4 INT8 weights and a dense one."""
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[N,64] x) => (float[N,8] y)
        <float s = {0.5}, int8[64,128] w1 = {0}, int8[128,64] w2 = {0}, int8[64,8] w3 = {0}>
        {
            d1 = DequantizeLinear(w1, s)
            d2 = DequantizeLinear(w2, s)
            d3 = DequantizeLinear(w3, s)
            h1 = MatMul(x, d1)
            h2 = MatMul(h1, d2)
            y = MatMul(h2, d3)
        }""")
    rng = np.random.default_rng(seed)
    for name, shape in (("w1", (64, 128)), ("w2", (128, 64)), ("w3", (64, 8))):
        weight = rng.integers(-127, 128, shape).astype(np.int8)
        if name != "w3":
            weight.reshape(-1, 4, shape[1])[:, ::2] = 0
        model.graph.initializers[name].const_value = ir.tensor(weight, name=name)
    return model


def make_bundle(folder: Path, *, external: bool = False) -> Manifest:
    """Write the bundle to `folder` and return its manifest."""
    folder.mkdir(parents=True)
    ir.save(sparse_model(), folder / "model.onnx", external_data="model.onnx.data" if external else None,
            size_threshold_bytes=0)  # fmt: skip
    (folder / "engine.sm80.rtx").write_bytes(b"an engine that is none" * 1000)
    (folder / "logs").mkdir()
    (folder / "logs" / "empty.log").touch()
    (folder / "manifest.json").write_text((KEPT / "manifest-1-a100.json").read_text())
    manifest = read_manifest(folder).model_copy(update={"files": hash_files(folder)})
    (folder / "manifest.json").write_text(manifest.to_json())
    return manifest
