"""A torch module → a clean ONNX graph, by torch's dynamo exporter.

LayerNormalization, Gelu and Attention arrive as single operators. What the exporter leaves behind is put in order:

* every node is named after its module, `blocks.0.attn.qkv/MatMul`, and carries that module as `gpusq.module`;
* the weight of a linear layer is called `blocks.0.attn.qkv.weight` again, though it is stored transposed, [K, N];
* the module's quantizers become Q/DQ with the scales that they have;
* stack traces and paths of the exporting machine are removed.

Where the exporter fails, the known cures are tried in their order, and the result says which way was taken and why.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from exporters.capture import WAYS, borrowed, branches_on_data
from exporters.module_names import MODULE_KEY, module_of, parameter_name
from exporters.passes.fuse_gelu import FuseGelu
from exporters.passes.lower_fake_quantize import LowerFakeQuantize
from exporters.quantizer import OPERATOR
from exporters.quiet import quiet_loggers
from exporters.signature import Input
from profiles.errors import GpusqError

if TYPE_CHECKING:
    import torch

OPSET = 23
_TALKATIVE = ("torch.onnx", "torch.export", "torch._dynamo", "torch.fx")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """A graph, and how it was come by.

    Attributes:
        model: the graph.
        way: the way that worked.
        failed: the ways that were tried before, each with the reason of its failure.
    """

    model: ir.Model
    way: str
    failed: tuple[tuple[str, str], ...] = ()


def to_onnx(
    module: torch.nn.Module,
    inputs: Sequence[Input],
    outputs: Sequence[str] | None = None,
    *,
    opset: int = OPSET,
    name: str = "student",
    root: str = "",
) -> Exported:
    """Export `module`, in eval mode.

    Args:
        module: takes the inputs in their order.
        inputs: what it takes.
        outputs: names of the outputs; the exporter's own without them.
        opset: of the graph.
        name: of the graph.
        root: the name of a module around the whole model, left out of all names.

    Raises:
        GpusqError: no way led to a graph; torch's own words are in the message.
    """
    import torch

    with contextlib.suppress(NotImplementedError):  # of a program, whose mode was settled when it was exported
        module.eval()
    failed: list[tuple[str, str]] = []
    for way in WAYS:
        if not way.fits(module, inputs) or (way.freezes and any(branches_on_data(reason) for _, reason in failed)):
            continue
        try:
            with _quiet(), torch.no_grad(), borrowed(module):
                model = way.capture(module, inputs, outputs, opset)
        except Exception as error:  # torch's exporter raises whatever the model's own code meets
            failed.append((way.name, _reason(error)))
            _log.debug("%s failed", way.name, exc_info=error)
            continue
        _check_no_scale_is_lost(module, model)
        _name_axes(model.graph, inputs)
        _clean(model, name, root)
        return Exported(model, way.name, tuple(failed))
    raise GpusqError(
        f"torch could not export the model: {failed[0][1]}",
        hint="its forward must be traceable by torch.export; run with -v for each way that was tried",
    )


def _check_no_scale_is_lost(module: torch.nn.Module, model: ir.Model) -> None:
    """Every quantizer of the module must have left its node."""
    from exporters.fake_quantize import FakeQuantize

    found = [node.attributes for node in model.graph if node.op_type == OPERATOR]
    kept = {attributes["place"].as_string() for attributes in found if "place" in attributes}
    lost = sorted({fake.place for fake in module.modules() if isinstance(fake, FakeQuantize)} - kept)
    if lost:
        more = f" and {len(lost) - 1} more" if lost[1:] else ""
        raise GpusqError(
            f"the trained scale of {lost[0]!r}{more} would be lost: the model's forward does not use it",
            hint="take the unused layer out of the model and the checkpoint",
        )


def _name_axes(graph: ir.Graph, inputs: Sequence[Input]) -> None:
    """Call the dynamic axes what the inputs call them; torch's names are `s77`, and sums of these."""
    names: dict[str, str] = {}
    for value, spec in zip(graph.inputs, inputs, strict=True):
        for axis, name in spec.dynamic.items():
            if value.shape is not None and isinstance(dim := value.shape[axis], ir.SymbolicDim) and dim.value:
                names.setdefault(dim.value, name)
    if not names:
        return
    symbol = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape(
                symbol.sub(lambda found: names[found[0]], dim.value or "") or None
                if isinstance(dim, ir.SymbolicDim)
                else dim
                for dim in value.shape
            )


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _clean(model: ir.Model, name: str, root: str) -> None:
    FuseGelu()(model)
    model.graph.name = name
    model.producer_name, model.producer_version = "gpusq", None
    _name_by_module(model.graph, root)
    _strip_exporter_metadata(model)
    LowerFakeQuantize()(model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and its warnings about its own dependencies out of the user's terminal."""
    said = io.StringIO()
    try:
        with quiet_loggers(*_TALKATIVE), warnings.catch_warnings(), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        if text := said.getvalue().strip():
            _log.debug("torch.onnx.export said: %s", text)


def _reason(error: Exception) -> str:
    """The first line of the cause: the exporter's own message around it is advice."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)


def _name_by_module(graph: ir.Graph, root: str) -> None:
    for value in list(graph.initializers.values()):
        assert value.name is not None
        _rename(graph, value, parameter_name(value.name, root))
    taken: Counter[str] = Counter()
    for node in graph:
        module = module_of(node, root)
        node.metadata_props[MODULE_KEY] = module
        base = f"{module}/{node.op_type}" if module else node.op_type
        taken[base] += 1
        node.name = base if taken[base] == 1 else f"{base}_{taken[base]}"
        _name_weight(graph, node, module)
    for node in graph:
        for index, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"{node.name}:{index}"


def _name_weight(graph: ir.Graph, node: ir.Node, module: str) -> None:
    """Give a linear layer's transposed weight its name back, unless it is shared or still stands there as well."""
    if node.op_type not in ("MatMul", "Gemm") or not module:
        return
    weight = node.inputs[1]
    if weight is not None and weight.is_initializer() and len(weight.uses()) == 1:
        _rename(graph, weight, f"{module}.weight")


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    if name != value.name and name not in graph.initializers:
        value.name = name


def _strip_exporter_metadata(model: ir.Model) -> None:
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        module = node.metadata_props[MODULE_KEY]
        node.metadata_props.clear()
        if module:
            node.metadata_props[MODULE_KEY] = module
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
