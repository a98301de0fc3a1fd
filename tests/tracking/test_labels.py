"""Display names of runs, flat configs, and directions of metrics."""

from __future__ import annotations

from typing import Any

import pytest

from fusion.config.compositions import CompositionConfig
from fusion.config.methods import MethodConfig
from fusion.config.model import AdapterConfig
from fusion.config.stages import Stage1Config, Stage2Config
from fusion.config.task import TaskConfig
from fusion.tasks.table import METRICS
from fusion.tracking.loggers import LENGTH, best_is, columns, stage_name

CB = TaskConfig(name="cb", text="text", labels=["a", "b"], metrics=["accuracy"])
RTE = TaskConfig(name="rte", text="text", labels=["a", "b"], metrics=["accuracy"])


def stage1(name: str = "cb", **changes: Any) -> str:
    settings: dict[str, Any] = {"task": CB, "seed": 3} | changes
    return stage_name(Stage1Config(**settings, name=name))


def stage2(name: str, sources: list[str], **changes: Any) -> str:
    return stage_name(Stage2Config(task=CB, seed=3, name=name, sources=sources, **changes), sources)


def test_names() -> None:
    assert stage1() == "cb · adapter · seed 3"
    assert stage1(name="cb-head", method=MethodConfig("head")) == "cb · head · seed 3"
    assert stage1(adapter=AdapterConfig(name="houlsby")) == "cb · adapter houlsby · seed 3"
    tasks = {"task": None, "tasks": [CB, RTE], "method": MethodConfig("multitask_adapter")}
    assert stage1(name="cb-rte-multitask_adapter", **tasks) == "cb+rte · multitask_adapter · seed 3"
    assert stage2("cb-adapterfusion", ["snli", "mrpc", "rte"]) == "cb ← snli+mrpc+rte · seed 3"
    static = CompositionConfig(name="static")
    assert stage2("cb-static", ["snli"], composition=static) == "cb ← snli · static · seed 3"


def test_swept_values_and_user_names_come_last() -> None:
    assert stage1("cb-seed-3") == "cb · adapter · seed 3"
    assert stage1("cb-optim.lr-0.001-seed-3") == "cb · adapter · seed 3 · optim.lr-0.001"
    assert stage1("cb-seed-31") == "cb · adapter · seed 3 · seed-31"
    assert stage1("mine") == "cb · adapter · seed 3 · mine"


def test_many_sources_and_long_names_are_shortened() -> None:
    many = [f"source-{number}" for number in range(14)]
    assert stage2("x", many) == "cb ← source-0+source-1+source-2+source-3+10 more · seed 3 · x"
    assert len(stage2("x", ["y" * 99, "z" * 99])) == LENGTH


def test_columns() -> None:
    values = {"optim": {"lr": 1e-4, "head_lr": None}, "tasks": [{"name": "a"}, {"name": "b"}], "seed": 0}
    values |= {"sources": ["a", "b"], "empty": [], "hub": {}}
    assert columns(values) == {
        "optim/lr": 1e-4,
        "tasks/0/name": "a",
        "tasks/1/name": "b",
        "seed": 0,
        "sources": ["a", "b"],
        "empty": [],
    }


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        ("train/loss", "min"),
        ("train/value_penalty_loss", "min"),
        ("cb/train/loss", "min"),
        ("validation_matched/accuracy", "max"),
        ("cb/validation/macro_f1", "max"),
        ("mean", "max"),
        ("train/lr", None),
        ("train/grad_norm", None),
        ("epoch", None),
        ("attention/entropy/0.feedforward", None),
    ],
)
def test_direction_of_metrics(metric: str, best: str | None) -> None:
    assert best_is(metric) == best


def test_every_score_has_a_best() -> None:
    assert all(best_is(f"validation/{name}") == "max" for names in METRICS.values() for name in names)
