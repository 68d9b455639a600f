"""What a placement leaves in high precision, and why: NVIDIA's documentation and Model Optimizer's ONNX heuristics.

| what | rule |
|---|---|
| linear layers | K and N are 16 at least, and they multiply more than one row |
| convolutions | 16 channels in and out at least; fewer of one where the other, or the image, makes up for it |
| transposed convolutions | none: whatever the scales, TensorRT-RTX dequantizes both operands and computes in float |
| grouped convolutions | 16 channels a group; fewer where kernels are 3 wide and the outputs a multiple of 8 |
| 4-bit weights | K and N are 16 at least, and K is a multiple of a block |
| FP8 | not convolutions of fewer than 16 channels |
| FP8 attention | 32 tokens at least, head size a multiple of 8 up to 256, no mask or a constant one |
| NVFP4 | linear layers whose K is a multiple of 16, the weight on the right |
| INT8 attention | head size 16, 32 or 64, at most 512 tokens (TensorRT, fused attention) |
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.linears import Linear, array_shape
from exporters.module_names import label_of
from exporters.placement import KEPT_FLOAT
from exporters.small_floats import BLOCK

SMALLEST = 16  # of K and N
BLOCKS = (128, 64)
_HEAD_SIZES = (16, 32, 64)
_TOKENS = 512
_FP8_HEAD_SIZE = 256
_FP8_TOKENS = 32


def kept_float(graph: ir.Graph) -> dict[str, str]:
    """The modules that are marked to stay float, each with the reason."""
    return {label_of(node): node.metadata_props[KEPT_FLOAT] for node in graph if KEPT_FLOAT in node.metadata_props}


def too_small(linear: Linear) -> str:
    """Why a layer is not worth quantizing to INT8; "" if it is."""
    if linear.kind == "conv":
        return _conv_too_small(linear)
    for letter, length in (("K", linear.k), ("N", linear.n)):
        if length < SMALLEST:
            return f"{letter} = {length} is below {SMALLEST}: slower in INT8"
    shape = activation(linear).shape
    rows = [] if shape is None else list(shape)
    if rows:  # [.., rows, K], or [.., K, rows] where the weight stands on the left
        del rows[-1 if linear.activation_input == 0 else -2]
    return "it multiplies a single row: slower in INT8" if rows and all(row == 1 for row in rows) else ""


def _conv_too_small(linear: Linear) -> str:
    if linear.node.op_type == "ConvTranspose":
        return "no kernel computes ConvTranspose on integers"
    stored = array_shape(linear.weight)
    kernel = stored[2:]
    outputs = linear.n
    inputs = stored[linear.k_axis] * (linear.group if linear.node.op_type == "Conv" else 1)
    if min(outputs, inputs) // linear.group >= SMALLEST:
        return ""
    if linear.group > 1:
        few = outputs % 8 != 0 or min(kernel) < 3
        return "a grouped convolution with few channels or a small kernel: slower in INT8" if few else ""
    first = activation(linear).is_graph_input()
    fits = (outputs % 8 == 0 or inputs % 8 == 0) and (first or max(outputs, inputs) >= SMALLEST)
    return "" if fits and len(set(kernel)) == 1 else f"a convolution of {inputs} to {outputs} channels: slower in INT8"


def no_block(linear: Linear) -> str:
    """Why a layer gets no 4-bit weight; "" if it does."""
    if linear.kind == "conv":
        return "4-bit weights are for linear layers"
    if linear.input_q is not None:
        return "its input is quantized, and no GEMM multiplies INT8 by INT4"
    if linear.k < SMALLEST or linear.n < SMALLEST:
        return f"K or N is below {SMALLEST}"
    return "" if block_of(linear) else f"K = {linear.k} is no multiple of {BLOCKS[-1]}"


def no_fp8(linear: Linear) -> str:
    """Why a layer gets no 8-bit floats; "" if it does."""
    if linear.kind == "conv" and linear.group == 1 and array_shape(linear.weight)[1] < SMALLEST:
        return f"a convolution with fewer than {SMALLEST} channels: computed in float16 behind its FP8 quantizers"
    return ""


def no_fp4(linear: Linear) -> str:
    """Why a layer gets no 4-bit floats; "" if it does."""
    if linear.kind == "conv":
        return "4-bit floats are for linear layers"
    if linear.input_q is not None:
        return "its input has trained scales, and both operands are of one type"
    if linear.activation_input != 0 or linear.node.attributes.get_int("transA", False):
        return "its input does not have K as its last axis"
    return "" if linear.k % BLOCK == 0 else f"K = {linear.k} is no multiple of {BLOCK}"


def block_of(linear: Linear) -> int:
    """The largest block that K is a multiple of; 0 if there is none."""
    return next((block for block in BLOCKS if linear.k % block == 0), 0)


def no_int8_attention(softmax: ir.Node, q: ir.Value, v: ir.Value) -> str:
    """Why no INT8 kernel computes an attention of these q and v in one; "" if one does."""
    queries, size = _last_two(q)
    keys, v_size = _last_two(v)
    for length in (size, v_size):
        if length not in _HEAD_SIZES:
            return f"head size {length} is none of {', '.join(map(str, _HEAD_SIZES))}: no INT8 kernel"
    for tokens in (queries, keys):
        if not isinstance(tokens, int):
            return f"its number of tokens is not known: an INT8 kernel takes at most {_TOKENS}"
        if tokens > _TOKENS:
            return f"{tokens} tokens are more than {_TOKENS}: no INT8 kernel"
    return ""


def no_fp8_attention(softmax: ir.Node, q: ir.Value, v: ir.Value) -> str:
    """Why no FP8 kernel computes an attention in one; "" if one does."""
    for length in (_last_two(q)[1], _last_two(v)[1]):
        if not isinstance(length, int) or length > _FP8_HEAD_SIZE or length % 8:
            return f"head size {length} is no multiple of 8 up to {_FP8_HEAD_SIZE}: no FP8 kernel"
    for tokens in (_last_two(q)[0], _last_two(v)[0]):
        if not isinstance(tokens, int) or tokens < _FP8_TOKENS:
            return f"it has {tokens} tokens: TensorRT-RTX 1.7 fuses FP8 attentions of {_FP8_TOKENS} and more"
    add = None if softmax.inputs[0] is None else softmax.inputs[0].producer()
    computed = [] if add is None or add.op_type != "Add" else [x for x in add.inputs if not _is_scores(x)]
    masked = any(x is not None and not x.is_initializer() for x in computed)
    return "its mask is computed: TensorRT-RTX does not fuse each such attention in FP8" if masked else ""


def _is_scores(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type in ("MatMul", "Add", "Cast")


def _last_two(value: ir.Value) -> tuple[int | ir.SymbolicDim | None, int | ir.SymbolicDim | None]:
    shape = [] if value.shape is None else list(value.shape)
    return (shape[-2], shape[-1]) if len(shape) > 1 else (None, None)


def activation(linear: Linear) -> ir.Value:
    """What a layer multiplies by its weight."""
    value = linear.node.inputs[linear.activation_input]
    assert value is not None
    return value
