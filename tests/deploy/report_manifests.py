"""Manifests like those of real bundles, for the tests of the report."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from deploy.manifest import (
    BlockAttention,
    Engine,
    FileEntry,
    Float16Check,
    Interval,
    Kernel,
    Layer,
    Manifest,
    Measurement,
    Missing,
    Plan,
    Prediction,
    Sizes,
    Source,
    Timing,
    Verification,
)
from exporters.passes.outcome import LeftAlone, Outcome
from exporters.sparsity import Sparsity
from profiles.device import load_device

HOSTILE = "blocks.0.</script><b>|`hostile`"
DIGEST = "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"
WIDTH = 192


def linear(module: str, k: int, n: int, *, sparse: bool = True, eligible: bool = True, reason: str = "") -> Layer:
    pattern = Sparsity(
        pattern="2:4" if sparse else "dense",
        axis=1,
        zeros=0.5 if sparse else 0.0003,
        broken_groups=0 if sparse else k * n // 4,
        eligible=sparse and eligible,
        reason=reason,
    )
    return Layer(
        module=module,
        k=k,
        n=n,
        weight_type="int8" if sparse else "float16",
        activation_type="int8" if sparse else "float16",
        input_scale=0.02341 if sparse else None,
        weight_scale_min=0.000912 if sparse else None,
        weight_scale_max=0.00413 if sparse else None,
        sparsity=pattern,
    )


def vit_layers(*, eligible: bool, reason: str, extra: tuple[Layer, ...] = ()) -> tuple[Layer, ...]:
    shapes = {
        "attn.qkv": (WIDTH, 3 * WIDTH),
        "attn.proj": (WIDTH, WIDTH),
        "mlp.fc1": (WIDTH, 4 * WIDTH),
        "mlp.fc2": (4 * WIDTH, WIDTH),
    }
    blocks = [
        linear(f"blocks.{block}.{name}", k, n, eligible=eligible, reason=reason)
        for block in range(4)
        for name, (k, n) in shapes.items()
    ]
    embed = linear("patch_embed.proj", 64, WIDTH, eligible=eligible, reason=reason)
    head = linear("head", WIDTH, 10, sparse=False, reason="not pruned: the head stays dense")
    return (embed, *blocks, head, *extra)


def vit_plan() -> Plan:
    kernels = [kernel("__myl_PadReshQuan", "pointwise", ("Half",), "patch_embed"), gemm("patch_embed.proj")]
    for block in (f"blocks.{number}" for number in range(4)):
        kernels += [
            kernel("__myl_MeanSubMulQuan", "pointwise", ("Half",), f"{block}.norm1"),
            gemm(f"{block}.attn.qkv"),
            kernel("__myl_MoveReshQuan", "pointwise", ("Int8",), f"{block}.attn"),
            kernel("__mha_v2_int8_s16_d64", "attention", ("Int8", "Int8", "Int8"), f"{block}.attn"),
            kernel("sm80_fused_add", "fused-gemm", ("Int8", "Int8", "Half"), f"{block}.attn.proj", block),
            kernel("__myl_MeanSubMulQuan", "pointwise", ("Half", "Float"), f"{block}.norm2"),
            kernel("sm80_fused_gelu", "fused-gemm", ("Int8", "Int8", "Float"), f"{block}.mlp.fc1", f"{block}.mlp.act"),
            kernel("__myl_Quan", "pointwise", ("Half",), f"{block}.mlp.act"),
            kernel("sm80_fused_add", "fused-gemm", ("Int8", "Int8", "Half"), f"{block}.mlp.fc2", block),
        ]
    kernels += [kernel("__myl_MeanMove", "pointwise", ("Half",), "norm"), kernel("Reformat", "pointwise", ())]
    kernels += [kernel("sm80_xmma_gemm_f16f16", "gemm", ("Half", "Half"), "head")]
    return Plan(
        source="TensorRT-RTX 1.7.1.116, ahead of time",
        target="SM80",
        kernels=tuple(kernels),
        gemms_by_type={"Int8": 17, "Half": 1},
        linear_gemms=18,
        linear_gemms_int8=17,
        attentions=tuple(BlockAttention(module=f"blocks.{number}.attn", fused=True) for number in range(4)),
        kernels_per_block={f"blocks.{number}": 9 for number in range(4)},
        weights_bytes=1_894_400,
        scratch_bytes=786_432,
    )


def kernel(name: str, kind: str, types: tuple[str, ...], *modules: str) -> Kernel:
    return Kernel(name=f"{name}_0x1f3a", kind=kind, types=types, modules=modules)


def gemm(module: str) -> Kernel:
    return kernel("sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x64x64", "gemm", ("Int8", "Int8", "Float"), module)


def fields(**changes: Any) -> dict[str, Any]:
    source = Source(
        file="fashion_vit_w8a8_24.pt",
        sha256=DIGEST,
        model="students.fashion_vit.model:fashion_vit",
        parameters=1_815_562,
        card={"epochs": 30, "top1": 0.912, "sparsity": "2:4 magnitude, then QAT with distillation"},
    )
    return {
        "gpusq": "0.1.0",
        "created": "2026-11-24T04:22:44+00:00",
        "profile": "a100-sxm-80gb",
        "device": "NVIDIA A100 SXM 80 GB",
        "device_profile": load_device("a100"),
        "gates_missed": (),
        "student": source,
        "baseline": None,
        "precision_asked": "w8a8-linear",
        "precision": "w8a8-linear",
        "float_type": "float16",
        "opset": 20,
        "host": {"system": "Linux 6.1, x86_64", "cpu": "2 cores", "gpu": "none"},
        "versions": {"onnx": "1.23.2", "onnxruntime": "1.32.0", "tensorrt_rtx": "1.7.1.116"},
        "layers": vit_layers(eligible=True, reason="its GEMM must have an INT8 output"),
        "sizes": SIZES,
        "passes": PASSES,
        "engines": (),
        "missing": (),
        "plan": None,
        "verified": None,
        "measured": None,
        "files": {"model.onnx": FileEntry(sha256=DIGEST, bytes=1_987_654)},
        **changes,
    }


SIZES = Sizes(
    pruned_fp32=7_127_040,
    pruned_compressed=1_113_600,
    pruned_ratio=6.4,
    scales=31_556,
    total_fp32=7_262_248,
    total_compressed=1_276_080,
    total_ratio=5.69,
)
PASSES = (
    Outcome(name="fold_constants", changed=12, left_alone=()),
    Outcome(
        name="move_q_across_transpose",
        changed=4,
        left_alone=(LeftAlone(where="blocks.0.attn", why="the scale is per channel on the moved axis"),),
    ),
    Outcome(name="annotate_sparsity", changed=17, left_alone=(LeftAlone(where="head", why="dense"),)),
)
VERIFIED = Verification(
    samples="Fashion-MNIST, test",
    samples_sha256=DIGEST,
    count=1000,
    labelled=True,
    runtime="onnxruntime 1.32.0, CPUExecutionProvider",
    student_top1=0.912,
    onnx_top1=0.912,
    agreement=1.0,
    max_abs_difference=0.00231,
    drop=Interval(value=0.0, low=-0.002, high=0.002),
    float16=Float16Check(count=64, finite=True, agreement=1.0, max_abs_difference=0.031),
)


def gpu_manifest(*extra: Layer) -> Manifest:
    return Manifest(
        **fields(
            layers=vit_layers(eligible=True, reason="its GEMM must have an INT8 output", extra=extra),
            plan=vit_plan(),
            verified=VERIFIED,
            engines=(
                Engine(
                    file="engine.sm80.rtx",
                    runtime="tensorrt-rtx",
                    runtime_version="1.7.1.116",
                    target="SM80",
                    nearest=False,
                    note="compiled ahead of time, without a GPU",
                ),
            ),
            missing=(
                Missing(
                    what="the TensorRT 10.16 engine",
                    why="TensorRT compiles on the device itself, and this host has no GPU.",
                    how="docker run --gpus all -v $PWD/dist:/dist gpusq:cuda gpusq build /dist/a100-sxm-80gb",
                ),
                Missing(
                    what="latency",
                    why="No A100 on this host.",
                    how="gpusq bench dist/a100-sxm-80gb --baseline dist/fp16",
                ),
            ),
            predicted=(
                Prediction(what="GEMM time, dense INT8", value=0.0412, unit="ms", how="roofline of the profile"),
                Prediction(what="GEMM time, sparse INT8", value=0.0307, unit="ms", how="roofline of the profile"),
            ),
        )
    )


def cpu_manifest(**changes: Any) -> Manifest:
    measured = Measurement(
        device="AMD EPYC 7B13, 2 cores",
        runtime="onnxruntime 1.32.0",
        threads=2,
        batch=1,
        pairs=300,
        student=timing("fashion_vit_w8a8_24", "w8a8-linear", 1.59, 2.08),
        baseline=timing("fashion_vit_dense", "float32", 2.09, 2.58),
        speedup=Interval(value=1.32, low=1.28, high=1.36),
        verdict="faster",
        raw="latency.csv",
    ).model_copy(update=changes)
    dense = "the CPU has no sparse kernels"
    return Manifest(
        **fields(
            profile="cpu",
            device="the CPU of this host",
            float_type="float32",
            baseline=Source(file="fashion_vit_dense.pt", sha256=DIGEST, model="fashion_vit", parameters=1, card={}),
            layers=vit_layers(eligible=False, reason=dense),
            verified=VERIFIED.model_copy(update={"onnx_top1": 0.91, "agreement": 0.9996}),
            engines=(
                Engine(
                    file="model.onnx",
                    runtime="onnxruntime",
                    runtime_version="1.32.0",
                    target="x86_64",
                    nearest=False,
                    note="",
                ),
            ),
            measured=measured,
        )
    )


def timing(name: str, precision: str, p50: float, p99: float) -> Timing:
    return Timing(name=name, precision=precision, p50_ms=around(p50), p99_ms=around(p99))


def around(value: float) -> Interval:
    return Interval(value=value, low=value * 0.98, high=value * 1.03)


def minimal_manifest() -> Manifest:
    empty = Sizes(
        pruned_fp32=0,
        pruned_compressed=0,
        pruned_ratio=1,
        scales=0,
        total_fp32=0,
        total_compressed=0,
        total_ratio=1,
    )
    return Manifest(**fields(layers=(), sizes=empty, passes=(), host={}, versions={}, files={}))


def hostile_manifest() -> Manifest:
    manifest = gpu_manifest(linear(HOSTILE, 64, 64))
    plan = vit_plan()
    kernels = (*plan.kernels, kernel(HOSTILE, "gemm", ("Int8", "Int8"), HOSTILE))
    return manifest.model_copy(update={"plan": plan.model_copy(update={"kernels": kernels})})


def write_samples(bundle: Path, pairs: int = 300) -> None:
    chance = random.Random(7)
    lines = ["pair,model,latency_ms"]
    for pair in range(pairs):
        for model, centre in (("student", 1.5), ("baseline", 2.0)):
            lines.append(f"{pair},{model},{centre + chance.expovariate(8):.4f}")
    lines.append(f"{pairs},student,19.5")
    (bundle / "latency.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
