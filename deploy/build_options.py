"""What is asked of a builder: the same options on every line of TensorRT, for `gpusq build` and `gpusq convert`.

    --shapes x:1x3x224x224:8x3x224x224:32x3x224x224     the smallest, usual and largest shape of the input x
    --shapes x:8x3x224x224                              just this one
    --shapes x:1x3x224x224 --shapes x:8x3x224x224       two optimization profiles: an input that is named again begins
                                                        the next one

`builder_config` sets them on TensorRT's own builder, `trtexec` writes them as flags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from profiles.errors import GpusqError

Compatibility = Literal["none", "ampere+", "same-compute-capability"]
Tiling = Literal["none", "fast", "moderate", "full"]
TILINGS: tuple[Tiling, ...] = get_args(Tiling)
Shape = tuple[int, ...]

_NAMES = {"sparse": "--dense", "dla_core": "--dla"}
# What TensorRT-RTX does with a model it does for any machine; the rest is for the builder on the device.
_AHEAD_OF_TIME = ("shapes", "workspace_mib", "weight_streaming", "sparse")
_SHAPE = r":\d+(?:x\d+)*"
_RANGE = re.compile(rf"(?P<name>.+?)(?P<shapes>(?:{_SHAPE}){{3}}|{_SHAPE})")


@dataclass(frozen=True)
class InputRange:
    """The shapes that an engine takes for one input: TensorRT's MIN, OPT and MAX."""

    name: str
    smallest: Shape
    usual: Shape
    largest: Shape

    @property
    def fixed(self) -> bool:
        """Whether it is just one shape."""
        return self.smallest == self.largest

    def takes(self, shape: Shape) -> bool:
        """Whether `shape` lies between the smallest and the largest."""
        return len(shape) == len(self.smallest) and all(
            low <= length <= high for low, length, high in zip(self.smallest, shape, self.largest, strict=True)
        )

    def __str__(self) -> str:
        """As `--shapes` takes it."""
        shapes = (self.usual,) if self.fixed else (self.smallest, self.usual, self.largest)
        return ":".join([self.name, *("x".join(map(str, shape)) for shape in shapes)])


@dataclass(frozen=True)
class BuildOptions:
    """The options of one build. What is None is left to TensorRT.

    Attributes:
        shapes: of the inputs, one optimization profile after the other, each with the same inputs; an input without an
            entry has the batches 1, 8 and 32.
        sparse: let the builder take sparse kernels for weights that are 2:4.
        optimization_level: 0 to 5: how much time the builder spends on finding faster kernels.
        workspace_mib: the most memory that a kernel may use for intermediate results.
        tiling: how hard the builder tries to keep neighbouring layers in the L2 cache.
        dla_core: run on this DLA core; None is the GPU.
        gpu_fallback: layers that the DLA cannot run may run on the GPU.
        hardware_compatibility: which other GPUs the engine must run on.
        version_compatible: later versions of TensorRT may run the engine.
        weight_streaming: weights may stay in host memory.
        refit: weights can be replaced in the engine.
    """

    shapes: tuple[InputRange, ...] = ()
    sparse: bool = True
    optimization_level: int | None = None
    workspace_mib: int | None = None
    tiling: Tiling | None = None
    dla_core: int | None = None
    gpu_fallback: bool = False
    hardware_compatibility: Compatibility = "none"
    version_compatible: bool = False
    weight_streaming: bool = False
    refit: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without a builder; raises GpusqError."""
        if self.gpu_fallback and self.dla_core is None:
            raise GpusqError("falling back to the GPU is for engines of the DLA", hint="add --dla 0")
        first, *others = [sorted(given.name for given in profile) for profile in self.profiles]
        if any(names != first for names in others):
            raise GpusqError(
                f"the optimization profiles have not the same inputs: {'; '.join(map(', '.join, (first, *others)))}",
                hint="an input that is named again begins the next profile: name every input in each",
            )

    @property
    def profiles(self) -> tuple[tuple[InputRange, ...], ...]:
        """The shapes of each optimization profile; one that says nothing where no shapes are given."""
        found: list[list[InputRange]] = [[]]
        for given in self.shapes:
            if given.name in {each.name for each in found[-1]}:
                found.append([])
            found[-1].append(given)
        return tuple(map(tuple, found))

    def canonical_json(self) -> str:
        """The options as JSON that is the same for the same options: sorted keys, no spaces."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    def asked(self) -> Mapping[str, Any]:
        """The options that differ from the defaults, by name."""
        default = BuildOptions()
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value != getattr(default, name)}

    def flags(self) -> list[str]:
        """The options as `gpusq build` takes them."""
        shapes = [word for given in self.shapes for word in ("--shapes", str(given))]
        others = {name: value for name, value in self.asked().items() if name != "shapes"}
        return [*shapes, *(word for name, value in others.items() for word in _flag(name, value))]

    def ahead_of_time(self) -> tuple[BuildOptions, tuple[str, ...]]:
        """What of this means something to TensorRT-RTX on another machine, and the flags of the rest."""
        kept = replace(BuildOptions(), **{name: getattr(self, name) for name in _AHEAD_OF_TIME})
        rest = [option_name(name) for name in self.asked() if name not in _AHEAD_OF_TIME]
        return kept, tuple(rest)

    def at_usual(self) -> BuildOptions:
        """The same for the usual shapes of the first optimization profile alone."""
        return replace(
            self, shapes=tuple(InputRange(each.name, each.usual, each.usual, each.usual) for each in self.profiles[0])
        )


def option_name(field: str) -> str:
    """The field of BuildOptions as the command line calls it."""
    return _NAMES.get(field) or f"--{field.replace('_', '-')}"


def _flag(name: str, value: Any) -> tuple[str, ...]:
    return (option_name(name),) if isinstance(value, bool) else (option_name(name), str(value))


def parse_shapes(text: str) -> InputRange:
    """Read `NAME:MIN:OPT:MAX` or `NAME:SHAPE`, a shape being lengths joined by `x`; the name may hold colons.

    Raises:
        GpusqError: it is not written so, the three differ in rank, or they do not grow.
    """
    match = _RANGE.fullmatch(text)
    if match is None:
        raise GpusqError(f"--shapes {text}: not understood", hint="write NAME:1x3x224x224:8x3x224x224:32x3x224x224")
    shapes = [tuple(map(int, shape.split("x"))) for shape in match["shapes"][1:].split(":")]
    smallest, usual, largest = shapes if len(shapes) > 1 else shapes * 3
    ranks = {len(smallest), len(usual), len(largest)}
    if len(ranks) > 1 or any(not 0 < a <= b <= c for a, b, c in zip(smallest, usual, largest, strict=True)):
        raise GpusqError(
            f"--shapes {text}: smallest, usual and largest shape must have as many axes and grow",
            hint="write them in this order: NAME:MIN:OPT:MAX",
        )
    return InputRange(match["name"], smallest, usual, largest)
