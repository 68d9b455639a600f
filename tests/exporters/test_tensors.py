from __future__ import annotations

import argparse
import copy
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from exporters.dense import is_torchao
from exporters.kinds import kind_of
from exporters.masks import fold_masks
from exporters.safe_pickle import load_pickle
from exporters.tensors import check_finite, read_tensors, same_bits
from profiles.errors import GpusqError

State = dict[str, torch.Tensor]
FUZZ = int(os.environ.get("GPUSQ_FUZZ", "200"))
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")


@pytest.fixture
def state() -> State:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(4, 6),
        "a.bias": torch.randn(4).half(),
        "b.weight": torch.randn(3, 4).bfloat16(),
        "b.count": torch.tensor(7),
        "b.fp8": torch.randn(4).to(torch.float8_e4m3fn),
    }


def same(one: State, other: State) -> bool:
    return list(one) == list(other) and all(same_bits(one[name], other[name]) for name in one)


def pruned_2_4(dtype: torch.dtype, rows: int = 32, columns: int = 64) -> torch.Tensor:
    """Two of four kept, one of two for float32: what the hardware and torch's packing of it know."""
    group, kept = (2, 1) if dtype is torch.float32 else (4, 2)
    weight = torch.randint(-128, 128, (rows, columns // group, group)).to(dtype) / 1
    order = torch.rand(weight.shape).argsort(-1)
    return weight.masked_fill(order >= kept, 0).reshape(rows, columns).to(dtype)


def cutlass(dense: torch.Tensor) -> Any:
    packed, meta = sparse_semi_structured_from_dense_cutlass(dense)  # type: ignore[no-untyped-call]
    return SparseSemiStructuredTensorCUTLASS(dense.shape, packed, meta, None, None, None)


class TestFiles:
    def test_torch_zip_comes_back_bit_for_bit_and_mapped(self, state: State, tmp_path: Path) -> None:
        torch.save(state, tmp_path / "w.bin")
        read = read_tensors(tmp_path / "w.bin")
        assert same(read.state, state)
        assert read.notes == ()
        assert read.state["a.weight"].untyped_storage().nbytes() < (tmp_path / "w.bin").stat().st_size
        assert str(tmp_path / "w.bin") in Path("/proc/self/maps").read_text()

    def test_the_older_stream_comes_back_bit_for_bit(self, state: State, tmp_path: Path) -> None:
        del state["b.fp8"]  # torch writes float8 to it but cannot read it
        torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
        assert same(read_tensors(tmp_path / "w.pt").state, state)

    def test_safetensors_come_back_bit_for_bit_with_their_metadata(self, state: State, tmp_path: Path) -> None:
        save_file(state, tmp_path / "w.pt", {"format": "pt"})
        read = read_tensors(tmp_path / "w.pt")
        assert same(dict(sorted(read.state.items())), dict(sorted(state.items())))
        assert read.metadata == {"format": "pt"}

    def test_views_that_overlap_and_transposed_tensors_are_fine(self, tmp_path: Path) -> None:
        base = torch.arange(12.0)
        views = {"t": base.view(3, 4).t(), "o": base.as_strided((4, 4), (2, 1)), "e": base[:1].expand(5)}
        torch.save(views, tmp_path / "w.pt")
        assert same(read_tensors(tmp_path / "w.pt").state, views)

    def test_reading_a_second_time_gives_the_same(self, state: State, tmp_path: Path) -> None:
        torch.save({"model": state, "epoch": 3}, tmp_path / "w.pt")
        one, two = read_tensors(tmp_path / "w.pt"), read_tensors(tmp_path / "w.pt")
        assert same(one.state, two.state)
        assert (one.notes, one.metadata) == (two.notes, two.metadata)


class TestNesting:
    @pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "module", "ema", "model_ema"])
    def test_the_usual_wrappers_are_opened_and_noted(self, key: str, state: State, tmp_path: Path) -> None:
        torch.save({key: state, "epoch": 3}, tmp_path / "w.pt")
        read = read_tensors(tmp_path / "w.pt")
        assert same(read.state, state)
        assert read.notes == (f"took the weights in {key!r}",)
        assert read.metadata == {"epoch": 3}

    def test_averaged_weights_win_and_the_others_are_named(self, state: State, tmp_path: Path) -> None:
        other = {name: tensor.clone() for name, tensor in state.items()}
        torch.save({"model": other, "ema": {"module": state, "decay": 0.99}}, tmp_path / "w.pt")
        read = read_tensors(tmp_path / "w.pt")
        assert same(read.state, state)
        assert read.notes == ("took the weights in 'ema', not those in 'model'", "took the weights in 'ema.module'")
        assert read.metadata == {"decay": 0.99}

    def test_a_training_script_s_junk_is_left_out_and_its_plain_data_kept(self, tmp_path: Path) -> None:
        net = torch.nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(net.parameters())
        net(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        content = {
            "model": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": {},
            "epoch": 12,
            "args": argparse.Namespace(lr=0.1, out=Path("/out/dir"), sizes=[1, (2, 3)]),
            "best": np.float64(0.75),
            "worst": np.float32(0.5),
            "count": np.int64(5),
            "rng": torch.get_rng_state(),
        }
        torch.save(content, tmp_path / "w.pt")
        read = read_tensors(tmp_path / "w.pt")
        assert same(read.state, dict(net.state_dict()))
        assert read.metadata == {
            "epoch": 12,
            "args": {"lr": 0.1, "out": "/out/dir", "sizes": [1, (2, 3)]},
            "best": 0.75,
            "worst": 0.5,
            "count": 5,
        }

    def test_two_unknown_sets_of_weights_are_an_error_that_names_them(self, state: State, tmp_path: Path) -> None:
        torch.save({"generator": state, "critic": state}, tmp_path / "w.pt")
        with pytest.raises(GpusqError, match="2 sets of weights: 'generator', 'critic'"):
            read_tensors(tmp_path / "w.pt")

    def test_one_unknown_set_is_taken_and_noted(self, state: State, tmp_path: Path) -> None:
        torch.save({"backbone_weights": state}, tmp_path / "w.pt")
        read = read_tensors(tmp_path / "w.pt")
        assert same(read.state, state)
        assert read.notes == ("took the weights in 'backbone_weights'",)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in torch.compile's own imports
    def test_data_parallel_and_compile_leave_no_trace_in_the_names(self, tmp_path: Path) -> None:
        net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        compiled = copy.deepcopy(net)
        compiled[0] = torch.compile(compiled[0])  # type: ignore[assignment]
        torch.save(torch.nn.DataParallel(compiled).state_dict(), tmp_path / "w.pt")
        read = read_tensors(tmp_path / "w.pt")
        assert same(read.state, dict(net.state_dict()))
        assert len(read.notes) == 2

    def test_an_averaged_model_loses_its_count(self, tmp_path: Path) -> None:
        net = torch.nn.Linear(2, 2)
        torch.save(torch.optim.swa_utils.AveragedModel(net).state_dict(), tmp_path / "w.pt")
        assert same(read_tensors(tmp_path / "w.pt").state, dict(net.state_dict()))

    @pytest.mark.parametrize("lightning", [True, False])
    def test_the_prefix_model_goes_only_where_lightning_put_it(self, lightning: bool, tmp_path: Path) -> None:
        version = {"pytorch-lightning_version": "2.4.0"} if lightning else {}
        torch.save({"state_dict": {"model.w": torch.ones(2)}, **version}, tmp_path / "w.pt")
        assert list(read_tensors(tmp_path / "w.pt").state) == ["w" if lightning else "model.w"]

    def test_containers_that_hold_themselves_end(self, tmp_path: Path) -> None:
        loop: dict[str, Any] = {"w": torch.ones(2)}
        loop["self"] = loop
        bomb: list[Any] = ["x"]
        for _ in range(60):
            bomb = [bomb, bomb]
        torch.save({"model": loop, "bomb": bomb}, tmp_path / "w.pt")
        assert "w" in read_tensors(tmp_path / "w.pt").state

    @pytest.mark.parametrize("content", [{}, {"epoch": 1}, [1, 2], torch.ones(2), {"optimizer": {"w": torch.ones(1)}}])
    def test_no_named_tensors_is_an_error(self, content: object, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(GpusqError, match="no tensors with names"):
            read_tensors(tmp_path / "w.pt")


class Mischief:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch was-run",)


class TestCode:
    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_pickle_with_code_names_it_and_runs_nothing(
        self, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        torch.save({"w": torch.ones(2), "x": Mischief()}, "w.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(GpusqError, match=r"asks for '(posix|nt)\.system'.*nothing was run") as caught:
            read_tensors("w.pt")
        assert "--trust-code" in caught.value.hint
        assert "state_dict" in caught.value.hint
        assert not Path("was-run").exists()

    def test_a_whole_module_needs_trust_and_is_then_taken(self, tmp_path: Path) -> None:
        net = torch.nn.Sequential(torch.nn.Linear(2, 2))
        torch.save({"epoch": 1, "model": net}, tmp_path / "w.pt")
        with pytest.raises(GpusqError, match=r"asks for 'torch.nn.modules.container.Sequential'"):
            read_tensors(tmp_path / "w.pt")
        read = read_tensors(tmp_path / "w.pt", trust_code=True)
        assert isinstance(read.module, torch.nn.Sequential)
        assert same(read.state, dict(net.state_dict()))
        assert read.notes == ("took the whole module Sequential in 'model'",)
        assert read.metadata == {"epoch": 1}

    def test_trusted_code_that_fails_is_an_error_with_its_reason(self, tmp_path: Path) -> None:
        (tmp_path / "w.pt").write_bytes(
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, its version, no system info
            b"\x80\x02M\xe9\x03.\x80\x02}q\x00.\x80\x02cno_such_package\nThing\n."
        )
        with pytest.raises(GpusqError, match=r"'no_such_package.Thing'"):
            read_tensors(tmp_path / "w.pt")
        with pytest.raises(GpusqError, match="ModuleNotFoundError"):
            read_tensors(tmp_path / "w.pt", trust_code=True)

    @pytest.mark.parametrize("protocol", [2, 4, 5])
    def test_a_plain_pickle_names_what_it_asks_for(self, protocol: int, tmp_path: Path) -> None:
        (tmp_path / "w.pkl").write_bytes(pickle.dumps({"x": Mischief()}, protocol))
        with pytest.raises(GpusqError, match=r"not one of torch.save, and asks for '(posix|nt)\.system'; nothing was"):
            read_tensors(tmp_path / "w.pkl")

    def test_the_list_of_safe_classes_is_left_as_it_was(self, state: State, tmp_path: Path) -> None:
        torch.save(state, tmp_path / "w.pt")
        with torch.serialization.safe_globals([Mischief]):
            torch.save({"x": argparse.Namespace(), **state}, tmp_path / "w.pt")
            before = set(torch.serialization.get_safe_globals())
            load_pickle(tmp_path / "w.pt", "torch-zip")
            assert set(torch.serialization.get_safe_globals()) == before


class TestSparse:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("parameter", [False, True])
    def test_cutlass_packed_weights_come_back_bit_for_bit(
        self, dtype: torch.dtype, transposed: bool, parameter: bool, tmp_path: Path
    ) -> None:
        dense = pruned_2_4(dtype)
        packed = cutlass(dense)
        assert torch.equal(packed.to_dense(), dense)
        packed = packed.t() if transposed else packed
        packed = torch.nn.Parameter(packed, requires_grad=False) if parameter else packed
        torch.save({"a.weight": packed, "a.bias": torch.ones(2)}, tmp_path / "w.pt")
        read = read_tensors(tmp_path / "w.pt").state
        assert type(read["a.weight"]) is torch.Tensor
        assert same_bits(read["a.weight"], dense.t() if transposed else dense)

    def test_cutlass_packing_needs_no_class_of_torch_to_be_allowed(self, tmp_path: Path) -> None:
        torch.save({"w": cutlass(pruned_2_4(torch.float16))}, tmp_path / "w.pt")
        with pytest.raises(pickle.UnpicklingError, match="SparseSemiStructuredTensorCUTLASS"):
            torch.load(tmp_path / "w.pt", weights_only=True)
        assert read_tensors(tmp_path / "w.pt").state["w"].shape == (32, 64)

    def test_cusparselt_packing_is_refused_with_layer_and_class(self, tmp_path: Path) -> None:
        packed = torch.ones(32 * 64 // 2 + 256, dtype=torch.float16)  # the layout is only known to the GPU's library
        weight = SparseSemiStructuredTensorCUSPARSELT(torch.Size((32, 64)), packed, None, None, None, None)
        torch.save({"blocks.0.fc.weight": weight}, tmp_path / "w.pt")
        with pytest.raises(GpusqError, match=r"'blocks.0.fc.weight' is a torch.sparse.*CUSPARSELT, which a CPU cannot"):
            read_tensors(tmp_path / "w.pt")

    def test_cutlass_parts_that_do_not_fit_are_an_error(self, tmp_path: Path) -> None:
        weight = cutlass(pruned_2_4(torch.float16))
        weight.meta = weight.meta[:, :2].contiguous()
        torch.save({"fc.weight": weight}, tmp_path / "w.pt")
        with pytest.raises(GpusqError, match=r"'fc.weight' \[32, 64\]: the parts .* do not fit"):
            read_tensors(tmp_path / "w.pt")

    @pytest.mark.parametrize(
        "layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc", "to_sparse_bsr", "to_sparse_bsc"]
    )
    @pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support:UserWarning")
    def test_torch_s_sparse_layouts_come_back_dense(self, layout: str, tmp_path: Path) -> None:
        dense = pruned_2_4(torch.float16)
        size = ((4, 4),) if layout[-3:] in ("bsr", "bsc") else ()
        torch.save({"w": getattr(dense, layout)(*size)}, tmp_path / "w.pt")
        assert same_bits(read_tensors(tmp_path / "w.pt").state["w"], dense)

    @pytest.mark.filterwarnings("ignore")  # of importing torchao
    def test_torchao_block_sparse_weights_come_back_dense(self, tmp_path: Path) -> None:
        blocksparse = import_module("torchao.sparsity.blocksparse")
        dense = pruned_2_4(torch.bfloat16)
        torch.save({"w": blocksparse.BlockSparseTensor.from_dense(dense, 4)}, tmp_path / "w.pt")
        assert same_bits(read_tensors(tmp_path / "w.pt").state["w"], dense)

    @pytest.mark.filterwarnings("ignore")  # of importing torchao
    def test_torchao_quantized_weights_stay_what_they_are_for_their_scales_to_be_taken(self, tmp_path: Path) -> None:
        quantization = import_module("torchao.quantization")
        net = torch.nn.Sequential(torch.nn.Linear(64, 32))
        quantization.quantize_(net, quantization.Int8WeightOnlyConfig(version=2))
        torch.save(net.state_dict(), tmp_path / "w.pt")
        state = read_tensors(tmp_path / "w.pt").state
        assert is_torchao(state["0.weight"])
        assert not is_torchao(state["0.bias"])

    @pytest.mark.filterwarnings("ignore")  # torch deprecates what is under test
    def test_quantized_and_empty_handed_tensors_are_refused_by_name(self, tmp_path: Path) -> None:
        torch.save({"a.weight": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)}, tmp_path / "q.pt")
        with pytest.raises(GpusqError, match=r"q.pt: tensor 'a.weight' is quantized \(quint8\)"):
            read_tensors(tmp_path / "q.pt")
        torch.save({"a.weight": torch.empty(3, device="meta")}, tmp_path / "m.pt")
        with pytest.raises(GpusqError, match=r"'a.weight' lies on 'meta'"):
            read_tensors(tmp_path / "m.pt")

    @pytest.mark.parametrize("sparse", [True, False])
    def test_a_few_bytes_cannot_become_a_huge_tensor(self, sparse: bool, tmp_path: Path) -> None:
        size = (1 << 20, 1 << 20)
        huge = torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), size, check_invariants=True)
        torch.save({"w": huge if sparse else torch.ones(1).expand(size)}, tmp_path / "w.pt")
        with pytest.raises(GpusqError, match=r"'w' claims 4398046511104 bytes"):
            read_tensors(tmp_path / "w.pt")


class TestShards:
    @pytest.fixture
    def index(self, state: State, tmp_path: Path) -> Path:
        names = list(state)
        save_file({name: state[name] for name in names[:2]}, tmp_path / "1.safetensors")
        save_file({name: state[name] for name in names[2:]}, tmp_path / "2.safetensors")
        weight_map = {name: f"{1 + (i > 1)}.safetensors" for i, name in enumerate(names)}
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
        return index

    def test_index_and_folder_give_all_the_shards(self, index: Path, state: State) -> None:
        for path in (index, index.parent):
            read = read_tensors(path)
            assert same(dict(sorted(read.state.items())), dict(sorted(state.items())))
            assert read.metadata == {"total_size": 1}

    @pytest.mark.parametrize("safe", [True, False])
    def test_the_shards_of_huggingface_hub_come_back(self, safe: bool, state: State, tmp_path: Path) -> None:
        from huggingface_hub import save_torch_state_dict

        save_torch_state_dict(state, tmp_path, max_shard_size=60, safe_serialization=safe)
        assert len(list(tmp_path.iterdir())) > 2
        assert kind_of(tmp_path) == "sharded"
        assert same(dict(sorted(read_tensors(tmp_path).state.items())), dict(sorted(state.items())))

    def test_missing_shards_are_named(self, index: Path) -> None:
        (index.parent / "2.safetensors").unlink()
        with pytest.raises(GpusqError, match=r"shards missing: 2\.safetensors"):
            read_tensors(index)

    def test_a_tensor_that_the_shard_lacks_is_named(self, index: Path, state: State) -> None:
        save_file({"a.weight": state["a.weight"]}, index.parent / "1.safetensors")
        with pytest.raises(GpusqError, match=r"shard 1\.safetensors lacks tensor 'a\.bias'"):
            read_tensors(index)

    def test_a_tensor_in_two_shards_may_not_differ(self, index: Path, state: State) -> None:
        rest = {name: state[name] for name in list(state)[2:]}
        save_file({**rest, "a.bias": state["a.bias"]}, index.parent / "2.safetensors")
        assert read_tensors(index).state.keys() == state.keys()
        save_file({**rest, "a.bias": state["a.bias"] + 1}, index.parent / "2.safetensors")
        with pytest.raises(GpusqError, match=r"'a\.bias' differs between 1\.safetensors and 2\.safetensors"):
            read_tensors(index)

    @pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "", 3])
    def test_an_index_that_leaves_its_folder_is_refused(self, shard: object, index: Path) -> None:
        index.write_text(json.dumps({"weight_map": {"a.weight": shard}}))
        with pytest.raises(GpusqError, match=r"'a\.weight' lies in .* no file beside the index"):
            read_tensors(index)

    @pytest.mark.parametrize("content", ['{"weight_map": ', '{"weight_map": {}}', '{"weight_map": [1]}'])
    def test_a_broken_index_is_an_error(self, content: str, index: Path) -> None:
        index.write_text(content)
        with pytest.raises(GpusqError, match=r"index\.json"):
            read_tensors(index)


class TestFolders:
    def test_safetensors_win_over_a_pickle_and_the_note_says_so(self, state: State, tmp_path: Path) -> None:
        save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
        torch.save(state, tmp_path / "pytorch_model.bin")
        read = read_tensors(tmp_path)
        assert list(read.state) == ["w"]
        assert read.notes == ("read model.safetensors, not pytorch_model.bin",)

    def test_several_files_without_a_usual_name_are_an_error(self, state: State, tmp_path: Path) -> None:
        for name in ("one.pt", "two.pt"):
            torch.save(state, tmp_path / name)
        with pytest.raises(GpusqError, match=r"several checkpoints: one\.pt, two\.pt"):
            read_tensors(tmp_path)

    def test_a_folder_without_weights_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(GpusqError, match="no weights file"):
            read_tensors(tmp_path)


class TestBroken:
    def test_missing_empty_and_foreign_files_say_what_they_are(self, tmp_path: Path) -> None:
        with pytest.raises(GpusqError, match="no file or folder"):
            read_tensors(tmp_path / "absent.pt")
        for content, message in (
            (b"", "is empty"),
            (b"<html>", "is a web page"),
            (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
            (b"nonsense", "no checkpoint that is known"),
        ):
            (tmp_path / "w.pt").write_bytes(content)
            with pytest.raises(GpusqError, match=message) as caught:
                read_tensors(tmp_path / "w.pt")
            assert caught.value.hint

    @pytest.mark.parametrize("lost", [1, 100, 3000])
    def test_cut_safetensors_say_how_many_bytes_are_missing(self, lost: int, tmp_path: Path) -> None:
        save_file({"w": torch.ones(1000)}, tmp_path / "w.safetensors")
        content = (tmp_path / "w.safetensors").read_bytes()
        (tmp_path / "w.safetensors").write_bytes(content[:-lost])
        with pytest.raises(GpusqError, match=f"cut short: {lost} of its {len(content)} bytes are missing"):
            read_tensors(tmp_path / "w.safetensors")

    def test_a_cut_safetensors_header_says_so(self, tmp_path: Path) -> None:
        save_file({"w": torch.ones(1000)}, tmp_path / "w.safetensors")
        content = (tmp_path / "w.safetensors").read_bytes()
        (tmp_path / "w.safetensors").write_bytes(content[:20])
        missing = 8 + int.from_bytes(content[:8], "little") - 20
        with pytest.raises(GpusqError, match=f"{missing} bytes of its header are missing"):
            read_tensors(tmp_path / "w.safetensors")

    def test_a_garbled_safetensors_header_is_an_error(self, tmp_path: Path) -> None:
        save_file({"w": torch.ones(1000)}, tmp_path / "w.safetensors")
        content = (tmp_path / "w.safetensors").read_bytes()
        (tmp_path / "w.safetensors").write_bytes(content.replace(b'"F32"', b'"F33"'))
        with pytest.raises(GpusqError, match="not a sound safetensors file"):
            read_tensors(tmp_path / "w.safetensors")

    @pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
    def test_a_cut_zip_says_so(self, keep: float, tmp_path: Path) -> None:
        torch.save({"w": torch.ones(10000)}, tmp_path / "w.pt")
        content = (tmp_path / "w.pt").read_bytes()
        (tmp_path / "w.pt").write_bytes(content[: int(len(content) * keep)])
        with pytest.raises(GpusqError, match=r"is cut short: .* its \d+ bytes have none"):
            read_tensors(tmp_path / "w.pt")

    def test_a_cut_stream_is_an_error(self, tmp_path: Path) -> None:
        torch.save({"w": torch.ones(1000)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
        content = (tmp_path / "w.pt").read_bytes()
        for length in (30, 200, 500, len(content) - 1):
            (tmp_path / "w.pt").write_bytes(content[:length])
            with pytest.raises(GpusqError, match="not a whole torch"):
                read_tensors(tmp_path / "w.pt")

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
    def test_weights_that_are_not_finite_are_named(self, bad: float, dtype: torch.dtype) -> None:
        state = {"a.weight": torch.ones(3), "b.weight": torch.tensor([1.0, bad]).to(dtype), "n": torch.tensor(3)}
        with pytest.raises(GpusqError, match=r"NaN or infinity in 'b\.weight'"):
            check_finite(state)

    def test_finite_weights_and_attention_masks_pass(self) -> None:
        mask = torch.full((3, 3), -torch.inf).triu(1)
        check_finite({"attn_mask": mask, "w": torch.ones(3), "e": torch.ones(0), "c": torch.ones(2) * 1j})


def _small_state() -> State:
    torch.manual_seed(1)
    return {"weight_orig": torch.randn(4, 8), "weight_mask": torch.ones(4, 8), "n.bias": torch.ones(3).half()}


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small sound file of each kind, by its name."""
    folder = tmp_path_factory.mktemp("whole")
    state = _small_state()
    dense = pruned_2_4(torch.float16)
    nested = {"model": state, "epoch": 1, "args": argparse.Namespace(a=1), "best": np.float64(1)}
    torch.save(nested, folder / "zip")
    torch.save(nested, folder / "legacy", _use_new_zipfile_serialization=False)
    torch.save({"c": cutlass(dense), "s": dense.to_sparse()}, folder / "sparse")
    torch.save({"c": cutlass(dense)}, folder / "sparse-legacy", _use_new_zipfile_serialization=False)
    save_file(state, folder / "safetensors")
    (folder / "bitmask").write_bytes((Path(__file__).parent / "data/sparse-24-bitmask.safetensors").read_bytes())
    (folder / "index").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, "safetensors")}))
    (folder / "pickle").write_bytes(pickle.dumps(nested, 4))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _mutants(content: bytes) -> st.SearchStrategy[bytes]:
    """`content` with a few bits flipped, cut, or with a stretch of it put somewhere else."""
    at = st.integers(0, len(content))
    flips = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(1, 255)), min_size=1, max_size=8)
    return st.one_of(
        flips.map(lambda pairs: _flip(content, pairs)),
        at.map(lambda end: content[:end]),
        st.tuples(at, at, at).map(lambda t: content[: t[0]] + content[min(t[1:]) : max(t[1:])] + content[t[0] :]),
        st.tuples(at, at).map(lambda t: content[: min(t)] + content[max(t) :]),
        st.tuples(at, st.binary(max_size=16)).map(lambda t: content[: t[0]] + t[1] + content[t[0] + len(t[1]) :]),
    )


def _flip(content: bytes, pairs: list[tuple[int, int]]) -> bytes:
    mutant = bytearray(content)
    for position, bits in pairs:
        mutant[position] ^= bits
    return bytes(mutant)


@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory: pytest.TempPathFactory, whole_files: dict[str, bytes]) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "safetensors").write_bytes(whole_files["safetensors"])
    return folder


@pytest.mark.parametrize(
    "kind", ["zip", "legacy", "sparse", "sparse-legacy", "safetensors", "bitmask", "index", "pickle"]
)
@settings(max_examples=FUZZ, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused_and_nothing_else(
    kind: str, data: st.DataObject, whole_files: dict[str, bytes], fuzz_folder: Path
) -> None:
    _check_mutant(fuzz_folder / "mutant", data.draw(_mutants(whole_files[kind])))


@pytest.mark.parametrize("kind", ["zip", "sparse"])
@settings(max_examples=FUZZ, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_pickle_in_a_sound_zip_file_is_read_or_refused_and_nothing_else(
    kind: str, data: st.DataObject, whole_files: dict[str, bytes], fuzz_folder: Path
) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole_files[kind])) as whole, zipfile.ZipFile(content, "w") as mutant:
        for name in whole.namelist():
            record = whole.read(name)
            mutant.writestr(name, data.draw(_mutants(record)) if name.endswith("data.pkl") else record)
    _check_mutant(fuzz_folder / "mutant", content.getvalue())


def _check_mutant(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # never in place: an earlier mutant may still be mapped
    path.write_bytes(content)
    refused: GpusqError | None = None
    state: State = {}
    try:
        state = fold_masks(read_tensors(path).state).state
        check_finite(state)
    except GpusqError as error:
        refused = error
    assert refused is None or ("\n" not in refused.message and refused.hint)
    assert all(type(tensor) is torch.Tensor for tensor in state.values())


@pytest.mark.parametrize("kind", ["zip", "legacy", "sparse", "sparse-legacy", "safetensors", "bitmask", "index"])
def test_the_files_that_are_mutated_are_sound(kind: str, whole_files: dict[str, bytes], fuzz_folder: Path) -> None:
    (fuzz_folder / "whole").write_bytes(whole_files[kind])
    check_finite(fold_masks(read_tensors(fuzz_folder / "whole").state).state)
