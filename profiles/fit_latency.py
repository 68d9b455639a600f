"""Fit what models add to GEMMs, and what programs add to models, to the published latencies of TensorRT.

The speed-ups of pairs are fitted beside the latencies, as rows of their own. The errors of a pair have a part in
common, so their difference says more of what separates INT8 from FP16, or 2:4 from dense, than either does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from profiles.cost_parameters import CostParameters, GemmParameters, KernelParameters, SoftwareEffect, Uncertainty
from profiles.least_squares import Fit, fit_figures
from profiles.pairs import all_pairs
from profiles.published import PublishedLatency, read_latencies
from profiles.replay import replayed_ms

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
# A guess by physics, and how far it may go.
_KERNEL = {
    "launch_cycles": (3500.0, 0.2),  # 2.5 µs at 1.41 GHz: the gap in a CUDA graph, and a kernel's ends
    "start_us": (10.0, 0.5),
    "int8_gain": (1.0, 0.2),
    "int8_power": (0.7, 0.3),
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
    """Fit the figures to `rows` and to the speed-ups of their pairs, which follow the rows in the fit's residuals.

    The rows of a device, a family, a precision and a source count together, and so do their speed-ups.
    """
    figures = [*_KERNEL.values(), *_SOFTWARE.values()]
    pairs = all_pairs(rows)

    def off(x: Array) -> Array:
        own = residuals(with_figures(x, gemm, sustained), rows)
        return np.concatenate([own, np.array([own[fast] - own[slow] for slow, fast in pairs])])

    return fit_figures(
        off,
        [guess for guess, _ in figures],
        [*map(_group, rows), *(("speed-up", rows[fast].pruned, *_group(rows[fast])) for _, fast in pairs)],
        looseness=[loose for _, loose in figures],
        steps=7,
    )


def _group(row: PublishedLatency) -> tuple[object, ...]:
    return row.device, row.family, row.precision, row.page


def with_pairs(left_out: Mask, rows: Sequence[PublishedLatency]) -> Mask:
    """`left_out` of the rows, and behind it of their pairs: a pair is not known if one of its rows is not."""
    return np.array([*left_out, *(left_out[slow] or left_out[fast] for slow, fast in all_pairs(rows))])


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
