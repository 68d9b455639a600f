"""The graph that torch.ao's FX conversion leaves behind: quantized operators between the modules.

quantize_per_tensor(x, scale, zero_point, dtype)  →  an Identity whose output is quantized
quantized.add_relu(x, y, scale, zero_point)       →  relu(x + y), and an Identity whose output is quantized
x.dequantize()                                    →  x
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from exporters.quantized_modules.findings import Findings, quantizer_like
from exporters.quantized_modules.torch_ao_modules import HINT, type_range
from exporters.quantizer import OUTPUT, Place
from profiles.errors import GpusqError


def _add_relu(x: Tensor, y: Tensor) -> Tensor:
    return torch.relu(x + y)


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat(list(tensors), dim)


# The float function of a quantized operator, and how many of its arguments are the function's; its scale follows.
_JOINS: dict[str, tuple[Callable[..., Any], int]] = {
    "quantized.add": (torch.add, 2),
    "quantized.add_relu": (_add_relu, 2),
    "quantized.mul": (torch.mul, 2),
    "quantized.cat": (_cat, 2),
}


def plain_graph(module: nn.Module, name: str, found: Findings) -> nn.Module:
    """Return `module`; where it is an FX graph, its quantized operators are replaced in place.

    Raises:
        GpusqError: an operator that is not known, or one with asymmetric scales.
    """
    if not isinstance(module, fx.GraphModule):
        return module
    changed = [_replace(module, node, name, found) for node in list(module.graph.nodes)]
    if any(changed):
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    return module


def _replace(module: fx.GraphModule, node: fx.Node, name: str, found: Findings) -> bool:
    target = str(node.target)
    if node.target is torch.quantize_per_tensor:
        x, scale, zero, dtype = node.args
        _quantize(module, node, x, (_constant(module, scale), _constant(module, zero), dtype), name, found)
    elif node.op == "call_method" and target == "dequantize":
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        module.graph.erase_node(node)
    elif node.op == "call_function" and target in _JOINS:
        function, arity = _JOINS[target]
        if len(node.args) != arity + 2:
            raise GpusqError(f"{_full(name, node)!r} is {target} with a number", hint="add or multiply in float")
        with module.graph.inserting_before(node):
            joined = module.graph.call_function(function, node.args[:arity])
        scale, zero = node.args[arity:]
        parameters = (_constant(module, scale), _constant(module, zero), torch.quint8)
        _quantize(module, node, joined, parameters, name, found)
    elif node.op == "call_function" and "quantize" in target:
        raise GpusqError(
            f"{_full(name, node)!r} is the operator {target}, which is not known here",
            hint="convert with convert_to_reference_fx, or give the checkpoint as it was before the conversion",
        )
    else:
        return False
    return True


def _quantize(
    module: fx.GraphModule, node: fx.Node, x: Any, parameters: tuple[Any, Any, Any], name: str, found: Findings
) -> None:
    scale, zero, dtype = parameters
    place = Place(_full(name, node), OUTPUT)
    quantizer = quantizer_like(torch.as_tensor(scale), torch.as_tensor(zero), (), *type_range(dtype))
    found.add_activation(place, quantizer, hint=HINT)
    module.add_module(node.name, nn.Identity())
    with module.graph.inserting_before(node):
        node.replace_all_uses_with(module.graph.call_module(node.name, (x,)))
    module.graph.erase_node(node)


def _constant(module: fx.GraphModule, argument: Any) -> Any:
    if isinstance(argument, fx.Node):
        return getattr(module, str(argument.target))
    return argument


def _full(name: str, node: fx.Node) -> str:
    return f"{name}.{node.name}" if name else node.name
