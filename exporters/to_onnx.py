"""A float module → a clean ONNX graph at opset 23, by torch's dynamo exporter.

LayerNormalization, Gelu and Attention arrive as single operators. What the exporter leaves behind is put in order:

* every node is named after its module, `blocks.0.attn.qkv/MatMul`, and carries that module as `gpusq.module`;
* the weight of a linear layer is called `blocks.0.attn.qkv.weight` again, though it is stored transposed, [K, N];
* stack traces and paths of the exporting machine are removed;
* the first axis of every input is the dynamic axis `batch`.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from profiles.errors import GpusqError

if TYPE_CHECKING:
    import torch

MODULE_KEY = "gpusq.module"
OPSET = 23

_log = logging.getLogger(__name__)


def to_onnx(
    module: torch.nn.Module, inputs: Mapping[str, Sequence[int]], outputs: Sequence[str], *, name: str = "student"
) -> ir.Model:
    """Export `module`, in eval mode, as a float32 graph.

    Args:
        module: takes one float32 tensor per input, in order.
        inputs: name → shape without the batch axis.
        outputs: names of the outputs.
        name: name of the graph.

    Raises:
        GpusqError: torch's exporter cannot capture the module; its own words are in the message.
    """
    import torch

    example = tuple(torch.zeros(2, *shape) for shape in inputs.values())
    batch = torch.export.Dim("batch")
    try:
        with _quiet():
            program = torch.onnx.export(
                module.eval(),
                example,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=tuple({0: batch} for _ in example),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise GpusqError(
            f"torch could not export the model: {_reason(error)}",
            hint="the model's forward must be traceable by torch.export; run it with -v for the whole report",
        ) from error
    assert program is not None
    model: ir.Model = program.model
    model.graph.name = name
    model.producer_name, model.producer_version = "gpusq", None
    _name_by_module(model.graph)
    _strip_exporter_metadata(model)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and its warnings about its own dependencies out of the user's terminal."""
    torch_log = logging.getLogger("torch.onnx")
    level = torch_log.level
    torch_log.setLevel(logging.ERROR)
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch_log.setLevel(level)
        if text := said.getvalue().strip():
            _log.debug("torch.onnx.export said: %s", text)


def _reason(error: Exception) -> str:
    """The first line of the cause: the exporter's own message around it is advice."""
    cause = error.__cause__ or error
    return next((line for line in map(str.strip, str(cause).splitlines()) if line), type(cause).__name__)


def _name_by_module(graph: ir.Graph) -> None:
    taken: Counter[str] = Counter()
    for node in graph:
        module = _module_of(node)
        node.metadata_props[MODULE_KEY] = module
        base = f"{module}/{node.op_type}" if module else node.op_type
        taken[base] += 1
        node.name = base if taken[base] == 1 else f"{base}_{taken[base]}"
        _name_weight(graph, node, module)
    for node in graph:
        for index, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"{node.name}:{index}"


def _module_of(node: ir.Node) -> str:
    """The innermost module around the node: the scopes are modules from the outside in, then the operator itself."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _name_weight(graph: ir.Graph, node: ir.Node, module: str) -> None:
    """Give a linear layer's transposed weight its name back, unless it is shared or still stands there as well."""
    if node.op_type not in ("MatMul", "Gemm") or not module:
        return
    weight, name = node.inputs[1], f"{module}.weight"
    if weight is None or not weight.is_initializer() or len(weight.uses()) > 1 or name in graph.initializers:
        return
    weight.name = name


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
