"""The published figures: whole models (`data/latency.csv`) and single GEMMs (`data/gemm.csv`), each with its source.

A row is used for the fit only where the model's kernels are known, the device has a profile, and the software is
TensorRT on its own. `why_unused` says of every other row why it is not, so that none is left out in silence.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

from profiles.device import Device, load_device
from profiles.work import BYTES, Work

DATA = Path(__file__).parent / "data"
GEMM_DEVICES = {
    "A100 80GB PCIe": "a100-pcie-80gb",
    "H100 80GB PCIe": "h100-pcie-80gb",
    "RTX4090": "rtx-4090",
    "RTX5080": "rtx-5080",
    "B200 180GB SXM": "b200",
    "DGX Spark GB10": "gb10",
}
_DEVICES = {
    "T4": "t4",
    "A10": "a10",
    "A30": "a30",
    "L40S": "l40s",
    "A30x1_TRT": "a30",
    "A2x1_TRT": "a2",
    "A100 80GB": "a100-sxm-80gb",
    "A100 80GB SXM": "a100-sxm-80gb",
    "A100-PCIe-80GBx1_TRT": "a100-pcie-80gb",
    "DGX-A100_A100-SXM-80GBx1_TRT": "a100-sxm-80gb",
    "H100-SXM-80GBx1_TRT": "h100-sxm-80gb",
    "Orin_NX_TRT": "orin-nx-16gb",
    "Jetson Orin NX 16GB": "orin-nx-16gb",
    "Jetson Orin Nano 8GB": "orin-nano-super-8gb",
    "Jetson Orin Nano Super": "orin-nano-super-8gb",
    "Jetson AGX Orin 64GB DK": "agx-orin-64gb",
    "RTX4090": "rtx-4090",
    "RTX3090": "rtx-3090",
}
_MODELS = {
    "BERT Base": "bert-base-{}",
    "BERT Large": "bert-large-{}",
    "BERT-Large": "bert-large-{}",
    "Megatron BERT-Large": "bert-large-{}",
    "BERT-base 12Lx768": "bert-base-{}",
    "ViT-B/16": "vit-b-{}",
    "ViT-L/16": "vit-l-{}",
    "Swin-V1-T": "swin-t-{}",
    "Swin-V1-S": "swin-s-{}",
    "Swin-V1-B": "swin-b-{}",
    "Swin-V1-L": "swin-l-{}",
    "ResNet-18": "resnet-18",
    "ResNet-50": "resnet-50",
    "resnet50": "resnet-50",
    "MobileNetV2": "mobilenet-v2",
    "6x MLP 768-3072-768 MatMul": "mlp-768-3072",
    **{f"YOLO11{size}": f"yolo11{size}" for size in "nsmlx"},
}
_OFFLINE_BATCH = 256
_SUSPECT = "anomalous"


@dataclass(frozen=True)
class PublishedLatency:
    """One published figure of a whole model.

    Attributes:
        device: as the source calls it.
        model: as the source calls it.
        size: its resolution, or `seq` and its length.
        batch: None where the source does not say.
        precision: as the source calls it.
        pruned: whether its weights are 2:4.
        latency_ms: of one batch.
        software: what ran it.
        source: where it was published.
        note: what else is known.
        power_mode: of a Jetson.
    """

    device: str
    model: str
    size: str
    batch: int | None
    precision: str
    pruned: bool
    latency_ms: float
    software: str
    source: str
    note: str
    power_mode: str

    @property
    def page(self) -> str:
        """The source without what differs within it: an MLPerf round, a README."""
        return re.split(r"/closed| README|@| docs", self.source.replace("closed/NVIDIA/results", "/closed"))[0].strip()

    @property
    def family(self) -> str:
        """The kind of model: `bert`, `vit`, `swin`, `resnet`, `yolo11`, …"""
        return re.split(r"[-/ 0-9]", self.works or self.model.casefold())[0]

    @property
    def works(self) -> str | None:
        """The name of the file with its kernels; None where there is none."""
        pattern = _MODELS.get(self.model)
        name = pattern.format(self.size.removeprefix("seq")) if pattern else None
        return name if name is not None and (DATA / "works" / f"{name}.json").is_file() else None

    @property
    def profile(self) -> Device | None:
        """Its device, in its power mode; None where there is no profile."""
        if "DLA" in self.device or self.device not in _DEVICES:
            return None
        return load_device(_DEVICES[self.device])

    @property
    def is_tensorrt(self) -> bool:
        """Whether TensorRT ran it, with kernels of its own choice."""
        return not re.match(r"FT |PyTorch|torch", self.software)

    @property
    def number(self) -> str:
        """`fp16` or `int8`, or what stands for FP32: TensorRT multiplies that in TF32 unless it is told not to."""
        if self.precision.startswith("INT8"):
            return "int8"
        if "16" in self.precision:
            return "fp16"
        tensor_cores = self.profile is not None and self.profile.rates is not None and self.profile.rates.dense.tf32
        return "tf32" if tensor_cores else "fp32"

    @property
    def is_int8_throughout(self) -> bool:
        """Whether its kernels pass INT8 to each other: NVIDIA's BERT demo does so with plugins of its own."""
        return self.is_demo and self.number == "int8"

    @property
    def is_demo(self) -> bool:
        """Whether NVIDIA's BERT demo ran it, whose attention is a plugin."""
        return "demo/BERT" in self.source

    @property
    def program(self) -> str:
        """What ran it, as the cost model's `software` calls it: `demo`, or the first word of the software."""
        return "demo" if self.is_demo else self.software.split()[0].casefold()

    @property
    def rows(self) -> float | None:
        """Rows of a single MLP's activation, which that source prints behind the rank: `2d197`."""
        return float(self.size[2:]) if re.match(r"\dd\d+$", self.size) else None

    @property
    def why_unused(self) -> str:
        """Why the fit does not use it; empty where it does."""
        if "DLA" in self.device:
            return "runs on the DLA"
        if self.device == "Orin_NX_TRT" and self.batch == _OFFLINE_BATCH:
            return "runs on GPU and DLA at once"
        if self.profile is None:
            return "no profile of the device"
        if not self.is_tensorrt:
            return "other software's kernels"
        if self.works is None:
            return "no kernels of the model"
        if "MLPerf" in self.software and self.model.startswith("bert"):
            return "lengths vary and are packed"
        if _SUSPECT in self.note:
            return "inconsistent with itself"
        return ""


@dataclass(frozen=True)
class PublishedGemm:
    """One problem of the table of GEMMs, both kernels of it, in µs."""

    device: str
    number: str
    m: int
    n: int
    k: int
    dense_us: float
    sparse_us: float


def read_latencies() -> Iterator[PublishedLatency]:
    """Yield every row of the table; a throughput is told as the latency of one batch."""
    with (DATA / "latency.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            offline = not row["batch"] and "MLPerf" in row["software"]
            batch = int(row["batch"]) if row["batch"] else _OFFLINE_BATCH if offline else None
            per_s = float(row["throughput_per_s"]) if row["throughput_per_s"] else 0.0
            yield PublishedLatency(
                device=row["device"],
                model=row["model"],
                size=row["res_or_seq"] or ("224" if row["model"] == "resnet50" else ""),
                batch=batch,
                precision=row["precision"],
                pruned=row["sparsity"] != "dense",
                latency_ms=float(row["latency_ms"]) if row["latency_ms"] else 1e3 * (batch or 1) / per_s,
                software=row["software"],
                source=row["source"],
                note=row["note"],
                power_mode=row["power_mode"],
            )


def read_gemms() -> Iterator[PublishedGemm]:
    """Yield every row of the table of GEMMs."""
    with (DATA / "gemm.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            m, n, k = (int(row[key]) for key in "MNK")
            dense, sparse = float(row["dense_us"]), float(row["sparse24_us"])
            yield PublishedGemm(row["device"], row["dtype"].casefold(), m, n, k, dense, sparse)


@cache
def read_works(name: str, number: str) -> tuple[int, tuple[Work, ...]]:
    """Return the batch that the kernels of the model called `name` were compiled at, and they; `tf32` from `fp16`."""
    document = json.loads((DATA / "works" / f"{name}.json").read_text(encoding="utf-8"))
    known = {field.name for field in fields(Work)}
    kept = "int8" if number == "int8" else "fp16"
    works = tuple(Work(**{key: value for key, value in entry.items() if key in known}) for entry in document[kept])
    return document["batch"], works if kept == number else tuple(as_number(work, number) for work in works)


def as_number(work: Work, number: str) -> Work:
    """A float kernel in another float type: its bytes grow with the type's."""
    if BYTES[work.number] == BYTES[number]:
        return replace(work, number=number)
    factor = BYTES[number] / BYTES[work.number]
    return replace(
        work, number=number, read=work.read * factor, weights=work.weights * factor, written=work.written * factor
    )


def pruned(works: tuple[Work, ...]) -> tuple[Work, ...]:
    """The same kernels with every weight of a linear layer 2:4."""
    return tuple(replace(work, pruned=work.kind in ("gemm", "convolution") and work.weights > 0) for work in works)
