"""The named placements: which quantizers a graph gets that has none yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from profiles.errors import GpusqError

if TYPE_CHECKING:
    from profiles.device import Device

Placement = Literal["as-trained", "fp16", "w8a8-linear", "w8a8-mha", "sparse-int8", "w4", "fp8", "fp8-mha", "nvfp4"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
KEPT_FLOAT = "gpusq.precision"  # in a node's metadata: no placement quantizes its module, and why


def places(placement: Placement) -> bool:
    """Whether the placement adds quantizers; the others leave the graph to what training decided."""
    return placement not in ("as-trained", "fp16")


def measures(placement: Placement) -> bool:
    """Whether it quantizes activations, whose ranges have to be measured on samples."""
    return places(placement) and placement != "w4"


# The first compute capability whose tensor cores have the type, and the first opset with it (TensorRT's support matrix,
# hardware and precision; ONNX's QuantizeLinear).
_SINCE = {"fp8": ("FP8", 8.9, 19), "fp8-mha": ("FP8", 8.9, 19), "nvfp4": ("FP4", 10.0, 23)}


def check_supported(placement: Placement, device: Device) -> None:
    """Raise GpusqError where `device` cannot compute in the type of the placement."""
    if placement not in _SINCE:
        return
    kind, since, opset = _SINCE[placement]
    other = "use --placement w8a8-linear, or a profile such as " + ("rtx-5090" if placement == "nvfp4" else "rtx-4090")
    if device.runtime != "tensorrt":
        raise GpusqError(f"{device.name} runs {device.runtime}, which has no {kind} kernels", hint=other)
    if float(device.compute_capability or 0) < since:
        raise GpusqError(
            f"{device.name} has no {kind}: it needs compute capability {since}, and has {device.compute_capability}",
            hint=other,
        )
    if device.onnx.opset < opset:
        raise GpusqError(
            f"{device.name} takes opset {device.onnx.opset}, and {kind} came with opset {opset}", hint=other
        )


def rounds_to_integers(placement: Placement) -> bool:
    """Whether it quantizes to integers, as all do but those of 8- and 4-bit floats."""
    return places(placement) and placement not in _SINCE


def format_of(placement: Placement) -> str:
    """What the numbers of a placement's layers are called in reports."""
    return {"w4": "w4", "fp8": "fp8", "fp8-mha": "fp8", "nvfp4": "nvfp4"}.get(placement, "int8")


def quantizes_attention(placement: Placement) -> bool:
    """Whether it quantizes the products of attentions, which are then written with MatMul and Softmax."""
    return placement in ("w8a8-mha", "fp8-mha")
