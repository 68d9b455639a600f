"""`python -m students.fashion_vit`: train a seed, print the table of several, write the shipped images."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click
import numpy as np
import torch

from exporters.student_file import read_student
from profiles.errors import GpusqError
from students.fashion_vit.data import DEFAULT_ROOT, read_split
from students.fashion_vit.recipe import Recipe
from students.fashion_vit.report import Cards, table
from students.fashion_vit.train import SHIPPED_TEST_IMAGES
from students.fashion_vit.train import train as train_seed

SHIPPED_TRAIN_IMAGES = 256
dataset_option = click.option(
    "--dataset",
    type=click.Path(path_type=Path),
    default=DEFAULT_ROOT,
    show_default=True,
    help="Folder of the four Fashion-MNIST .gz files.",
)
out_option = click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write to.")


@click.group(help=__doc__)
def main() -> None:
    """Log progress to stderr; results go to stdout or to files."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


@main.command()
@click.option("--seed", type=int, required=True, help="Seeds the weights, the order and the augmentation.")
@click.option("--threads", type=int, default=2, show_default=True, help="CPU threads; the result depends on it.")
@click.option("--epochs", type=int, nargs=3, help="Epochs of the three stages, where not the recipe's own.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to.  [default: build/fashion-vit-SEED]")
@dataset_option
def train(seed: int, threads: int, epochs: tuple[int, int, int] | None, out: Path | None, dataset: Path) -> None:
    """Train teacher, 2:4 student and 2:4 + INT8 student; writes three .safetensors files to --out."""
    torch.set_num_threads(threads)
    train_seed(seed, out or Path(f"build/fashion-vit-{seed}"), dataset, Recipe(epochs=epochs) if epochs else Recipe())


@main.command()
@click.argument("folders", type=click.Path(path_type=Path), nargs=-1, required=True)
def report(folders: tuple[Path, ...]) -> None:
    """Print the accuracies of the runs in FOLDERS, with their mean and spread."""
    click.echo(table([cards(folder) for folder in folders]))


@main.command()
@out_option
@dataset_option
def sample(out: Path, dataset: Path) -> None:
    """Write test-1000.npz and train-256.npz, the first images of each set."""
    out.mkdir(parents=True, exist_ok=True)
    for part, count, name in (("t10k", SHIPPED_TEST_IMAGES, "test-1000"), ("train", SHIPPED_TRAIN_IMAGES, "train-256")):
        images = read_split(part, dataset)
        image, label = images.pixels[:count].numpy(), images.labels[:count].numpy()
        np.savez_compressed(out / f"{name}.npz", image=image, label=label)


def cards(folder: Path) -> Cards:
    """The cards of the run in `folder`: dense, 2:4, 2:4 + INT8."""
    return tuple(read_student(folder / f"{name}.safetensors").card for name in ("teacher", "sparse", "student"))


if __name__ == "__main__":
    try:
        main()
    except GpusqError as error:
        click.echo(f"Error: {error.message}", err=True)
        if error.hint:
            click.echo(f"Hint: {error.hint}", err=True)
        sys.exit(1)
