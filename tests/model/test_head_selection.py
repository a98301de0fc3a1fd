"""Whose head answers: the artifact's own tasks, one by name, one by its labels, or none."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from fusion.config.task import TaskConfig
from fusion.errors import UserError
from fusion.model.head_selection import answers, own_tasks
from fusion.store.manifest import Manifest
from tests.store.conftest import build

HEAD = {"pooling": "cls", "layers": 1, "outputs": 2, "dropout": 0.1}


def task(name: str, labels: list[str] | None = None, **changes: Any) -> TaskConfig:
    kind = "classification" if labels else "regression"
    metric = "accuracy" if labels else "pearson"
    return TaskConfig(name=name, kind=kind, text="text", labels=labels, metrics=[metric], **changes)


ANIMALS, MOODS, MOODS_TOO, RATING = (
    task("animals", ["cat", "dog"]),
    task("moods", ["bad", "good"]),
    task("moods_too", ["bad", "good"]),
    task("rating"),
)


def stored(*tasks: TaskConfig) -> Manifest:
    entries = {str(one.name): {"task": asdict(one), "head": HEAD} for one in tasks}
    return build("mt", task=asdict(tasks[0]), multitask=entries if len(tasks) > 1 else None)


def chosen(manifest: Manifest, asked: TaskConfig | None) -> list[tuple[str | None, int, str]]:
    return [(answer.task.name, answer.head, answer.head_task) for answer in answers(manifest, asked)]


def test_without_a_task_all_its_own_are_answered() -> None:
    assert chosen(stored(ANIMALS), None) == [("animals", 0, "animals")]
    several = stored(MOODS, RATING, ANIMALS)
    assert chosen(several, None) == [
        ("moods", 0, "moods"),
        ("rating", 1, "rating"),
        ("animals", 2, "animals"),
    ]
    assert own_tasks(several) == [MOODS, RATING, ANIMALS]


def test_a_task_is_answered_by_the_head_of_its_name_else_by_the_one_of_its_labels() -> None:
    several = stored(ANIMALS, MOODS, MOODS_TOO, RATING)
    assert chosen(several, MOODS_TOO) == [("moods_too", 2, "moods_too")]
    assert chosen(several, task("pets", ["cat", "dog"])) == [("pets", 0, "animals")]
    assert chosen(several, task("stars")) == [("stars", 3, "rating")]
    assert chosen(stored(ANIMALS), task("pets", ["cat", "dog"])) == [("pets", 0, "animals")]


@pytest.mark.parametrize(
    ("manifest", "asked", "says"),
    [
        (
            stored(ANIMALS),
            MOODS,
            ["mt answers classification with labels ['cat', 'dog']", "leave +task= out"],
        ),
        (
            stored(ANIMALS, RATING),
            MOODS,
            ["mt answers the tasks animals, rating, and task moods asks for", "one of animals, rating"],
        ),
        (
            stored(ANIMALS, MOODS),  # its name, but no longer its labels
            task("animals", ["bad", "good"]),
            ["mt answers classification with labels ['cat', 'dog'], and task animals asks for"],
        ),
        (
            stored(MOODS, ANIMALS, MOODS_TOO),
            task("tones", ["bad", "good"]),
            [
                "the heads of moods and moods_too would all do for task tones",
                "one of moods, animals, moods_too",
            ],
        ),
    ],
)
def test_no_head_or_several(manifest: Manifest, asked: TaskConfig, says: list[str]) -> None:
    with pytest.raises(UserError) as error:
        answers(manifest, asked)
    assert len(str(error.value).splitlines()) == 2
    for said in says:
        assert said in str(error.value)
