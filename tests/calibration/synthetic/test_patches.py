from __future__ import annotations

import torch

from calibration.synthetic.patches import diversity


def test_patches_of_a_few_kinds_are_more_diverse_than_patches_that_are_all_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(4, 8, generator=generator)
    drawn = kinds[torch.randint(4, (2, 1, 30), generator=generator)].expand(2, 3, 30, 8)
    alike = kinds[:1].expand(2, 3, 30, 8) + 0.01 * torch.randn(2, 3, 30, 8, generator=generator)
    assert float(diversity([drawn], 2)) > float(diversity([alike], 2)) + 0.5


def test_heads_may_be_a_part_of_the_batch() -> None:
    attention = torch.randn(2, 3, 30, 8, generator=torch.Generator().manual_seed(0))
    assert float(diversity([attention], 2)) == float(diversity([attention.flatten(0, 1)], 2))


def test_a_narrow_density_has_the_entropy_of_its_kernel() -> None:
    alike = torch.ones(1, 1, 20, 4) * torch.tensor([1.0, 0, 0, 0])
    alike[..., 10:, :] = torch.tensor([0.0, 1, 0, 0])  # cosines of 0 and of 1, whose kernel ends at 1
    gaussian = 0.5 * torch.log(2 * torch.pi * torch.e * torch.tensor(0.05) ** 2)
    found = float(diversity([alike], 1))
    assert float(gaussian) < found < float(gaussian) + 1.0


def test_many_patches_are_measured_on_a_part_of_their_pairs_the_same_each_time() -> None:
    attention = torch.randn(1, 1, 400, 8, generator=torch.Generator().manual_seed(0))
    assert float(diversity([attention], 1)) == float(diversity([attention], 1))
    few = torch.randn(1, 1, 40, 8, generator=torch.Generator().manual_seed(1))
    assert abs(float(diversity([attention], 1)) - float(diversity([few], 1))) < 0.2
