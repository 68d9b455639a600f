"""Name the layers that cost a conversion its accuracy, and the command that leaves them float."""

from __future__ import annotations

from dataclasses import replace

from calibration.costly_layers import Found
from deploy.job import Job
from exporters.passes.keep_costly_float import search_of
from exporters.surgery import surgery
from profiles.device import Device

TARGET_DROP = 0.5  # points: what is searched for where nobody has said
_SHOWN = 5


def costly_layers(job: Job, device: Device, target_drop: float) -> Found | None:
    """Search for the layers to leave float so that `target_drop` points are lost; nothing is written.

    What it found out is remembered: a conversion with this target does not search again.

    Returns:
        None where the job quantizes nothing by itself, or has no samples to judge by.
    """
    if not job.can_leave_float:
        return None
    target = replace(job.target(device), target_drop=target_drop)
    return search_of(surgery(job.exported.model.clone(), target, job.measure, job.ranges, job.feed))


def advice(found: Found) -> str:
    """What costs the accuracy, and what to do about it."""
    names = ", ".join(one.name for one in found.left[:_SHOWN])
    more = f" and {len(found.left) - _SHOWN} more" if found.left[_SHOWN:] else ""
    return f"quantizing {names}{more} costs most of it: convert with --target-drop {found.target:g} leaves them float"
