from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from calibration.first_layer import doubts
from calibration.rows import all_of
from calibration.samples import load_samples
from exporters.checkpoint import LoadOptions, load_student
from exporters.sample_facts import sample_facts
from exporters.student import Student, sample_specs
from tests.calibration.test_preprocessing import ROUNDING, photo_paths, photos


def student_of(path: Path, model: str) -> Student:
    return load_student(path, LoadOptions(model=model))


@pytest.fixture(scope="module")
def deit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    timm = importlib.import_module("timm")
    path = tmp_path_factory.mktemp("deit") / "deit.pth"
    torch.save(timm.create_model("deit_tiny_patch16_224", depth=1, num_classes=10).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def folder_of_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, path in enumerate(photo_paths()):
        (folder / f"{number}.jpg").symlink_to(path)
    return folder


def test_timms_config_makes_of_photos_what_timm_makes(deit: Path, folder_of_photos: Path) -> None:
    data = importlib.import_module("timm.data")
    student = student_of(deit, "timm:deit_tiny_patch16_224?depth=1")
    facts = sample_facts(student, deit)
    assert facts.origin == "timm's config of deit_tiny_patch16_224.fb_in1k"
    samples = load_samples(folder_of_photos, sample_specs(student), facts)
    theirs = data.create_transform(**data.resolve_data_config({}, model=student.module))  # type: ignore[attr-defined]
    expected = np.stack([theirs(photo).numpy() for photo in photos()])
    assert np.abs(all_of(samples.inputs["image"]) - expected).max() <= ROUNDING


def test_a_config_beside_the_checkpoint_comes_first(deit: Path, tmp_path: Path) -> None:
    (tmp_path / "deit.pth").symlink_to(deit)
    stored = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 224, 224], "crop_pct": 0.9}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": stored}))
    student = student_of(tmp_path / "deit.pth", "timm:deit_tiny_patch16_224?depth=1")
    facts = sample_facts(student, tmp_path / "deit.pth")
    assert facts.preprocessing is not None
    assert facts.preprocessing.mean == (0.5, 0.5, 0.5)
    transformers = importlib.import_module("transformers")
    transformers.CLIPImageProcessor().save_pretrained(tmp_path)
    facts = sample_facts(student, tmp_path / "deit.pth")
    assert (facts.origin, facts.preprocessing and facts.preprocessing.resize) == ("preprocessor_config.json", 224)


def test_a_config_that_asks_for_more_is_told_when_images_are_given(deit: Path, tmp_path: Path) -> None:
    (tmp_path / "deit.pth").symlink_to(deit)
    importlib.import_module("transformers").DetrImageProcessor().save_pretrained(tmp_path)
    facts = sample_facts(student_of(tmp_path / "deit.pth", "timm:deit_tiny_patch16_224?depth=1"), tmp_path / "deit.pth")
    assert facts.preprocessing is None
    assert "asks for do_pad" in facts.refused


def test_transformers_folder(tmp_path: Path) -> None:
    transformers = importlib.import_module("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    student = load_student(tmp_path)
    facts = sample_facts(student, tmp_path)
    assert facts.origin == "preprocessor_config.json"
    assert facts.preprocessing is not None
    assert facts.preprocessing.output_size == (32, 32)
    assert facts.tokenizer == tmp_path


def test_torchvision_and_its_first_layer(tmp_path: Path) -> None:
    models = importlib.import_module("torchvision.models")
    module = models.mobilenet_v2(weights=None)
    module.features[0][1].running_var.fill_(2.0)
    torch.save(module.state_dict(), tmp_path / "mobilenet.pth")
    student = student_of(tmp_path / "mobilenet.pth", "torchvision:mobilenet_v2")
    facts = sample_facts(student, tmp_path / "mobilenet.pth")
    assert facts.preprocessing is not None
    assert (facts.preprocessing.resize, facts.preprocessing.output_size) == (232, (224, 224))
    assert facts.first_layer is not None
    assert facts.first_layer.weight.shape == (32, 3, 3, 3)
    assert facts.first_layer.variance.tolist() == [2.0] * 32


def test_grey_students_of_timm(tmp_path: Path) -> None:
    timm = importlib.import_module("timm")
    torch.save(timm.create_model("resnet18", in_chans=1).state_dict(), tmp_path / "grey.pth")
    facts = sample_facts(student_of(tmp_path / "grey.pth", "timm:resnet18?in_chans=1"), tmp_path / "grey.pth")
    assert facts.preprocessing is not None
    assert facts.preprocessing.channels == 1
    assert facts.preprocessing.mean == pytest.approx((0.449,))
    assert facts.first_layer is None  # its statistics are those of a fresh module


def test_an_ultralytics_model_takes_a_letter_box(folder_of_photos: Path, tmp_path: Path) -> None:
    tasks = importlib.import_module("ultralytics.nn.tasks")
    augment = importlib.import_module("ultralytics.data.augment")
    torch.save(tasks.DetectionModel("yolov8n.yaml", verbose=False).state_dict(), tmp_path / "yolo.pth")
    student = student_of(tmp_path / "yolo.pth", "ultralytics:yolov8n.yaml")
    facts = sample_facts(student, tmp_path / "yolo.pth")
    found = all_of(load_samples(folder_of_photos, sample_specs(student), facts).inputs["images"])
    for image, photo in zip(found, photos(), strict=True):
        theirs = augment.LetterBox((640, 640), auto=False)(image=np.asarray(photo)).transpose(2, 0, 1) / 255
        # Its OpenCV resizes without a filter before, so edges differ; borders and averages do not.
        border = (theirs == 114 / 255).all(axis=(0, 2))[:, None] | (theirs == 114 / 255).all(axis=(0, 1))
        assert border.any()
        assert np.abs(image - theirs)[:, border].max() <= ROUNDING
        assert np.abs(image.mean(axis=(1, 2)) - theirs.mean(axis=(1, 2))).max() <= 1 / 255


GRAPH = """
<ir_version: 10, opset_import: ["": 20]>
g (float[N, 3, 8, 8] image) => (float[N, 2, 6, 6] y)
{
    c = Conv (image, w)
    y = BatchNormalization (c, one, one, one, v)
}
"""


def graph(variance: float) -> ir.Model:
    model = ir.from_onnx_text(GRAPH)
    weight = np.random.default_rng(0).standard_normal((2, 3, 3, 3), np.float32)
    constants = {"w": weight, "one": np.ones(2, np.float32), "v": np.full(2, variance, np.float32)}
    for value in {value for node in model.graph for value in node.inputs if value is not None}:
        if value.name in constants:
            value.const_value = ir.tensor(constants[value.name], name=value.name)
            model.graph.initializers.add(value)
    return model


def test_an_onnx_file_tells_what_its_first_layer_was_trained_on(tmp_path: Path) -> None:
    ir.save(graph(27.0), tmp_path / "model.onnx")
    facts = sample_facts(load_student(tmp_path / "model.onnx"), tmp_path / "model.onnx")
    assert facts.preprocessing is None
    assert facts.first_layer is not None
    images = np.random.default_rng(1).standard_normal((40, 3, 8, 8), np.float32)
    assert doubts(facts.first_layer, {"image": images}) == ()
    assert doubts(facts.first_layer, {"image": images * 255}) != ()


def test_an_untrained_normalization_tells_nothing(tmp_path: Path) -> None:
    ir.save(graph(1.0), tmp_path / "model.onnx")
    assert sample_facts(load_student(tmp_path / "model.onnx"), tmp_path / "model.onnx").first_layer is None
