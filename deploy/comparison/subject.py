"""What is known of a model that is compared: its layers, its plan, its verification, and its timings in the history.

A bundle brings all but the timings; an ONNX file is read and, for a profile with a compiler here, compiled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from deploy import tensorrt_api
from deploy.ahead_of_time import RUNTIME
from deploy.bundle import hash_file
from deploy.comparison.answers import error_of
from deploy.graph_file import read_graph
from deploy.layers import layers_of, sizes_of
from deploy.manifest import MODEL_FILE, Layer, Plan, Sizes, Verification, is_bundle, read_manifest
from deploy.show_plan import show_plan
from exporters.module_names import label_of
from profiles.device import load_device
from profiles.errors import GpusqError

Quantizers = Counter[tuple[str, str]]


@dataclass(frozen=True)
class Subject:
    """A model that is compared.

    Attributes:
        name: the path as it was given.
        models: what its results are found by in a history: SHA-256 of the files that bench runs, or a name.
        layers: its layers with a constant weight.
        sizes: the bytes of its weights.
        plan: its compiled kernels; None where nothing compiled it.
        verified: how it compares with its student; None of a plain ONNX file.
        quantizers: how many quantizers follow which operator of which module.
        error: its difference from the reference that was given, relative; None where none was.
        history: the file that holds its timings, where it is one; None where that is looked up elsewhere.
    """

    name: str
    models: tuple[str, ...] = ()
    layers: tuple[Layer, ...] = ()
    sizes: Sizes | None = None
    plan: Plan | None = None
    verified: Verification | None = None
    quantizers: Quantizers = field(default_factory=Counter)
    error: float | None = None
    history: Path | None = None


def read_subject(given: str, profile: str | None = None, reference: Path | None = None) -> Subject:
    """Return what is known of a bundle, an ONNX file, or results: `gpusq.db`, or `gpusq.db:NAME` for one model of it.

    Args:
        given: the path.
        profile: the device to compile an ONNX file for; None compiles none.
        reference: an ONNX file whose answers it is held to; None where its bundle's verification is enough.

    Raises:
        GpusqError: nothing is there, or it cannot be read.
    """
    path = Path(given)
    if path.is_dir() and is_bundle(path):
        return _of_bundle(path, reference)
    file, _, name = given.partition(".db:")
    if path.suffix == ".db" or name:
        return Subject(given, models=(name,) if name else (), history=Path(f"{file}.db") if name else path)
    if not path.is_file():
        raise GpusqError(
            f"{given} is neither a bundle, an ONNX file nor a history", hint="give a path, or gpusq.db:NAME"
        )
    return _of_model(path, profile, reference)


def quantizers_of(model: ir.Model) -> Quantizers:
    """How many quantizers of `model` follow which operator, by its module and its type; "input" for the graph's own."""
    return Counter(_before(node) for node in model.graph if node.op_type == "QuantizeLinear")


def _before(quantizer: ir.Node) -> tuple[str, str]:
    value = quantizer.inputs[0]
    producer = None if value is None else value.producer()
    return ("", "input") if producer is None else (label_of(producer), producer.op_type)


def _of_bundle(path: Path, reference: Path | None) -> Subject:
    manifest = read_manifest(path)
    return Subject(
        name=str(path),
        models=tuple(_hashes(path)),
        layers=manifest.layers,
        sizes=manifest.sizes,
        plan=manifest.plan,
        verified=manifest.verified,
        quantizers=quantizers_of(read_graph(path / MODEL_FILE)),
        error=None if reference is None else error_of(path / MODEL_FILE, reference),
    )


def _hashes(bundle: Path) -> Iterator[str]:
    yield from (hash_file(file).sha256 for file in sorted(bundle.glob("*.onnx")))


def _of_model(path: Path, profile: str | None, reference: Path | None) -> Subject:
    graph = read_graph(path)
    device = None if profile is None else load_device(profile)
    compiles = device is not None and device.ahead_of_time is not None and tensorrt_api.has_api(RUNTIME)
    return Subject(
        name=str(path),
        models=(hash_file(path).sha256,),
        layers=layers_of(graph, device),
        sizes=sizes_of(graph),
        plan=show_plan(path, profile).plan if compiles else None,
        quantizers=quantizers_of(graph),
        error=None if reference is None else error_of(path, reference),
    )
