"""The plan as a picture: compiled kernels by the bytes they move, and predicted ones by their time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from deploy.manifest import Kernel, Plan
from deploy.plan import block_of
from deploy.prediction import KernelPoint, Point, Predicted
from deploy.report import formats
from deploy.report.document import Figure
from deploy.report.drawing.tiles import Tile, tiles

LETTERS = {
    "gemm": "G",
    "fused-gemm": "F",
    "attention": "A",
    "pointwise": "P",
    "convolution": "C",
    "pooling": "O",
}
GEMMS = ("gemm", "fused-gemm", "convolution")
WIDTHS = ("int4", "fp4", "int8", "fp8", "float8", "float16", "bfloat16", "float32")
COLOURS = {
    "int4": "int4",
    "fp4": "int4",
    "int8": "int8",
    "fp8": "fp8",
    "float8": "fp8",
    "float16": "float16",
    "bfloat16": "float16",
    "float32": "float32",
}
_EXPLAINED = (
    "A row is a block, a tile a kernel; its colour is the type of its inputs (of a GEMM: of its two operands), a frame "
    "a whole attention. Point at a tile, or go through them with Tab and the arrow keys, for its name and modules."
)


def compiled(plan: Plan, name: str = "plan") -> Figure:
    """The compiled kernels, as wide as the bytes that they read and write."""
    found = [_of_kernel(number, kernel) for number, kernel in enumerate(plan.kernels, start=1)]
    kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(k.kind for k in plan.kernels).most_common())
    alternative = f"The {formats.count(len(found))} kernels compiled for {plan.target}, by block: {kinds}."
    caption = f"{_EXPLAINED} {_width_of(plan)}"
    return _figure(name, found, [_types(kernel) for kernel in plan.kernels], alternative, caption, "compiled")


def predicted(found: Predicted, point: Point, name: str = "time") -> Figure:
    """The kernels of one point, as wide as the time that is predicted for them."""
    kernels = [each for each in found.kernels if (each.profile, each.batch) == (point.profile, point.batch)]
    drawn = [_of_point(number, kernel) for number, kernel in enumerate(kernels, start=1)]
    alternative = (
        f"Where the predicted {formats.milliseconds(point.latency_ms)} on {point.device} at batch {point.batch} go: "
        f"{_slowest(kernels)}."
    )
    caption = f"{_EXPLAINED} The width is the predicted time. Kernels that TensorRT joins with a product count with it."
    types = [formats.type_name(kernel.number) for kernel in kernels]
    return _figure(name, drawn, types, alternative, caption, "predicted")


def _figure(
    name: str, found: Sequence[Tile], types: Iterable[str], alternative: str, caption: str, origin: str
) -> Figure:
    legend = tuple((_class(each), each) for each in sorted(set(types), key=_width))
    kinds = dict.fromkeys((tile.letter, tile.word) for tile in found)
    return Figure(
        name, tiles(found, alternative), alternative, origin, caption, key=tuple(kinds), colours=legend  # type: ignore[arg-type]
    )  # fmt: skip


def _of_kernel(number: int, kernel: Kernel) -> Tile:
    moved = None if kernel.bytes_in is None or kernel.bytes_out is None else kernel.bytes_in + kernel.bytes_out
    says = [
        f"{number}. {kernel.kind}, {_types(kernel)}",
        f"modules: {', '.join(kernel.modules) or 'none'}",
        "bytes not known" if moved is None else f"{formats.size(moved)} read and written",
        kernel.name,
    ]
    return _tile(kernel.modules, moved, _types(kernel), kernel.kind, says)


def _of_point(number: int, kernel: KernelPoint) -> Tile:
    says = [
        f"{number}. {kernel.kind}, {formats.type_name(kernel.number)}",
        f"modules: {', '.join(kernel.modules) or 'none'}",
        f"predicted {formats.significant(1e3 * kernel.latency_ms)} µs, {formats.percent(kernel.share)} of the time",
        f"bound by {kernel.bound_by}" + ("" if kernel.modelled else "; only its bytes were counted"),
        kernel.name,
    ]
    return _tile(kernel.modules, kernel.latency_ms, formats.type_name(kernel.number), kernel.kind, says)


def _tile(modules: Sequence[str], weight: float | None, types: str, kind: str, says: Sequence[str]) -> Tile:
    return Tile(
        row=_row(modules),
        weight=weight or None,
        colour=_class(types).split()[0],
        mixed=" + " in types,
        letter=LETTERS.get(kind, "–"),
        word=kind,
        fused=kind == "attention",
        says="\n".join(says),
    )


def _width_of(plan: Plan) -> str:
    known = [kernel for kernel in plan.kernels if kernel.bytes_in is not None and kernel.bytes_out is not None]
    if not known:
        return "All tiles are of one width: the compiler tells no sizes."
    shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in plan.sizes.items())
    width = f"The width is the bytes that it reads and writes{f', for {shapes}' if shapes else ''}"
    rest = len(plan.kernels) - len(known)
    unknown = f"{rest} kernel{'s' if rest > 1 else ''}, drawn dashed and narrow"
    return f"{width}; of {unknown}, they are not known." if rest else f"{width}."


def _slowest(kernels: Sequence[KernelPoint]) -> str:
    """The share of each kind of kernel, and what bounds the most of the time."""
    kinds: Counter[str] = Counter()
    bounds: Counter[str] = Counter()
    for kernel in kernels:
        kinds[kernel.kind] += kernel.share  # type: ignore[assignment]  # a share of the time
        bounds[kernel.bound_by] += kernel.share  # type: ignore[assignment]
    shares = ", ".join(f"{formats.percent(share)} {kind}" for kind, share in kinds.most_common())
    (bound, share), *_ = bounds.most_common()
    return f"{shares}; {formats.percent(share)} is bound by {bound}"


def _row(modules: Sequence[str]) -> str:
    """The block of the first module: `blocks.0` of `blocks.0.mlp.fc2`, `head` of `head.fc`."""
    if not modules:
        return "no module"
    return block_of(modules[0]) or re.split("[./]", modules[0])[0]


def _types(kernel: Kernel) -> str:
    """The types of a kernel's inputs, of a GEMM's two operands: its scales and bias do not make it mixed."""
    types = kernel.operands or kernel.types[:2] if kernel.kind in GEMMS else kernel.types
    return " + ".join(sorted({formats.type_name(name) for name in types}, key=_width)) or "no input"


def _width(types: str) -> tuple[int, int, str]:
    """Order types by width, the narrowest input first, pure before mixed."""
    first = types.split(" + ")[0]
    return (WIDTHS.index(first) if first in WIDTHS else len(WIDTHS), types.count("+"), types)


def _class(types: str) -> str:
    """The classes of a tile of these types: of its narrowest, and whether there are others."""
    names = types.split(" + ")
    return f"n-{COLOURS.get(names[0], 'other')}{' mixed' if names[1:] else ''}"
