"""An .onnx file, whoever wrote it → a clean graph: checked, at opset 13 or newer, each node traceable to its module.

The names of inputs and outputs, of weights and of nodes stay. What is brought in order:

* local functions are inlined, Constant nodes become initializers, nodes are sorted;
* every node has a unique name and, where one is known, its module as `gpusq.module`;
* doc strings, stack traces and paths of the exporting machine are removed;
* external data is checked and stays on the disk, mapped into memory when it is read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from exporters.external_data import check_external_data
from exporters.finite_weights import not_finite
from exporters.graph_names import check_names, sort_nodes
from exporters.module_names import MODULE_KEY
from exporters.node_modules import name_modules
from exporters.onnx_proto import parse_onnx, tensors_of
from exporters.placement import KEPT_FLOAT
from exporters.qdq_scales import POSITIVE, bad_scale, is_quantizer
from exporters.raise_opset import raise_opset, set_weights_aside
from profiles.errors import GpusqError

_DAMAGED = "the file is damaged or was edited: export the model again"
_CLEANING = (
    common.InlinePass(),
    common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    common.RemoveInitializersFromInputsPass(),
    common.RemoveUnusedOpsetsPass(),
)
_OLDEST_IR_VERSION = 7  # that of opset 13; before 4, every initializer had to be an input as well
_TORCH_METADATA = "pkg."
# An absolute path, of Unix or Windows, that is no part of a URL.
_PATH = re.compile(r"(?<![\w:/.])/[\w.\-]+/[\w.\-/]+|(?<!\w)[A-Za-z]:\\\w")


@dataclass(frozen=True)
class InputInfo:
    """What a graph takes: a shape whose dynamic axes are names or None, and a dtype as numpy calls it, `float32`."""

    shape: tuple[int | str | None, ...] | None
    dtype: str


def read_onnx(path: Path) -> ir.Model:
    """Return the model in `path`, its weights mapped into memory where they are external data.

    Raises:
        GpusqError: the file is missing, damaged, no ONNX model, or not one that could be run.
    """
    proto = parse_onnx(path)
    check_external_data(path, proto)
    check_names(path, proto)
    for _, tensor in tensors_of(proto):
        tensor.ClearField("doc_string")
        tensor.ClearField("metadata_props")
    sort_nodes(proto)
    weights = set_weights_aside(proto.graph)
    _check_operators(path, proto)
    model = _deserialized(path, raise_opset(path, proto))
    _put_back(model, weights, path.parent)
    _clean(path, model)
    _check_values(path, model)
    return model


def input_infos(model: ir.Model) -> dict[str, InputInfo]:
    """The graph's inputs by name, in order; initializers are none."""
    return {value.name or "": _info(value) for value in model.graph.inputs if not value.is_initializer()}


def custom_operators(model: ir.Model) -> Mapping[str, int]:
    """How often each operator from outside the ONNX standard occurs, as `com.microsoft.QGemm`."""
    return Counter(f"{node.domain}.{node.op_type}" for node in model.graph.all_nodes() if node.domain)


def _info(value: ir.Value) -> InputInfo:
    shape = (
        None if value.shape is None else tuple(axis if isinstance(axis, int) else axis.value for axis in value.shape)
    )
    return InputInfo(shape, "unknown" if value.dtype is None else _dtype_name(value.dtype))


def _dtype_name(dtype: ir.DataType) -> str:
    return "string" if dtype == ir.DataType.STRING else dtype.numpy().name


def _check_operators(path: Path, proto: onnx.ModelProto) -> None:
    """Let onnx check every operator; it wants a shape on every input and output, onnxruntime and we do not."""
    shapeless = [
        value.type.tensor_type
        for value in (*proto.graph.input, *proto.graph.output)
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")
    ]
    for tensor_type in shapeless:
        tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise GpusqError(
            f"{path}: {reason}", hint="the operators do not fit the opset that the file declares: export it again"
        ) from error
    for tensor_type in shapeless:
        tensor_type.ClearField("shape")


def _deserialized(path: Path, proto: onnx.ModelProto) -> ir.Model:
    try:
        return ir.from_proto(proto)
    except (ir.serde.SerdeError, ValueError, TypeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise GpusqError(f"{path} cannot be read as a graph: {' '.join(str(cause).split())}", hint=_DAMAGED) from error


def _put_back(model: ir.Model, weights: Sequence[onnx.TensorProto], folder: Path) -> None:
    """Let the inputs that stand for large weights be initializers again."""
    inputs = {value.name: value for value in model.graph.inputs}
    for weight in weights:
        value, tensor = inputs[weight.name], ir.serde.deserialize_tensor(weight)
        value.const_value, value.shape, value.dtype = tensor, ir.Shape(weight.dims), tensor.dtype
        model.graph.register_initializer(value)
    ir.external_data.set_base_dir(model.graph, folder)


def _clean(path: Path, model: ir.Model) -> None:
    try:
        for step in _CLEANING:
            step(model)
    except (ValueError, ir.passes.PassError) as error:
        raise GpusqError(f"{path}: its local functions cannot be inlined: {error}", hint=_DAMAGED) from error
    model.ir_version = max(model.ir_version, _OLDEST_IR_VERSION)
    name_modules(model)
    _strip_metadata(model)


def _strip_metadata(model: ir.Model) -> None:
    kept = {key: text for key, text in model.metadata_props.items() if not _is_foreign(key, text)}
    model.metadata_props.clear()
    model.metadata_props.update(kept)
    model.doc_string = None
    for graph in (model.graph, *model.graph.subgraphs()):
        graph.doc_string = None
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            _strip_value(value)
    for node in model.graph.all_nodes():
        module, kept_float = (node.metadata_props.get(key) for key in (MODULE_KEY, KEPT_FLOAT))
        node.metadata_props.clear()
        if kept_float:
            node.metadata_props[KEPT_FLOAT] = kept_float
        node.doc_string = None
        if module:
            node.metadata_props[MODULE_KEY] = module
        for attribute in node.attributes.values():
            attribute.doc_string = None
        for value in node.outputs:
            _strip_value(value)


def _strip_value(value: ir.Value) -> None:
    value.metadata_props.clear()
    value.doc_string = None


def _is_foreign(key: str, text: str) -> bool:
    """Whether a property of the model is torch's or holds a path of the exporting machine."""
    return key.startswith(_TORCH_METADATA) or bool(_PATH.search(text))


def _check_values(path: Path, model: ir.Model) -> None:
    if trouble := next(not_finite(model.graph), None):
        raise GpusqError(
            f"{path}: {trouble}", hint="the training diverged: export the last checkpoint whose loss was finite"
        )
    for node in filter(is_quantizer, model.graph.all_nodes()):
        if trouble := bad_scale(node):
            raise GpusqError(f"{path}: the scale of {node.name!r} {trouble}", hint=POSITIVE)
