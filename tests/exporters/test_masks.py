from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.utils import parametrizations, parametrize, prune

from exporters.masks import FoldedMask, fold_masks
from exporters.tensors import read_tensors, same_bits
from profiles.errors import GpusqError

DATA = Path(__file__).parent / "data"
State = dict[str, torch.Tensor]


def net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(4, 16, 3), torch.nn.ReLU(), torch.nn.Linear(16, 32))


def saved(module: torch.nn.Module, path: Path) -> State:
    """The module's state dict by way of a file."""
    torch.save(module.state_dict(), path / "net.pt")
    return read_tensors(path / "net.pt").state


def same_bits_but_for_minus_zero(folded: State, dense: State) -> bool:
    """The library's own product has −0 where a negative weight was masked; here it is +0, and all else bit for bit."""
    return folded.keys() == dense.keys() and all(same_bits(folded[k], dense[k].detach() + 0.0) for k in dense)


def no_negative_zeros(tensor: torch.Tensor) -> bool:
    return not bool((torch.signbit(tensor) & (tensor == 0)).any())


class TestTorchPrune:
    def test_folds_to_what_torch_itself_makes_permanent(self, tmp_path: Path) -> None:
        module = net()
        prune.random_unstructured(module[0], "weight", 0.3)  # type: ignore[no-untyped-call]
        prune.l1_unstructured(module[2], "weight", 0.5)  # type: ignore[no-untyped-call]
        prune.random_unstructured(module[2], "bias", 0.25)  # type: ignore[no-untyped-call]
        result = fold_masks(saved(module, tmp_path))
        for layer, name in ((module[0], "weight"), (module[2], "weight"), (module[2], "bias")):
            prune.remove(layer, name)  # type: ignore[no-untyped-call]
        assert same_bits_but_for_minus_zero(result.state, module.state_dict())
        assert all(no_negative_zeros(tensor) for tensor in result.state.values())
        assert {m.name: (m.kind, round(m.zeros, 2)) for m in result.folded} == {
            "0.weight": ("torch.nn.utils.prune", 0.3),
            "2.weight": ("torch.nn.utils.prune", 0.5),
            "2.bias": ("torch.nn.utils.prune", 0.25),
        }

    def test_two_prunings_of_one_weight_are_one_mask(self, tmp_path: Path) -> None:
        module = net()
        prune.random_unstructured(module[2], "weight", 0.3)  # type: ignore[no-untyped-call]
        prune.ln_structured(module[2], "weight", 0.5, 2, 0)  # type: ignore[no-untyped-call]
        result = fold_masks(saved(module, tmp_path))
        prune.remove(module[2], "weight")  # type: ignore[no-untyped-call]
        assert same_bits_but_for_minus_zero(result.state, module.state_dict())

    def test_what_lies_under_the_mask_does_not_matter(self) -> None:
        weight = torch.tensor([1.0, -1.0, torch.nan, torch.inf, -0.0, -0.0])
        mask = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
        folded = fold_masks({"weight_orig": weight, "weight_mask": mask}).state["weight"]
        assert same_bits(folded, torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, -0.0]))

    def test_a_buffer_that_is_called_mask_is_no_pruning_mask(self) -> None:
        state = {
            "attn.attn_mask": torch.zeros(3, 3),
            "attn.mask": torch.ones(2),
            "pos_mask": torch.ones(2),
        }
        result = fold_masks(state)
        assert all(result.state[name] is state[name] for name in state)
        assert result.folded == ()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch.ao is deprecated as a whole
class TestTorchAoPruning:
    @pytest.fixture
    def sparsified(self) -> tuple[torch.nn.Module, Any]:
        pruning = import_module("torch.ao.pruning")
        module = net()
        sparsifier = pruning.WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
        sparsifier.prepare(module, [{"tensor_fqn": "2.weight"}])
        sparsifier.step()
        return module, sparsifier

    def test_masks_saved_with_the_sparsifier_fold_to_what_squash_mask_gives(
        self, sparsified: tuple[torch.nn.Module, Any], tmp_path: Path
    ) -> None:
        module, sparsifier = sparsified
        parallel = torch.nn.DataParallel(module)
        torch.save({"sparsifier": sparsifier.state_dict(), "model": parallel.state_dict()}, tmp_path / "net.pt")
        read = read_tensors(tmp_path / "net.pt")
        assert "took 1 masks from the sparsifier's state" in read.notes
        result = fold_masks(read.state)
        sparsifier.squash_mask()
        assert same_bits_but_for_minus_zero(result.state, module.state_dict())
        assert result.folded == (FoldedMask("2.weight", "torch.ao.pruning", 0.5),)
        torch.save({"sparsifier": sparsifier.state_dict(), "model": module.state_dict()}, tmp_path / "squashed.pt")
        assert fold_masks(read_tensors(tmp_path / "squashed.pt").state).state.keys() == result.state.keys()

    def test_without_its_masks_the_weight_is_refused_and_the_hint_says_how_to_save_them(
        self, sparsified: tuple[torch.nn.Module, Any], tmp_path: Path
    ) -> None:
        state = saved(sparsified[0], tmp_path)
        assert not any("mask" in name for name in state)
        with pytest.raises(GpusqError, match=r"'2\.weight' is under a parametrization \(original\)") as caught:
            fold_masks(state)
        assert "sparsifier.state_dict()" in caught.value.hint

    def test_an_unknown_parametrization_beside_the_mask_is_refused(
        self, sparsified: tuple[torch.nn.Module, Any], tmp_path: Path
    ) -> None:
        module, sparsifier = sparsified
        parametrize.register_parametrization(module[2], "weight", torch.nn.Linear(16, 16), unsafe=True)  # type: ignore[index]
        torch.save({"sparsifier": sparsifier.state_dict(), "model": module.state_dict()}, tmp_path / "net.pt")
        with pytest.raises(GpusqError, match=r"'2\.weight' is under a parametrization \(1\.bias, 1\.weight\)"):
            fold_masks(read_tensors(tmp_path / "net.pt").state)


@pytest.mark.filterwarnings("ignore")  # of importing modelopt
class TestModelopt:
    def test_folds_to_what_the_sparse_module_computes_with(self, tmp_path: Path) -> None:
        mts, mto = import_module("modelopt.torch.sparsity"), import_module("modelopt.torch.opt")
        module = mts.sparsify(net(), "sparse_magnitude")
        with torch.no_grad():
            module[2].weight.data.add_(0.1)  # fine-tuning moves what is under the mask too
        mto.save(module, tmp_path / "net.pth")
        read = read_tensors(tmp_path / "net.pth")
        assert read.notes == ("took the weights in 'model_state_dict'",)
        assert read.metadata["modelopt_state"]["modelopt_state_dict"][0][0] == "sparse_magnitude"
        assert "2._weight_mask" in read.state
        result = fold_masks(read.state)
        computed = {"2.weight": module[2].weight.detach(), "2.bias": module[2].bias.detach()}
        assert same_bits_but_for_minus_zero({name: result.state[name] for name in computed}, computed)
        assert FoldedMask("2.weight", "modelopt mts", 0.5) in result.folded
        assert not any("mask" in name for name in result.state)
        exported = mts.export(module).state_dict()
        assert same_bits_but_for_minus_zero(result.state, exported)


def asp(module: torch.nn.Module, name: str, mask: torch.Tensor, *, recompute: bool = False) -> None:
    """What apex's ASP.compute_sparse_masks does to a parameter; apex itself is not on PyPI and wants a GPU."""
    weight = module.get_parameter(name)
    module.register_buffer(f"__{name}_mma_mask", mask)
    with torch.no_grad():
        if recompute:
            module.register_buffer(f"__{name}_mma_pruned_p", weight * ~mask)
        weight.mul_(mask)


class TestApex:
    mask = torch.tensor([True, True, False, False]).repeat(32, 4)

    @pytest.mark.parametrize("recompute", [True, False])
    def test_masks_and_pruned_values_go_and_zeros_stay(self, recompute: bool, tmp_path: Path) -> None:
        module = net()
        asp(module[2], "weight", self.mask, recompute=recompute)
        result = fold_masks(saved(module, tmp_path))
        dense = {name: tensor for name, tensor in module.state_dict().items() if "mma" not in name}
        assert same_bits_but_for_minus_zero(result.state, dense)
        assert no_negative_zeros(result.state["2.weight"])
        assert result.folded == (FoldedMask("2.weight", "apex ASP", 0.5),)

    def test_weights_that_came_back_to_life_are_an_error(self, tmp_path: Path) -> None:
        module = net()
        asp(module[2], "weight", self.mask)
        with torch.no_grad():
            module.get_parameter("2.weight")[0, 2] = 1
        with pytest.raises(GpusqError, match=r"'2\.weight' has 1 non-zero values under its mask \(apex ASP\)"):
            fold_masks(saved(module, tmp_path))

    def test_a_mask_beside_its_weight_is_held_to_the_same(self) -> None:
        mask = torch.tensor([1, 0])
        result = fold_masks({"fc.weight": torch.tensor([2.0, -0.0]), "fc.weight_mask": mask})
        assert same_bits(result.state["fc.weight"], torch.tensor([2.0, 0.0]))
        with pytest.raises(GpusqError, match=r"'fc\.weight' has 1 non-zero"):
            fold_masks({"fc.weight": torch.tensor([2.0, 3.0]), "fc.weight_mask": mask})


class TestBitmask:
    @pytest.mark.parametrize("kind", ["sparse-24-bitmask", "sparse-bitmask"])
    def test_the_library_s_files_unpack_to_the_dense_weights(self, kind: str) -> None:
        result = fold_masks(read_tensors(DATA / f"{kind}.safetensors").state)
        dense = load_file(DATA / "dense.safetensors")
        assert result.state.keys() == dense.keys()
        for name, tensor in dense.items():
            kept = tensor.to(torch.float32) != 0
            assert torch.equal(result.state[name].to(torch.float32), tensor.to(torch.float32))
            assert same_bits(
                result.state[name].view(torch.uint8 if "fp8" in name else tensor.dtype)[kept],
                tensor.view(torch.uint8 if "fp8" in name else tensor.dtype)[kept],
            )
        kinds = {m.name: (m.kind, m.zeros) for m in result.folded}
        assert kinds["f32.weight"] == (f"compressed-tensors {kind}", 0.5)

    @given(rows=st.integers(1, 6), columns=st.integers(1, 5).map(lambda n: 4 * n), data=st.data())
    def test_any_mask_packed_in_the_library_s_way_comes_back(
        self, rows: int, columns: int, data: st.DataObject
    ) -> None:
        bits = st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)
        keep = torch.tensor(data.draw(bits)).reshape(rows, columns)
        dense = torch.arange(1.0, rows * columns + 1).reshape(rows, columns).masked_fill(~keep, 0)
        state = {
            "l.compressed": dense[keep],
            "l.bitmask": torch.from_numpy(np.packbits(keep.numpy(), axis=-1, bitorder="little")),
            "l.shape": torch.tensor([rows, columns]),
            "l.row_offsets": keep.sum(1).cumsum(0) - keep.sum(1),
        }
        assert same_bits(fold_masks(state).state["l.weight"], dense)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"f32.bitmask": torch.zeros(8, 2, dtype=torch.uint8)}, r"'f32': the bitmask is uint8 \[8, 2\]"),
            ({"f32.bitmask": torch.zeros(8, 3, dtype=torch.uint8)}, r"'f32': .* keeps 0 of \[8, 20\]"),
            ({"f32.shape": torch.tensor([8, -20])}, r"'f32': its shape is int64 \[2\]"),
            ({"f32.shape": torch.tensor([1 << 40, 1 << 40])}, r"'f32': the bitmask is"),
            ({"f32.compressed": torch.ones(8, 9)}, r"'f32': float32 \[8, 9\] values do not fit"),
            ({"f32.weight": torch.ones(8, 20)}, r"'f32' has its weight twice"),
            ({"f32.shape": None}, r"'f32' has a bitmask but no 'f32\.shape'"),
            ({"f32.compressed": None}, r"'f32' has a bitmask but no 'f32\.compressed'"),
        ],
    )
    def test_parts_that_do_not_fit_name_the_layer(self, change: dict[str, torch.Tensor | None], message: str) -> None:
        state: dict[str, Any] = {**read_tensors(DATA / "sparse-24-bitmask.safetensors").state, **change}
        with pytest.raises(GpusqError, match=message):
            fold_masks({name: tensor for name, tensor in state.items() if tensor is not None})


class TestMasksThatDoNotFit:
    @pytest.mark.parametrize(
        ("state", "message"),
        [
            (
                {"a.weight_orig": (4,), "a.weight_mask": (5,)},
                r"'a\.weight_mask' \[5\] does not fit .*'a\.weight' \[4\]",
            ),
            ({"a.weight": (4,), "a._weight_mask": (4, 1)}, r"'a\._weight_mask' \[4, 1\] does not fit"),
            ({"a._weight_mask": (4,)}, r"'a\._weight_mask' \(modelopt mts\) has no weight 'a\.weight'"),
            ({"a.__weight_mma_mask": (4,)}, r"\(apex ASP\) has no weight 'a\.weight'"),
            ({"a.parametrizations.weight.0.mask": (4,)}, r"\(torch\.ao\.pruning\) has no weight"),
            ({"a.weight_mask": (4,)}, r"'a\.weight_mask' .* has no weight 'a\.weight'"),
            ({"a.weight_orig": (4,)}, r"'a\.weight_orig' has no mask"),
            ({"a.weight": (4,), "a.weight_orig": (4,), "a.weight_mask": (4,)}, r"'a\.weight' is there twice"),
            ({"a.weight": (4,), "a._weight_mask": (4,), "a.__weight_mma_mask": (4,)}, r"'a\.weight' has masks of"),
        ],
    )
    def test_each_is_an_error_that_names_the_layer(self, state: dict[str, tuple[int, ...]], message: str) -> None:
        with pytest.raises(GpusqError, match=message) as caught:
            fold_masks({name: torch.ones(shape) for name, shape in state.items()})
        assert caught.value.hint

    @pytest.mark.parametrize("value", [0.5, -1.0, torch.nan, 2.0])
    def test_a_mask_of_other_values_is_an_error(self, value: float) -> None:
        with pytest.raises(GpusqError, match=r"'weight_mask' of weight 'weight' holds values other than 0 and 1"):
            fold_masks({"weight_orig": torch.ones(2), "weight_mask": torch.tensor([1.0, value])})


@given(st.lists(st.tuples(st.floats(width=32), st.booleans()), min_size=1, max_size=50))
def test_kept_weights_keep_their_bits_and_masked_ones_are_plus_zero(pairs: list[tuple[float, bool]]) -> None:
    weight = torch.tensor([value for value, _ in pairs])
    mask = torch.tensor([keep for _, keep in pairs])
    folded = fold_masks({"weight_orig": weight, "weight_mask": mask.float()}).state["weight"]
    assert same_bits(folded[mask], weight[mask])
    assert same_bits(folded[~mask], torch.zeros(int((~mask).sum())))
    assert fold_masks({"weight": folded}).state["weight"] is folded


class TestOtherParametrizations:
    @pytest.mark.parametrize("dim", [0, 1, 2, None])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_weight_norm_folds_to_torch_s_own_bits(self, dim: int | None, dtype: torch.dtype, tmp_path: Path) -> None:
        module = torch.nn.Sequential(parametrizations.weight_norm(torch.nn.Conv1d(4, 8, 3), dim=dim)).to(dtype)  # type: ignore[arg-type]
        with torch.no_grad():
            module[0].parametrizations.weight.original0.mul_(1.5)  # type: ignore[operator, union-attr]
        folded = fold_masks(saved(module, tmp_path)).state
        parametrize.remove_parametrizations(module[0], "weight")
        assert same_bits(folded["0.weight"], module[0].weight.detach())  # type: ignore[operator]
        assert folded.keys() == {"0.weight", "0.bias"}

    @pytest.mark.filterwarnings("ignore::FutureWarning")  # torch deprecates what is under test
    def test_the_older_weight_norm_too(self, tmp_path: Path) -> None:
        lstm = torch.nn.utils.weight_norm(torch.nn.LSTM(3, 4), "weight_hh_l0")
        linear = torch.nn.utils.weight_norm(torch.nn.Linear(3, 4))
        module = torch.nn.ModuleList([lstm, linear])
        folded = fold_masks(saved(module, tmp_path)).state
        torch.nn.utils.remove_weight_norm(lstm, "weight_hh_l0")
        torch.nn.utils.remove_weight_norm(linear)
        dense = module.state_dict()
        assert folded.keys() == dense.keys()
        assert all(same_bits(folded[name], dense[name]) for name in dense)

    def test_lengths_that_fit_no_axis_are_an_error(self) -> None:
        with pytest.raises(GpusqError, match=r"'a\.weight': the lengths \[3\]"):
            fold_masks({"a.weight_g": torch.ones(3), "a.weight_v": torch.ones(4, 5)})

    @pytest.mark.filterwarnings("ignore::FutureWarning")  # torch deprecates what is under test
    def test_spectral_norm_is_refused_by_name_in_both_forms(self, tmp_path: Path) -> None:
        for norm in (parametrizations.spectral_norm, torch.nn.utils.spectral_norm):
            module = torch.nn.Sequential(norm(torch.nn.Linear(3, 4)))
            with pytest.raises(GpusqError, match=r"'0\.weight' is under spectral norm"):
                fold_masks(saved(module, tmp_path))

    def test_a_parametrization_of_the_user_s_own_is_refused(self, tmp_path: Path) -> None:
        class Symmetric(torch.nn.Module):
            def forward(self, weight: torch.Tensor) -> torch.Tensor:
                return weight.triu() + weight.triu(1).T

        module = torch.nn.Sequential(torch.nn.Linear(3, 3))
        parametrize.register_parametrization(module[0], "weight", Symmetric())
        with pytest.raises(GpusqError, match=r"'0\.weight' is under a parametrization \(original\)") as caught:
            fold_masks(saved(module, tmp_path))
        assert "remove_parametrizations" in caught.value.hint
