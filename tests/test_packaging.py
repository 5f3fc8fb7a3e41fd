"""The package as a user gets it: the wheel, the import, the pins and the reference."""

from __future__ import annotations

import ast
import email.message
import email.parser
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hypergrad", "bidora")
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT: dict[str, Any] = PYPROJECT["project"]

# What nobody should pay for who only wants a hypergradient.
HEAVY = {
    "accelerate",
    "bidora",
    "datasets",
    "matplotlib",
    "pandas",
    "peft",
    "pyarrow",
    "scipy",
    "sklearn",
    "torchopt",
    "transformers",
}

PROBE = """
import json, sys, time
import torch
start = time.perf_counter()
import hypergrad
seconds = time.perf_counter() - start
roots = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"seconds": seconds, "roots": roots}))
"""


def python(code: str, *options: str) -> str:
    """Run `code` in a fresh interpreter that finds this tree, return its output."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def requirements() -> list[Requirement]:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


def public_modules() -> dict[str, ModuleType]:
    """Import every module of both packages whose dotted name has no underscore part."""
    modules: dict[str, ModuleType] = {}
    for package in PACKAGES:
        top = importlib.import_module(package)
        modules[package] = top
        for info in pkgutil.walk_packages(top.__path__, f"{package}."):
            if not any(part.startswith("_") for part in info.name.split(".")):
                modules[info.name] = importlib.import_module(info.name)
    return modules


def reference_targets() -> list[str]:
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    texts = [page.read_text("utf-8") for page in pages]
    return [t for text in texts for t in re.findall(r"(?m)^::: ([\w.]+)$", text)]


# --- import -------------------------------------------------------------------------


def test_import_of_hypergrad_is_light_and_quick() -> None:
    runs = [json.loads(python(PROBE)) for _ in range(3)]
    assert HEAVY.isdisjoint(runs[0]["roots"])
    # The least of three: the first may compile byte code, any may meet a busy machine.
    assert min(run["seconds"] for run in runs) < 1.0


@pytest.mark.parametrize("package", PACKAGES)
def test_import_warns_of_nothing_and_prints_nothing(package: str) -> None:
    # Only our own modules: what third parties warn about at import is theirs.
    code = f"import warnings; warnings.simplefilter('error'); import {package}"
    if package == "bidora":
        code = f"import peft, datasets; {code}"
    assert python(code) == ""


# --- the wheel ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel from this tree with the build backend itself, no network."""
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def in_dist_info(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [n for n in wheel.namelist() if n.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    return email.parser.Parser().parsestr(in_dist_info(wheel, "METADATA"))


def test_wheel_holds_both_packages_whole_and_nothing_else(
    wheel: zipfile.ZipFile,
) -> None:
    packed = {n for n in wheel.namelist() if ".dist-info/" not in n}
    here = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == here
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed


def test_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    found = metadata(wheel)
    assert found["Name"] == "hypergrad-bidora"
    assert found["Version"] == PROJECT["version"]
    assert found["Requires-Python"] == ">=3.11"
    assert found["License-Expression"] == "Apache-2.0"
    license_text = in_dist_info(wheel, "licenses/LICENSE")
    assert "Version 2.0, January 2004" in license_text
    assert found["Description-Content-Type"] == "text/markdown"
    extras = found.get_all("Provides-Extra") or []
    assert {"demo", "test", "docs", "bench", "dev"} <= set(extras)


def test_wheel_declares_a_command_that_exists(wheel: zipfile.ZipFile) -> None:
    lines = in_dist_info(wheel, "entry_points.txt").split("\n")
    assert "bidora = bidora.cli:main" in lines
    tree = ast.parse(wheel.read("bidora/cli/__init__.py"))
    functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    assert "main" in functions


def test_versions_agree(wheel: zipfile.ZipFile) -> None:
    hypergrad = importlib.import_module("hypergrad")
    version = getattr(hypergrad, "__version__", PROJECT["version"])
    assert version == PROJECT["version"] == metadata(wheel)["Version"]


# --- pins ---------------------------------------------------------------------------


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line.strip() for line in lines if line.strip() and line[0] != "#"]
    return {canonicalize_name(n): v for n, _, v in (p.partition("==") for p in pins)}


def test_constraints_are_plain_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line.strip() and line[0] != "#"]
    odd = [line for line in pins if not re.fullmatch(r"[a-z0-9-]+==[\w.]+", line)]
    assert odd == []  # no ranges, no local tags such as +cpu, no markers
    names = [pin.partition("==")[0] for pin in pins]
    assert names == sorted(set(names))
    assert constraints()["torch"] == "2.13.0"


def test_pins_satisfy_the_declared_ranges() -> None:
    pins = constraints()
    untested = {
        canonicalize_name(Requirement(line).name)
        for line in PROJECT["optional-dependencies"]["bench"]
    }
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        if name not in pins and name in untested:
            continue
        assert name in pins, f"{name} has no tested version in constraints.txt"
        assert requirement.specifier.contains(pins[name]), requirement


# --- documentation ------------------------------------------------------------------


def test_reference_pages_name_modules_that_exist() -> None:
    targets = reference_targets()
    assert len(targets) == len(set(targets)), "a module is documented twice"
    assert set(targets) <= set(public_modules())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_a_place_in_the_reference(package: str) -> None:
    modules, targets = public_modules(), reference_targets()
    shown = [modules[target] for target in targets if target in modules]
    names = [(n, getattr(m, n)) for m in shown for n in getattr(m, "__all__", ())]
    # A package on a page shows what it exports; its modules are its own affair.
    behind = tuple(f"{target}." for target in targets)
    missing: list[str] = []
    for where, module in modules.items():
        if where.partition(".")[0] != package or where.startswith(behind):
            continue
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            is_page = any(value is page for page in shown)
            if not is_page and not any(n == name and v is value for n, v in names):
                missing.append(f"{where}.{name}")
    missing = [name for name in missing if not name.endswith(".__version__")]
    assert missing == [], "add the module to a page under docs/reference"


def test_every_public_module_declares_its_names() -> None:
    bare = [
        name
        for name, module in public_modules().items()
        if not hasattr(module, "__all__")
    ]
    assert bare == []


def test_every_reference_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = [p.name for p in (ROOT / "docs" / "reference").glob("*.md")]
    assert [p for p in pages if f"reference/{p}" not in navigation] == []


def test_every_citation_is_resolved() -> None:
    known = set(
        re.findall(
            r"(?m)^\*\*\[(\w+)\]\*\*",
            (ROOT / "docs" / "references.md").read_text("utf-8"),
        )
    )
    assert known
    sources = [
        path
        for folder in (*PACKAGES, "docs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".md"}
    ]
    cited = {
        key: path.relative_to(ROOT).as_posix()
        for path in [*sources, ROOT / "README.md"]
        for key in re.findall(
            r"\[([A-Z][A-Za-z]*\d\d[a-z]?)(?:, [^\]]+)?\]", path.read_text("utf-8")
        )
    }
    assert {key: where for key, where in cited.items() if key not in known} == {}
