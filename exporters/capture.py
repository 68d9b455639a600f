"""The ways from a torch module to a first graph, in the order in which they are tried.

All of them see frozen parameters. Whether torch runs scaled_dot_product_attention as one kernel depends on whether it
records gradients, and so does how the result lies in memory; the exporter asks twice, with and without, and a view
that was recorded for one layout fails on the other: "Cannot view a tensor with shape …". So torch 2.13 fails on Hugging
Face's Swin as it is.

Each way exists for a failure that was met, which its docstring tells. A way that cannot differ from the ones before it
is left out: nothing is done about attention in a model that has no such switch.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from exporters.module_names import mark_scopes_of_paths
from exporters.quantizer import DOMAIN
from exporters.signature import Input

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Way:
    """One way to a graph.

    Attributes:
        name: as the report tells it.
        capture: (module, inputs, names of the outputs, opset) → the graph; raises whatever torch raises.
        fits: whether it can do anything for this module and these inputs.
        freezes: whether it takes each branch as the example happens to, even one that depends on the data.
    """

    name: str
    capture: Callable[[torch.nn.Module, Sequence[Input], Sequence[str] | None, int], ir.Model]
    fits: Callable[[torch.nn.Module, Sequence[Input]], bool] = lambda module, inputs: True
    freezes: bool = False


def _plain(module: torch.nn.Module, inputs: Sequence[Input], outputs: Sequence[str] | None, opset: int) -> ir.Model:
    return _translate(_program(module, inputs), inputs, outputs, opset)


def _eager(module: torch.nn.Module, inputs: Sequence[Input], outputs: Sequence[str] | None, opset: int) -> ir.Model:
    """With transformers' attention and experts written out.

    Fused ones may have no translation, as `grouped_mm` of mixtures of experts has none, or a mask made with vmap.
    """
    with _written_out(module):
        return _plain(module, inputs, outputs, opset)


def _fixed_axes(
    module: torch.nn.Module, inputs: Sequence[Input], outputs: Sequence[str] | None, opset: int
) -> ir.Model:
    """With those axes fixed that the model's own code fixes, by an `int(x.shape[0])` or a table of that length."""
    import torch

    return _translate(_program(module, inputs, dynamic=torch.export.Dim.AUTO), inputs, outputs, opset)


def _strict(module: torch.nn.Module, inputs: Sequence[Input], outputs: Sequence[str] | None, opset: int) -> ir.Model:
    """Through the bytecode: it follows Python state that non-strict tracing may not change."""
    return _translate(_program(module, inputs, strict=True), inputs, outputs, opset)


def _torchscript(
    module: torch.nn.Module, inputs: Sequence[Input], outputs: Sequence[str] | None, opset: int
) -> ir.Model:
    """By the older exporter, which runs the module once and records what it does: it needs no translation of Python."""
    import onnx
    import torch
    from onnxscript import optimizer

    from exporters.fake_quantize import FakeQuantize, as_symbols

    stored: Any = io.BytesIO()
    with as_symbols(module):
        torch.onnx.export(
            module,
            tuple(map(_example, inputs)),
            stored,
            dynamo=False,
            opset_version=opset,
            input_names=[spec.name for spec in inputs],
            output_names=None if outputs is None else list(outputs),
            dynamic_axes={spec.name: dict(spec.dynamic) for spec in inputs if spec.dynamic},
            custom_opsets={DOMAIN: 1} if any(isinstance(part, FakeQuantize) for part in module.modules()) else {},
        )
    model = ir.from_proto(onnx.load_from_string(stored.getvalue()))
    mark_scopes_of_paths(model.graph, dict(module.named_modules()))
    optimizer.optimize(model)  # constants folded, copies and dead nodes removed: the dynamo exporter does it itself
    return model


def _has_switches(module: torch.nn.Module, inputs: Sequence[Input]) -> bool:
    return any(True for _ in _switches(module))


def _has_dynamic(module: torch.nn.Module, inputs: Sequence[Input]) -> bool:
    return any(spec.dynamic for spec in inputs)


WAYS = (
    Way("torch.export", _plain),
    Way("torch.export, attention and experts written out", _eager, _has_switches),
    Way("torch.export, axes that the model fixes", _fixed_axes, _has_dynamic),
    Way("torch.export, strict", _strict),
    Way("TorchScript", _torchscript, freezes=True),
)


def branches_on_data(reason: str) -> bool:
    """Whether torch.export failed at a branch that depends on the data."""
    return "data-dependent" in reason.lower()


def _program(
    module: torch.nn.Module, inputs: Sequence[Input], *, strict: bool = False, dynamic: Any = None
) -> torch.export.ExportedProgram:
    import torch

    from exporters.fake_quantize import as_symbols

    hint = torch.export.Dim.DYNAMIC if dynamic is None else dynamic
    dims = [dict.fromkeys(spec.dynamic, hint) or None for spec in inputs]
    with as_symbols(module):
        return torch.export.export(
            module, tuple(map(_example, inputs)), dynamic_shapes=_as_called(module, dims), strict=strict
        )


def _as_called(module: torch.nn.Module, dims: list[Any]) -> tuple[Any, ...]:
    """The dims as forward takes its arguments: what goes into `*args` is one tuple."""
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(dims)
    fixed = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*dims[:fixed], tuple(dims[fixed:])) if dims[fixed:] else tuple(dims)


def _example(spec: Input) -> torch.Tensor:
    import torch

    shape = tuple(max(dim, 2) if axis in spec.dynamic else dim for axis, dim in enumerate(spec.shape))
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def _translate(
    program: torch.export.ExportedProgram, inputs: Sequence[Input], outputs: Sequence[str] | None, opset: int
) -> ir.Model:
    import torch

    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        input_names=[spec.name for spec in inputs],
        output_names=None if outputs is None else list(outputs),
        verbose=False,
    )
    assert exported is not None
    model: ir.Model = exported.model
    return model


@contextlib.contextmanager
def borrowed(module: torch.nn.Module) -> Iterator[None]:
    """Freeze the parameters of `module`, and give it back as it was.

    What a forward keeps for its next call, as ultralytics' heads keep their anchors, is a tensor without data after a
    trace; the next run or way would stumble over it.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    before = [(part, dict(vars(part)), dict(part._buffers)) for part in module.modules()]
    for parameter in trained:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True
        for part, attributes, buffers in before:
            vars(part).clear()
            vars(part).update(attributes)
            part._buffers.clear()
            part._buffers.update(buffers)


@contextlib.contextmanager
def _written_out(module: torch.nn.Module) -> Iterator[None]:
    found = [(part, name, getattr(part, name)) for part, name in _switches(module)]
    for config, name, _ in found:
        setattr(config, name, "eager" if "attn" in name else "batched_mm")
    try:
        yield
    finally:
        for config, name, before in found:
            setattr(config, name, before)


def _switches(module: torch.nn.Module) -> Iterator[tuple[Any, str]]:
    """The configs in `module` that choose an implementation, with the attribute that does."""
    configs = {id(config): config for part in module.modules() if (config := getattr(part, "config", None)) is not None}
    for config in configs.values():
        for name in ("_attn_implementation", "_experts_implementation"):
            if getattr(config, name, None) not in (None, "eager", "batched_mm"):
                yield config, name
