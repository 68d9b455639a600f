from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from calibration.samples import InputSpec
from calibration.synthetic.text import write_text
from profiles.errors import GpusqError

VOCABULARY = 7
SPECS = {"input_ids": InputSpec((6,), "int64"), "attention_mask": InputSpec((6,), "int64")}


class Counts(nn.Module):
    """After token t comes t + 1 with near certainty, never any other."""

    def __init__(self, ahead: int = 0) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)
        self.ahead = ahead
        self.table.weight.data = 50 * torch.eye(VOCABULARY).roll(1, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Mapping[str, Tensor]:
        seen = input_ids.roll(-self.ahead, 1) if self.ahead else input_ids
        return {"logits": self.table(seen)}


def written(network: nn.Module, count: int = 20, seed: int = 0) -> dict[str, Tensor]:
    told: list[float] = []
    text = write_text(network, SPECS, count, torch.Generator().manual_seed(seed), told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0
    return text


def test_every_token_but_the_first_is_one_that_the_model_predicts() -> None:
    ids = written(Counts())["input_ids"]
    assert ids.shape == (20, 6)
    assert torch.equal(ids[:, 1:], (ids[:, :-1] + 1) % VOCABULARY)
    assert len(set(ids[:, 0].tolist())) > 3


def test_is_random_after_a_greedy_start() -> None:
    network = Counts()
    network.table.weight.data = torch.log(torch.tensor([0.4, 0.3, 0.3, 1e-9, 1e-9, 1e-9, 1e-9])).repeat(VOCABULARY, 1)
    ids = written(network, 50)["input_ids"]
    assert bool((ids[:, 1:4] == 0).all())
    assert set(ids[:, 4:].flatten().tolist()) == {0, 1, 2}


def test_repeats_with_its_seed() -> None:
    first, again, other = (written(Counts(), seed=seed)["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_other_inputs_are_those_of_whole_texts() -> None:
    class Placed(Counts):
        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Mapping[str, Tensor]:
            assert position_ids[0].tolist() == [0, 1, 2, 3, 4, 5]
            return super().forward(input_ids, position_ids)

    specs = {"input_ids": SPECS["input_ids"], "position_ids": InputSpec((6,), "int32")}
    found = write_text(Placed(), specs, 2, torch.Generator(), lambda share: None)
    assert found["position_ids"].dtype == torch.int32


class Embeds(Counts):
    """Makes features of tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Mapping[str, Tensor]:
        return {"features": self.table(input_ids)[..., :3]}


@pytest.mark.parametrize(
    ("network", "message"), [(Embeds(), "does not predict tokens"), (Counts(ahead=1), "looks ahead")]
)
def test_what_is_no_language_model_is_refused(network: nn.Module, message: str) -> None:
    with pytest.raises(GpusqError, match=message) as caught:
        written(network)
    assert "--data" in caught.value.hint


def test_an_unknown_input_is_refused() -> None:
    specs = {"input_ids": SPECS["input_ids"], "past": SPECS["input_ids"]}
    with pytest.raises(GpusqError, match="the input 'past' is unknown"):
        write_text(Counts(), specs, 2, torch.Generator(), lambda share: None)


class Remembers(Counts):
    """Has a cache of the last three tokens, which it must not read where the mask is 0."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert attention_mask.shape == (8, 9)
        assert bool((memory[attention_mask[:, None, :3, None] == 0] == 0).all())
        return self.table(input_ids), torch.cat([memory, input_ids[:, None, :, None].float()], 2)


def test_a_cache_is_filled_by_a_text_and_the_sample_goes_on_from_there() -> None:
    specs = {
        "input_ids": SPECS["input_ids"],
        "attention_mask": InputSpec((9,), "int64"),
        "memory": InputSpec((1, 3, 1), "float32"),
    }
    found = write_text(Remembers(), specs, 5, torch.Generator().manual_seed(0), lambda share: None)
    assert found["memory"].shape == (5, 1, 3, 1)
    assert bool((found["attention_mask"] == 1).all())
    whole = torch.cat([found["memory"][:, 0, :, 0].long(), found["input_ids"]], 1)
    assert torch.equal(whole[:, 1:], (whole[:, :-1] + 1) % VOCABULARY)
