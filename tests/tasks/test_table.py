"""The table of kinds: what each one provides, and that no module outside `fusion/tasks/` compares their names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusion.config.commands import RankConfig
from fusion.config.task import TaskConfig
from fusion.errors import UserError
from fusion.tasks.table import KINDS, METRICS

ROOT = Path(__file__).parents[2]


def compared(source: str) -> Iterator[str]:
    """The kinds that `source` compares something with, by `==`, `!=`, `in`, `match` or as the key of a dict."""
    for node in ast.walk(ast.parse(source)):
        values: list[ast.expr | None] = []
        if isinstance(node, ast.Compare):
            values = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            values = [node.value]
        elif isinstance(node, ast.Dict):
            values = list(node.keys)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            values = list(node.args[:1])
        for value in values:
            is_call = isinstance(value, ast.Call)  # its arguments are not compared
            for one in ast.walk(value) if value is not None and not is_call else ():
                if isinstance(one, ast.Constant) and one.value in KINDS:
                    yield str(one.value)


def test_no_other_module_compares_the_name_of_a_kind() -> None:
    found = {
        str(path.relative_to(ROOT)): kinds
        for path in sorted([*(ROOT / "fusion").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")])
        if path.parent.name != "tasks" and (kinds := set(compared(path.read_text(encoding="utf-8"))))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        'if task.kind == "regression": pass',
        'x = "choice" != kind',
        'x = kind in ("classification", "other")',
        'match kind:\n    case "regression":\n        pass',
        'f = {"choice": 1}[kind]',
        'f = handlers.get("choice")',
    ],
)
def test_a_comparison_is_detected(source: str) -> None:
    assert len(set(compared(source))) == 1


def test_kinds_that_task_files_and_artifacts_name() -> None:
    promised = {
        "classification": ("classification", ("accuracy", "f1", "macro_f1", "matthews"), ()),
        "regression": ("regression", ("pearson", "spearman"), ()),
        "choice": ("choice", ("accuracy",), ("choices", "blank")),
        "multi_label": ("multi_label", ("micro_f1", "macro_f1", "subset_accuracy"), ()),
        "tagging": ("tagging", ("entity_f1", "entity_precision", "entity_recall", "token_accuracy"), ()),
    }
    there = {name: (kind.name, kind.metric_names, kind.keys) for name, kind in KINDS.items()}
    assert promised.items() <= there.items()
    assert all(name == kind.name and kind.metric_names for name, kind in KINDS.items())
    assert {name: kind.metric_names for name, kind in KINDS.items()} == METRICS


@pytest.mark.parametrize("kind", ["classification", "regression", "multi_label", "choice"])
def test_a_key_of_another_kind_is_refused(kind: str) -> None:
    for owner in KINDS.values():
        for key in set(owner.keys) - set(KINDS[kind].keys):
            own: dict[str, Any] = {"labels": ["a", "b"]} | dict.fromkeys(KINDS[kind].keys, "column")
            with pytest.raises(UserError, match=f"{key} is only allowed for kind={owner.name}, not {kind}"):
                TaskConfig(kind=kind, text="t", metrics=[METRICS[kind][0]], **own | {key: "x"})


def test_a_linear_probe_is_refused_where_there_is_no_vector_per_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusion.analysis.initialization import best_source

    asked = TaskConfig(name="n", text="t", labels=["a", "b"], metrics=["accuracy"])
    monkeypatch.setattr(KINDS["classification"], "is_pooled", False)
    with pytest.raises(UserError, match=r"n is a task of kind classification, but logme and probe need .*attention\]"):
        RankConfig(task=asked)
    assert RankConfig(task=asked, methods=["similarity", "attention"]).methods == ["similarity", "attention"]
    nothing: Any = None
    with pytest.raises(UserError, match=r"kind classification such as n .*\n.*out of x, y, e\.g\. 'sources=\[x\]'"):
        best_source(["x", "y"], asked, nothing)
    assert best_source(["x"], asked, nothing) == "x"
