"""Imports go one way, package by package, and a library is imported only where it belongs.

The source is read with `ast`, imports inside functions included.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A package imports only those before it, beside the modules that every package may use. Commands import all of them.
EVERYWHERE = ("errors", "text", "files", "locks")
PACKAGES = (
    *("layers", "hub", "tasks", "backbones", "config", "data", "store", "runs"),
    *("reporting", "tracking", "model", "formats", "training", "analysis", "stages", "cli"),
)
COMMANDS = ("stage1", "stage2", "select", "rank", "evaluate", "predict", "inspect", "report", "compare", "sync")
LIBRARIES = {
    "rich": {"cli"},
    "hydra": {"cli"},
    "hydra_plugins": {"cli"},
    "omegaconf": {"cli"},
    "wandb": {"tracking"},
    "pytorch_lightning": {"training", "tracking", "commands"},
    "lightning_fabric": {"training", "commands"},
    "transformers": {"backbones", "data", "hub"},
    "datasets": {"data"},
    "peft": {"backbones"},
    "nervaluate": {"tasks"},
    "safetensors": {"store", "data", "training", "backbones", "model", "formats"},
    "pydantic": {"store", "analysis"},
    "filelock": {"locks"},
}
HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "pytorch_lightning",
    "lightning_fabric",
    "wandb",
    "torchmetrics",
    "pydantic",
)


def imports_of(source: str) -> set[str]:
    """Every module that `source` names in an import; `from a.b import c` counts as a.b and as a.b.c."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): imports_of(
        path.read_text("utf-8")
    )
    for path in sorted((ROOT / "fusion").rglob("*.py"))
}


def package_of(module: str) -> str:
    """`fusion.data.rows` -> data; `fusion.stage1` and `fusion.store.__main__` -> commands."""
    part = [*module.split("."), ""][1]
    return "commands" if part in ("", *COMMANDS) or module.endswith(".__main__") else part


def wrong_imports(modules: Mapping[str, set[str]]) -> list[str]:
    wrong = []
    for module, names in modules.items():
        own = package_of(module)
        allowed = {own, *EVERYWHERE} if own in EVERYWHERE else {own, *EVERYWHERE, *PACKAGES[: _rank(own)]}
        for name in sorted(names & modules.keys() - {"fusion", module}):
            if package_of(name) not in allowed or package_of(name) == "commands":
                wrong.append(f"{module} imports {name}")
        for library in {name.split(".")[0] for name in names} - {"fusion"}:
            outside = own == "layers" and library not in {"torch", *sys.stdlib_module_names}
            if own not in LIBRARIES.get(library, {own}) or outside:
                wrong.append(f"{module} imports {library}")
    return wrong


def _rank(package: str) -> int:
    return len(PACKAGES) if package == "commands" else PACKAGES.index(package)


def test_every_module_is_in_a_package_and_imports_go_one_way() -> None:
    assert {package_of(module) for module in MODULES} == {"commands", *EVERYWHERE, *PACKAGES}
    assert wrong_imports(MODULES) == []
    assert len(list((ROOT / "fusion").glob("*.py"))) <= 15


def test_no_module_imports_itself_through_others() -> None:
    inside = {module: names & MODULES.keys() - {module, "fusion"} for module, names in MODULES.items()}
    while leaves := [module for module, names in inside.items() if not names & inside.keys()]:
        for module in leaves:
            del inside[module]
    assert inside == {}


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("fusion.data.rows", "def f():\n    from fusion.model import adapted", "fusion.model.adapted"),
        ("fusion.layers.bank", "import fusion.config.model", "fusion.config.model"),
        ("fusion.layers.bank", "import numpy", "numpy"),
        ("fusion.errors", "from fusion.store import lookup", "fusion.store.lookup"),
        ("fusion.stage1", "from fusion.stage2 import main", "fusion.stage2"),
        ("fusion.data.rows", "import wandb.sdk", "wandb"),
        ("fusion.stage1", "import fusion.cli.app", None),
        ("fusion.training.fit", "from fusion.errors import UserError", None),
    ],
)
def test_a_wrong_import_is_detected(module: str, source: str, wrong: str | None) -> None:
    found = wrong_imports({**MODULES, module: imports_of(source)})
    assert (f"{module} imports {wrong}" in found) if wrong else not found


def test_wandb_is_imported_inside_functions() -> None:
    for path in (ROOT / "fusion" / "tracking").glob("*.py"):
        top = ast.parse(path.read_text("utf-8")).body
        lines = [ast.unparse(node) for node in top if isinstance(node, ast.Import | ast.ImportFrom)]
        assert "wandb" not in imports_of("\n".join(lines)), path.name


def test_commands_import_no_heavy_modules_before_they_run() -> None:
    modules = [module for module in MODULES if "fusion.cli.app" in MODULES[module]]
    assert len(modules) >= 7
    code = f"import sys, {', '.join(modules)}; print(sorted(m for m in sys.modules if m in {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
