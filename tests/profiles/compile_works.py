"""Compile the published models and write their kernels, `profiles/data/works/*.json`.

    python tests/profiles/compile_works.py [FOLDER] [--only bert-base-128 …]

Run by hand, where timm, torchvision, transformers, ultralytics and TensorRT-RTX are installed; it takes some minutes.
Every model has random weights, is exported by `gpusq export`, typed by surgery in FP16 and with INT8 linear layers and
convolutions, and compiled for SM80 at batch 8. A BERT is compiled with two and three layers:

    kernels of L layers = kernels of 3 + (L − 3) × (kernels of 3 − kernels of 2)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import tests.conftest  # noqa: F401  lets torchvision import
from deploy.export import export
from deploy.predict import Precision, compiled_work
from exporters.architecture import build_architecture
from exporters.checkpoint import LoadOptions
from exporters.signature import Input
from profiles.device import load_device
from profiles.published import DATA
from profiles.work import Work

BATCH = 8
_PRECISIONS: tuple[Precision, ...] = ("fp16", "int8")
_DEVICE = "a100"  # SM80


@dataclass(frozen=True)
class Bert:
    """A BERT for question answering, as NVIDIA's demonstration runs it."""

    layers: int
    width: int
    tokens: int

    def works(self, precision: Precision, folder: Path) -> Counter[Work]:
        """Its kernels, from those of two and three layers."""
        two, three = (self._of(layers, precision, folder) for layers in (2, 3))
        return repeated(two, three, self.layers)

    def _of(self, layers: int, precision: Precision, folder: Path) -> Counter[Work]:
        import transformers

        config = transformers.BertConfig(
            num_hidden_layers=layers,
            hidden_size=self.width,
            num_attention_heads=self.width // 64,
            intermediate_size=4 * self.width,
        )
        path = folder / f"{layers}"
        if not path.is_dir():
            transformers.BertForQuestionAnswering(config).save_pretrained(path)
            names = ("input_ids", "attention_mask", "token_type_ids")
            given = tuple(Input(name, (BATCH, self.tokens), "int64") for name in names)
            export(path, path / "model.onnx", LoadOptions(inputs=given))
        return _compiled(path / "model.onnx", precision)


@dataclass(frozen=True)
class Named:
    """A model that a library builds by name, with the inputs that nothing tells."""

    spec: str
    inputs: tuple[Input, ...] = ()

    def works(self, precision: Precision, folder: Path) -> Counter[Work]:
        """Its kernels."""
        import torch

        path = folder / "model.onnx"
        if not path.exists():
            built = build_architecture(self.spec, inputs=self.inputs)
            torch.save(built.weights_module.state_dict(), folder / "student.pt")
            export(folder / "student.pt", path, LoadOptions(self.spec, self.inputs))
        return _compiled(path, precision)


def mlp() -> object:
    """Six times 768 → 3072 → 768, as onnxsim's benchmark has it; 197 rows."""
    from torch import nn

    layers = [layer for _ in range(6) for layer in (nn.Linear(768, 3072), nn.ReLU(), nn.Linear(3072, 768))]
    return nn.Sequential(*layers)


def _of_images(spec: str, size: int = 224, name: str = "image") -> Named:
    return Named(spec, (Input(name, (BATCH, 3, size, size)),))


MODELS: dict[str, Bert | Named] = {
    **{f"bert-base-{tokens}": Bert(12, 768, tokens) for tokens in (128, 384)},
    **{f"bert-large-{tokens}": Bert(24, 1024, tokens) for tokens in (128, 384)},
    "deit-t-224": _of_images("timm:deit_tiny_patch16_224"),
    "deit-s-224": _of_images("timm:deit_small_patch16_224"),
    "vit-b-224": _of_images("timm:vit_base_patch16_224"),
    "vit-b-384": _of_images("timm:vit_base_patch16_384", 384),
    "swin-t-224": _of_images("timm:swin_tiny_patch4_window7_224"),
    "swin-b-224": _of_images("timm:swin_base_patch4_window7_224"),
    "resnet-18": _of_images("timm:resnet18"),
    "resnet-50": _of_images("timm:resnet50"),
    "mobilenet-v2": _of_images("torchvision:mobilenet_v2"),
    "mlp-768-3072": Named("tests.profiles.compile_works:mlp", (Input("x", (BATCH, 197, 768)),)),
    **{f"yolo11{size}": _of_images(f"ultralytics:yolo11{size}.yaml", 640, "images") for size in "nsml"},
}


def main() -> None:
    """Write a file for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=DATA / "works")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    asked = parser.parse_args()
    for name in asked.only:
        with tempfile.TemporaryDirectory() as folder:
            of = MODELS[name].works
            text = "\n".join(document(name, {each: of(each, Path(folder)) for each in _PRECISIONS}))
        (asked.folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(name, flush=True)


def document(name: str, works: Mapping[Precision, Counter[Work]]) -> Iterator[str]:
    """The lines of a model's file: a kernel a line, sorted."""
    yield "{"
    yield f'  "model": "{name}",'
    yield f'  "batch": {BATCH},'
    for precision in _PRECISIONS:
        found = [asdict(replace(work, count=count)) for work, count in works[precision].items()]
        rows = sorted(
            json.dumps({key: _number(value) for key, value in row.items() if key != "pruned"}) for row in found
        )
        yield f'  "{precision}": ['
        yield ",\n".join(f"    {row}" for row in rows)
        yield "  ]," if precision != _PRECISIONS[-1] else "  ]"
    yield "}"


def _number(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def repeated(two: Counter[Work], three: Counter[Work], layers: int) -> Counter[Work]:
    """The kernels of `layers` layers from those of two and three."""
    found = {work: three[work] + (layers - 3) * (three[work] - two[work]) for work in two | three}
    if any(count < 0 for count in found.values()):
        raise RuntimeError("three layers lack a kernel that two have, so nothing tells the kernels of more")
    return Counter({work: count for work, count in found.items() if count})


def counted(works: Iterable[Work]) -> Counter[Work]:
    """Equal kernels once, with how many they are."""
    found: Counter[Work] = Counter()
    for work in works:
        found[replace(work, count=1)] += work.count
    return found


def _compiled(path: Path, precision: Precision) -> Counter[Work]:
    return counted(compiled_work(path, load_device(_DEVICE), precision).at(BATCH))


if __name__ == "__main__":
    main()
