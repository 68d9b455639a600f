"""Quantizers in a torch module: they compute what the engine will, and leave one node each in an exported graph.

A `FakeQuantize` module rounds and clamps. Within `as_symbols` it stands for one operator instead,
`gpusq::FakeQuantize(x, scale)`, which `exporters.passes.lower_fake_quantize` turns into Q/DQ with the same scale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from exporters.quantizer import DOMAIN, INPUT, OPERATOR, OUTPUT, Place, Quantizer, by_module, check_quantizer
from profiles.errors import GpusqError


def fake_quantize(x: Tensor, scale: Tensor, low: int = -128, high: int = 127) -> Tensor:
    """`clamp(round_half_even(x / scale), low, high) * scale`, as ONNX's QuantizeLinear and DequantizeLinear compute it.

    It divides: a multiplication by the reciprocal rounds differently next to a tie. `scale` broadcasts against `x`.
    """
    return torch.clamp(torch.round(x / scale), low, high) * scale


class FakeQuantize(nn.Module):
    """Quantizes and dequantizes a tensor, symmetrically."""

    scale: Tensor

    def __init__(self, quantizer: Quantizer, place: Place) -> None:
        super().__init__()
        assert not quantizer.zero_point.any()
        self.register_buffer("scale", torch.tensor(quantizer.scale))
        self.axis, self.block = quantizer.axis, quantizer.block
        self.low, self.high = quantizer.low, quantizer.high
        self.place = str(place)
        self.symbolic = False

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` as the integers hold it; same shape and type."""
        if self.symbolic:
            return self._symbol(x)
        return fake_quantize(x, self._spread(x), self.low, self.high)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        scales = f"scales={tuple(self.scale.shape)}, axis={self.axis}, block={self.block}"
        return f"{self.place}, {scales}, [{self.low}, {self.high}]"

    def _symbol(self, x: Tensor) -> Tensor:
        attributes: dict[str, Any] = {"low": self.low, "high": self.high, "place": self.place}
        if self.axis is not None:
            attributes["axis"] = self.axis
        if self.block is not None:
            attributes["block_size"] = self.block
        if torch._C._is_tracing():
            traced: Tensor = _Traced.apply(x, self.scale, attributes)  # type: ignore[no-untyped-call]
            return traced
        symbol: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OPERATOR}", (x, self.scale), attributes, dtype=x.dtype, shape=x.shape, version=1
        )
        return symbol

    def _spread(self, x: Tensor) -> Tensor:
        if self.axis is None:
            return self.scale
        axis = self.axis % x.ndim
        if self.block is not None:
            return self.scale.repeat_interleave(self.block, axis).narrow(axis, 0, x.shape[axis])
        return self.scale.reshape([-1 if index == axis else 1 for index in range(x.ndim)])


class _Traced(torch.autograd.Function):
    """The operator for the TorchScript exporter, which does not know torch.onnx.ops."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, attributes: dict[str, Any]) -> Tensor:
        return x.clone()

    @staticmethod
    def symbolic(g: Any, x: Any, scale: Any, attributes: dict[str, Any]) -> Any:
        node = g.op(
            f"{DOMAIN}::{OPERATOR}",
            x,
            scale,
            **{f"{name}_{'s' if isinstance(value, str) else 'i'}": value for name, value in attributes.items()},
        )
        node.setType(x.type())
        return node


def attach(module: nn.Module, quantizers: Mapping[Place, Quantizer]) -> None:
    """Let `module` compute with `quantizers`, in place.

    Raises:
        GpusqError: a quantizer has no module or parameter, or does not fit it.
    """
    modules = dict(module.named_modules())
    for name, tensors in by_module(quantizers).items():
        if name not in modules:
            raise GpusqError(
                f"the model has no module {name!r}, whose scales the checkpoint holds",
                hint="the checkpoint belongs to another architecture",
            )
        for tensor, quantizer in tensors.items():
            _attach(modules[name], Place(name, tensor), quantizer)


@contextlib.contextmanager
def as_symbols(module: nn.Module) -> Iterator[None]:
    """Let the quantizers in `module` stand for one operator each while it is traced."""
    fakes = [fake for fake in module.modules() if isinstance(fake, FakeQuantize)]
    for fake in fakes:
        fake.symbolic = True
    try:
        yield
    finally:
        for fake in fakes:
            fake.symbolic = False


def _attach(module: nn.Module, place: Place, quantizer: Quantizer) -> None:
    check_quantizer(quantizer, place)
    fake = FakeQuantize(quantizer, place)
    if place.tensor == INPUT:
        module.input_quantizer = fake
        module.register_forward_pre_hook(_quantize_input)
    elif place.tensor == OUTPUT:
        module.output_quantizer = fake
        module.register_forward_hook(_quantize_output)
    else:
        parameter = getattr(module, place.tensor, None)
        if not isinstance(parameter, Tensor):
            raise GpusqError(
                f"the model has no parameter {str(place)!r}, whose scales the checkpoint holds",
                hint="the checkpoint belongs to another architecture",
            )
        check_quantizer(quantizer, place, tuple(parameter.shape))
        parametrize.register_parametrization(module, place.tensor, fake, unsafe=True)


def _quantize_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    quantizer: Any = module.input_quantizer
    return (quantizer(inputs[0]), *inputs[1:])


def _quantize_output(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    quantizer: Any = module.output_quantizer
    if isinstance(output, tuple):
        return (quantizer(output[0]), *output[1:])
    return quantizer(output)
