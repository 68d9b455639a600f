"""The recipe of GPUSQ-ViT (arXiv 2305.10727) in three stages: dense, 2:4 from it, and 2:4 + INT8 from that.

The loss of the second and third stage is

    1 · cross-entropy with the label  +  10 · T² · KL(teacher ‖ student) at temperature T  +  5 · Σ_l w_l · MSE_l

where l runs over the late half of the blocks and MSE_l only over the samples for which teacher and student agree on the
class. In the second stage every w_l is 1; in the third w_l is inverse to layer l's MSE at the end of the second,
normalised to a mean of 1. The sum over layers is divided by their number.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from students.fashion_vit.data import Images, augment, normalise
from students.fashion_vit.model import FashionVit
from students.fashion_vit.prune import prune
from students.fashion_vit.quant import quantize


@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter of the three stages; epochs and learning rates are (dense, sparse, quantized)."""

    epochs: tuple[int, int, int] = (36, 7, 4)
    learning_rates: tuple[float, float, float] = (2e-3, 1e-3, 3e-4)
    batch: int = 128
    warmup_steps: int = 200
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    hard: float = 1.0
    soft: float = 10.0
    feature: float = 5.0
    temperature: float = 2.0
    range_batches: int = 8


@dataclass
class Batch:
    """What a loss sees: the model, its input `image` and the labels."""

    image: Tensor
    labels: Tensor


@dataclass
class Distillation:
    """The second and third stage's loss; `feature_losses` keeps the last epoch's mean MSE of each late block."""

    recipe: Recipe
    teacher: FashionVit
    weights: Tensor
    sums: Tensor = field(init=False)
    batches: int = 0

    def __post_init__(self) -> None:
        self.sums = torch.zeros_like(self.weights)

    def start_epoch(self) -> None:
        """Forget the feature losses of the epoch before."""
        self.sums.zero_()
        self.batches = 0

    @property
    def feature_losses(self) -> Tensor:
        """float32 [late blocks], the mean MSE since the epoch began."""
        return self.sums / max(self.batches, 1)

    def __call__(self, model: FashionVit, batch: Batch) -> Tensor:
        """The loss [] of one batch."""
        with torch.no_grad():
            wanted = self.teacher.forward_features(batch.image)
            wanted_logits = self.teacher.forward_head(wanted[-1])
        features = model.forward_features(batch.image)
        logits = model.forward_head(features[-1])
        agree = wanted_logits.argmax(1) == logits.argmax(1)
        late = len(self.weights)
        pairs = zip(features[-late:], wanted[-late:], strict=True)
        errors = torch.stack([agreeing_error(feature, want, agree) for feature, want in pairs])
        self.sums += errors.detach()
        self.batches += 1
        return (
            self.recipe.hard * nn.functional.cross_entropy(logits, batch.labels)
            + self.recipe.soft * soft_loss(logits, wanted_logits, self.recipe.temperature)
            + self.recipe.feature * (self.weights * errors).mean()
        )


@dataclass
class HardLabels:
    """The first stage's loss: cross-entropy with label smoothing."""

    smoothing: float

    def start_epoch(self) -> None:
        """Nothing is kept between epochs."""

    def __call__(self, model: FashionVit, batch: Batch) -> Tensor:
        """The loss [] of one batch."""
        return nn.functional.cross_entropy(model(batch.image), batch.labels, label_smoothing=self.smoothing)


Loss = HardLabels | Distillation


def soft_loss(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(wanted/T) ‖ softmax(logits/T)), the mean over the batch; both are [N, classes]."""
    student = nn.functional.log_softmax(logits / temperature, dim=1)
    teacher = nn.functional.log_softmax(wanted / temperature, dim=1)
    return nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def agreeing_error(feature: Tensor, wanted: Tensor, agree: Tensor) -> Tensor:
    """The mean squared error [] of [N, T, C] over the samples that `agree` (bool [N]) names; 0 where none does."""
    error = (feature - wanted).square().mean(dim=(1, 2)) * agree
    return error.sum() / agree.sum().clamp(min=1)


def late_blocks(model: FashionVit) -> int:
    """How many blocks at the end have their output distilled: half of them, rounded up."""
    return math.ceil(len(model.blocks) / 2)


def inverse_weights(losses: Tensor) -> Tensor:
    """Weights ∝ 1/loss with a mean of 1, [layers]."""
    inverse = 1 / losses.clamp(min=1e-12)
    return inverse / inverse.mean()


def sparse_student(teacher: FashionVit) -> FashionVit:
    """A copy of the dense model, pruned 2:4 by magnitude."""
    student = copy.deepcopy(teacher)
    prune(student)
    return student


def quantized_student(sparse: FashionVit, train: Images, recipe: Recipe, generator: torch.Generator) -> FashionVit:
    """A copy of the sparse model with fake quantization, its ranges from a few augmented training batches."""
    student = copy.deepcopy(sparse)
    count = recipe.range_batches * recipe.batch
    pixels = train.pixels[torch.randperm(len(train), generator=generator)[:count]]
    quantize(student, torch.split(normalise(augment(pixels, generator)), recipe.batch))
    return student


@dataclass(frozen=True)
class Stage:
    """One stage's run: what it is called, how long and how fast it learns, and what it minimises."""

    name: str
    epochs: int
    learning_rate: float
    loss: Loss


def fit(
    model: FashionVit,
    stage: Stage,
    train: Images,
    recipe: Recipe,
    generator: torch.Generator,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train `model` in place with AdamW, a linear warm-up and a cosine to zero; `after_epoch` gets the number done."""
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), lr=stage.learning_rate, fused=True)
    steps = stage.epochs * (len(train) // recipe.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, steps, recipe.warmup_steps))
    for epoch in range(stage.epochs):
        stage.loss.start_epoch()
        model.train()
        for batch in shuffled(train, recipe.batch, generator):
            train_step(model, stage.loss, batch, optimizer)
            schedule.step()
        after_epoch(epoch + 1)


def train_step(model: FashionVit, loss: Loss, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    """One step on one batch. With so few tokens the plain attention kernel beats the CPU's flash kernel by a fifth."""
    optimizer.zero_grad()
    with sdpa_kernel(SDPBackend.MATH):
        torch.autograd.backward(loss(model, batch))
    optimizer.step()


def shuffled(images: Images, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Whole batches of augmented images in a random order; the rest of the epoch is dropped."""
    order = torch.randperm(len(images), generator=generator)
    for index in torch.split(order[: len(order) // size * size], size):
        chosen = images.take(index)
        yield Batch(normalise(augment(chosen.pixels, generator)), chosen.labels)


def pace(step: int, steps: int, warmup: int) -> float:
    """The learning rate's factor: linear over the warm-up, then a cosine down to zero."""
    warmup = min(warmup, steps // 5)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(steps - warmup, 1))))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; biases, norms, positions and scales do not."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim != 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@torch.inference_mode()
def accuracy(model: nn.Module, images: Images, batch: int = 500) -> float:
    """The fraction of `images` whose largest logit is the label's."""
    model.eval()
    hits = 0
    for pixels, labels in zip(torch.split(images.pixels, batch), torch.split(images.labels, batch), strict=True):
        hits += int((model(normalise(pixels)).argmax(1) == labels).sum())
    return hits / len(images)
