"""The quantize and dequantize operators of a torch.export program → quantizers of a plain module."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from exporters.quantized_modules.findings import Findings, quantizer_like
from exporters.quantized_modules.plain import PlainModule
from exporters.quantizer import INPUT, OUTPUT, Place, Quantizer
from profiles.errors import GpusqError

_HINT = (
    "quantize with a symmetric spec: QuantizationSpec(dtype=torch.int8, quant_min=-128, quant_max=127, "
    "qscheme=torch.per_tensor_symmetric, observer_or_fake_quant_ctr=FakeQuantize...); the activations of "
    "X86InductorQuantizer and XNNPACKQuantizer are affine"
)
_AGAIN = "the program is damaged: export it again with torch.export.save"
_QUANTIZE = ("quantized_decomposed.quantize_per_tensor", "quantized_decomposed.quantize_per_channel")
_DEQUANTIZE = ("quantized_decomposed.dequantize_per_tensor", "quantized_decomposed.dequantize_per_channel")
_LIBRARIES = ("quantized_decomposed.", "quantized.", "torchao.", "onednn.", "pt2e_quant.")
# Operators whose answer depends on whether the model was being trained: operator → the position of that argument.
_TRAINING = {
    "aten.dropout.default": 2,
    "aten.feature_dropout.default": 2,
    "aten.batch_norm.default": 5,
    "aten.instance_norm.default": 5,
}


def plain_program(program: torch.export.ExportedProgram, *, drop_dynamic: bool = False) -> PlainModule:
    """Return a module that computes what `program` does without its quantizers, and these quantizers.

    Args:
        program: float, or converted by PT2E.
        drop_dynamic: leave activations float whose scales are computed for each input, instead of refusing them.

    Raises:
        GpusqError: a quantizer is asymmetric, dynamic or has a scale that is not positive; an operator of a
            quantization library is not known; the program was exported in training mode.
    """
    module = _module(program)
    _check_mode(module)
    found = Findings(drop_dynamic)
    editor = _Editor(module, found)
    for node in list(module.graph.nodes):
        if _operator(node) in _DEQUANTIZE:
            editor.dequantize(node)
    module.graph.eliminate_dead_code()
    _check_known(module)
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    return PlainModule(module, found.quantizers, tuple(found.notes))


def _module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as a module with a graph, its weights as attributes."""
    try:
        with torch.no_grad():
            module = program.module(check_guards=False)
    except Exception as error:  # torch raises whatever it meets in a damaged description of inputs and modules
        first = str(error).strip().partition(chr(10))[0]
        raise GpusqError(
            f"torch makes no module of the program: {type(error).__name__}: {first}", hint=_AGAIN
        ) from error
    assert isinstance(module, fx.GraphModule)
    return fx.GraphModule(module, module.graph)  # torch's own refuses eval()


@dataclass
class _Editor:
    module: fx.GraphModule
    found: Findings

    def dequantize(self, node: fx.Node) -> None:
        """Replace a dequantize operator, and the quantize operator before it if there is one."""
        _check_arguments(node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if _operator(source) in _QUANTIZE:
            _check_arguments(source)
            x = source.args[0]
            assert isinstance(x, fx.Node)
            if x.op == "get_attr":
                self._weight(node, _attribute(self.module, x), integers=False)
            else:
                self._activation(node, x)
        elif source.op == "get_attr":
            self._weight(node, _attribute(self.module, source), integers=True)
        else:
            raise GpusqError(f"{node.name!r} dequantizes what {source.name!r} computed as integers", hint=_HINT)
        self.module.graph.erase_node(node)

    def _activation(self, node: fx.Node, x: fx.Node) -> None:
        consumer = _module_of(next(iter(node.users), node))
        if (source := self._computed_by(node)) is not None:
            self.found.dynamic(Place(consumer, INPUT), source)
            node.replace_all_uses_with(x)
            return
        name = self._free(f"{consumer}.input" if consumer else "input")
        low, high = _bounds(node)
        scale, zero, axis = self._parameters(node, name)
        if axis is not None:
            raise GpusqError(f"'{name}' has one scale for each channel", hint=_HINT)
        self.found.add_activation(Place(name, OUTPUT), quantizer_like(scale, zero, (), low, high), hint=_HINT)
        self.module.add_submodule(name, nn.Identity())
        with self.module.graph.inserting_before(node):
            quantized = self.module.graph.call_module(name, (x,))
        quantized.meta = _meta(node)
        node.replace_all_uses_with(quantized)

    def _computed_by(self, node: fx.Node) -> str | None:
        """The operator that computes the scale of a dequantize operator for each input; None where it is constant."""
        scale = node.args[1]
        if not isinstance(scale, fx.Node) or scale.op == "get_attr":
            return None
        source = scale.args[0] if scale.target is operator.getitem else scale
        assert isinstance(source, fx.Node)
        return _operator(source) or source.name

    def _weight(self, node: fx.Node, stored: Tensor, *, integers: bool) -> None:
        low, high = _bounds(node)
        place = self._parameter_place(node, tuple(stored.shape))
        scale, zero, axis = self._parameters(node, str(place))
        quantizer = _quantizer(scale, zero, axis, low, high)
        if not integers:
            stored = torch.from_numpy(quantizer.integers(stored.detach().numpy()))
        if high > 127 and low < -128:  # int32: a bias, which stays float
            values = torch.from_numpy(quantizer.real(stored.numpy()))
            self.found.notes.append(f"{place} is float, with the values that it was quantized to")
        else:
            values = self.found.add_integers(place, quantizer, stored)
        owner = self.module.get_submodule(place.module)
        owner.register_parameter(place.tensor, nn.Parameter(values, requires_grad=False))
        with self.module.graph.inserting_before(node):
            parameter = self.module.graph.get_attr(str(place))
        parameter.meta = _meta(node)
        node.replace_all_uses_with(parameter)

    def _parameter_place(self, node: fx.Node, shape: tuple[int, ...]) -> Place:
        """The parameter of the layer that reads it, if that layer has one of its shape; else a new one."""
        user = next(iter(node.users), node)
        module = _module_of(user)
        position = user.args.index(node) if node in user.args else 1
        name = "bias" if position == 2 else "weight"
        try:
            owner: nn.Module | None = self.module.get_submodule(module)
        except AttributeError:
            owner = None
        held = None if owner is None else owner._parameters.get(name)
        if owner is not None and held is not None and tuple(held.shape) == shape and module:
            return Place(module, name)
        return Place("", self._free(f"{module}_{name}".replace(".", "_").lstrip("_")))

    def _parameters(self, node: fx.Node, name: str) -> tuple[Tensor, Tensor, int | None]:
        """Scale, zero-point and axis of a dequantize operator, and of the quantize operator before it."""
        mine = self._constants(node, name)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if _operator(source) in _QUANTIZE:
            before = self._constants(source, name)
            if not all(
                a is b or torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(mine, before, strict=True)
            ):
                raise GpusqError(f"{name!r} is quantized with one scale and dequantized with another", hint=_HINT)
        scale, zero, axis = mine
        return torch.as_tensor(scale), torch.as_tensor(zero), axis

    def _constants(self, node: fx.Node, name: str) -> tuple[Any, Any, int | None]:
        found: list[Any] = []
        for argument in node.args[1:3]:
            if isinstance(argument, fx.Node):
                if argument.op != "get_attr":
                    raise GpusqError(
                        f"{name!r} is quantized dynamically: {argument.name!r} computes its scale for each input",
                        hint="TensorRT has no dynamic INT8: quantize with static activation scales",
                    )
                argument = _attribute(self.module, argument).detach()
            found.append(argument)
        per_channel = "per_channel" in _operator(node)
        axis = node.args[3] if per_channel else None
        return found[0], found[1], axis if isinstance(axis, int) else None

    def _free(self, name: str) -> str:
        taken = {module for module, _ in self.module.named_modules()} | {
            key for key, _ in self.module.named_parameters()
        }
        if name not in taken:
            return name
        return next(f"{name}_{count}" for count in range(2, 10**6) if f"{name}_{count}" not in taken)


def _quantizer(scale: Tensor, zero: Tensor, axis: int | None, low: int, high: int) -> Quantizer:
    if axis is None:
        return quantizer_like(scale, zero, (), low, high)
    return Quantizer(np.array(scale.float().numpy()), axis, None, low, high, np.array(zero.to(torch.int32).numpy()))


def _check_arguments(node: fx.Node) -> None:
    """Refuse a quantize or dequantize operator whose arguments are not those of its schema: (x, scale, zero, …)."""
    first = 4 if "per_channel" in _operator(node) else 3
    parameters = node.args[1:3] if first == 3 else [arg for arg in node.args[1:3] if isinstance(arg, fx.Node)]
    sound = (
        len(node.args) >= first + 2
        and isinstance(node.args[0], fx.Node)
        and len(parameters) == 2
        and all(isinstance(argument, (fx.Node, int, float)) for argument in parameters)
        and all(type(bound) is int for bound in node.args[3 : first + 2])
    )
    if not sound:
        raise GpusqError(
            f"the arguments of {node.name!r} ({node.target}) are not those of that operator",
            hint=_AGAIN,
        )


def _bounds(node: fx.Node) -> tuple[int, int]:
    first = 4 if "per_channel" in _operator(node) else 3
    low, high = node.args[first : first + 2]
    assert isinstance(low, int)
    assert isinstance(high, int)
    return low, high


def _operator(node: fx.Node) -> str:
    """`quantized_decomposed.quantize_per_tensor`: the operator without its overload."""
    return str(node.target).rpartition(".")[0] if node.op == "call_function" else ""


def _attribute(module: fx.GraphModule, node: fx.Node) -> Tensor:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def _module_of(node: fx.Node) -> str:
    """The name of the innermost module that `node` was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [str(path) for path, _ in stack.values()]
    return names[-1] if names else ""


def _meta(node: fx.Node) -> dict[str, Any]:
    """What is known of `node`, with the modules of what reads it: a quantizer belongs to the layer behind it."""
    user = next(iter(node.users), node)
    return {**node.meta, "nn_module_stack": user.meta.get("nn_module_stack", {})}


def _check_mode(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        position = _TRAINING.get(str(node.target))
        if position is not None and len(node.args) > position and node.args[position] is True:
            raise GpusqError(
                f"{_module_of(node) or node.name!r} was exported in training mode ({node.target})",
                hint="call eval() before torch.export.export; for PT2E, move_exported_model_to_eval after convert_pt2e",
            )


def _check_known(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith(_LIBRARIES):
            raise GpusqError(
                f"{node.name!r} is the operator {node.target}, whose quantization is not known here", hint=_HINT
            )
