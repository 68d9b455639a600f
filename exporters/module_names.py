"""The names that modules and parameters keep in a graph, so that every node can be traced to its module.

torch's exporter tells the scopes of a node from the outside in, and calls parameters by their full name. Wrappers,
parametrizations and quantizers are machinery: the node belongs to the module around them.
"""

from __future__ import annotations

import ast
from collections.abc import Collection

import onnx_ir as ir

MODULE_KEY = "gpusq.module"
_SCOPES = "pkg.torch.onnx.name_scopes"
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # torch's word for a node of no module
_PARAMETRIZATIONS = "parametrizations"
_QUANTIZERS = ("input_quantizer", "output_quantizer")


def module_of(node: ir.Node, root: str = "") -> str:
    """The innermost module around `node`, without `root`, the name of a wrapper around the whole model."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    name = str(scopes[-2]) if len(scopes) > 1 else ""
    return "" if name == _NO_MODULE else without_machinery(name, root)


def label_of(node: ir.Node) -> str:
    """What a node is called to people: its module, or its own name where the exporter kept no module."""
    return node.metadata_props.get(MODULE_KEY) or node.name or ""


def mark_scopes_of_paths(graph: ir.Graph, modules: Collection[str]) -> None:
    """Tell the scopes of nodes that the TorchScript exporter made, from their names: `/blocks.0/attn/qkv/MatMul`.

    The children of a Sequential repeat its name there, `/mlp/mlp.0/MatMul`; `modules`, all that the model has, tell
    which reading is right. Hooks run outside their module's scope: a quantizer belongs where its scale does.
    """
    for node in graph:
        if node.op_type == "FakeQuantize" and (scale := node.inputs[1]) is not None:
            node.metadata_props[_SCOPES] = repr(["", (scale.name or "").removesuffix(".scale"), node.op_type])
            continue
        *path, _ = (node.name or "").removeprefix("/").split("/")
        scopes = [""]
        for part in path:
            nested = f"{scopes[-1]}.{part}".removeprefix(".")
            beside = f"{scopes[-1].rpartition('.')[0]}.{part}".removeprefix(".")
            scopes.append(nested if nested in modules else beside)
        node.metadata_props[_SCOPES] = repr([*scopes, node.op_type])


def without_machinery(name: str, root: str = "") -> str:
    """`blocks.0.fc.parametrizations.weight.0` → `blocks.0.fc`; `blocks.0.fc.input_quantizer` → `blocks.0.fc`."""
    parts = _below(name, root).split(".")
    if _PARAMETRIZATIONS in parts:
        parts = parts[: parts.index(_PARAMETRIZATIONS)]
    if parts and parts[-1] in _QUANTIZERS:
        parts.pop()
    return ".".join(parts)


def parameter_name(name: str, root: str = "") -> str:
    """`fc.parametrizations.weight.original` → `fc.weight`; any other name without `root`."""
    module, found, parameter = _below(name, root).partition(f".{_PARAMETRIZATIONS}.")
    return f"{module}.{parameter.removesuffix('.original')}" if found else module


def _below(name: str, root: str) -> str:
    return name.removeprefix(f"{root}.") if name != root else ""
