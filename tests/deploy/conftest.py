from __future__ import annotations

from pathlib import Path

import pytest

from deploy.conversion import Conversion
from deploy.demo import demo


@pytest.fixture(scope="session")
def conversion(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """The demonstration, run once: the shipped student for a100, agx-orin and cpu."""
    return demo(tmp_path_factory.mktemp("demo") / "bundles")


@pytest.fixture(scope="session")
def bundles(conversion: Conversion) -> dict[str, Path]:
    """The folders of its bundles, by profile."""
    return {bundle.path.name: bundle.path for bundle in conversion.bundles}
