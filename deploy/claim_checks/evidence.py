"""What claims are held to: graphs, bundles, and histories of timings; and graphs that are built for want of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from deploy.claim_checks.graph_cost import GraphCost, cost_of
from deploy.graph_file import read_graph
from deploy.manifest import MODEL_FILE, Manifest, is_bundle, read_manifest
from deploy.timing.history import open_history
from deploy.timing.results import BenchResult
from profiles.claim import Claim
from profiles.errors import GpusqError


@dataclass
class Evidence:
    """What is known.

    Attributes:
        graphs: what graphs cost, by the model's name or architecture.
        bundles: manifests, by the model's architecture or the folder as it was given.
        timings: results of histories, with the file.
        build: whether to build graphs that are missing, with random weights: shapes decide.
    """

    graphs: dict[str, GraphCost] = field(default_factory=dict)
    bundles: dict[str, Manifest] = field(default_factory=dict)
    timings: list[BenchResult] = field(default_factory=list)
    build: bool = False

    def cost(self, claim: Claim) -> GraphCost | None:
        """What the claim's graph costs; None where there is none."""
        for name in (claim.model, claim.architecture):
            if name in self.graphs:
                return self.graphs[name]
        if not self.build or not claim.architecture:
            return None
        self.graphs[claim.architecture] = built(claim.architecture)
        return self.graphs[claim.architecture]


def read_evidence(given: Iterable[str], *, build: bool = False) -> Evidence:
    """Read results: bundles, ONNX files as `MODEL=PATH` or by their stem, and histories.

    Raises:
        GpusqError: one of them is none of these, or cannot be read.
    """
    evidence = Evidence(build=build)
    for text in given:
        name, _, rest = text.rpartition("=")
        path = Path(rest)
        if path.is_dir() and is_bundle(path):
            _add_bundle(evidence, path, name)
        elif path.suffix == ".db":
            with open_history(path) as history:
                evidence.timings += history.results()
        elif path.is_file():
            key = name or path.stem
            evidence.graphs[key] = cost_of(read_graph(path), key)
        else:
            raise GpusqError(f"{rest} is neither a bundle, an ONNX file nor a history", hint="check the path")
    return evidence


def _add_bundle(evidence: Evidence, path: Path, name: str) -> None:
    manifest = read_manifest(path)
    for key in dict.fromkeys([name, manifest.student.model, str(path)]):
        if key:
            evidence.bundles[key] = manifest
    key = name or manifest.student.model
    evidence.graphs[key] = cost_of(read_graph(path / MODEL_FILE), key, manifest.student.parameters)


def built(spec: str) -> GraphCost:
    """What the graph of an architecture costs, its weights random."""
    import torch

    from exporters.architecture import build_architecture
    from exporters.to_onnx import to_onnx

    torch.manual_seed(0)
    architecture = build_architecture(spec)
    model = to_onnx(architecture.module, architecture.inputs, architecture.outputs, root=architecture.root).model
    parameters = sum(parameter.numel() for parameter in architecture.module.parameters())
    return cost_of(model, spec, parameters)
