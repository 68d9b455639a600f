"""The graph surgery: which passes run for a target, in which order.

    canonical forms ► quantizers where none are ► types ► sparsity ► opset

The order matters: attention takes its form before quantizers are placed, since it decides which tensors exist; ranges
are measured on the float graph; sparsity is judged on the values that are stored in the end; and the opset is declared
when no operator changes any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from calibration.probes import Feed
from calibration.weight_scales import WeightMethod
from exporters.improvement import AUTO, Improvement, check_improvable, measures_samples, tried_on
from exporters.passes.absorb_bias import AbsorbBias
from exporters.passes.annotate_sparsity import AnnotateSparsity
from exporters.passes.choose_improvements import ChooseImprovements, OnlyIf
from exporters.passes.clamp_masks import ClampMasks
from exporters.passes.correct_biases import CorrectBiases
from exporters.passes.error_feedback import ErrorFeedback
from exporters.passes.fix_shapes import FixShapes
from exporters.passes.fold_batch_norm import FoldBatchNorm
from exporters.passes.fold_constants import FoldConstants
from exporters.passes.fuse_attention import FuseAttention
from exporters.passes.fuse_gelu import FuseGelu
from exporters.passes.fuse_layer_norm import FuseLayerNorm
from exporters.passes.fuse_rms_norm import OPSET as RMS_NORM_OPSET
from exporters.passes.fuse_rms_norm import FuseRmsNorm
from exporters.passes.fuse_silu import FuseSilu
from exporters.passes.keep_costly_float import KeepCostlyFloat
from exporters.passes.lower_attention import LowerAttention
from exporters.passes.lower_einsum import LowerEinsum
from exporters.passes.lower_fake_quantize import LowerFakeQuantize
from exporters.passes.lower_rms_norm import LowerRmsNorm
from exporters.passes.lower_rotary import LowerRotary
from exporters.passes.merge_grouped_projections import MergeGroupedProjections
from exporters.passes.merge_projections import MergeProjections
from exporters.passes.name_axes import NameAxes
from exporters.passes.outcome import Outcome, Pass
from exporters.passes.place_quantizers import Measure, PlaceQuantizers
from exporters.passes.quantize_pools import QuantizePools
from exporters.passes.raise_opset import RaiseOpset
from exporters.passes.remove_no_ops import RemoveNoOps
from exporters.passes.repair_qdq import RepairQdq
from exporters.passes.repair_sparsity import RepairSparsity
from exporters.passes.scale_channels import ScaleChannels
from exporters.passes.select_early import SelectEarly
from exporters.passes.select_queries import SelectQueries
from exporters.passes.set_opset import SetOpset
from exporters.passes.share_concat_scales import ShareConcatScales
from exporters.passes.share_key_heads import ShareKeyHeads
from exporters.passes.split_packed import SplitPacked
from exporters.passes.type_floats import IoTypes, TypeFloats
from exporters.placement import Placement, check_supported, places, quantizes_attention
from profiles.device import AttentionForm, Device, FloatType
from profiles.errors import GpusqError

_INT8_QUERIES = 2  # what an INT8 attention kernel takes at least


@dataclass(frozen=True)
class Target:
    """What the graph is made for.

    Attributes:
        device: the profile.
        float_type: the type of what is not quantized.
        placement: the quantizers that it gets where it has none.
        repair_sparsity: whether layers that are 2:4 but for a few groups are pruned to it.
        io_types: whether inputs and outputs stay float32 or get the graph's type.
        improve: what is done beyond the default so that less is lost by the quantizers that are placed.
        target_drop: points of accuracy that may be lost; the layers that cost more stay float. None: all are quantized.
        share_concat_scales: whether the inputs of concatenations get the largest of their scales.
    """

    device: Device
    float_type: FloatType
    placement: Placement = "as-trained"
    repair_sparsity: bool = False
    io_types: IoTypes = "keep"
    improve: tuple[Improvement, ...] = ()
    target_drop: float | None = None
    share_concat_scales: bool = False

    def __post_init__(self) -> None:
        """Raise GpusqError where the device cannot compute what the placement asks for."""
        check_supported(self.placement, self.device)
        check_improvable(self.placement, self.improve, target_drop=self.target_drop)

    @property
    def attention(self) -> AttentionForm:
        """The form that the target fuses; TensorRT has no float32 kernel for the Attention operator."""
        if self.device.runtime != "onnxruntime" and self.float_type == "float32":
            return "matmul"
        return "matmul" if quantizes_attention(self.placement) else self.device.onnx.attention

    @property
    def lowers_attention(self) -> bool:
        """Whether attentions are written with MatMul and Softmax, all of them or what TensorRT fuses better so.

        The quantizers that sparse-int8 puts behind q, k and v would leave such an attention half quantized.
        """
        better = self.device.runtime != "onnxruntime" and self.placement != "sparse-int8"
        return self.attention == "matmul" or better

    @property
    def one_kernel_answers(self) -> bool:
        """Whether a weight gets one scale, and takes over the bias, where that lets one kernel give the answer."""
        placed = self.placement in ("w8a8-linear", "w8a8-mha", "sparse-int8")
        return self.device.runtime == "tensorrt" and placed and self.writes_float32

    @property
    def writes_float32(self) -> bool:
        """Whether a GEMM may read 8 bits and write float32: TensorRT-RTX refuses that for Turing."""
        compiler = self.device.ahead_of_time
        return compiler is None or "float32-gemm" not in compiler.lacks


def passes_for(
    target: Target, measure: Measure | None = None, ranges: Measure | None = None, feed: Feed | None = None
) -> list[Pass]:
    """The passes for `target`, in their order.

    `measure` tells the ranges of the activations that get quantizers, `ranges` those of all that gets a shorter type,
    and `feed` has the samples for the improvements that look at what the model does on them.
    """
    repair = RepairQdq(target.device.sparse, keep_outputs=target.placement == "sparse-int8")
    passes: list[Pass] = [
        RaiseOpset(target.device.onnx.opset),
        FixShapes(),
        FoldConstants(),
        RemoveNoOps(),
        repair,
        FoldBatchNorm(),
        FuseLayerNorm(),
        FuseRmsNorm(target.device.onnx.opset),
        FuseGelu(),
        FuseSilu(),
        LowerEinsum(),
        FuseAttention(lowered=target.lowers_attention),
        MergeProjections(),
        MergeGroupedProjections(),
        SelectEarly(),
        SelectQueries(_INT8_QUERIES if quantizes_attention(target.placement) else 1),
    ]
    if target.attention == "matmul":
        passes.append(LowerAttention())
    else:
        passes += [LowerAttention(crashing=True), ShareKeyHeads()]
        passes += [LowerAttention(may_stay=True)] if target.lowers_attention else []
    if target.device.onnx.opset < RMS_NORM_OPSET:
        passes += [LowerRmsNorm(), LowerRotary()]
    if target.repair_sparsity:
        passes.append(RepairSparsity())
    if places(target.placement):
        passes += _quantizing(target, measure or _unmeasured, feed)
        passes.append(repair)
    passes += [QuantizePools()] if target.device.runtime == "tensorrt" else []
    passes += [ShareConcatScales(target.share_concat_scales), SplitPacked(), FoldConstants()]  # which tells new shapes
    if target.float_type != "float32":
        passes += [ClampMasks(), TypeFloats(target.float_type, ranges, target.io_types, target.writes_float32)]
    passes.append(AnnotateSparsity(target.device.sparse))
    passes += [SetOpset(target.device.onnx.opset), NameAxes()]
    return passes


def _quantizing(target: Target, measure: Measure, feed: Feed | None) -> list[Pass]:
    """Place quantizers and lower them; what makes them lose less stands before, or sees them as they are placed."""
    improve = set(target.improve)
    if feed is None and (measures_samples(improve) or target.target_drop is not None):
        asked = [*target.improve, *(() if target.target_drop is None else ("--target-drop",))]
        raise GpusqError(
            f"{', '.join(asked)}: there is nothing to measure on",
            hint="give samples with --data calib.npz",
        )
    one_kernel = target.one_kernel_answers
    passes: list[Pass] = [AbsorbBias()] if one_kernel else []
    choice: ChooseImprovements | None = None
    if AUTO in improve and feed is not None:
        choice = ChooseImprovements(target.placement, target.float_type, feed, tried_on(target.placement))
        passes.append(choice)
        improve |= set(choice.candidates)

    def wanted(name: Improvement, step: Callable[[Feed], Pass]) -> list[Pass]:
        if name not in improve or feed is None:
            return []
        return [step(feed) if choice is None else OnlyIf(name, choice, step(feed))]

    weights: WeightMethod = "mse" if "mse-weights" in improve and choice is None else "max"
    place = PlaceQuantizers(target.placement, _remembered(measure), target.float_type, weights, one_kernel)
    passes += wanted("smooth-quant", lambda feed: ScaleChannels("gemm", feed, target.placement))
    passes += wanted("equalize", lambda feed: ScaleChannels("conv", feed, target.placement))
    placing = [
        place if choice is None else choice.placing(place),
        *wanted("error-feedback", lambda feed: ErrorFeedback(feed, target.float_type)),
        *wanted("bias-correction", CorrectBiases),
    ]
    if target.target_drop is not None and feed is not None:
        context = repr((target.placement, target.float_type, target.improve))
        passes.append(KeepCostlyFloat(target.target_drop, placing, feed, context))
    return [*passes, *placing, LowerFakeQuantize()]


def _remembered(measure: Measure) -> Measure:
    """Asks `measure` once for each tensor: marks change no number of a graph."""
    known: dict[str, float] = {}

    def remembered(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
        if missing := [name for name in names if name not in known]:
            known.update(measure(model, missing))
        return {name: known[name] for name in names}

    return remembered


def surgery(
    model: ir.Model,
    target: Target,
    measure: Measure | None = None,
    ranges: Measure | None = None,
    feed: Feed | None = None,
) -> list[Outcome]:
    """Run the passes on `model`, in place, and return what each did.

    Args:
        model: a float32 graph, whose quantizers, if any, are Q/DQ.
        target: what the graph is made for.
        measure: tells the ranges of activations; needed where the placement quantizes any.
        ranges: tells the ranges of all activations, infinite ones too, so that those beyond float16 stay float32.
        feed: the samples; needed for most of `target.improve`.

    Raises:
        GpusqError: the placement needs ranges and there is no `measure`, or a constant is beyond float16
                and `ranges` is not there to tell what comes of it.
    """
    return [step(model) for step in passes_for(target, measure, ranges, feed)]


def _unmeasured(model: ir.Model, names: Sequence[str]) -> Mapping[str, float]:
    """Stands in where nobody can measure: an error as soon as something is to be measured."""
    if names:
        raise GpusqError(
            f"{len(names)} activations have no scales",
            hint="give samples to measure them on: --data calib.npz",
        )
    return {}
