"""XᵀX of what layers multiply by their weights, over samples, in runs that fit the memory.

    GEMM    x [.., K] ─► Reshape [rows, K] ────────────────────────────────► MatMul(Xᵀ, X) ─► [1, K, K]
    Conv    x ─► Conv with one-hot kernels: one channel for each value ───► MatMul(Xᵀ, X) ─► [groups, K, K]
            of the patches that the layer's kernel sees

A convolution is a GEMM over its patches; the one-hot convolution has the layer's own strides, pads and dilations, so
that they are the very same patches. Each batch adds up in float32: K · K · 4 bytes a layer, however many samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from calibration.inference import choose, over_batches
from calibration.probes import Feed, Probe

Float = npt.NDArray[np.float32]
_MIB = 1 << 20


@dataclass(frozen=True)
class Product:
    """What a layer multiplies by its weight.

    Attributes:
        tensor: name of its input.
        k: length of the reduction: of a convolution, its input channels in a group times the kernel's size.
        axis: −1 or −2, of the input of a GEMM.
        kernel: the shape of a convolution's kernel; () for a GEMM.
        groups: of a convolution.
        window: the attributes of a convolution that say where its patches are.
    """

    tensor: str
    k: int
    axis: int = -1
    kernel: tuple[int, ...] = ()
    groups: int = 1
    window: Mapping[str, Any] | None = None

    @property
    def bytes(self) -> int:
        """What its matrices take."""
        return 4 * self.groups * self.k**2


def measure_hessians(
    model: ir.Model, products: Sequence[Product], feed: Feed, *, memory_mib: int = 1024
) -> Iterator[tuple[int, Float]]:
    """Yield XᵀX, float32 [groups, K, K], with the index of its product, in the order of `products`.

    The matrices of one run take `memory_mib` at most, but for one that takes more alone.
    """
    for start, end in _runs(products, memory_mib * _MIB):
        sums: list[Float] = []
        part = products[start:end]
        for _, arrays in over_batches(model, lambda graph, part=part: _grams(graph, part), feed.samples, feed.batch):  # type: ignore[misc]
            sums = arrays if not sums else [total + array for total, array in zip(sums, arrays, strict=True)]
        for index, found in enumerate(sums):
            yield start + index, found.reshape(products[start + index].groups, *found.shape[-2:])


def _runs(products: Sequence[Product], limit: int) -> Iterator[tuple[int, int]]:
    start, held = 0, 0
    for index, product in enumerate(products):
        if index > start and held + product.bytes > limit:
            yield start, index
            start, held = index, 0
        held += product.bytes
    if products:
        yield start, len(products)


def _grams(graph: ir.Graph, products: Sequence[Product]) -> list[ir.Value]:
    probe, outputs = Probe(graph), []
    values = {str(value.name): value for value in choose(graph, [product.tensor for product in products])}
    for product in products:
        source = values[product.tensor]
        x, rank = probe.kept(probe.float32(source), source), len(source.shape or ())
        columns = _patches(probe, x, product) if product.kernel else _columns(probe, x, product, rank)
        gram = probe.add("MatMul", [columns, _transposed(probe, columns, bool(product.kernel))])
        outputs.append(probe.output(gram, 3 if product.kernel else 2))
    return outputs


def _columns(probe: Probe, x: ir.Value, product: Product, rank: int) -> ir.Value:
    """Xᵀ, [K, rows]."""
    if product.axis == -1:
        rows = probe.add("Reshape", [x, probe.constant(np.array([-1, product.k], np.int64))])
        return probe.add("Transpose", [rows], perm=[1, 0])
    turned = probe.add("Transpose", [x], perm=[rank - 2, *range(rank - 2), rank - 1])
    return probe.add("Reshape", [turned, probe.constant(np.array([product.k, -1], np.int64))])


def _patches(probe: Probe, x: ir.Value, product: Product) -> ir.Value:
    """Xᵀ of each group, [groups, K, rows]."""
    size = prod(product.kernel)
    eye = np.eye(product.k, dtype=np.float32).reshape(product.k, product.k // size, *product.kernel)
    kernels = probe.constant(np.tile(eye, (product.groups, *[1] * (eye.ndim - 1))))
    patches = probe.add("Conv", [x, kernels], group=product.groups, **dict(product.window or {}))
    split = probe.add("Reshape", [patches, probe.constant(np.array([0, product.groups, product.k, -1], np.int64))])
    turned = probe.add("Transpose", [split], perm=[1, 2, 0, 3])
    return probe.add("Reshape", [turned, probe.constant(np.array([0, 0, -1], np.int64))])


def _transposed(probe: Probe, columns: ir.Value, stacked: bool) -> ir.Value:
    return probe.add("Transpose", [columns], perm=[0, 2, 1] if stacked else [1, 0])
