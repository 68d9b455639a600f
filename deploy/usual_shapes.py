"""The shapes that a model is usually given, where its graph leaves axes open besides the batch.

`--input ids=8x128` says that 8 is the usual batch and that `ids` has 128 tokens. Axes with the same name in the graph
have the same length, so `mask [batch, tokens]` needs no `--input` of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from deploy.tensorrt_api import ShapeRange
from exporters.signature import Input
from profiles.errors import GpusqError


def usual_shapes(model: ir.Model, given: Sequence[Input]) -> tuple[ShapeRange, dict[str, tuple[int, ...]]]:
    """Return the batch sizes, and the usual shape of each input that varies behind its first axis.

    Raises:
        GpusqError: `given` does not fit the inputs of `model`, or leaves an axis open.
    """
    shapes = {value.name or "": _dims(value) for value in model.graph.inputs if not value.is_initializer()}
    for spec in given:
        _check(spec, shapes)
    lengths = dict(_lengths(given, shapes))
    first = [spec.shape[0] for spec in given if spec.shape and not isinstance(shapes[spec.name][0], int)]
    default = ShapeRange()
    usual = first[0] if first else default.usual
    batch = ShapeRange(default.smallest, usual, max(default.largest, usual))
    return batch, {name: _sized(name, dims, usual, lengths) for name, dims in shapes.items() if _varies(dims)}


def _dims(value: ir.Value) -> tuple[int | str, ...]:
    """The axes of an input: a length, the name of what varies, or a name made up for what has none."""
    if value.shape is None:
        raise GpusqError(f"input {value.name!r} has no shape", hint="export the model with shapes")
    return tuple(
        dim if isinstance(dim, int) else dim.value or f"{value.name}:{axis}" for axis, dim in enumerate(value.shape)
    )


def _check(spec: Input, shapes: Mapping[str, tuple[int | str, ...]]) -> None:
    if spec.name not in shapes:
        raise GpusqError(f"the model has no input {spec.name!r}", hint=f"its inputs are: {', '.join(shapes)}")
    dims = shapes[spec.name]
    fits = len(dims) == len(spec.shape) and all(
        isinstance(dim, str) or dim == length for dim, length in zip(dims, spec.shape, strict=True)
    )
    if not fits:
        written = "×".join(map(str, dims))
        raise GpusqError(f"input {spec.name!r} cannot have the shape {list(spec.shape)}", hint=f"it is {written}")


def _lengths(given: Sequence[Input], shapes: Mapping[str, tuple[int | str, ...]]) -> Iterator[tuple[str, int]]:
    for spec in given:
        for dim, length in zip(shapes[spec.name], spec.shape, strict=True):
            if isinstance(dim, str):
                yield dim, length


def _varies(dims: tuple[int | str, ...]) -> bool:
    return any(isinstance(dim, str) for dim in dims[1:])


def _sized(name: str, dims: tuple[int | str, ...], batch: int, lengths: Mapping[str, int]) -> tuple[int, ...]:
    sized = []
    for axis, dim in enumerate(dims):
        length = dim if isinstance(dim, int) else batch if axis == 0 else lengths.get(dim)
        if length is None:
            example = "x".join(str(other) if isinstance(other, int) else "8" for other in dims)
            raise GpusqError(f"input {name!r} varies in axis {axis} too, {dim!r}", hint=f"add --input {name}={example}")
        sized.append(length)
    return tuple(sized)
