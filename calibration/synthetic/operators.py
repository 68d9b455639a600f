"""ONNX operators in differentiable torch: those that exporters write for CNNs, transformers and detectors.

Each function takes the inputs by position and the attributes by ONNX's own names. What older opsets have as an
attribute and newer ones as an input (`axes`, `split`, `pads`) is one parameter here, so both call the same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_TYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64}


def convolution(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    group: int = 1,
    **_: Any,
) -> Tensor:
    """Conv of one to three dimensions, its pads symmetric or not."""
    dims = x.dim() - 2
    call = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
    x, left = _padded(x, pads or (0,) * (2 * dims), 0.0)
    return call(x, w, b, tuple(strides) or 1, left, tuple(dilations) or 1, group)


def transposed_convolution(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
    output_padding: Sequence[int] = (),
    group: int = 1,
    **_: Any,
) -> Tensor:
    """ConvTranspose of two dimensions with symmetric pads."""
    left = _symmetric(pads or (0,) * 4)
    return functional.conv_transpose2d(
        x, w, b, tuple(strides) or 1, left, tuple(output_padding) or 0, group, tuple(dilations) or 1
    )


def max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
    ceil_mode: int = 0,
    **_: Any,
) -> Tensor:
    """MaxPool of two dimensions."""
    x, left = _padded(x, pads or (0,) * 4, -math.inf)
    return functional.max_pool2d(x, tuple(kernel_shape), tuple(strides) or 1, left, ceil_mode=bool(ceil_mode))


def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    **_: Any,
) -> Tensor:
    """AveragePool of two dimensions with symmetric pads."""
    left = _symmetric(pads or (0,) * 4)
    return functional.avg_pool2d(
        x, tuple(kernel_shape), tuple(strides) or 1, left, bool(ceil_mode), bool(count_include_pad)
    )


def batch_normalization(
    x: Tensor, scale: Tensor, b: Tensor, mean: Tensor, variance: Tensor, *, epsilon: float = 1e-5, **_: Any
) -> Tensor:
    """BatchNormalization for inference."""
    return functional.batch_norm(x, mean, variance, scale, b, eps=epsilon)


def layer_normalization(
    x: Tensor, scale: Tensor, b: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, **_: Any
) -> Tensor:
    """LayerNormalization, its first output."""
    return functional.layer_norm(x, x.shape[axis:], scale.expand(x.shape[axis:]), b, epsilon)


def rms_normalization(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, **_: Any) -> Tensor:
    """RMSNormalization."""
    return functional.rms_norm(x, x.shape[axis:], scale.expand(x.shape[axis:]), epsilon)


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
) -> Tensor:
    """Gemm."""
    product = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return product if c is None else product + beta * c


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: int = 0,
    q_num_heads: int = 0,
    kv_num_heads: int = 0,
    **_: Any,
) -> Tensor:
    """Attention of opset 23 without a cache: [B, heads, N, D], or [B, N, heads · D] with the numbers of heads."""
    packed = q.dim() == 3
    if packed:
        q, k, v = (_heads(x, n) for x, n in ((q, q_num_heads), (k, kv_num_heads), (v, kv_num_heads)))
    o = functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=bool(is_causal), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return o.transpose(1, 2).flatten(2) if packed else o


def reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    """Reshape; 0 keeps a length unless `allowzero`."""
    asked = _ints(shape)
    return x.reshape([n if n or allowzero else x.shape[axis] for axis, n in enumerate(asked)])


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """Flatten to two dimensions."""
    return x.reshape(math.prod(x.shape[:axis]), -1)


def transpose(x: Tensor, *, perm: Sequence[int] = ()) -> Tensor:
    """Transpose; without `perm` all axes are reversed."""
    return x.permute(*(perm or range(x.dim())[::-1]))


def slice_(x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    """Slice, with negative steps too."""
    starts, ends = _ints(starts), _ints(ends)
    for index, axis in enumerate(_ints(axes) if axes is not None else range(len(starts))):
        step = _ints(steps)[index] if steps is not None else 1
        chosen = range(x.shape[axis])[starts[index] : _end(ends[index], x.shape[axis], step) : step]
        x = x.index_select(axis, torch.tensor(chosen, dtype=torch.int64))
    return x


def split(x: Tensor, split: Any = None, *, axis: int = 0, num_outputs: int = 0) -> tuple[Tensor, ...]:
    """Split into the given lengths, or into equal parts."""
    lengths = _ints(split) if split is not None else -(-x.shape[axis] // num_outputs)
    return tuple(torch.split(x, lengths, axis))


def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Gather; negative indices count from the end."""
    wrapped = torch.where(indices < 0, indices + x.shape[axis], indices)
    found = x.index_select(axis, wrapped.reshape(-1))
    axis %= x.dim()
    return found.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """GatherND without batch dimensions."""
    if batch_dims:
        raise NotImplementedError(f"batch_dims {batch_dims}")
    return x[tuple(indices.unbind(-1))]


def unsqueeze(x: Tensor, axes: Any) -> Tensor:
    """Unsqueeze at axes of the result."""
    asked = _ints(axes)
    for axis in sorted(axis % (x.dim() + len(asked)) for axis in asked):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Any = None) -> Tensor:
    """Squeeze the given axes, or all of length 1."""
    return x.squeeze() if axes is None else x.squeeze(_ints(axes))


def expand(x: Tensor, shape: Tensor) -> Tensor:
    """Expand by broadcasting in both directions."""
    asked = _ints(shape)
    missing = max(len(asked) - x.dim(), 0)
    lengths = [
        max(n, m) if n and m else 0
        for n, m in zip([1] * missing + list(x.shape), [1] * (x.dim() - len(asked)) + asked, strict=True)
    ]
    return x.expand(lengths)


def pad(x: Tensor, pads: Any, value: Any = None, axes: Any = None, *, mode: str = "constant") -> Tensor:
    """Pad, constant or by reflection."""
    asked, dims = _ints(pads), x.dim()
    places = _ints(axes) if axes is not None else list(range(dims))
    before, after = [0] * dims, [0] * dims
    for index, axis in enumerate(places):
        before[axis], after[axis] = asked[index], asked[index + len(places)]
    flat = [n for axis in reversed(range(dims)) for n in (before[axis], after[axis])]
    while flat[-2:] == [0, 0]:
        del flat[-2:]
    fill = 0.0 if value is None else float(value)
    name = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}[mode]
    return functional.pad(x, flat, name, fill) if name == "constant" else functional.pad(x, flat, name)


def resize(
    x: Tensor,
    roi: Any = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    **_: Any,
) -> Tensor:
    """Resize of the last two dimensions: nearest, or linear and cubic with half pixels or aligned corners."""
    size = (
        _ints(sizes)[2:]
        if sizes is not None
        else [
            int(n * s)
            for n, s in zip(x.shape[2:], scales.tolist()[2:], strict=True)  # type: ignore[union-attr]
        ]
    )
    if mode == "nearest":
        return functional.interpolate(x, size, mode="nearest")
    name = {"linear": "bilinear", "cubic": "bicubic"}[mode]
    return functional.interpolate(x, size, mode=name, align_corners=coordinate_transformation_mode == "align_corners")


def reduction(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A Reduce operator of torch's function with the parameters `dim` and `keepdim`."""

    def reduced(x: Tensor, axes: Any = None, *, keepdims: int = 1, **_: Any) -> Tensor:
        return reduce(x, dim=_ints(axes) if axes is not None else list(range(x.dim())), keepdim=bool(keepdims))

    return reduced


def clip(x: Tensor, min: Any = None, max: Any = None) -> Tensor:  # noqa: A002  ONNX's names
    """Clip; a bound may be missing."""
    if min is None and max is None:
        return x
    return torch.clamp(x, *(None if bound is None else float(bound) for bound in (min, max)))


def constant_of_shape(shape: Tensor, *, value: Tensor | None = None) -> Tensor:
    """ConstantOfShape."""
    return (torch.zeros(1) if value is None else value.reshape(1)).expand(_ints(shape)).clone()


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Softmax of opset 13 and newer."""
    return functional.softmax(x, axis)


def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """Shape, or a part of it."""
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Gelu."""
    return functional.gelu(x, approximate=approximate)


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Div; of integers, rounded towards zero."""
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


def cast(x: Tensor, *, to: int, **_: Any) -> Tensor:
    """Cast; raises KeyError for a type that is no number of a float network."""
    return x.to(_TYPES[to])


def _ints(values: Any) -> list[int]:
    return [int(value) for value in (values.reshape(-1).tolist() if isinstance(values, Tensor) else values)]


def _end(end: int, length: int, step: int) -> int | None:
    """What Python's slices take for an end before the first element, going backwards."""
    return None if end < -length and step < 0 else end


def _heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def _symmetric(pads: Sequence[int]) -> tuple[int, ...]:
    half = len(pads) // 2
    if tuple(pads[:half]) != tuple(pads[half:]):
        raise NotImplementedError(f"pads {list(pads)} that differ between the two sides")
    return tuple(pads[:half])


def _padded(x: Tensor, pads: Sequence[int], fill: float) -> tuple[Tensor, tuple[int, ...]]:
    """`x` and what is left to pad, the same on both sides."""
    half = len(pads) // 2
    if tuple(pads[:half]) == tuple(pads[half:]):
        return x, tuple(pads[:half])
    flat = [n for axis in reversed(range(half)) for n in (pads[axis], pads[axis + half])]
    return functional.pad(x, flat, value=fill), (0,) * half


OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Add": torch.add, "And": torch.logical_and, "Attention": attention, "AveragePool": average_pool,
    "BatchNormalization": batch_normalization, "Cast": cast, "Ceil": torch.ceil, "Clip": clip,
    "Concat": lambda *x, axis: torch.cat(x, axis), "ConstantOfShape": constant_of_shape, "Conv": convolution,
    "ConvTranspose": transposed_convolution, "Cos": torch.cos, "Div": divide, "Dropout": lambda x, *_, **__: x,
    "Equal": torch.eq, "Erf": torch.erf, "Exp": torch.exp, "Expand": expand, "Flatten": flatten, "Floor": torch.floor,
    "Gather": gather, "GatherND": gather_nd, "Gelu": gelu, "Gemm": gemm,
    "GlobalAveragePool": lambda x: x.mean(dim=tuple(range(2, x.dim())), keepdim=True), "Greater": torch.gt,
    "GreaterOrEqual": torch.ge, "HardSigmoid": lambda x, alpha=0.2, beta=0.5: torch.clamp(alpha * x + beta, 0, 1),
    "HardSwish": functional.hardswish, "Identity": lambda x: x, "LayerNormalization": layer_normalization,
    "LeakyRelu": lambda x, alpha=0.01: functional.leaky_relu(x, alpha), "Less": torch.lt, "LessOrEqual": torch.le,
    "Log": torch.log, "MatMul": torch.matmul, "Max": lambda *x: _folded(torch.maximum, x), "MaxPool": max_pool,
    "Min": lambda *x: _folded(torch.minimum, x), "Mul": torch.mul, "Neg": torch.neg, "Not": torch.logical_not,
    "Or": torch.logical_or, "Pad": pad, "Pow": torch.pow, "RMSNormalization": rms_normalization,
    "Range": lambda start, limit, delta: torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype),
    "Reciprocal": torch.reciprocal, "ReduceMax": reduction(torch.amax), "ReduceMean": reduction(torch.mean),
    "ReduceMin": reduction(torch.amin), "ReduceSum": reduction(torch.sum), "Relu": torch.relu, "Reshape": reshape,
    "Resize": resize, "Shape": shape, "Sigmoid": torch.sigmoid, "Sin": torch.sin, "Slice": slice_, "Softmax": softmax,
    "Softplus": functional.softplus, "Split": split, "Sqrt": torch.sqrt, "Squeeze": squeeze, "Sub": torch.sub,
    "Tanh": torch.tanh, "Tile": lambda x, repeats: x.repeat(_ints(repeats)), "Transpose": transpose,
    "Unsqueeze": unsqueeze, "Where": torch.where,
}  # fmt: skip
"""By operator type."""


def _folded(pairwise: Callable[[Tensor, Tensor], Tensor], values: Sequence[Tensor]) -> Tensor:
    found, *rest = values
    for value in rest:
        found = pairwise(found, value)
    return found
