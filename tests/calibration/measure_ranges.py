"""What each method of finding ranges is worth on real weights and real inputs, beside onnxruntime's calibrators.

    python tests/calibration/measure_ranges.py [--subjects mobilenet …] [--placement w8a8-linear] [--methods max …]
                                               [--photos DIR]

The rows are those of tests/exporters/measure_accuracy.py, and the CNNs on more photos (photos.py). Every column places
the same quantizers on the same graph with the same samples; only the ranges of the activations differ. `ort-…` are the
ranges of onnxruntime's calibrators for these tensors, symmetric and with their defaults. Model Optimizer's INT8 default
for ONNX is onnxruntime's entropy.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parents[2]))
import tests.conftest  # noqa: F401  lets torchvision import
from calibration.collect import CollectOptions, collect
from calibration.methods import Method
from calibration.probes import Feed
from exporters.passes.place_quantizers import PlaceQuantizers
from exporters.placement import PLACEMENTS, Placement
from exporters.range_choice import choose_methods
from exporters.surgery import Target, surgery
from profiles.device import load_device
from tests.calibration import photos
from tests.exporters import measure_accuracy
from tests.exporters.accuracy_subjects import BATCH, SUBJECTS, Array, Subject, answers, missing

Ranges = Callable[[ir.Model, Sequence[str], Mapping[str, Array]], Mapping[str, float]]
_PHOTOS = {"mobilenet-photos": "mobilenet", "efficientnet-photos": "efficientnet"}
_logger = logging.getLogger(__name__)


class Reader:
    """The samples as onnxruntime's calibrators want them: one feed after the other, then None."""

    def __init__(self, samples: Mapping[str, Array]) -> None:
        count = len(next(iter(samples.values())))
        self._feeds = iter(
            [{name: x[start : start + BATCH] for name, x in samples.items()} for start in range(0, count, BATCH)]
        )

    def get_next(self) -> Mapping[str, Array] | None:
        """The next feed."""
        return next(self._feeds, None)


def ours(method: Method) -> Ranges:
    """The product's ranges by `method`."""

    def ranges(model: ir.Model, names: Sequence[str], samples: Mapping[str, Array]) -> Mapping[str, float]:
        found = collect(model, names, samples, CollectOptions(BATCH))
        return {name: method(histogram) for name, histogram in found.items()}

    return ranges


def least_loss(model: ir.Model, names: Sequence[str], samples: Mapping[str, Array]) -> Mapping[str, float]:
    """The product's ranges by the method that loses the least, tensor by tensor."""
    found = collect(model, names, samples, CollectOptions(BATCH))
    largest = {name: histogram.amax for name, histogram in found.items()}
    place = PlaceQuantizers("w8a8-linear", lambda model, names: largest, "float32")
    chosen = choose_methods(model, found, place, Feed(samples, BATCH, tell=_logger.info))
    return {name: chosen[name](histogram) for name, histogram in found.items()}


def by_onnxruntime(method: str) -> Ranges:
    """The ranges of onnxruntime's calibrator of that name: MinMax, Entropy or Percentile."""

    def ranges(model: ir.Model, names: Sequence[str], samples: Mapping[str, Array]) -> Mapping[str, float]:
        from onnxruntime.quantization import calibrate

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            ir.save(_known_domains(model.clone()), path)
            calibrator: Any = getattr(calibrate, f"{method}Calibrater")(
                str(path), augmented_model_path=str(Path(folder) / "augmented.onnx"), symmetric=True
            )
            infos = {name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names}
            calibrator.select_tensors_to_calibrate = lambda model: (set(names), infos)
            calibrator.augment_graph()
            calibrator.create_inference_session()
            calibrator.collect_data(Reader(samples))
            found = calibrator.compute_data().data
        return {name: float(np.abs(found[name].range_value).max()) for name in names}

    return ranges


def _known_domains(model: ir.Model) -> ir.Model:
    """The model without the declaration of domains that no node uses, which onnx's checker wants known."""
    used = {node.domain for node in model.graph}
    for domain in [domain for domain in model.opset_imports if domain not in used]:
        del model.opset_imports[domain]
    return model


METHODS: Mapping[str, Ranges] = {
    "max": ours(Method("max")),
    "percentile 99.99": ours(Method("percentile")),
    "percentile 99.999": ours(Method("percentile", 99.999)),
    "entropy": ours(Method("entropy")),
    "mse": ours(Method("mse")),
    "least-loss": least_loss,
    "ort-minmax": by_onnxruntime("MinMax"),
    "ort-percentile": by_onnxruntime("Percentile"),
    "ort-entropy": by_onnxruntime("Entropy"),
}


def judged(
    subject: Subject, placement: Placement, methods: Sequence[str]
) -> Iterator[tuple[str, measure_accuracy.Judged]]:
    """The name of each method, after fp32, and what its graph answers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(subject.model, path)
        reference = subject.features(answers(path, subject.inputs), subject.inputs)
        yield "fp32", measure_accuracy.judge(subject, reference, reference)
        for name in methods:
            start = time.perf_counter()

            def measure(model: ir.Model, names: Sequence[str], name: str = name) -> Mapping[str, float]:
                return METHODS[name](model, names, subject.calibration)

            model = subject.model.clone()
            surgery(model, Target(load_device("cpu"), "float32", placement), measure)
            ir.save(model, path)
            features = subject.features(answers(path, subject.inputs), subject.inputs)
            found = measure_accuracy.judge(subject, features, reference)
            _logger.info("%s, %s: %.1f s, %s", subject.name, name, time.perf_counter() - start, found)
            yield name, found


def _without_photos(name: str, folder: Path) -> str:
    return "no photos: apt-get install gcompris-qt-data" if name in _PHOTOS and not folder.is_dir() else ""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subjects", nargs="+", choices=[*SUBJECTS, *_PHOTOS], default=[*SUBJECTS, *_PHOTOS])
    parser.add_argument("--photos", type=Path, default=photos.RESOURCES, help="where Debian's gcompris-qt-data lies")
    parser.add_argument("--placement", choices=PLACEMENTS, default="w8a8-linear")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    asked = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    _logger.setLevel(logging.INFO)
    print(measure_accuracy.header(["fp32", *asked.methods]))
    for name in asked.subjects:
        if why := missing(_PHOTOS.get(name, name)) or _without_photos(name, asked.photos):
            print(f"{name} is left out: {why}", file=sys.stderr)
            continue
        subject = photos.agreement(_PHOTOS[name], asked.photos) if name in _PHOTOS else SUBJECTS[name]()
        print(measure_accuracy.lines(subject, dict(judged(subject, asked.placement, asked.methods))), flush=True)


if __name__ == "__main__":
    main()
