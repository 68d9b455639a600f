"""Export every pair of survey_pairs and print one table: `python tests/exporters/survey.py [NAME…]`.

Each pair is measured in a process of its own, so that its peak memory is its own: the peak of loading and export, less
what is resident once the libraries are imported.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

SAMPLES = 8


@dataclass(frozen=True)
class Row:
    """What the table tells of a pair.

    `difference` is max |onnx − torch| / max |torch| over all outputs and samples; `agreement` the share of samples with
    the same top-1 class, None without classes; memory is in MiB.
    """

    name: str
    kind: str
    nodes: int
    way: str
    difference: float
    bound: float
    why: str
    agreement: float | None
    seconds: float
    peak_mib: float
    weights_mib: float


def survey_pair(pair: Any, folder: Path) -> tuple[Row, Any]:
    """Load, export and compare the pair that was saved in `folder`; return its row and its graph."""
    from exporters.checkpoint import load_student

    start, resident = time.perf_counter(), _resident_mib()
    student: Any = load_student(*pair.given(folder))
    exported = student.export()
    seconds, peak = time.perf_counter() - start, _peak_mib() - resident
    difference, agreement = compare(student, exported.model, unordered=pair.unordered)
    row = Row(
        name=pair.name,
        kind=pair.kind,
        nodes=len(exported.model.graph),
        way=exported.way,
        difference=difference,
        bound=pair.bound,
        why=pair.why,
        agreement=agreement if pair.classes else None,
        seconds=seconds,
        peak_mib=peak,
        weights_mib=sum(one.nbytes for one in student.module.state_dict().values()) / 2**20,
    )
    return row, exported.model


def compare(student: Any, model: Any, *, unordered: bool = False) -> tuple[float, float]:
    """The largest relative difference to PyTorch, and the share of samples with the same largest first output.

    Where outputs are sets along axis 1, each member is compared with the nearest of PyTorch's.
    """
    import numpy as np
    import onnx_ir as ir
    import onnxruntime as ort
    import torch

    with tempfile.TemporaryDirectory() as folder:
        ir.save(model, Path(folder) / "model.onnx", external_data="model.data")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(Path(folder) / "model.onnx", options, providers=["CPUExecutionProvider"])
    worst, same = 0.0, 0
    for seed in range(SAMPLES):
        generator = torch.Generator().manual_seed(seed)
        inputs = samples(student, generator)
        with torch.no_grad():
            expected = tensors(student.module(*inputs))
        taken = {one.name for one in session.get_inputs()}
        named = zip(student.inputs, inputs, strict=True)
        found = session.run(None, {one.name: value.numpy() for one, value in named if one.name in taken})
        reference = [value.numpy() for value in expected]
        if unordered:
            joined, wanted = np.concatenate(found, -1)[0], np.concatenate(reference, -1)[0]
            nearest = np.abs(joined[:, None] - wanted[None]).max(-1).argmin(-1)
            assert len(set(nearest)) == len(wanted)
            reference = [value[:, nearest] for value in reference]
        for ours, theirs in zip(found, reference, strict=True):
            assert ours.shape == theirs.shape
            worst = max(worst, float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
        same += int(found[0].argmax() == reference[0].argmax())
    return worst, same / SAMPLES


def tensors(found: Any) -> list[Any]:
    """All tensors in what a module returned, in the order that torch flattens them in."""
    import torch

    return [one for one in torch.utils._pytree.tree_leaves(found) if isinstance(one, torch.Tensor)]


def samples(student: Any, generator: Any) -> list[Any]:
    """A random input for each; the cache of a decoder is its own, of random tokens: any other drives it to extremes."""
    import torch

    found = [sample(one, generator) for one in student.inputs]
    cached = [index for index, one in enumerate(student.inputs) if one.name.startswith("past_key_values")]
    if cached:
        before = torch.randint(0, 200, student.inputs[0].shape, generator=generator)
        with torch.no_grad():
            layers = student.module.get_submodule(student.root)(before, use_cache=True).past_key_values.layers
        past = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        found[cached[0] :] = past
    return found


def sample(spec: Any, generator: Any) -> Any:
    """A random input: tokens below 200, a mask of ones, positions behind the cache, else standard normal."""
    import torch

    if spec.name.endswith("mask"):
        return torch.ones(spec.shape, dtype=torch.int64)
    if spec.name == "token_type_ids":
        return torch.zeros(spec.shape, dtype=torch.int64)
    if spec.name == "position_ids":
        return torch.arange(spec.shape[1], 2 * spec.shape[1])[None].expand(spec.shape)
    if spec.dtype == "int64":
        return torch.randint(0, 10 if spec.name == "label" else 200, spec.shape, generator=generator)
    return torch.randn(spec.shape, generator=generator)


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = ("architecture", "checkpoint", "nodes", "way", "difference", "top-1", "s", "peak/weights MiB")
    lines = [head, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    bound = f" ({row.why})" if row.why else ""
    top1 = "" if row.agreement is None else f"{row.agreement:.0%}"
    memory = f"{row.peak_mib:.0f} / {row.weights_mib:.0f} = {row.peak_mib / row.weights_mib:.1f}"
    return (
        row.name,
        row.kind,
        str(row.nodes),
        row.way,
        f"{row.difference:.1e}{bound}",
        top1,
        f"{row.seconds:.1f}",
        memory,
    )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def declare_torchvision_operators() -> None:
    """Let torchvision import, as tests/conftest.py does."""
    importlib.import_module("tests.conftest")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and the warnings of the libraries."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _in_this_process(step: str, name: str, folder: Path) -> None:
    with quiet():
        declare_torchvision_operators()
        import onnxruntime  # noqa: F401
        import timm  # noqa: F401
        import transformers  # noqa: F401

        import exporters.to_onnx  # noqa: F401
        from tests.exporters.survey_pairs import PAIRS

        pair = next(pair for pair in PAIRS if f"{pair.name} {pair.kind}" == name)
        if step == "save":
            pair.save(folder)
            return
        row, _ = survey_pair(pair, folder)
    print(json.dumps(asdict(row)))


def _in_a_process(pair: Any) -> Row | None:
    with tempfile.TemporaryDirectory() as folder:
        for step in ("save", "measure"):
            done = subprocess.run(
                [sys.executable, __file__, "--step", step, f"{pair.name} {pair.kind}", folder],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                print(f"{pair.name}, {pair.kind}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                return None
    return Row(**json.loads(done.stdout.strip().splitlines()[-1]))


def main(arguments: Sequence[str]) -> int:
    """Print the table of the pairs whose name holds one of `arguments`; of all without any."""
    if arguments[:1] == ["--step"]:
        _in_this_process(arguments[1], arguments[2], Path(arguments[3]))
        return 0
    with quiet():
        declare_torchvision_operators()
        from tests.exporters.survey_pairs import PAIRS
    asked = [pair for pair in PAIRS if not arguments or any(text in pair.name for text in arguments)]
    rows = [_in_a_process(pair) for pair in asked]
    print(table([row for row in rows if row]))
    return 0 if all(row and row.difference <= row.bound for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
