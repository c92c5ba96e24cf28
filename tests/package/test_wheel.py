"""A wheel builds without a network, holds every file of the packages, and installs with its extras and its command."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("cppass", "lowering")
PROJECT = (ROOT / "pyproject.toml").read_text()
(VERSION,) = re.findall(r'^version = "(.+)"$', PROJECT, re.MULTILINE)
(EXTRAS,) = re.findall(r"^\[project.optional-dependencies\]$(.*?)^\[", PROJECT, re.MULTILINE | re.DOTALL)


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves files in its source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), str(source))
    (built,) = out.glob("*.whl")
    return built


def test_it_holds_every_file_of_the_packages(wheel: Path) -> None:
    """Typed markers and templates, too, which are easily forgotten in package-data."""
    files = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.split("/")[0] in PACKAGES}
    assert held == files
    assert {"cppass/py.typed", "lowering/py.typed"} <= held


def test_its_metadata_names_the_extras(wheel: Path) -> None:
    (name,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(zipfile.ZipFile(wheel).read(name).decode())
    assert set(metadata.get_all("Provides-Extra", [])) == set(re.findall(r"^([\w-]+) = \[", EXTRAS, re.MULTILINE))
    plain = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(line.split("<")[0].split(">")[0] for line in plain) == ["sympy", "torch"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_it_installs_and_torch_finds_the_backend(wheel: Path, tmp_path: Path) -> None:
    pip("install", "--no-deps", "--no-index", "--target", str(tmp_path), str(wheel))
    code = (
        "from importlib.metadata import entry_points\n"
        "import cppass\n"
        "(backend,) = entry_points(group='torch_dynamo_backends', name='npu_cp')\n"
        "print(cppass.__version__, cppass.__file__, backend.value)"
    )
    installed = os.environ | {"PYTHONPATH": str(tmp_path)}
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=installed, check=True
    ).stdout.split()
    assert printed == [VERSION, str(tmp_path / "cppass" / "__init__.py"), "cppass.backend:npu_cp"]
    script = (tmp_path / "bin" / "cppass").read_text()
    assert "from cppass.cli import main" in script
