"""Show what is in a model without building anything: the 2:4 state and the Q/DQ of each linear layer."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError
from pydantic import Field

from deploy.finish import check_files
from deploy.inspect_checkpoint import CheckpointInspection, inspect_checkpoint
from deploy.layers import layers_of, sizes_of, summary
from deploy.manifest import MODEL_FILE, Layer, Sizes, is_bundle, read_manifest
from deploy.text_table import text_table
from exporters.checkpoint import LoadOptions
from exporters.kinds import kind_of
from profiles.device import load_device
from profiles.errors import GpusqError
from profiles.record import Record

SCHEMA = 1
_HEADING = (
    "layer",
    "K×N",
    "weight",
    "activation",
    "input scale",
    "weight scales",
    "2:4",
    "zeros",
    "eligible",
    "why not, or what else",
)


class Inspection(Record):
    """The linear layers of a model, and the bytes of its weights."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    model: str
    profile: str | None
    layers: tuple[Layer, ...]
    sizes: Sizes

    def to_text(self) -> str:
        """The inspection as a table for the terminal."""
        return "\n".join(
            [
                text_table([_HEADING, *(_row(layer) for layer in self.layers)]),
                "",
                summary(self.layers),
                f"pruned weights: {self.sizes.pruned_fp32:,} bytes in FP32, "
                f"{self.sizes.pruned_compressed:,} compressed, "
                f"{self.sizes.pruned_ratio:.2f}× (and {self.sizes.scales:,} bytes of scales)",
                f"whole model: {self.sizes.total_fp32:,} bytes in FP32, {self.sizes.total_compressed:,} compressed, "
                f"{self.sizes.total_ratio:.2f}×",
            ]
        )


def inspect(
    path: Path, profile: str | None = None, options: LoadOptions | None = None
) -> Inspection | CheckpointInspection:
    """Inspect an ONNX model or a bundle, its sparsity judged by the kernels of `profile` (a bundle's own by default).

    Anything else is a checkpoint: what it holds is shown without building its model; `options` decide what it leaves
    open about its scales.

    Raises:
        GpusqError: there is no such file, or it is no ONNX model.
    """
    device = load_device(profile) if profile else None
    if is_bundle(path):
        manifest = read_manifest(path)
        check_files(path, manifest)
        device = device or manifest.device_profile
        path = path / MODEL_FILE
    if not path.exists():
        raise GpusqError(
            f"no such file: {path}", hint="give a checkpoint, an .onnx file, or a folder that convert wrote"
        )
    if kind_of(path) != "onnx":
        return inspect_checkpoint(path, options)
    model = _load(path)
    return Inspection(
        model=path.name,
        profile=device.name if device else None,
        layers=layers_of(model, device),
        sizes=sizes_of(model),
    )


def _load(path: Path) -> ir.Model:
    try:
        model = ir.load(path)
    except (DecodeError, ValueError) as error:
        raise GpusqError(f"{path} is no ONNX model: {error}", hint="`gpusq convert` takes checkpoints") from None
    if not len(model.graph):
        raise GpusqError(f"{path} is no ONNX model, or an empty one", hint="`gpusq convert` takes checkpoints")
    return model


def _row(layer: Layer) -> tuple[str, ...]:
    weights = "" if layer.weight_scale_min is None else f"{layer.weight_scale_min:.3g} – {layer.weight_scale_max:.3g}"
    return (
        layer.module,
        f"{layer.k}×{layer.n}",
        layer.weight_type,
        layer.activation_type,
        "" if layer.input_scale is None else f"{layer.input_scale:.4g}",
        weights,
        "yes" if layer.sparsity.pattern == "2:4" else "no",
        f"{100 * layer.sparsity.zeros:.1f} %",
        "yes" if layer.sparsity.eligible else "no",
        layer.sparsity.reason,
    )
