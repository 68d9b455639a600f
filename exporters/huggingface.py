"""Hugging Face models as modules that take and return tensors, from their config alone or with their weights.

A model returns a ModelOutput; around it stands a wrapper of a few lines whose attribute `model` is the model, so that
names stay those of the checkpoint once the root is left out. One folder may hold several networks, each a `#part`:

    causal language model          input_ids, attention_mask, position_ids, past_key_values.N.key/value
                                   → logits, present.N.key/value
    encoder–decoder, #encoder      its main input (and attention_mask) → last_hidden_state
    encoder–decoder, #decoder      decoder_input_ids, encoder_hidden_states, encoder_attention_mask → logits
    two towers, #text and #vision  → text_embeds, image_embeds
    any other                      its main input by name → the outputs of its head
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exporters.architecture import Architecture, resolve_inputs
from exporters.signature import Input
from profiles.errors import GpusqError

ROOT = "model"
_TOKENS, _PAST = 16, 16  # length of the example where the config tells none
_OF_THE_BODY = (
    "last_hidden_state",
    "hidden_states",
    "attentions",
    "past_key_values",
    "loss",
    "reshaped_hidden_states",
)
_OF_TRAINING = ("enc_", "intermediate_", "init_reference_points", "auxiliary_")  # what only DETR's losses read


class _Named(nn.Module):
    """Takes tensors in order, gives them to the model by name, returns the named outputs."""

    def __init__(self, model: nn.Module, names: Sequence[str], outputs: Sequence[str] = ()) -> None:
        super().__init__()
        self.model, self.names, self.outputs = model, tuple(names), tuple(outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.run(dict(zip(self.names, inputs, strict=True)))
        return tuple(found[name] for name in self.outputs)

    def run(self, named: dict[str, Tensor]) -> Mapping[str, Any]:
        """The model's own answer."""
        found: Mapping[str, Any] = self.model(**named, return_dict=True)
        return found


class _Decoder(_Named):
    """A causal language model whose cache comes and goes as flat tensors."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        first, past = inputs[:3], inputs[3:]
        cache: Any = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        named = dict(zip(self.names[:3], first, strict=True))
        found = self.model(**named, past_key_values=cache, use_cache=True, return_dict=True)
        return (found.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


class _Encoder(_Named):
    def run(self, named: dict[str, Tensor]) -> Mapping[str, Any]:
        model: Any = self.model
        found: Mapping[str, Any] = model.get_encoder()(**named, return_dict=True)
        return found


class _EncoderDecoder(_Named):
    """The decoder and the head of an encoder–decoder, given what the encoder found."""

    def run(self, named: dict[str, Tensor]) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.model(
            encoder_outputs=(named["encoder_hidden_states"],),
            attention_mask=named.get("encoder_attention_mask"),
            decoder_input_ids=named["decoder_input_ids"],
            use_cache=False,
            return_dict=True,
        )
        return found


class _Tower(_Named):
    def run(self, named: dict[str, Tensor]) -> Mapping[str, Any]:
        (output,) = self.outputs
        model: Any = self.model
        found = (model.get_text_features if output == "text_embeds" else model.get_image_features)(**named)
        return {output: found if isinstance(found, Tensor) else found.pooler_output}


def architecture_from_config(
    directory: Path, part: str = "", keywords: Mapping[str, Any] | None = None, given: Sequence[Input] = ()
) -> Architecture:
    """The model that `directory`/config.json describes, without its weights; `keywords` change the config."""
    from transformers import initialization

    config = _config(directory, keywords or {})
    with initialization.no_init_weights():
        model = _model_class(config)._from_config(config, dtype=torch.float32)
    return wrap(model, part, given, directory)


def architecture_from_state(
    directory: Path, state: Mapping[str, Tensor], part: str = "", given: Sequence[Input] = ()
) -> Architecture:
    """The model that `directory`/config.json describes with the weights in `state`, in float32.

    The names in `state` may be those of older versions of transformers, which renamed modules since (the `query` of a
    ViT is now `q_proj`): transformers' own table translates them, and the graph has the new ones.

    Raises:
        GpusqError: a parameter of the model is missing in `state`, or has another shape.
    """
    config = _config(directory, {})
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain by now; transformers would quantize them again
    try:
        with _no_progress_bar():
            model, loading = _model_class(config).from_pretrained(
                None, config=config, state_dict=dict(state), dtype=torch.float32, output_loading_info=True
            )
    except (ValueError, RuntimeError) as error:
        raise GpusqError(
            f"the weights do not fit {directory / 'config.json'}: {_first_line(error)}",
            hint="the checkpoint belongs to another architecture",
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise GpusqError(
            f"{len(missing)} parameters of the model are not in the checkpoint, the first is {missing[0]!r}",
            hint="the checkpoint belongs to another architecture",
        )
    built = wrap(model, part, given, directory)
    if unused := sorted(loading["unexpected_keys"]):
        told = f"{len(unused)} tensors of the checkpoint have no place in the model, the first is {unused[0]!r}"
        return replace(built, notes=(*built.notes, told))
    return built


def wrap(model: nn.Module, part: str = "", given: Sequence[Input] = (), directory: Path | None = None) -> Architecture:
    """Stand the wrapper for `part` around `model`; `directory` may have the image's size in preprocessor_config.json.

    Raises:
        GpusqError: the model has no such part, or is one of several networks and no part was named.
    """
    config: Any = model.config
    parts = _parts(model)
    if part not in parts:
        raise _no_part(type(model).__name__, part, parts)
    what = type(model).__name__ + (f"#{part}" if part else "")
    wrapper, inferred, outputs = parts[part](model, config, directory)
    inputs = resolve_inputs(inferred, given, what)
    module = wrapper(model, [one.name for one in inputs], outputs)
    module.eval()
    if not outputs:
        module.outputs = outputs = _outputs_of(module, inputs)
    return Architecture(module, inputs, tuple(outputs), ROOT)


def _plain(model: nn.Module, config: Any, directory: Path | None) -> Any:
    main = str(getattr(model, "main_input_name", "input_ids"))
    return _Named, _main_inputs(main, config, directory, model), ()


def _decoder(model: nn.Module, config: Any, directory: Path | None) -> Any:
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sequence, past = {0: "batch", 1: "sequence"}, {0: "batch", 2: "past_sequence"}
    inputs = [
        Input("input_ids", (1, _TOKENS), "int64", sequence),
        Input("attention_mask", (1, _PAST + _TOKENS), "int64", {0: "batch", 1: "past_sequence + sequence"}),
        Input("position_ids", (1, _TOKENS), "int64", sequence),
    ]
    pairs = [f"{layer}.{kind}" for layer in range(text.num_hidden_layers) for kind in ("key", "value")]
    inputs += [Input(f"past_key_values.{pair}", (1, heads, _PAST, size), "float32", past) for pair in pairs]
    return _Decoder, inputs, ("logits", *(f"present.{pair}" for pair in pairs))


def _encoder(model: nn.Module, config: Any, directory: Path | None) -> Any:
    main = str(getattr(model, "main_input_name", "input_ids"))
    return _Encoder, _main_inputs(main, config, directory, model), ("last_hidden_state",)


def _encoder_decoder(model: nn.Module, config: Any, directory: Path | None) -> Any:
    width = getattr(config, "d_model", None) or config.hidden_size
    inputs = [Input("decoder_input_ids", (1, _TOKENS), "int64"), Input("encoder_hidden_states", (1, _TOKENS, width))]
    if getattr(model, "main_input_name", "") == "input_ids":
        inputs.append(Input("encoder_attention_mask", (1, _TOKENS), "int64"))
    else:
        length = getattr(config, "max_source_positions", _TOKENS)
        inputs[1] = replace(inputs[1], shape=(1, length, width))
    return _EncoderDecoder, inputs, ("logits",)


def _text_tower(model: nn.Module, config: Any, directory: Path | None) -> Any:
    return _Tower, _main_inputs("input_ids", config.text_config, directory, model), ("text_embeds",)


def _vision_tower(model: nn.Module, config: Any, directory: Path | None) -> Any:
    return _Tower, _main_inputs("pixel_values", config.vision_config, directory, model), ("image_embeds",)


def _parts(model: nn.Module) -> Mapping[str, Any]:
    config: Any = model.config
    if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        return {"text": _text_tower, "vision": _vision_tower}
    if getattr(config, "is_encoder_decoder", False) and hasattr(model, "prepare_inputs_for_generation"):
        return {"encoder": _encoder, "decoder": _encoder_decoder}
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return {"": _decoder}
    return {"": _plain}


def _main_inputs(main: str, config: Any, directory: Path | None, model: nn.Module) -> list[Input]:
    if main == "pixel_values":
        size = _image_size(config, directory)
        channels = getattr(config, "num_channels", 3)
        return [] if size is None else [Input(main, (1, channels, *size))]
    if main == "input_ids":
        length = min(_TOKENS, getattr(config, "max_position_embeddings", _TOKENS))
        names = ["input_ids", "attention_mask"]
        if getattr(config, "type_vocab_size", 0) > 1:
            names.append("token_type_ids")
        return [Input(name, (1, length), "int64") for name in names]
    if main == "input_features" and hasattr(config, "num_mel_bins"):
        # Whisper's encoder halves the length once.
        return [Input(main, (1, config.num_mel_bins, 2 * config.max_source_positions))]
    return []


def _image_size(config: Any, directory: Path | None) -> tuple[int, int] | None:
    """Height and width, by the preprocessor's file, else by the config."""
    size = _preprocessed_size(directory) or getattr(config, "image_size", None)
    if isinstance(size, int):
        return (size, size)
    return (int(size[0]), int(size[1])) if size else None


def _preprocessed_size(directory: Path | None) -> tuple[int, int] | None:
    path = None if directory is None else directory / "preprocessor_config.json"
    if path is None or not path.is_file():
        return None
    stored = json.loads(path.read_text())
    size = stored.get("crop_size") if stored.get("do_center_crop") else stored.get("size")
    if isinstance(size, int):
        return (size, size)
    return (size["height"], size["width"]) if isinstance(size, dict) and {"height", "width"} <= size.keys() else None


def _outputs_of(module: _Named, inputs: Sequence[Input]) -> tuple[str, ...]:
    """What the model returns for an example: the outputs of its head, or of its body where it has no head."""
    examples = {one.name: torch.ones(one.shape, dtype=getattr(torch, one.dtype)) for one in inputs}
    with torch.no_grad():
        tensors = [name for name, value in module.run(examples).items() if isinstance(value, Tensor)]
    head = [name for name in tensors if not name.endswith(_OF_THE_BODY) and not name.startswith(_OF_TRAINING)]
    body = [name for name in tensors if name in ("last_hidden_state", "pooler_output")]
    return tuple(body if not head or head == ["pooler_output"] else head)


def _config(directory: Path, keywords: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    if not (directory / "config.json").is_file():
        raise GpusqError(f"{directory} holds no config.json", hint="name the folder that save_pretrained wrote")
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **keywords)
    except (OSError, ValueError, KeyError) as error:
        raise GpusqError(
            f"{directory / 'config.json'} describes no model that transformers knows: {_first_line(error)}",
            hint="a checkpoint's own code is not run; name a factory of yours, --model package.module:factory",
        ) from error


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Without transformers' own, which it also writes where there is no terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _model_class(config: Any) -> Any:
    import transformers

    names = config.architectures or []
    found = next((cls for name in names if (cls := getattr(transformers, name, None)) is not None), None)
    if found is None:
        asked = f"architectures = {names}" if names else "no architectures"
        raise GpusqError(
            f"config.json names {asked}, which transformers does not have",
            hint="name a class of transformers, such as ViTForImageClassification, under 'architectures'",
        )
    return found


def _no_part(model: str, part: str, parts: Mapping[str, Any]) -> GpusqError:
    known = [f"#{name}" for name in parts if name]
    if not known:
        return GpusqError(f"{model} has no part {part!r}", hint="it is one network: leave out what follows '#'")
    asked = f"has no part {part!r}" if part else f"holds {len(known)} networks"
    return GpusqError(f"{model} {asked}", hint=f"export one at a time, with {' or '.join(known)} after the folder")


def _first_line(error: Exception) -> str:
    return next((line for line in map(str.strip, str(error).splitlines()) if line), type(error).__name__)
