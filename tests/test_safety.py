"""What is read is data: no pickle, no YAML objects, no code. The source itself is read, imports in functions too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from omegaconf._utils import get_yaml_loader

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for part in ("fusion", "pipelines") for path in (ROOT / part).rglob("*.py"))
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
# Besides the safe calls: errors, and parsing events, which construct no objects.
YAML_ALLOWED = {"safe_load", "safe_dump", "YAMLError", "MarkedYAMLError", "parse", "SafeLoader"} | {
    f"{kind}Event"
    for kind in (*("DocumentStart", "CollectionEnd", "Node", "Alias", "Scalar"), *("MappingStart", "SequenceStart"))
}
FROM_PRETRAINED_FILES = {"fusion/backbones/load.py", "fusion/hub/tokenizer.py", "fusion/hub/packages.py"}


def faults(source: str, where: str) -> Iterator[str]:
    """What in a source could run or unpickle what it reads, by line."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        at = f"{where}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = []
        for name in names:
            if UNSAFE_MODULES & set(name.split(".")):
                yield f"{at}: imports {name}"
            if name.startswith("yaml.") and name.removeprefix("yaml.") not in YAML_ALLOWED:
                yield f"{at}: imports {name}"
            if name in ("torch.load", "numpy.load", "numpy.lib.format.read_array"):
                yield f"{at}: imports {name} by itself, where its arguments are not seen"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "yaml" and node.attr not in YAML_ALLOWED:
            yield f"{at}: yaml.{node.attr}"
        if isinstance(node, ast.Call):
            yield from (f"{at}: {fault}" for fault in _of_call(node))


def _of_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if given.get("allow_pickle", "False") != "False":
        yield f"{name} with allow_pickle"
    if None in given and name.rpartition(".")[0] in ("torch", "np", "numpy"):
        yield f"{name} with arguments that are not seen"
    if name in ("eval", "exec", "__import__") or (name == "compile" and call.args):
        yield f"{name}()"
    if given.get("trust_remote_code", "False") not in ("False", "trust_remote_code"):
        yield f"{name} with trust_remote_code={given['trust_remote_code']}"
    if name.endswith((".from_pretrained", ".from_config")) and "Auto" in name and "trust_remote_code" not in given:
        yield f"{name} without trust_remote_code"
    if name in ("read_pickle", "pd.read_pickle", "pandas.read_pickle"):
        yield name


def test_the_loader_of_task_files_is_a_safe_one() -> None:
    assert issubclass(get_yaml_loader(), yaml.SafeLoader)


def test_nothing_unsafe_is_read() -> None:
    assert len(SOURCES) > 90 and {ROOT / file for file in FROM_PRETRAINED_FILES} <= set(SOURCES)
    found = [
        fault
        for path in SOURCES
        for fault in faults(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]
    # The benchmark's baseline runs in a separate process, on the backbone that the user specified.
    allowed = "from_pretrained without trust_remote_code"
    assert [
        fault for fault in found if not (fault.startswith("pipelines/benchmark/baseline") and allowed in fault)
    ] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    import dill as d",
        "from joblib import load",
        "from numpy.lib import marshal",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import torch\ntorch.load('x', weights_only=how)",
        "import torch\ntorch.load('x', **how)",
        "from torch import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import yaml\nyaml.unsafe_load(text)",
        "from yaml import full_load",
        "AutoModel.from_pretrained('x')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "load_backbone('x', trust_remote_code=True)",
        "datasets.load_dataset('x', trust_remote_code=True)",
        "eval(text)",
        "__import__(name)",
    ],
)
def test_unsafe_calls_are_detected(source: str) -> None:
    assert list(faults(source, "x.py"))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x', weights_only=True)",
        "import yaml\nyaml.safe_load(text)\nyaml.safe_dump(text)",
        "AutoModel.from_pretrained('x', trust_remote_code=trust_remote_code)",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import re\nre.compile('x')\nself.compile()",
    ],
)
def test_safe_calls_are_accepted(source: str) -> None:
    assert list(faults(source, "x.py")) == []
