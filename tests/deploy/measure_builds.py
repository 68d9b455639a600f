"""Build every network for every target of TensorRT-RTX, twice, and print what came of it. It takes minutes.

    python tests/deploy/measure_builds.py [--zoo FOLDER] [--networks deit_s_timm …] [--targets SM80 …] [--batch 8]

The targets are those of the shipped profiles: one profile stands for all whose compiler and ONNX form are the same.
`student` is the shipped one, 2:4 and INT8 as trained; FOLDER has float32 ONNX files of the others, which get the
placement w8a8-linear with ranges of eight random samples: that decides about kernels, not about accuracy.

| column | is |
|---|---|
| profiles | how many of the shipped profiles it stands for |
| kernels | compiled kernels |
| INT8 | layers with an INT8 kernel, of those quantized to INT8 |
| fused | attentions that are one kernel, of all |
| gates | those of `gpusq build`, by default, which leave INT8 convolutions of SM75 to the device |
| same twice | whether two builds have the same bytes, or at least the same kernels |
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parents[2]))
import tests.conftest  # noqa: F401  lets torchvision import
from deploy.compiled_kernels import CompiledKernel, read_kernels
from deploy.gates import missed_requirements
from deploy.plan import read_plan
from deploy.surgery import operate
from deploy.tensorrt_api import Built, ShapeRange, build_engine
from profiles.device import Device, list_devices
from students.fashion_vit.sample import student_path

NETWORKS = ("student", "deit_s_timm", "swin_t_timm", "resnet50", "minilm")
SAMPLES = 8
HEADING = (
    "| network | target | profiles | kernels | INT8 | fused | gates | same twice |\n|---|---|---|---|---|---|---|---|"
)


def targets() -> dict[tuple[str, str], list[Device]]:
    """The profiles by (target, form of the ONNX)."""
    found: dict[tuple[str, str], list[Device]] = defaultdict(list)
    for device in list_devices():
        if device.ahead_of_time is not None:
            form = f"opset {device.onnx.opset}, {device.onnx.attention}"
            found[device.ahead_of_time.compute_capability, form].append(device)
    return dict(sorted(found.items()))


def graph_for(network: str, zoo: Path, device: Device, folder: Path) -> Path:
    """The graph of `network` for `device`, made once for each form."""
    path = folder / f"{network} {device.onnx.opset} {device.onnx.attention}" / "model.onnx"
    if path.exists():
        return path
    path.parent.mkdir()
    if network == "student":
        operate(student_path(), path, profile=device.name)
        return path
    samples = folder / f"{network}.npz"
    source = zoo / f"{network}.onnx"
    arrays: dict[str, Any] = dict(_random(ir.load(source)))
    np.savez(samples, **arrays)
    operate(source, path, profile=device.name, precision="int8", data=samples)
    return path


def _random(model: ir.Model) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
    random = np.random.default_rng(0)
    for value in model.graph.inputs:
        assert value.shape is not None
        shape = (SAMPLES, *[int(dim) if isinstance(dim, int) else 1 for dim in value.shape][1:])
        whole = value.dtype == ir.DataType.INT64
        yield value.name or "", random.integers(0, 2, shape) if whole else random.standard_normal(shape, np.float32)


def row(network: str, path: Path, devices: list[Device], batch: int) -> str:
    """Build the graph in `path` twice for the target of `devices`."""
    ahead = devices[0].ahead_of_time
    assert ahead is not None
    target, sizes = ahead.compute_capability, ShapeRange(batch, batch, batch)
    one, two = (build_engine(path, "tensorrt-rtx", compute_capability=target, batch=sizes) for _ in range(2))
    plan = read_plan(one.log, ir.load(path), source="", target=target, lacks=ahead.lacks)
    missed = missed_requirements(plan, (), float_type="float16", placement="as-trained", required=())
    asked = [layer for layer in plan.layers if layer.asked == ("int8", "int8")]
    int8 = sum(layer.compiled == ("Int8", "Int8") for layer in asked)
    fused = sum(attention.fused for attention in plan.attentions)
    cells = (
        network,
        f"{target}, {devices[0].onnx.attention}",
        len(devices),
        len(plan.kernels),
        f"{int8}/{len(asked)}",
        f"{fused}/{len(plan.attentions)}",
        "; ".join(each.sentence for each in missed) or "pass",
        "bytes" if one.engine == two.engine else "kernels" if _kernels(one) == _kernels(two) else "no",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _kernels(built: Built) -> list[CompiledKernel]:
    return list(read_kernels(built.log))


def main() -> None:
    """Print the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, default=Path())
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--targets", nargs="*")
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    print(HEADING, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for network in given.networks:
            for (target, _), devices in targets().items():
                if not given.targets or target in given.targets:
                    path = graph_for(network, given.zoo, devices[0], Path(folder))
                    print(row(network, path, devices, given.batch), flush=True)


if __name__ == "__main__":
    main()
