"""A decoder such as Llama-2 7B, made on the spot: the graph that our exporter writes for it, weights in a sparse file.

The file is as long as the weights and takes no room on the disk: all of them are zeros. The mask is written in fewer
operators than transformers does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx_ir as ir

from exporters.module_names import MODULE_KEY

BYTES = {"float": 4, "float16": 2}


@dataclass(frozen=True)
class Decoder:
    """The sizes of Llama-2 7B, and the type of its weights as ONNX text names it: 6.74 billion parameters."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    hidden: int = 11008
    vocabulary: int = 32000
    dtype: str = "float"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights by name, in the order of the file."""
        width, hidden = self.width, self.hidden
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, width)}
        for layer in range(self.layers):
            block = f"model.layers.{layer}"
            shapes |= {f"{block}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
            shapes |= {f"{block}.mlp.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
            shapes |= {f"{block}.mlp.down_proj.weight": (hidden, width)}
            shapes |= {f"{block}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        return shapes | {"model.norm.weight": (width,), "lm_head.weight": (width, self.vocabulary)}

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes that they take."""
        return self.parameters * BYTES[self.dtype]

    def save(self, folder: Path) -> Path:
        """Write `decoder.onnx` and its sparse `decoder.data` into `folder`; return the graph's path."""
        with (folder / "decoder.data").open("wb") as file:
            file.truncate(self.weight_bytes)
        model = ir.from_onnx_text(_text(self))
        for node in model.graph:
            module, _, _ = (node.name or "").partition("/")
            if module:
                node.metadata_props[MODULE_KEY] = module
        ir.save(model, folder / "decoder.onnx")
        return folder / "decoder.onnx"


def _text(decoder: Decoder) -> str:
    t, head = decoder.dtype, decoder.width // decoder.heads
    cache = f"{t}[B, {decoder.heads}, P, {head}]"
    longer = f"{t}[B, {decoder.heads}, T, {head}]"
    past = [f"{cache} past.{layer}.{name}" for layer in range(decoder.layers) for name in ("key", "value")]
    present = [f"{longer} present.{layer}.{name}" for layer in range(decoder.layers) for name in ("key", "value")]
    frequencies = ", ".join(str(10000 ** (-2 * index / head)) for index in range(head // 2))
    known = [*_weights(decoder), *_CONSTANTS, *_values(decoder, head)]
    known += [f"int64[1] head = {{{head}}}", f"float[{head // 2}] inv_freq = {{{frequencies}}}"]
    nodes = [_START, *(_layer(layer, decoder.heads, head) for layer in range(decoder.layers)), _end(decoder.layers)]
    text = f"""
        <ir_version: 10, opset_import: ["": 23]>
        decoder (int64[B, S] input_ids, int64[B, T] attention_mask, int64[B, S] position_ids, {", ".join(past)})
            => ({t}[B, S, {decoder.vocabulary}] logits, {", ".join(present)})
        <{", ".join(known)}>
        {{ {" ".join(nodes).replace("FLOAT", str(int(_FLOATS[t])))} }}
    """
    return _DOTTED.sub(r'"\g<0>"', text)


_DOTTED = re.compile(r'(?<!")\b[a-z]\w*(?:[./]\w+)+')  # names that ONNX text wants in quotes
_FLOATS = {"float": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}
_CONSTANTS = (
    "int64[1] minus_one = {-1}",
    "int64[1] two = {2}",
    "int64[2] batch_and_head = {1, 2}",
    "int64 zero = {0}",
    "int64 one = {1}",
)
_START = """
    [model.embed_tokens/Gather] h.0 = Gather<axis = 0>(model.embed_tokens.weight, input_ids)
    [b] batch = Shape<start = 0, end = 1>(input_ids)
    [s] length = Shape<start = 1, end = 2>(input_ids)
    [p] past_length = Shape<start = 2, end = 3>(past.0.key)
    [model/Squeeze] past_scalar = Squeeze(past_length)
    [model/Squeeze_2] length_scalar = Squeeze(length)
    [model/Add] total = Add(past_scalar, length_scalar)
    [model/Range] keys = Range(zero, total, one)
    [model/Range_2] queries = Range(past_scalar, total, one)
    [model/Unsqueeze] queries_column = Unsqueeze(queries, minus_one)
    [model/LessOrEqual] causal = LessOrEqual(keys, queries_column)
    [model/Cast] kept = Cast<to = 9>(attention_mask)
    [model/Unsqueeze_2] kept_keys = Unsqueeze(kept, batch_and_head)
    [model/And] mask = And(causal, kept_keys)
    [model/Concat] to_heads = Concat<axis = 0>(batch, length, minus_one, head)
    [model/Concat_2] to_width = Concat<axis = 0>(batch, length, minus_one)
    [model.rotary_emb/Unsqueeze] positions = Unsqueeze(position_ids, two)
    [model.rotary_emb/Cast] angle_positions = Cast<to = 1>(positions)
    [model.rotary_emb/Mul] angles = Mul(angle_positions, inv_freq)
    [model.rotary_emb/Cos] cos_wide = Cos(angles)
    [model.rotary_emb/Sin] sin_wide = Sin(angles)
    [model.rotary_emb/Cast_2] cos = Cast<to = FLOAT>(cos_wide)
    [model.rotary_emb/Cast_3] sin = Cast<to = FLOAT>(sin_wide)
"""


def _weights(decoder: Decoder) -> Iterator[str]:
    offset = 0
    for name, shape in decoder.shapes.items():
        length = prod(shape) * BYTES[decoder.dtype]
        where = f'"location": "decoder.data", "offset": "{offset}", "length": "{length}"'
        yield f"{decoder.dtype}[{', '.join(map(str, shape))}] {name} = [{where}]"
        offset += length


def _values(decoder: Decoder, head: int) -> Iterator[str]:
    """The types of what the nodes make, as the exporter declares them."""
    t = decoder.dtype
    wide, tall = f"{t}[B, S, {decoder.width}]", f"{t}[B, S, {decoder.hidden}]"
    by_token, by_head = f"{t}[B, S, {decoder.heads}, {head}]", f"{t}[B, {decoder.heads}, S, {head}]"
    yield "int64[B, S, 1] positions, bool[B, T] kept, bool[B, 1, 1, T] kept_keys, bool[B, 1, S, T] mask"
    yield f"float[B, S, 1] angle_positions, float[B, S, {head // 2}] angles, {wide} h.0, {wide} normal"
    yield from (f"float[B, S, {head // 2}] {name}_wide, {t}[B, S, {head // 2}] {name}" for name in ("cos", "sin"))
    for layer in range(decoder.layers):
        kinds = {wide: "n q k v w o m d", by_token: "qs ks vs at", by_head: "qt kt vt qr kr a", tall: "g sg si u gu"}
        yield from (f"{kind} {name}.{layer}" for kind, names in kinds.items() for name in names.split())
        yield f"{wide} h.{layer + 1}"


def _layer(layer: int, heads: int, head: int) -> str:
    block, attn, i = f"model.layers.{layer}", f"model.layers.{layer}.self_attn", layer
    projections = "\n".join(
        f"""[{attn}.{x}_proj/MatMul] {x}.{i} = MatMul(n.{i}, {attn}.{x}_proj.weight)
        [{attn}/Reshape_{x}] {x}s.{i} = Reshape({x}.{i}, to_heads)
        [{attn}/Transpose_{x}] {x}t.{i} = Transpose<perm = [0, 2, 1, 3]>({x}s.{i})"""
        for x in "qkv"
    )
    return f"""
        [{block}.input_layernorm/N] n.{i} = RMSNormalization<axis = -1, epsilon = 1e-6>({_norm(i, "input")})
        {projections}
        [{attn}/Rotary_q] qr.{i} = RotaryEmbedding<interleaved = 0, num_heads = {heads}>(qt.{i}, cos, sin)
        [{attn}/Rotary_k] kr.{i} = RotaryEmbedding<interleaved = 0, num_heads = {heads}>(kt.{i}, cos, sin)
        [{attn}/Concat_k] present.{i}.key = Concat<axis = -2>(past.{i}.key, kr.{i})
        [{attn}/Concat_v] present.{i}.value = Concat<axis = -2>(past.{i}.value, vt.{i})
        [{attn}/Attention] a.{i} = Attention<scale = {head**-0.5}>(qr.{i}, present.{i}.key, present.{i}.value, mask)
        [{attn}/Transpose] at.{i} = Transpose<perm = [0, 2, 1, 3]>(a.{i})
        [{attn}/Reshape] w.{i} = Reshape(at.{i}, to_width)
        [{attn}.o_proj/MatMul] o.{i} = MatMul(w.{i}, {attn}.o_proj.weight)
        [{block}/Add] m.{i} = Add(h.{i}, o.{i})
        [{block}.post_attention_layernorm/N] d.{i} = RMSNormalization<axis = -1, epsilon = 1e-6>(
            m.{i}, {block}.post_attention_layernorm.weight)
        [{block}.mlp.gate_proj/MatMul] g.{i} = MatMul(d.{i}, {block}.mlp.gate_proj.weight)
        [{block}.mlp.act_fn/Sigmoid] sg.{i} = Sigmoid(g.{i})
        [{block}.mlp.act_fn/Mul] si.{i} = Mul(g.{i}, sg.{i})
        [{block}.mlp.up_proj/MatMul] u.{i} = MatMul(d.{i}, {block}.mlp.up_proj.weight)
        [{block}.mlp/Mul] gu.{i} = Mul(si.{i}, u.{i})
        [{block}.mlp.down_proj/MatMul] f.{i} = MatMul(gu.{i}, {block}.mlp.down_proj.weight)
        [{block}/Add_2] h.{i + 1} = Add(m.{i}, f.{i})
    """


def _norm(layer: int, which: str) -> str:
    return f"h.{layer}, model.layers.{layer}.{which}_layernorm.weight"


def _end(layers: int) -> str:
    return f"""
        [model.norm/N] normal = RMSNormalization<axis = -1, epsilon = 1e-6>(h.{layers}, model.norm.weight)
        [lm_head/MatMul] logits = MatMul(normal, lm_head.weight)
    """
