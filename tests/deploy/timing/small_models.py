"""Models that take a known amount of work: so many products of a matrix with itself."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

_MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[batch, {size}, {size}] x0) => (float[batch, {size}, {size}] x{count}) {{ {body} }}"""


def save_model(path: Path, products: int, size: int = 32) -> Path:
    """Save a model of `products` products of [size, size] matrices, its batch open; return its path."""
    body = "\n".join(f"x{index + 1} = MatMul(x{index}, x0)" for index in range(products))
    ir.save(ir.from_onnx_text(_MODEL.format(size=size, count=products, body=body)), path)
    return path
