"""Is an engine one for the bundle's device at all? Whether it fits this host is `deploy.engine.unfit`."""

from __future__ import annotations

from deploy.manifest import Engine
from profiles.device import Device


def why_not_its_device(engine: Engine, device: Device) -> str:
    """Why `engine` cannot be one for `device`; empty where it can."""
    if engine.runtime == "onnxruntime":
        return "" if device.runtime == "onnxruntime" else f"it is for a processor, and {device.name} is a GPU"
    ahead = device.ahead_of_time
    known = {f"SM{(device.compute_capability or '').replace('.', '')}"}
    if engine.runtime == "tensorrt-rtx" and ahead is not None:
        known.add(ahead.compute_capability)
    return "" if engine.target in known else f"it is for {engine.target}, and {device.name} takes {', '.join(known)}"
