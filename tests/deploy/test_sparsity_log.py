from __future__ import annotations

import pytest

from deploy.sparsity_log import SparseChoice, read_sparse_choice


@pytest.mark.parametrize(
    ("log", "found"),
    [
        (
            [
                "(Sparsity) Layers eligible for sparse math: fc1, fc2, qkv",
                "(Sparsity) TRT inference plan picked sparse implementation for layers: fc1",
            ],
            SparseChoice(3, 1),
        ),
        (
            [
                "[V] [TRT] (Sparsity) Found 12 layer(s) eligible to use sparse tactics: a, b",
                "[V] [TRT] (Sparsity) Chose 0 layer(s) using sparse tactics:",
                "[V] [TRT] (Sparsity) Found 196 layer(s) eligible to use sparse tactics: a, b",
                "[V] [TRT] (Sparsity) Chose 140 layer(s) using sparse tactics: a",
            ],
            SparseChoice(196, 140),
        ),
        (["(Sparsity) TRT inference plan picked sparse implementation for layers: "], SparseChoice(None, 0)),
        (["Layers: fc1", "sparse"], SparseChoice(None, None)),
    ],
    ids=["TensorRT 8", "TensorRT 10", "none chosen", "silent"],
)
def test_reads_both_wordings(log: list[str], found: SparseChoice) -> None:
    assert read_sparse_choice(log) == found
