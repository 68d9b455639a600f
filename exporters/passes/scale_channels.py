"""Divide the channels of an activation where they are made, and multiply the weights that read them: less to round.

    LayerNorm(γ, β) ─► x ─► MatMul W       →   LayerNorm(γ/s, β/s) ─► x/s ─► MatMul s·W        smooth-quant, of GEMMs
    Conv V ─► ReLU ─► x ─► Conv W          →   Conv V/s ─► ReLU ─► x/s ─► Conv s·W             equalize, of convolutions

An activation has one scale, that of its largest channel; a weight has one for each output. So channels that are small
beside the largest lose most of their bits, and factors that bring them closer win more than the weights lose. Which
factors do is predicted from what the channels reach on the samples (calibration/channel_scales.py); a tensor whose
error no factors lower is left alone.

In float nothing changes but the rounding. The one exception is a Clip between 0 and c (ReLU6), which stays as it is:
a channel is only enlarged, and no further than to c / 2 on the samples; one that reaches more than that stays. So the
numbers are the same for whatever reaches less than twice what it did on the samples; beyond, c clips it earlier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from calibration.channel_scales import Reader, Reading, best_factors
from calibration.probes import Channels, Feed, measure_channels
from exporters.channel_groups import Group, Kind, find_groups, scale_group
from exporters.derived_tensor import release
from exporters.linears import Linear
from exporters.passes.inserter import Inserter, drop_unused_initializers
from exporters.passes.outcome import Change, LeftAlone, Outcome
from exporters.passes.placement_rules import block_of, no_block, too_small
from exporters.quantizer import INT4, INT8

_NO_GAIN = "no factors lower the predicted error"


@dataclass(frozen=True)
class ScaleChannels:
    """Scale the channels that layers of `kind` read.

    Attributes:
        kind: `gemm` (SmoothQuant, arXiv 2211.10438) or `conv` (equalization, arXiv 1906.04721).
        feed: the samples.
        placement: the quantizers that will be placed.
        alpha: of SmoothQuant's equation 4; None to search it for each tensor.
    """

    kind: Kind
    feed: Feed
    placement: str
    alpha: float | None = None

    def __call__(self, model: ir.Model) -> Outcome:
        """Scale them; what cannot be scaled, or would not gain, is left alone with the reason.

        Raises:
            GpusqError: a tensor became NaN or infinite on the samples.
        """
        left: list[LeftAlone] = []
        groups = list(find_groups(model.graph, self.kind, self._not_quantized, left))
        tensors = {name: axis for group in groups for name, axis in group.measured.items()}
        reached = measure_channels(model, tensors, self.feed)
        inserter, changes = Inserter(model.graph), []
        for group in groups:
            s, gain = self._factors(group, reached)
            if gain < 1:
                scale_group(group, s, inserter)
                what = f"predicted error × {gain:.2g}, factors {s.min():.3g} to 1"
                changes += [Change(module, what) for module in group.modules]
            else:
                left += [LeftAlone(module, _NO_GAIN) for module in group.modules]
        drop_unused_initializers(model.graph)
        name = "smooth activations" if self.kind == "gemm" else "equalize channels"
        return Outcome(name, len(changes), tuple(left), tuple(changes))

    def _not_quantized(self, linear: Linear) -> str:
        return no_block(linear) if self.placement == "w4" else too_small(linear)

    def _factors(self, group: Group, reached: Mapping[str, Channels]) -> tuple[npt.NDArray[np.float32], float]:
        readings = [
            Reading(reached[str(value.name)], [self._reader(linear) for linear in readers])
            for value, readers in group.readers.items()
        ]
        return best_factors(
            readings,
            made_by=_largest_of_outputs(group.layers) if self.kind == "conv" else None,
            ceilings=[(reached[str(value.name)].amax, high) for value, high in group.ceilings.items()],
            activations=self.placement != "w4",
            alpha=self.alpha,
        )

    def _reader(self, linear: Linear) -> Reader:
        values = weight_by_groups(linear)
        return Reader(values, block_of(linear), INT4[1]) if self.placement == "w4" else Reader(values, 0, INT8[1])


def weight_by_groups(linear: Linear) -> npt.NDArray[np.float32]:
    """The weight as float32 [groups, K, N, P]: K channels of a group, N outputs, P values of a kernel."""
    values = linear.values.astype(np.float32)
    release(linear.weight.const_value)
    if linear.kind == "gemm":
        return np.moveaxis(values, linear.k_axis, 0).reshape(1, linear.k, -1, 1)
    groups, shape = linear.group, values.shape
    if linear.node.op_type == "ConvTranspose":
        return values.reshape(groups, shape[0] // groups, shape[1], -1)
    return values.reshape(groups, shape[0] // groups, shape[1], -1).transpose(0, 2, 1, 3)


def _largest_of_outputs(layers: Sequence[Linear]) -> npt.NDArray[np.float32] | None:
    """The largest weight that makes each channel, [C]."""
    found = []
    for layer in layers:
        values = np.abs(layer.values.astype(np.float32))
        release(layer.weight.const_value)
        found.append(values.max(axis=tuple(axis for axis in range(values.ndim) if axis != layer.n_axis)))
    return np.max(found, axis=0) if found else None
