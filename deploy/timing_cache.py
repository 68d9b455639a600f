"""TensorRT's timing cache: one file for each GPU, version and module, because it is wrong for every other.

"The information it contains is specific to the targeted device, CUDA, TensorRT versions, and BuilderConfig parameters"
(https://docs.nvidia.com/deeplearning/tensorrt/10.16.1/performance/builder-performance.html). With it a second build
takes the same kernels; without it, sparse kernels come and go from build to build.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Any

from deploy.builder_config import RTX

_log = logging.getLogger(__name__)


def default_folder() -> Path:
    """`gpusq/timing` in the user's cache folder (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpusq" / "timing"


def timing_cache_file(folder: Path, *, gpu: str, cuda: str, version: str) -> Path:
    """The file in `folder` for a GPU, a release of CUDA and a version of TensorRT."""
    return (
        folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', f'{gpu} cuda {cuda} tensorrt {version}').strip('-').lower()}.timing"
    )


def load_timing_cache(api: Any, config: Any, file: Path) -> None:
    """Give `config` the cache in `file`, or an empty one if there is none or TensorRT does not take it."""
    if api.__name__ == RTX:
        return  # since 1.2 its timing cache does nothing: kernels are chosen where the engine runs
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if not config.set_timing_cache(cache, False):
        _log.warning("the timing cache %s is of another device or version and is made anew", file)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def save_timing_cache(api: Any, config: Any, file: Path) -> None:
    """Write what the build has timed to `file`, in one rename; where that is not possible, say so and go on."""
    if api.__name__ == RTX:
        return
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(bytes(config.get_timing_cache().serialize()))
        beside.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        _log.warning("the timing cache %s cannot be written: %s", file, error)
