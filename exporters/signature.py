"""What a model takes: its inputs by name, with shapes, types and the axes that may vary.

On the command line `--input NAME=1x3x224x224` gives an input its shape, `NAME=1x16:int64` its type as well, and
`--dynamic NAME:AXIS` lets an axis vary; NAME may be `*` for every input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from profiles.errors import GpusqError

DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "bool")
_INPUT = re.compile(r"(?P<name>[^=]+)=(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
_DYNAMIC = re.compile(r"(?P<name>[^:]+):(?P<axis>\d+)")


@dataclass(frozen=True)
class Input:
    """One input of a model.

    Attributes:
        name: as the graph calls it.
        shape: of an example, with the batch.
        dtype: one of DTYPES.
        dynamic: the axes that may vary, with the name of each.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    dynamic: Mapping[int, str] = field(default_factory=dict)


def parse_input(text: str) -> Input:
    """Return the input that `NAME=1x3x224x224` or `NAME=1x16:int64` describes."""
    match = _INPUT.fullmatch(text)
    dtype = match["dtype"] or "float32" if match else ""
    if match is None or dtype not in DTYPES:
        raise GpusqError(
            f"{text!r} describes no input", hint=f"write NAME=1x3x224x224, or NAME=1x16:int64 ({', '.join(DTYPES)})"
        )
    shape = tuple(int(dim) for dim in match["shape"].split("x"))
    if 0 in shape:
        raise GpusqError(f"{text!r} has an axis of length 0", hint="give the shape of a real example")
    return Input(match["name"], shape, dtype)


def with_dynamic(inputs: Sequence[Input], asked: Sequence[str]) -> tuple[Input, ...]:
    """Return `inputs` with the axes that `asked` names, each as NAME:AXIS; axis 0 is called `batch`."""
    found = list(inputs)
    for text in asked:
        match = _DYNAMIC.fullmatch(text)
        if match is None:
            raise GpusqError(f"{text!r} names no axis", hint="write NAME:AXIS, such as images:0 or '*:0'")
        indices = [index for index, spec in enumerate(found) if match["name"] in ("*", spec.name)]
        if not indices:
            known = ", ".join(spec.name for spec in inputs)
            raise GpusqError(f"the model has no input {match['name']!r}", hint=f"its inputs are: {known}")
        axis = int(match["axis"])
        for index in indices:
            spec = found[index]
            if axis >= len(spec.shape) and match["name"] != "*":
                raise GpusqError(
                    f"input {spec.name!r} has no axis {axis}", hint=f"its shape is {list(spec.shape)}, counted from 0"
                )
            if axis < len(spec.shape):
                found[index] = replace(spec, dynamic={**spec.dynamic, axis: axis_name(spec.name, axis)})
    return tuple(found)


def axis_name(name: str, axis: int) -> str:
    """What a dynamic axis is called in the graph."""
    return "batch" if axis == 0 else f"{name}_axis{axis}"
