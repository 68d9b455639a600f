"""The placements that are worth a trial on a device, the one that changes fewest numbers first.

| the student | placements |
|---|---|
| has trained scales | as-trained; fp16, which drops them |
| is float | fp16, w8a8-linear, sparse-int8 where a weight is 2:4, w8a8-mha; fp8 and fp8-mha where the device has FP8 |

INT8 and FP8 are tried where the tensor cores of the device have them. w4 and nvfp4 are not: the cost model does not
know kernels of 4-bit numbers, and would time them as float16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from deploy.job import Job
from exporters.linears import Linear, find_linears
from exporters.placement import Placement, check_supported
from exporters.sparsity import sparsity_of
from profiles.device import Device
from profiles.errors import GpusqError
from profiles.machine import machine_of

_NUMBERS: dict[Placement, str] = {"w8a8-linear": "int8", "sparse-int8": "int8", "w8a8-mha": "int8", "fp8": "fp8",
                                  "fp8-mha": "fp8"}  # fmt: skip


def candidates(job: Job, device: Device) -> Iterator[Placement]:
    """The placements to try, the one that changes fewest numbers first."""
    if job.student.quantized:
        yield from ("as-trained", "fp16")
        return
    yield "fp16"
    sparse = device.sparse is not None and any(map(_is_pruned, find_linears(job.exported.model.graph)))
    for placement, number in _NUMBERS.items():
        if number in machine_of(device).dense and (sparse or placement != "sparse-int8"):
            with contextlib.suppress(GpusqError):
                check_supported(placement, device)
                yield placement


def _is_pruned(linear: Linear) -> bool:
    """Whether its weight is 2:4; there are no float32 kernels, so whether one can take it is seen in the trial."""
    return sparsity_of(linear, None).pattern != "dense"
