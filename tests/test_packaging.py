"""The import view, the package list and the wheel agree with what is on disk."""

import os
import re
import tomllib
from pathlib import Path

import gradiometer

ROOT = Path(__file__).parents[1]
VIEW = ROOT / "src/gradiometer"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_view_links_exactly_the_packages_of_the_top_level() -> None:
    links = {path.name: str(path.readlink()) for path in VIEW.iterdir() if path.is_symlink()}
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"benchmarks", "src", "tests"}
    assert links == {name: f"../../{name}" for name in packages}


def test_pyproject_lists_every_package_on_disk() -> None:
    found = {"gradiometer"}
    for directory, _, files in os.walk(VIEW, followlinks=True):
        if "__init__.py" in files and "__pycache__" not in directory:
            found.add(".".join(("gradiometer", *Path(directory).relative_to(VIEW).parts)))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_the_version_is_the_same_everywhere() -> None:
    assert PROJECT["project"]["version"] == gradiometer.__version__
    assert re.search(r"^## \[Unreleased\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_every_pin_is_exact_and_names_no_build() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9!.a-z]+", line), line


def test_a_training_process_needs_little() -> None:
    names = {re.split(r"[<>=]", line)[0] for line in PROJECT["project"]["dependencies"]}
    assert names == {"array-api-compat", "grpcio", "numpy", "protobuf"}
