"""Excerpts of logs that people posted, one for each wording."""

from __future__ import annotations

import pytest

from deploy.build_log import BuildLog, read_build_log
from deploy.sparsity_log import SparseChoice

SILENT = SparseChoice(None, None)

# https://github.com/NVIDIA-AI-IOT/jetson_dla_tutorial/issues/3 (trtexec --useDLACore=0 --allowGPUFallback, 2024)
DLA = """\
[W] [TRT] Layer '/model.24/Constant_1_output_0' (CONSTANT): Unsupported on DLA. Switching this layer's device type to GPU.
[W] [TRT] Layer '(Unnamed Layer* 277) [Shuffle]' (SHUFFLE): Unsupported on DLA. Switching this layer's device type to GPU.
"""  # noqa: E501
# https://github.com/NVIDIA/TensorRT/issues/2318
DLA_DEFAULT = """\
[W] [TRT] Default DLA is enabled but layer Embedding matrix is not supported on DLA, falling back to GPU.
[W] [TRT] Default DLA is enabled but layer Gather in embedding is not supported on DLA, falling back to GPU.
"""
# https://github.com/lewes6369/TensorRT-Yolov3/issues/86
DLA_RUNNING = "WARNING: Default DLA is enabled but layer layer74-act is not running on DLA, falling back to GPU.\n"
# https://github.com/marcoslucianops/DeepStream-Yolo/issues/27
DLA_SUBGRAPHS = "WARNING: [TRT]: DLA supports only 8 subgraphs per DLA core. Switching to GPU for layer conv_6\n"
# https://github.com/onnx/tensorflow-onnx/issues/1632
DLA_TYPES = """\
[W] [TRT] DLA only supports FP16 and Int8 precision type. Switching (Unnamed Layer* 275) [Gather] device type to GPU.
"""
# https://github.com/NVIDIA/TensorRT/issues/1529: no fallback, an error
DLA_REFUSED = """\
[09/28/2021-15:56:23] [E] [TRT] Default DLA is enabled but layer 283 copy is not supported on DLA and falling back to GPU is not enabled.
"""  # noqa: E501
# https://github.com/ultralytics/ultralytics/issues/22271 (AGX Orin, 2025)
MEMORY = """\
[10/01/2025-08:26:34] [TRT] [W] UNSUPPORTED_STATE: Skipping tactic 33 due to insufficient memory on requested size of 629145600 detected for tactic 0xa5a46bfbd719d757.
[10/01/2025-08:26:34] [TRT] [W] Tactic Device request: 600MB Available: 302MB. Device memory is insufficient to use tactic.
[10/01/2025-08:26:34] [TRT] [W] UNSUPPORTED_STATE: Skipping tactic 34 due to insufficient memory on requested size of 629145600 detected for tactic 0x9d562342491490bf.
"""  # noqa: E501
# https://github.com/ultralytics/yolov5/issues/12248
MEMORY_OLD = "[10/18/2023-20:27:00] [TRT] [W] Skipping tactic 3 due to insuficient memory on requested size of 449 detected for tactic 4.\n"  # noqa: E501
# https://github.com/NVIDIA/TensorRT-LLM/issues/493
MEMORY_GLUED = "[11/28/2023-15:47:38] [TRT] [W] UNSUPPORTED_STATESkipping tactic 4 due to insufficient memory on requested size of 66048 detected for tactic 0x000000000000001f.\n"  # noqa: E501
# https://github.com/NVIDIA/TensorRT/issues/1403
SPARSE_OLD = """\
[TensorRT] INFO: (Sparsity) Layers eligible for sparse math: Conv_0
[TensorRT] INFO: (Sparsity) TRT inference plan picked sparse implementation for layers:
"""
# examples/sparse_quant_trt/README.md at dff1aa1a in NVIDIA/Model-Optimizer; the counts 39 and 0: a published build log
SPARSE = """\
(Sparsity) Found 39 layer(s) eligible to use sparse tactics
(Sparsity) Chose 0 layer(s) using sparse tactics
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (DLA, BuildLog(("/model.24/Constant_1_output_0", "(Unnamed Layer* 277) [Shuffle]"), 0, SILENT)),
        (DLA_DEFAULT, BuildLog(("Embedding matrix", "Gather in embedding"), 0, SILENT)),
        (DLA_RUNNING, BuildLog(("layer74-act",), 0, SILENT)),
        (DLA_SUBGRAPHS, BuildLog(("conv_6",), 0, SILENT)),
        (DLA_TYPES, BuildLog(("(Unnamed Layer* 275) [Gather]",), 0, SILENT)),
        (DLA_REFUSED, BuildLog((), 0, SILENT)),
        (MEMORY, BuildLog((), 2, SILENT)),
        (MEMORY_OLD, BuildLog((), 1, SILENT)),
        (MEMORY_GLUED, BuildLog((), 1, SILENT)),
        (SPARSE_OLD, BuildLog((), 0, SparseChoice(1, 0))),
        (SPARSE, BuildLog((), 0, SparseChoice(39, 0))),
        ("nothing", BuildLog((), 0, SILENT)),
    ],
)
def test_reads_every_wording(text: str, found: BuildLog) -> None:
    assert read_build_log(text.splitlines()) == found
    assert read_build_log([text]) == found, "a message may have several lines"


def test_a_layer_that_is_said_twice_is_one() -> None:
    assert read_build_log([DLA_RUNNING, DLA_RUNNING]).dla_fallbacks == ("layer74-act",)
