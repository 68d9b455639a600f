"""Check weights for 2:4 by gpusq and by Polygraphy, and compare the time.

    python tests/exporters/measure_sparsity.py [--shapes 768x3072 4096x11008] [--rounds 3]

Every weight is 2:4, so both must look at all of it, and stands in a model of one MatMul that is in memory already: time
is that of finding the layer and judging its weight. The two take turns. Polygraphy reads no INT8 weights. Where it is
not installed, gpusq is measured alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from exporters.linears import find_linears
from exporters.sparsity import sparsity_of

TYPES = ("int8", "float16", "float32")
SHAPES = ("768x3072", "4096x11008")


@dataclass(frozen=True)
class Measured:
    """Milliseconds of one check, round by round; those of Polygraphy are empty where it cannot tell."""

    gpusq_ms: tuple[float, ...]
    polygraphy_ms: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Polygraphy's median by gpusq's."""
        return statistics.median(self.polygraphy_ms) / statistics.median(self.gpusq_ms)


def has_polygraphy() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("polygraphy") is not None


def two_four_model(shape: tuple[int, int], dtype: str, k_axis: int) -> onnx.ModelProto:
    """One Gemm over a random weight that is 2:4 along `k_axis`; of an INT8 one, behind its DequantizeLinear."""
    rng = np.random.default_rng(0)
    weight = rng.integers(1, 127, shape).astype(dtype)
    lines = np.moveaxis(weight, k_axis, -1)
    lines[..., 1::4] = lines[..., 2::4] = 0
    helper, held = onnx.helper, [onnx.numpy_helper.from_array(weight, "w")]
    nodes, operand = [], "w"
    if dtype == "int8":
        held += [onnx.numpy_helper.from_array(np.array(a), n) for a, n in ((np.float32(1), "s"), (np.int8(0), "z"))]
        nodes, operand = [helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"])], "d"
    nodes.append(helper.make_node("Gemm", ["x", operand], ["y"], transB=k_axis))
    float_type = onnx.TensorProto.FLOAT16 if dtype == "float16" else onnx.TensorProto.FLOAT
    x, y = (helper.make_tensor_value_info(name, float_type, [None, None]) for name in "xy")
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], held))


def gpusq_check(proto: onnx.ModelProto) -> Callable[[], bool]:
    """What gpusq's annotation does for each layer."""
    graph = ir.from_proto(proto).graph
    return lambda: all(sparsity_of(linear, None).pattern == "2:4" for linear in find_linears(graph))


def polygraphy_check(proto: onnx.ModelProto) -> Callable[[], bool]:
    """What `polygraphy inspect sparsity` does once the model is loaded."""
    logger = importlib.import_module("polygraphy.logger").G_LOGGER
    sparse = importlib.import_module("polygraphy.tools.sparse")
    logger.module_severity = logger.ERROR

    def check() -> bool:
        pruner = sparse.SparsityPruner(proto)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # it casts float64's largest number
            pruner.check()
        return bool(pruner.sparse_tensors == {"w"})

    return check


def measure(shape: tuple[int, int], dtype: str, k_axis: int, rounds: int) -> Measured:
    """Check one weight by both, in turn."""
    proto = two_four_model(shape, dtype, k_axis)
    checks = {"gpusq": gpusq_check(proto)}
    if has_polygraphy() and dtype != "int8":
        checks["polygraphy"] = polygraphy_check(proto)
    times: dict[str, list[float]] = {"gpusq": [], "polygraphy": []}
    for _ in range(rounds):
        for who, check in checks.items():
            start = time.perf_counter()
            if not check():
                raise AssertionError(f"{who} did not find the weight to be 2:4")
            times[who].append(1000 * (time.perf_counter() - start))
    return Measured(tuple(times["gpusq"]), tuple(times["polygraphy"]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    if not has_polygraphy():
        print("polygraphy is not installed: gpusq alone")
    for text in asked.shapes:
        rows, columns = map(int, text.split("x"))
        for dtype in TYPES:
            for k_axis in (0, 1):
                found = measure((rows, columns), dtype, k_axis, asked.rounds)
                line = f"{text:11} {dtype:8} K on axis {k_axis}  gpusq {_milliseconds(found.gpusq_ms)}"
                if found.polygraphy_ms:
                    line += f"  Polygraphy {_milliseconds(found.polygraphy_ms)}  {found.ratio:.0f} ×"
                print(line, flush=True)


def _milliseconds(times: tuple[float, ...]) -> str:
    return f"{statistics.median(times):9.2f} ms [{min(times):.2f}, {max(times):.2f}]"


if __name__ == "__main__":
    main()
