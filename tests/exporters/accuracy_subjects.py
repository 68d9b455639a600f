"""The rows of measure_accuracy.py: real weights, real inputs, and how the answers are judged.

- MobileNetV2 and EfficientNet-Lite0, trained on ImageNet-1k: photos of Debian's tuxpaint-stamps-default, 63 of whose
  captions are ImageNet words.
- DINOv2 ViT-S/14 at 98 × 98 pixels: Fashion-MNIST, by a ridge probe that was fitted to the float features.
- Fashion ViT, the shipped dense teacher: the shipped 1,000 test images.
- MiniLM-L6: sentences of Python's language reference, by the cosine of their embeddings.

Calibration inputs are never among those that are judged. What is drawn at random is drawn with SEED.
"""

from __future__ import annotations

import importlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from calibration.rows import all_of
from calibration.samples import load_samples
from deploy.onnxruntime_api import PROVIDERS, cores
from exporters.checkpoint import load_student
from exporters.signature import Input
from exporters.student import sample_specs
from students.fashion_vit.data import DEFAULT_ROOT, MEAN, SCALE, STD, read_idx
from students.fashion_vit.sample import calibration_images, labelled_images, teacher_path
from tests.exporters import survey_pairs

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
SEED = 0
BATCH = 8
STAMPS = Path("/usr/share/tuxpaint/stamps")
UNKNOWN = -1

_ERRORS_ONLY = 3
_PHOTOS_SIDE = 224
_CALIBRATION = 64
_UNLABELLED = 137
_NO_PHOTOS = frozenset({"cartoon", "symbols", "flags", "roadsigns"})
_HOMONYMS = frozenset({"mouse"})  # the animal; ImageNet's is a computer's
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LITE = ((0.498, 0.498, 0.498), (0.502, 0.502, 0.502))
_DINO_SIDE = 98
_PROBE_TRAINED = 512
_PROBE_TESTED = 256
_RIDGE = 1e-2
_TOKENS = 48
_SENTENCES = 256


@dataclass(frozen=True)
class Subject:
    """One row.

    Attributes:
        name: the model.
        model: its float32 graph with a batch that may vary.
        calibration: inputs [N, …] by name on which ranges are measured.
        inputs: inputs [M, …] by name on which it is judged.
        features: what of the first output is compared by cosine: [M, …], the inputs → [M, D].
        scores: makes scores of classes of the features, [M, D] → [M, C]; None for embeddings.
        labels: int64 [M], UNKNOWN where an input has none; None where no input has one.
    """

    name: str
    model: ir.Model
    calibration: Feeds
    inputs: Feeds
    features: Callable[[Array, Feeds], Array]
    scores: Callable[[Array], Array] | None = None
    labels: npt.NDArray[np.int64] | None = None


def answers(path: Path, inputs: Feeds) -> Array:
    """The first output of the ONNX file at `path`, float32 [M, …], on onnxruntime with every node as it is written.

    Nothing is optimized: what onnxruntime 1.32 makes of a graph with float16 around Q/DQ, as Model Optimizer writes it,
    answers wrongly (EfficientNet-Lite0: 0 of 63 photos right, 50 unoptimized), and that is no fault of the quantizers.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = cores()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS)
    count = len(next(iter(inputs.values())))
    starts = range(0, count, BATCH)
    parts = [session.run(None, {k: v[start : start + BATCH] for k, v in inputs.items()})[0] for start in starts]
    return np.concatenate(parts).astype(np.float32)


def mobilenet() -> Subject:
    """Depthwise convolutions, which are known to suffer from INT8."""
    return _cnn("MobileNetV2", _exported(_pair("MobileNetV2, real weights (torchvision)")), IMAGENET)


def efficientnet() -> Subject:
    """Made for INT8: ReLU6 and no squeeze-and-excite."""
    return _cnn("EfficientNet-Lite0", _exported(_pair("EfficientNet-Lite0, real weights (own code)")), LITE)


def dinov2() -> Subject:
    """Features of a self-supervised transformer; a closed-form probe is fitted to the float ones."""
    model = _exported(dino_pair())
    name = _name(model.graph.inputs[0])
    train, labels = _fashion("train", _PROBE_TRAINED)
    tested, truths = _fashion("t10k", _PROBE_TESTED)
    calibration, _ = _fashion("train", _PROBE_TRAINED + _CALIBRATION)
    with tempfile.TemporaryDirectory() as folder:
        ir.save(model, Path(folder) / "float.onnx")
        probe = ridge(answers(Path(folder) / "float.onnx", {name: train}), labels, classes=10)
    return Subject(
        f"DINOv2 ViT-S/14, {_DINO_SIDE} px",
        model,
        {name: calibration[_PROBE_TRAINED:]},
        {name: tested},
        _as_they_are,
        probe,
        truths,
    )


def student() -> Subject:
    """The dense teacher of the shipped student, quantized after training."""
    teacher = load_student(teacher_path())
    specs = sample_specs(teacher)
    tested = load_samples(labelled_images(), specs)
    calibration = load_samples(calibration_images(), specs)
    model = teacher.export().model
    given, asked = ({name: all_of(rows) for name, rows in one.inputs.items()} for one in (calibration, tested))
    return Subject("Fashion ViT", model, given, asked, _as_they_are, lambda x: x, tested.labels)


def minilm() -> Subject:
    """Sentence embeddings: the mean over the tokens that are no padding (the package's 1_Pooling)."""
    tokens = tokenized(sentences())
    taken = tuple(Input(name, (2, _TOKENS), "int64") for name in tokens)
    model = _exported(_pair("MiniLM-L6, real weights (HF)"), taken)
    feeds = {_name(value): tokens[_name(value)] for value in model.graph.inputs}
    calibration = {name: array[:_CALIBRATION] for name, array in feeds.items()}
    return Subject("MiniLM-L6", model, calibration, {k: v[_CALIBRATION:] for k, v in feeds.items()}, _mean_of_tokens)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "mobilenet": mobilenet,
    "efficientnet": efficientnet,
    "dinov2": dinov2,
    "student": student,
    "minilm": minilm,
}


def dino_pair() -> survey_pairs.Pair:
    """The checkpoint of DINOv2 at _DINO_SIDE pixels."""
    return survey_pairs.state_dict(
        f"timm:vit_small_patch14_dinov2?img_size={_DINO_SIDE}", "DINOv2", suffix=".safetensors", weights=_dino_state
    )


def missing(name: str) -> str:
    """Why a row cannot be measured here, or nothing."""
    if name in ("mobilenet", "efficientnet") and not STAMPS.is_dir():
        return "no photos: apt-get install tuxpaint-stamps-default"
    if name == "dinov2" and not DEFAULT_ROOT.is_dir():
        return "no Fashion-MNIST: apt-get install dataset-fashion-mnist"
    return ""


def ridge(features: Array, labels: npt.NDArray[np.int64], classes: int) -> Callable[[Array], Array]:
    """A linear probe fitted in closed form: W = (XᵀX + λ n I)⁻¹ XᵀY on standardized features, Y one-hot, λ = 0.01."""
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-6

    def standardized(x: Array) -> Array:
        return np.concatenate([(x - mean) / std, np.ones((len(x), 1))], axis=1)

    x, y = standardized(features), np.eye(classes)[labels]
    weights = np.linalg.solve(x.T @ x + _RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y)
    return lambda others: np.asarray(standardized(others) @ weights)


def sentences() -> list[str]:
    """Sentences of Python's language reference, which comes with Python, in an order drawn with SEED."""
    topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    text = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)))
    found = sorted(set(re.findall(r"(?<=[.] )[A-Z][a-z][^.:*`\"{}]{38,200}[.](?= )", text)))
    order = np.random.default_rng(SEED).permutation(len(found))
    return [found[index] for index in order[:_SENTENCES]]


def tokenized(texts: Sequence[str]) -> dict[str, npt.NDArray[np.int64]]:
    """Token ids, masks and types, int64 [N, 48], by MiniLM's own tokenizer."""
    import zipfile

    tokenizers = importlib.import_module("tokenizers")
    package = importlib.util.find_spec("all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    with zipfile.ZipFile(Path(package.origin).parent / "model.zip") as archive:
        tokenizer = tokenizers.Tokenizer.from_str(archive.read("tokenizer.json").decode())
    tokenizer.enable_truncation(_TOKENS)
    tokenizer.enable_padding(length=_TOKENS)
    encoded = tokenizer.encode_batch(list(texts))
    parts = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    return {name: np.array([getattr(one, part) for one in encoded], np.int64) for name, part in parts.items()}


def stamps() -> Iterator[tuple[Path, int]]:
    """The photos among the stamps, with the class of ImageNet-1k that the caption names or UNKNOWN."""
    classes = _imagenet_words()
    for path in sorted(STAMPS.rglob("*.png")):
        caption = path.with_suffix(".txt")
        if caption.is_file() and not _NO_PHOTOS & set(path.relative_to(STAMPS).parts):
            yield path, classes.get(_thing(caption.read_text(errors="replace")), UNKNOWN)


def photo(path: Path, side: int) -> npt.NDArray[np.uint8]:
    """A stamp on white, in the middle of a square with a border of 1/8: uint8 [side, side, 3]."""
    image = importlib.import_module("PIL.Image")
    stamp = image.open(path).convert("RGBA")
    length = max(stamp.size) * 8 // 6
    square = image.new("RGBA", (length, length), "white")
    square.alpha_composite(stamp, ((length - stamp.width) // 2, (length - stamp.height) // 2))
    return np.array(square.convert("RGB").resize((side, side), image.Resampling.BICUBIC))


def _cnn(name: str, model: ir.Model, mean_and_std: tuple[Sequence[float], Sequence[float]]) -> Subject:
    found = list(stamps())
    labelled = [(path, label) for path, label in found if label != UNKNOWN]
    others = [pair for pair in found if pair[1] == UNKNOWN]
    order = np.random.default_rng(SEED).permutation(len(others))
    calibration = [others[index] for index in order[:_CALIBRATION]]
    tested = labelled + [others[index] for index in order[_CALIBRATION : _CALIBRATION + _UNLABELLED]]
    mean, std = (np.asarray(part, np.float32) for part in mean_and_std)

    def pixels(of: Sequence[tuple[Path, int]]) -> npt.NDArray[np.float32]:
        images = np.stack([photo(path, _PHOTOS_SIDE) for path, _ in of])
        return np.ascontiguousarray(((images / np.float32(255) - mean) / std).transpose(0, 3, 1, 2), np.float32)

    graph_input = _name(model.graph.inputs[0])
    labels = np.array([label for _, label in tested], np.int64)
    return Subject(
        name,
        model,
        {graph_input: pixels(calibration)},
        {graph_input: pixels(tested)},
        _as_they_are,
        lambda x: x,
        labels,
    )


def _imagenet_words() -> dict[str, int]:
    """The classes of ImageNet-1k by each of their synonyms; a word of two classes is left out."""
    info = importlib.import_module("timm.data").ImageNetInfo("imagenet-1k")
    found: dict[str, set[int]] = {}
    for index in range(info.num_classes()):
        for word in info.index_to_description(index, detailed=False).lower().split(", "):
            found.setdefault(word, set()).add(index)
    return {word: of.pop() for word, of in found.items() if len(of) == 1 and word not in _HOMONYMS}


def _thing(caption: str) -> str:
    """What `A sea lion.` on the first line is a caption of."""
    return re.sub(r"^(an?|the) ", "", caption.partition("\n")[0].strip().lower().rstrip(".!"))


def _fashion(part: str, count: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Images drawn with SEED, enlarged and in three channels, and their labels."""
    import torch

    pixels, labels = (read_idx(DEFAULT_ROOT / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    drawn = np.random.default_rng(SEED).permutation(len(labels))[:count]
    images = torch.from_numpy((pixels[drawn] * np.float32(SCALE) - np.float32(MEAN)) / np.float32(STD))[:, None]
    large = torch.nn.functional.interpolate(images, (_DINO_SIDE, _DINO_SIDE), mode="bicubic")
    return np.ascontiguousarray(large.expand(-1, 3, -1, -1).numpy()), labels[drawn].astype(np.int64)


def _dino_state() -> dict[str, Any]:
    """DINOv2's weights with the positions of 16 × 16 patches resampled to the grid of _DINO_SIDE."""
    import torch

    state = survey_pairs.timm_dinov2()
    of_class, of_patches = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    grid = of_patches.reshape(1, 16, 16, -1).permute(0, 3, 1, 2)
    side = _DINO_SIDE // 14
    resized = torch.nn.functional.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    return state | {"pos_embed": torch.cat([of_class, resized.flatten(2).transpose(1, 2)], 1)}


def _pair(name: str) -> survey_pairs.Pair:
    return next(pair for pair in survey_pairs.PAIRS if pair.name == name)


def _exported(pair: survey_pairs.Pair, inputs: tuple[Input, ...] = ()) -> ir.Model:
    """The graph of a pair of the survey, loaded and exported as `gpusq export` does, with a batch that may vary."""
    with tempfile.TemporaryDirectory() as folder:
        pair.save(Path(folder))
        path, options = pair.given(Path(folder))
        options = replace(options, inputs=inputs or options.inputs, dynamic=("*:0",))
        return load_student(path, options).export().model


def _as_they_are(output: Array, _: Feeds) -> Array:
    return output.reshape(len(output), -1)


def _mean_of_tokens(output: Array, inputs: Feeds) -> Array:
    mask = inputs["attention_mask"][..., None].astype(np.float32)
    return np.asarray((output * mask).sum(axis=1) / mask.sum(axis=1))


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name
