"""A trained student, whatever it was saved as: what every loader returns, and how it becomes a graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from calibration.input_spec import InputSpec, SampleSpec
from exporters.quantizer import Place, Quantizer
from exporters.signature import Input
from exporters.to_onnx import OPSET, Exported, to_onnx

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.generic]


class Student(Protocol):
    """A model with what training decided about it."""

    @property
    def model(self) -> str:
        """The architecture in a few words, `timm:deit_small_patch16_224`."""
        ...

    @property
    def kind(self) -> str:
        """What the file was taken for, in words."""
        ...

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What it takes."""
        ...

    @property
    def preprocessing(self) -> Mapping[str, InputSpec]:
        """How samples become the inputs that need it."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What was folded, and what was decided where two readings were possible."""
        ...

    @property
    def card(self) -> Mapping[str, Any]:
        """Plain data that the file says about itself."""
        ...

    @property
    def parameters(self) -> int:
        """Number of weights."""
        ...

    @property
    def quantized(self) -> int:
        """Number of weights' tensors that have trained scales."""
        ...

    def export(self, *, scales: bool = True, opset: int = OPSET) -> Exported:
        """Return the graph, with the trained scales as Q/DQ unless `scales` is false."""
        ...


def sample_specs(student: Student) -> dict[str, SampleSpec]:
    """Return how samples of each input look: its shape without the batch, and its preprocessing where there is one."""
    found = {}
    for one in student.inputs:
        spec = student.preprocessing.get(one.name) or InputSpec(shape=one.shape[1:], dtype=one.dtype)
        dynamic = tuple(axis - 1 for axis in sorted(one.dynamic) if axis > 0)
        found[one.name] = SampleSpec(spec.shape, spec.dtype, spec.scale, spec.mean, spec.std, dynamic)
    return found


@dataclass(frozen=True)
class ModuleStudent:
    """A student that is a torch module.

    Attributes:
        module: in eval mode, with plain float32 weights: masks are folded, quantized weights hold `integers · scale`.
        inputs: what it takes, in the order of its forward.
        model: the architecture in a few words.
        kind: what the file was taken for, in words.
        outputs: names of its outputs; None where the exporter is to choose.
        quantizers: the trained scales by place; empty for a float student.
        preprocessing: how samples become inputs.
        notes: what was folded, and what was decided where two readings were possible.
        root: the name of a wrapper around the whole model, left out of all names.
        card: plain data that the file says about itself.
    """

    module: torch.nn.Module
    inputs: tuple[Input, ...]
    model: str = ""
    kind: str = ""
    outputs: tuple[str, ...] | None = None
    quantizers: Mapping[Place, Quantizer] = field(default_factory=dict)
    preprocessing: Mapping[str, InputSpec] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    root: str = ""
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def quantized(self) -> int:
        """Number of weights' tensors that have trained scales."""
        return sum(place.is_parameter for place in self.quantizers)

    def export(self, *, scales: bool = True, opset: int = OPSET) -> Exported:
        """Return the graph, with the trained scales as Q/DQ unless `scales` is false."""
        return to_onnx(self._module(scales), self.inputs, self.outputs, opset=opset, root=self.root)

    def predict(self, inputs: Mapping[str, Array], *, scales: bool = True) -> tuple[Array, ...]:
        """Return the outputs of the module on one batch, computed in float32."""
        import torch

        with torch.inference_mode():
            output = self._module(scales)(*(torch.from_numpy(inputs[spec.name]) for spec in self.inputs))
        return tuple(np.asarray(tensor.numpy()) for tensor in _tensors(output))

    def _module(self, scales: bool) -> torch.nn.Module:
        """The module, or one with the same weights that computes with the quantizers."""
        return self._quantized_module if scales and self.quantizers else self.module

    @cached_property
    def _quantized_module(self) -> torch.nn.Module:
        from exporters.fake_quantize import attach

        quantized = copy.deepcopy(self.module, {id(p): p for p in self.module.parameters()})
        attach(quantized.get_submodule(self.root), self.quantizers)
        return quantized


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors of an output, in the order in which an exported graph has them."""
    import torch

    for leaf in torch.utils._pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            yield leaf
