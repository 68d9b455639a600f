from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from exporters.architecture import build_architecture, parse_spec, require
from exporters.signature import Input
from profiles.errors import GpusqError

MOBILENET = "torchvision:mobilenet_v2"


class Scaled(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 2)
        self.example_inputs = {"x": torch.zeros(1, width), "mask": torch.zeros(1, 2, dtype=torch.bool)}

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, self.fc(x), 0.0)


class TellsNothing(nn.Module):
    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return image + text


def not_a_module() -> int:
    return 1


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under importlib mode a test module has no name that can be imported."""
    monkeypatch.setitem(sys.modules, "own_code", _this())


def _this() -> types.ModuleType:
    module = types.ModuleType("own_code")
    vars(module).update(Scaled=Scaled, TellsNothing=TellsNothing, not_a_module=not_a_module)
    return module


def test_a_spec_has_a_source_a_name_keywords_and_a_part() -> None:
    spec = parse_spec("timm:vit?num_classes=10&global_pool=avg&dims=(1,2)#encoder")
    assert (spec.source, spec.name, spec.part) == ("timm", "vit", "encoder")
    assert spec.keywords == {"num_classes": 10, "global_pool": "avg", "dims": (1, 2)}


def test_a_path_is_a_name() -> None:
    assert parse_spec("hf:/data/my-model_v1.0").name == "/data/my-model_v1.0"


@pytest.mark.parametrize("text", ["resnet50", "timm:", ":x", "ti mm:vit", ""])
def test_what_is_no_spec_is_an_error_that_lists_the_sources(text: str) -> None:
    with pytest.raises(GpusqError, match="names no architecture") as caught:
        parse_spec(text)
    assert "torchvision:NAME" in caught.value.hint


def test_timm_tells_the_size_of_its_images() -> None:
    built = build_architecture("timm:test_vit.r160_in1k")
    assert built.inputs == (Input("image", (1, 3, 160, 160)),)
    assert (built.outputs, built.root, built.module.training) == (("logits",), "", False)


def test_keywords_reach_the_factory_and_shape_the_input() -> None:
    built = build_architecture("timm:test_vit?num_classes=7&img_size=96&in_chans=1")
    assert built.inputs[0].shape == (1, 1, 96, 96)
    with torch.no_grad():
        assert built.module(torch.zeros(built.inputs[0].shape)).shape == (1, 7)


@pytest.mark.parametrize(("name", "size"), [("mobilenet_v2", 224), ("inception_v3?init_weights=False", 299)])
def test_torchvision_takes_the_size_that_its_weights_were_trained_for(name: str, size: int) -> None:
    assert build_architecture(f"torchvision:{name}").inputs[0].shape == (1, 3, size, size)


def test_ultralytics_returns_one_tensor_of_boxes() -> None:
    built = build_architecture("ultralytics:yolov8n.yaml?nc=3", inputs=[Input("images", (1, 3, 64, 64))])
    with torch.no_grad():
        boxes = built.module(torch.zeros(1, 3, 64, 64))
    assert boxes.shape == (1, 4 + 3, 8 * 8 + 4 * 4 + 2 * 2)


def test_the_users_own_factory_gives_its_example_inputs_by_name() -> None:
    built = build_architecture("own_code:Scaled?width=8")
    assert built.inputs == (Input("x", (1, 8)), Input("mask", (1, 2), "bool"))


def test_the_users_own_code_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net_of_mine.py").write_text("import torch\n\ndef tiny():\n    return torch.nn.Linear(4, 2)\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    built = build_architecture("net_of_mine:tiny", inputs=[Input("input", (1, 4))])
    assert isinstance(built.module, nn.Linear)
    assert sys.path == before


def test_given_inputs_stand_in_the_order_of_forward() -> None:
    given = [Input("text", (1, 4)), Input("image", (1, 4))]
    assert [one.name for one in build_architecture("own_code:TellsNothing", inputs=given).inputs] == ["image", "text"]


def test_a_given_input_replaces_the_inferred_one() -> None:
    given = Input("image", (2, 3, 64, 64), dynamic={0: "batch"})
    assert build_architecture(MOBILENET, inputs=[given]).inputs == (given,)


def test_the_checkpoints_config_gives_way_to_the_spec() -> None:
    built = build_architecture("own_code:Scaled?width=8", checkpoint_config={"width": 2})
    assert built.inputs[0].shape == (1, 8)
    assert build_architecture("own_code:Scaled", checkpoint_config={"width": 2}).inputs[0].shape == (1, 2)


def test_the_number_of_classes_is_taken_from_the_checkpoints_head() -> None:
    trained = build_architecture(f"{MOBILENET}?num_classes=10").module.state_dict()
    built = build_architecture(MOBILENET, shapes={name: tuple(value.shape) for name, value in trained.items()})
    built.weights_module.load_state_dict(trained)
    assert built.notes == ("num_classes=10: taken from the head's shape in the checkpoint",)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"features.0.0.weight": (32, 1, 3, 3)},
        {"classifier.1.weight": (10, 1280), "features.0.1.weight": (16,)},
        {"classifier.1.weight": (10, 640)},
    ],
)
def test_any_other_misfit_is_left_for_the_loader_to_tell(changed: dict[str, tuple[int, ...]]) -> None:
    own = build_architecture(MOBILENET).module.state_dict()
    shapes = {name: tuple(value.shape) for name, value in own.items()} | changed
    assert build_architecture(MOBILENET, shapes=shapes).notes == ()


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("timm:deit_smal_patch16_224", "timm has no 'deit_smal_patch16_224' (did you mean 'deit", "it has"),
        ("torchvision:mobilenetv2", "did you mean 'mobilenet_v2'?", "it has"),
        ("ultralytics:yolov99n.yaml", "ultralytics has no 'yolov99n.yaml'", "yolov8n.yaml"),
        ("timm:test_vit?num_clases=3", "test_vit cannot be built with num_clases=3", "keyword arguments"),
        ("torchvision:maskrcnn_resnet50_fpn?weights_backbone=None", "nothing tells what", "--input"),
        ("own_code:Scaledd", "own_code has no 'Scaledd' (did you mean 'Scaled'?)", "it has"),
        ("own_code:TellsNothing", "nothing tells what own_code:TellsNothing takes", "--input"),
        ("own_code:not_a_module", "own_code:not_a_module returns a int", "returns a module"),
        ("no_such_package.models:net", "there is no module 'no_such_package'", "timm, torchvision, hf"),
    ],
)
def test_what_cannot_be_built_is_a_clear_error(spec: str, message: str, hint: str) -> None:
    with pytest.raises(GpusqError, match=re.escape(message)) as caught:
        build_architecture(spec)
    assert hint in caught.value.hint


def test_an_input_that_the_model_lacks_is_an_error_with_those_it_has() -> None:
    with pytest.raises(GpusqError, match="has no input 'pixels'") as caught:
        build_architecture(MOBILENET, inputs=[Input("pixels", (1, 3, 224, 224))])
    assert "image" in caught.value.hint


def test_example_inputs_that_no_graph_takes_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Scaled()
    module.example_inputs = {"x": 3}  # type: ignore[dict-item]
    monkeypatch.setattr(sys.modules["own_code"], "given", lambda: module, raising=False)
    with pytest.raises(GpusqError, match="'x' is no tensor"):
        build_architecture("own_code:given")


def test_a_missing_package_is_an_error_with_its_extra() -> None:
    with pytest.raises(GpusqError, match="timm:vit needs package_that_is_not_there") as caught:
        require("package_that_is_not_there", "timm", "timm:vit")
    assert caught.value.hint == "pip install 'gpusq[timm]'"


@pytest.mark.parametrize("error", ["RuntimeError", "ImportError", "OSError"])
def test_a_library_that_is_there_but_does_not_import_is_an_error_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    (tmp_path / "broken_library.py").write_text(f"raise {error}('operator torchvision::nms does not exist\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        GpusqError, match=r"needs broken_library, .*: operator torchvision::nms does not exist$"
    ) as caught:
        require("broken_library", "timm", "timm:x")
    assert "same build as torch" in caught.value.hint
