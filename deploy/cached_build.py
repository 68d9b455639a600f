"""Build engines, or take those that were built before of the same model, for the same device, by the same runtimes."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy import build as building
from deploy.build import BuildResult
from deploy.build_options import BuildOptions
from deploy.cache import Cache
from deploy.cache_key import Key
from deploy.device_engine import Via, build_on_device
from deploy.manifest import MODEL_FILE
from deploy.progress import Progress
from deploy.stages import build_key
from profiles.device import Device

_NAME = "NAME-OF-THE-BUNDLE"  # in what is kept, for the name that differs from folder to folder


@dataclasses.dataclass(frozen=True)
class CachedBuild:
    """Builds with what was built before.

    Attributes:
        label: the bundle or the model, in what the cache explains.
        device: the profile.
        options: what is asked of the builders.
        cache: where builds are kept.
        progress: is told what goes on.
        via: what builds TensorRT's engine on the device; what trtexec builds is not kept, its version being unknown.
    """

    label: str
    device: Device
    options: BuildOptions
    cache: Cache
    progress: Progress
    via: Via = "python"

    def everything(self, folder: Path, *, name: str | Sequence[str], model: Path | None = None) -> BuildResult:
        """Build every engine that this host can, into `folder`, as `deploy.build.build` does.

        Args:
            folder: for the engines.
            name: what is to be built, in the command that the user is told to run on the device.
            model: the ONNX file; by default `model.onnx` in the folder.
        """
        model = model or folder / MODEL_FILE

        def make() -> BuildResult:
            return building.build(folder, self.device, name=_NAME, options=self.options, model=model, via=self.via)

        built = self._fetch(build_key(model, self.device, self.options), folder, make)
        words = name if isinstance(name, str) else shlex.join(name)
        missing = (one.model_copy(update={"how": one.how.replace(_NAME, words)}) for one in built.missing)
        return dataclasses.replace(built, missing=tuple(missing))

    def on_device(self, bundle: Path) -> BuildResult:
        """Build TensorRT's engine alone, as `deploy.device_engine.build_on_device` does, into the folder `bundle`."""

        def make() -> BuildResult:
            engine, plan = build_on_device(bundle, self.device, self.options, via=self.via)
            return BuildResult((engine,), (), plan)

        whole = build_key(bundle / MODEL_FILE, self.device, self.options)
        return self._fetch(Key(whole.stage, {**whole.parts, "engines": "TensorRT's alone"}), bundle, make)

    def _fetch(self, key: Key, folder: Path, make: Callable[[], BuildResult]) -> BuildResult:
        def working() -> BuildResult:
            with self.progress.working(f"building for {self.device.title}"):
                return make()

        if self.via == "trtexec":
            self.cache.note(key, self.label, "what trtexec builds is not kept: its version is not known before")
            return working()
        return self.cache.fetch(key, folder, working, BuildResult, bundle=self.label)
