"""One whole training run: the three stages of a seed, and their student files with the accuracies in the card.

The validation split is looked at after every epoch; the test set is read once, after the last stage, for all three
models. Every accuracy is that of the module built from the student file, not of the one in training.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters.student_file import StudentFile, write_student
from exporters.torch_student import fake_quant_module
from students.fashion_vit.data import Images, read_split, train_and_validation
from students.fashion_vit.model import FashionVit, fashion_vit
from students.fashion_vit.pack import pack
from students.fashion_vit.recipe import (
    Distillation,
    HardLabels,
    Recipe,
    Stage,
    accuracy,
    fit,
    inverse_weights,
    late_blocks,
    quantized_student,
    sparse_student,
)

SHIPPED_TEST_IMAGES = 1_000
CONFIG: dict[str, Any] = {
    "image": 28,
    "padded": 32,
    "patch": 8,
    "width": 96,
    "depth": 6,
    "heads": 3,
    "mlp_ratio": 2,
    "classes": 10,
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What stays the same through a run's stages."""

    recipe: Recipe
    train: Images
    validation: Images
    generator: torch.Generator
    started: float

    def stage(self, model: FashionVit, index: int, name: str, loss: HardLabels | Distillation) -> None:
        """Train `model` in place for stage `index`, with a progress line after every epoch."""
        stage = Stage(name, self.recipe.epochs[index], self.recipe.learning_rates[index], loss)
        began = time.monotonic()

        def report(epoch: int) -> None:
            each = (time.monotonic() - began) / epoch
            logger.info(
                "%-8s epoch %d/%d  validation %.2f %%  %.0f s per epoch, %.0f s left in this stage",
                *(name, epoch, stage.epochs, 100 * accuracy(model, self.validation), each),
                each * (stage.epochs - epoch),
            )

        fit(model, stage, self.train, self.recipe, self.generator, report)


def train(seed: int, out: Path, dataset: Path, recipe: Recipe) -> None:
    """Train and measure the three models of `seed` and write `teacher`, `sparse` and `student.safetensors` to `out`.

    Deterministic for one torch version and number of threads.
    """
    torch.manual_seed(seed)
    started = time.monotonic()
    run = Run(recipe, *train_and_validation(dataset), torch.Generator().manual_seed(seed), started)
    (dense, sparse, quantized), feature_weights = three_stages(run)
    card = {
        "seed": seed,
        "recipe": asdict(recipe),
        "stage_3_feature_weights": feature_weights.tolist(),
        "seconds": round(time.monotonic() - started, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    test = read_split("t10k", dataset)
    files = ("teacher", "dense", dense), ("sparse", "2:4", sparse), ("student", "2:4+INT8", quantized)
    for file, kind, model in files:
        packed = measured(pack(model, CONFIG, {"kind": kind, **card}), run.validation, test)
        write_student(out / f"{file}.safetensors", packed)
        logger.info("%-8s test %.2f %%  %s", kind, 100 * packed.card["test_accuracy"], out / f"{file}.safetensors")


def three_stages(run: Run) -> tuple[tuple[FashionVit, FashionVit, FashionVit], Tensor]:
    """The dense, the 2:4 and the 2:4 + INT8 model, and the feature weights [late blocks] of the third stage."""
    dense = fashion_vit(**CONFIG)
    run.stage(dense, 0, "dense", HardLabels(run.recipe.label_smoothing))

    sparse = sparse_student(dense)
    first = Distillation(run.recipe, dense.eval(), torch.ones(late_blocks(dense)))
    run.stage(sparse, 1, "2:4", first)

    quantized = quantized_student(sparse, run.train, run.recipe, run.generator)
    weights = inverse_weights(first.feature_losses)
    run.stage(quantized, 2, "2:4+INT8", Distillation(run.recipe, sparse.eval(), weights))
    return (dense, sparse, quantized), weights


def measured(student: StudentFile, validation: Images, test: Images) -> StudentFile:
    """`student` with its accuracies (fractions) on validation, test and the shipped 1,000 test images in the card."""
    module = fake_quant_module(student)
    first = Images(test.pixels[:SHIPPED_TEST_IMAGES], test.labels[:SHIPPED_TEST_IMAGES])
    figures = {
        "validation_accuracy": accuracy(module, validation),
        "test_accuracy": accuracy(module, test),
        "test_1000_accuracy": accuracy(module, first),
    }
    return replace(student, card={**student.card, **figures})
