"""Imports go one way: layers <- backbones <- model <- training <- commands, data and store beside them.

The whole source is read with `ast`, imports inside functions included, so that nothing hides.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = ("stage1", "stage2", "rank", "evaluate", "predict", "inspect", "report")
HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "pytorch_lightning",
    "lightning_fabric",
    "wandb",
    "torchmetrics",
    "pydantic",  # light enough for a command that reads manifests, and no other
)

TABLES = {
    "checks",
    "model.compositions",
    "model.methods",
    "model.settings",
}  # light parts of model, and what they need
BASE = {
    "config",
    "errors",
    "overrides",
    "expected_warnings",
    "repeats",
    "paths",
    "safe_text",
    "signals",
    "tasks",
    *TABLES,
}
# What each part of the package may import of the others. Parts that are not listed are commands.
MAY_IMPORT: dict[str, set[str]] = {
    "": {"signals"},
    "errors": set(),
    "signals": set(),
    "repeats": set(),
    "overrides": set(),
    "expected_warnings": set(),
    "safe_text": set(),
    "paths": {"errors", "safe_text"},
    "program": {"errors", "safe_text", "signals"},
    "checks": {"errors", "overrides"},
    "config": TABLES | {"errors", "overrides", "repeats", "tasks"},
    "tasks": {"errors", "overrides", "safe_text", "metrics", "layers", "data.table"},
    "hub": {"errors"},
    "custom_code": {"errors"},
    "memory": set(),
    "metrics": set(),
    "run": BASE,
    "run_lock": set(),
    "sweep": BASE | {"run"},
    "layers": set(),
    "backbones": BASE | {"hub", "custom_code", "layers", "data.tokenizer"},
    "model": BASE | {"layers", "backbones"},
    "data": BASE | {"hub", "custom_code"},
    "provenance": set(),
    "selection": BASE,
    "terminal": {"errors", "safe_text"},
    "store": BASE | {"program", "run_lock", "selection", "terminal"},
    "review": BASE | {"run", "store", "packing", "metrics"},
    "sync": BASE | {"program", "run", "run_lock", "review", "terminal"},
    "entry": BASE | {"run", "store"},
    "settings_table": BASE | {"run", "store", "sweep"},
    "ending": BASE | {"run", "sweep", "store", "terminal", "settings_table"},
    "compare": BASE | {"program", "run", "store", "terminal"},
    "answers": BASE | {"store"},
    "from_manifests": BASE | {"layers", "backbones.slots", "model", "store", "selection"},
    "build": BASE | {"layers", "backbones", "model", "store", "selection", "from_manifests"},
    "inputs": BASE | {"store"},
    "unseen": BASE | {"data", "store"},
    "usable": BASE | {"backbones", "store"},
    "unchanged": BASE | {"backbones", "store"},
    "inference": BASE | {"memory", "model", "data"},
    "listening": BASE | {"layers", "model", "data"},
    "pruning": BASE | {"model", "data", "store", "listening"},
    "masking": set(),
    "packing": set(),
    "words": BASE | {"model", "data", "packing"},
    "inspection": BASE
    | {"backbones", "model", "data", "store", "answers", "build", "inference"}
    | {"listening", "masking", "words", "training.metrics", "unseen"},
    "probe": BASE | {"layers", "backbones", "model", "data", "store", "build", "training.metrics"},
    "start": BASE
    | {"run", "from_manifests"}
    | {"layers", "backbones", "model", "data", "store", "build", "inference", "pruning", "probe"},
    "initial": BASE | {"layers", "backbones", "model", "store", "build"},
    "feature_cache": BASE | {"backbones", "model", "data"},
    "several": BASE | {"layers", "backbones", "model"},
    "training": BASE
    | {
        "run",
        "hub",
        "memory",
        "metrics",
        "layers",
        "backbones",
        "model",
        "data",
        "store",
        "terminal",
        "review",
        "entry",
        "build",
        "inference",
        "listening",
        "feature_cache",
        "provenance",
    },
    "ranking": BASE
    | {"memory"}
    | {"run", "layers", "backbones", "model", "data", "store", "build", "inference", "pruning", "probe"}
    | {"training"},
    "app": BASE
    | {"run", "run_lock", "sweep", "ending", "memory", "terminal", "training.processes", "data.task_files"}
    | {"review.decision", "store.unfit"},
}
MAY_IMPORT |= {command: {*MAY_IMPORT} for command in COMMANDS}
MAY_IMPORT["store.__main__"] = MAY_IMPORT["store"] | {"from_manifests"}  # the command `store`

# Who may import a library; every other part may not. Commands count as one part.
LIBRARIES: dict[str, set[str]] = {
    "rich": {"terminal"},
    "hydra": {"app"},
    "hydra_plugins": {"app"},
    "omegaconf": {"app"},
    "wandb": {"review"},
    "pytorch_lightning": {"training", "review", "commands"},
    "lightning_fabric": {"training", "commands"},
    "transformers": {"backbones", "data"},
    "datasets": {"data"},
    "peft": {"backbones"},
    "nervaluate": {"tasks"},
    "safetensors": {"store", "data", "training", "backbones"},
    "pydantic": {"store"},
    "filelock": {"store", "data", "run_lock"},
}
LAYERS_LIBRARIES = {"torch", *sys.stdlib_module_names}


def imports_of(source: str, module: str) -> Iterator[str]:
    """Every module that `source` names in an import; `from a.b import c` counts as a.b and as a.b.c."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            target = ".".join([*package, *([node.module] if node.module else [])])
            yield target
            yield from (f"{target}.{alias.name}" for alias in node.names)


def read_package(root: Path = ROOT) -> dict[str, set[str]]:
    """Module name -> the modules it imports. An `__init__` is named as its package."""
    found = {}
    for path in sorted((root / "fusion").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts)
        found[module.removesuffix(".__init__")] = set(imports_of(path.read_text(encoding="utf-8"), module))
    return found


PACKAGE = read_package()


def part(module: str) -> str:
    """`fusion.data.rows` -> data; `fusion.app` -> app."""
    return module.split(".")[1] if "." in module else ""


def edges(package: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The imports inside the package, module by module; a package that is only named on the way is left out."""
    graph = {}
    for module, names in package.items():
        inside = {name for name in names if name in package} - {module}
        graph[module] = {name for name in inside if not any(other.startswith(f"{name}.") for other in inside)}
    return graph


def wrong_directions(package: Mapping[str, set[str]]) -> list[str]:
    wrong = []
    for module, names in edges(package).items():
        own = module.removeprefix("fusion.")
        allowed = MAY_IMPORT.get(own, MAY_IMPORT.get(part(module), set())) | {part(module), ""}
        beyond = [
            name for name in names if part(name) not in allowed and name[len("fusion.") :] not in allowed
        ]
        wrong += [f"{module} imports {name}" for name in sorted(beyond)]
    return wrong


def wrong_libraries(package: Mapping[str, set[str]]) -> list[str]:
    wrong = []
    for module, names in package.items():
        here = "commands" if part(module) in COMMANDS else part(module)
        for library in {name.split(".")[0] for name in names} - {"fusion"}:
            if here not in LIBRARIES.get(library, {here}):
                wrong.append(f"{module} imports {library}")
            if here == "layers" and library not in LAYERS_LIBRARIES:
                wrong.append(f"{module} imports {library}")
    return wrong


def cycles(package: Mapping[str, set[str]]) -> list[str]:
    graph = edges(package)
    done: set[str] = set()
    found = []

    def visit(module: str, way: list[str]) -> None:
        if module in way:
            found.append(" -> ".join([*way[way.index(module) :], module]))
        elif module not in done:
            for name in sorted(graph[module]):
                visit(name, [*way, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def test_the_package_was_read() -> None:
    assert {
        "fusion.config",
        "fusion.app",
        "fusion.stage1",
        "fusion.store",
        "fusion.review.tracking",
    } <= PACKAGE.keys()
    assert "fusion.store.manifest" in PACKAGE["fusion.store.artifacts"]
    parts = {part(module) for module in PACKAGE} - {"", "__main__"}
    assert parts <= MAY_IMPORT.keys(), f"say in MAY_IMPORT what {parts - MAY_IMPORT.keys()} may import"


def test_imports_go_one_way() -> None:
    assert wrong_directions(PACKAGE) == []


def test_there_are_no_circles() -> None:
    assert cycles(PACKAGE) == []


def test_libraries_stay_where_they_belong() -> None:
    assert wrong_libraries(PACKAGE) == []


def test_tracking_takes_only_loggers_from_lightning() -> None:
    names = {name for name in PACKAGE["fusion.review.tracking"] if name.startswith("pytorch_lightning")}
    assert all(name.startswith("pytorch_lightning.loggers") for name in names)


def test_wandb_is_imported_only_where_it_is_used() -> None:
    path = ROOT / "fusion" / "review" / "tracking.py"
    top = [ast.unparse(node) for node in ast.parse(path.read_text(encoding="utf-8")).body]
    lines = [line for line in top if line.startswith(("import ", "from "))]
    assert lines and "wandb" not in set(imports_of("\n".join(lines), "fusion.review.tracking"))


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        (
            "fusion.data.rows",
            "from fusion.model.adapted import AdaptedModel",
            "fusion.data.rows imports fusion.model.adapted",
        ),
        (
            "fusion.data.rows",
            "def f():\n    from fusion.model import adapted",
            "fusion.data.rows imports fusion.model.adapted",
        ),
        (
            "fusion.data.rows",
            "from ..store import manifest",
            "fusion.data.rows imports fusion.store.manifest",
        ),
        ("fusion.layers.bank", "import fusion.config", "fusion.layers.bank imports fusion.config"),
        ("fusion.training.fit", "from fusion.app import command", "fusion.training.fit imports fusion.app"),
        ("fusion.app", "from fusion.training import fit", "fusion.app imports fusion.training.fit"),
        ("fusion.stage1", "from fusion.stage2 import main", "fusion.stage1 imports fusion.stage2"),
        ("fusion.stage1", "from fusion.training.fit import fit", None),
        ("fusion.app", "from fusion.training import processes", None),
        ("fusion.training.fit", "from fusion.training import processes", None),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str, says: str | None) -> None:
    assert module in PACKAGE
    changed = {**PACKAGE, module: set(imports_of(source, module))}
    if says is None:
        assert wrong_directions(changed) == []
    else:
        assert says in wrong_directions(changed)


def test_a_circle_and_a_wrong_library_are_seen() -> None:
    circle = {"fusion": set(), "fusion.a": {"fusion.b"}, "fusion.b": {"fusion.c"}, "fusion.c": {"fusion.a"}}
    assert cycles(circle) == ["fusion.a -> fusion.b -> fusion.c -> fusion.a"]
    assert wrong_libraries({"fusion.data.rows": {"wandb.sdk"}}) == ["fusion.data.rows imports wandb"]
    assert wrong_libraries({"fusion.layers.bank": {"numpy"}}) == ["fusion.layers.bank imports numpy"]
    assert wrong_libraries({"fusion.stage1": {"pytorch_lightning"}, "fusion.app": {"hydra.core"}}) == []


def command_modules() -> list[str]:
    return [module for module in sorted(PACKAGE) if "fusion.app" in PACKAGE[module]]


@pytest.mark.parametrize("module", command_modules())
def test_a_command_is_light_until_it_runs(module: str) -> None:
    code = f"import sys, {module}; print(sorted(m for m in sys.modules if m in {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_both_stages_are_commands() -> None:
    assert {"fusion.stage1", "fusion.stage2"} <= set(command_modules())
