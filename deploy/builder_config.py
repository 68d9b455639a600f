"""Set build options on a builder's configuration, by what the module at hand has.

What it lacks is refused with a sentence. Three things are found by asking: an attribute or an enumerator that is not
there, a builder that knows no DLA, and a setter that says no. A fourth cannot be: TensorRT-RTX takes options and
builds the same bytes without them. Those are listed here, and a test compares the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deploy.build_options import BuildOptions, option_name
from profiles.errors import GpusqError

# The option that sets each flag of BuilderFlag.
FLAGS = {
    "sparse": "SPARSE_WEIGHTS",
    "gpu_fallback": "GPU_FALLBACK",
    "version_compatible": "VERSION_COMPATIBLE",
    "weight_streaming": "WEIGHT_STREAMING",
    "refit": "REFIT",
}
LEVELS = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}
TILINGS = {"none": "NONE", "fast": "FAST", "moderate": "MODERATE", "full": "FULL"}
_BYTES_PER_MIB = 1 << 20
# tensorrt_rtx 1.7.1.116, compiling for SM80 without a GPU: the bytes do not change (the first three), the builder
# looks for a library that the package does not have, or it asks for a GPU.
RTX = "tensorrt_rtx"
WITHOUT_EFFECT = ("optimization_level", "tiling", "hardware_compatibility")
_RTX_LACKS = {
    **dict.fromkeys(WITHOUT_EFFECT, "takes it and does nothing with it"),
    "version_compatible": "has no lean runtime to put into the engine",
    "refit": "compiles no refittable engine without a GPU",
}


def configure(api: Any, builder: Any, network: Any, config: Any, options: BuildOptions) -> None:
    """Set `options` on `config`, and always: detailed profiling, and no TF32, so that float32 means float32.

    Args:
        api: the module, `tensorrt` or `tensorrt_rtx`.
        builder: its Builder.
        network: what is to be built.
        config: the builder's IBuilderConfig.
        options: what is asked.

    Raises:
        GpusqError: this module, or this device, lacks one of them.
    """
    for sentence in lacking(api, builder, network, options):
        raise GpusqError(sentence, hint="leave the option out, or build on a device and version that has it")
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    config.clear_flag(api.BuilderFlag.TF32)
    for option, flag in FLAGS.items():
        if getattr(options, option):
            config.set_flag(getattr(api.BuilderFlag, flag))
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, options.workspace_mib * _BYTES_PER_MIB)
    if options.tiling is not None:
        config.tiling_optimization_level = getattr(api.TilingOptimizationLevel, TILINGS[options.tiling])
    if options.hardware_compatibility != "none":
        level = LEVELS[options.hardware_compatibility]
        config.hardware_compatibility_level = getattr(api.HardwareCompatibilityLevel, level)
    if options.dla_core is not None:
        config.default_device_type = api.DeviceType.DLA
        config.DLA_core = options.dla_core


def lacking(api: Any, builder: Any, network: Any, options: BuildOptions) -> Iterator[str]:
    """One sentence for each option that cannot be had."""
    said = f"{api.__name__} {api.__version__}"
    if api.__name__ == RTX:
        for option in options.asked().keys() & _RTX_LACKS.keys():
            yield f"{said} {_RTX_LACKS[option]}: {option_name(option)}"
    for option, flag in FLAGS.items():
        if getattr(options, option) and not hasattr(api.BuilderFlag, flag):
            yield f"{said} has no {flag}: {option_name(option)}"
    if options.tiling is not None and not hasattr(api, "TilingOptimizationLevel"):
        yield f"{said} has no tiling: {option_name('tiling')}"
    level = LEVELS[options.hardware_compatibility]
    if level != "NONE" and not hasattr(api.HardwareCompatibilityLevel, level):
        yield f"{said} has no {level}: {option_name('hardware_compatibility')}"
    if options.dla_core is not None:
        yield from _lacking_on_dla(said, builder, network, options.dla_core)


def _lacking_on_dla(said: str, builder: Any, network: Any, core: int) -> Iterator[str]:
    cores = builder.num_DLA_cores
    if core >= cores:
        has = f"sees {cores} DLA cores, not number {core}" if cores else "drives no DLA on this device"
        yield f"{said} {has}: {option_name('dla_core')}"
    dynamic = [tensor for tensor in map(network.get_input, range(network.num_inputs)) if -1 in tuple(tensor.shape)]
    if dynamic:
        yield f"the DLA takes no dynamic axis, and input '{dynamic[0].name}' has one: {option_name('dla_core')}"
