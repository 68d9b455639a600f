"""Fit what models add to GEMMs, and what programs add to models, to the published latencies of TensorRT."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from profiles.cost_parameters import CostParameters, GemmParameters, KernelParameters, SoftwareEffect, Uncertainty
from profiles.least_squares import Fit, fit_figures
from profiles.published import PublishedLatency, read_latencies
from profiles.replay import replayed_ms

Array = npt.NDArray[np.float64]
# A guess by physics, and how far it may go.
_KERNEL = {
    "launch_cycles": (3500.0, 0.2),  # 2.5 µs at 1.41 GHz: the gap in a CUDA graph, and a kernel's ends
    "start_us": (10.0, 0.5),
    "int8_gain": (1.1, 0.2),
    "sparse_gain": (0.8, 0.5),
    "convolution_share": (1.0, 0.3),
    "attention_share": (0.4, 0.3),
    "jetson_share": (0.6, 0.3),
    "pointwise_share": (0.8, 0.3),
    "full_load": (0.8, 0.3),
}
_SOFTWARE = {
    ("jetpack", "enqueue_us"): (12.0, 0.5),
    ("ultralytics", "enqueue_us"): (12.0, 0.5),
    ("ultralytics", "start_us"): (800.0, 0.7),
    ("mlperf", "start_us"): (150.0, 1.0),
}
_UNKNOWN = Uncertainty(gemm=0.1, end_to_end=0.2, speedup=0.1)


def used_rows() -> list[PublishedLatency]:
    """The rows that are fitted."""
    return [row for row in read_latencies() if not row.why_unused]


def fit_latency(gemm: GemmParameters, sustained: dict[str, float], rows: Sequence[PublishedLatency]) -> Fit:
    """Fit the figures to `rows`; the rows of a device, a family, a precision and a source count together."""
    figures = [*_KERNEL.values(), *_SOFTWARE.values()]
    return fit_figures(
        lambda x: residuals(with_figures(x, gemm, sustained), rows),
        [guess for guess, _ in figures],
        [(row.device, row.family, row.precision, row.page) for row in rows],
        looseness=[loose for _, loose in figures],
        steps=7,
    )


def residuals(parameters: CostParameters, rows: Sequence[PublishedLatency]) -> Array:
    """log(predicted / published) of each row."""
    return np.array([np.log(replayed_ms(row, parameters) / row.latency_ms) for row in rows])


def with_figures(x: Array, gemm: GemmParameters, sustained: dict[str, float]) -> CostParameters:
    """All parameters, with those of which `x` are the logarithms."""
    values = np.exp(x).tolist()
    kernel = KernelParameters(**dict(zip(_KERNEL, values, strict=False)))
    software: dict[str, dict[str, float]] = {}
    for (program, field), value in zip(_SOFTWARE, values[len(_KERNEL) :], strict=True):
        software.setdefault(program, {})[field] = value
    effects = {program: SoftwareEffect(**fields) for program, fields in software.items()}
    return CostParameters(sustained=sustained, gemm=gemm, kernel=kernel, software=effects, uncertainty=_UNKNOWN)
