from __future__ import annotations

import json
from typing import Any

import pytest

from deploy.inspector import read_inspector
from profiles.errors import GpusqError

# Shortened from https://github.com/NVIDIA/TensorRT/issues/4020: trtexec 10, ResNet-18, INT8, --sparsity=force. The
# weights would do for a sparse kernel; the tactic that was taken is a dense one.
DENSE = """
{"Layers": [{
  "Name": "Reformatting CopyNode for Input Tensor 0 to resnetv15_conv0_fwd",
  "LayerType": "Reformat",
  "Inputs": [{"Name": "data", "Location": "Device", "Dimensions": [1,3,224,224],
              "Format/Datatype": "Row major linear FP32"}],
  "Outputs": [{"Name": "Reformatted Input Tensor 0", "Location": "Device", "Dimensions": [1,3,224,224],
               "Format/Datatype": "Row major Int8 format"}],
  "ParameterType": "Reformat", "Origin": "REFORMAT", "TacticValue": "0x00000000000003e8", "StreamId": 0, "Metadata": ""
},{
  "Name": "resnetv15_stage3_conv0_fwd + resnetv15_stage3_batchnorm0_fwd + resnetv15_stage3_relu0_fwd",
  "LayerType": "CaskConvolution",
  "Inputs": [{"Name": "resnetv15_stage2_activation1", "Location": "Device", "Dimensions": [1,128,28,28],
              "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
  "Outputs": [{"Name": "resnetv15_stage3_relu0_fwd", "Location": "Device", "Dimensions": [1,256,14,14],
               "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
  "ParameterType": "Convolution", "Kernel": [3,3], "OutMaps": 256, "Groups": 1,
  "Weights": {"Type": "Int8", "Count": 294912}, "Bias": {"Type": "Float", "Count": 256}, "HasSparseWeights": 1,
  "Activation": "RELU",
  "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_tensor16x8x32",
  "TacticValue": "0x4749124f62d8bd23", "StreamId": 0,
  "Metadata": "[ONNX Layer: resnetv15_stage3_conv0_fwd]\\u001e[ONNX Layer: resnetv15_stage3_relu0_fwd]"
}], "Bindings": ["data"]}
"""


def layer(**fields: Any) -> str:
    return json.dumps({"Layers": [{"Name": "k", "LayerType": "gemm", "Inputs": [], "Outputs": [], **fields}]})


def test_reads_types_weights_and_nodes_of_a_convolution() -> None:
    reformat, convolution = read_inspector(DENSE)
    assert (reformat.kind, reformat.inputs[0].dtype, reformat.outputs[0].dtype) == ("pointwise", "Float", "Int8")
    assert convolution.kind == "convolution"
    assert convolution.operands == ("Int8", "Int8")
    assert convolution.nodes == ("resnetv15_stage3_conv0_fwd", "resnetv15_stage3_relu0_fwd")


def test_weights_that_would_do_are_no_sparse_kernel() -> None:
    assert not read_inspector(DENSE)[1].sparse


@pytest.mark.parametrize(
    "tactic",
    [
        # named by cuSPARSELt's users on GitHub, and in the facts about TensorRT's own engines
        "sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tt_t_tilesize128x128x64_stage3_warpsize2x2x1_sptensor16x8x32_execute",
        "sm80_xmma_sparse_gemm_i8i8_i8i32_f32_tn_n_tilesize128x64x128_stage4_warpsize2x2x1_sptensor16x8x64_execute",
        "sm80_xmma_fprop_sparse_conv_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_sptensor16x8x64",
    ],
)
def test_sparse_kernels_are_known_by_their_tactics_name(tactic: str) -> None:
    assert read_inspector(layer(TacticName=tactic))[0].sparse


def test_a_module_that_is_called_sparse_is_no_sparse_kernel() -> None:
    assert not read_inspector(layer(Name="my_sparse_attention/MatMul", TacticName="sm80_xmma_gemm"))[0].sparse


@pytest.mark.parametrize(
    ("name", "layer_type", "kind"),
    [
        ("_gemm_mha_v2_myl3_6", "kgen", "attention"),
        ("__myl_TranReshMove_myl3_5", "kgen", "pointwise"),
        ("fc", "CaskGemmMatrixMultiply", "gemm"),
        ("pool", "CaskPooling", "pooling"),
        ("{ForeignNode[conv1...relu]}", "DLA", "dla"),
        ("up", "CaskDeconvolutionV2", "convolution"),
    ],
)
def test_kinds(name: str, layer_type: str, kind: str) -> None:
    assert read_inspector(layer(Name=name, LayerType=layer_type))[0].kind == kind


def test_what_is_no_kernel_is_left_out() -> None:
    assert read_inspector(layer(LayerType="NoOp")) == ()


@pytest.mark.parametrize(
    "said", ["Half", "Row major linear FP16 format", "Channel major FP16 format where channel % 16 == 0"]
)
def test_words_for_one_type(said: str) -> None:
    assert (
        read_inspector(layer(Inputs=[{"Name": "x", "Dimensions": [1, 2], "Format/Datatype": said}]))[0].inputs[0].dtype
        == "Half"
    )


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"Layers": ["conv1 + relu"], "Bindings": []}'])
def test_anything_else_is_one_error_that_names_the_cure(text: str) -> None:
    with pytest.raises(GpusqError) as caught:
        read_inspector(text)
    assert "profilingVerbosity=detailed" in caught.value.hint
