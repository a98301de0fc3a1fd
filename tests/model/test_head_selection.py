"""The selected head: by the name of the task, by its kind and labels, or none."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from fusion.config.task import TaskConfig
from fusion.errors import UserError
from fusion.model.head_selection import select_heads
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
    return [(head.task.name, head.index, head.trained_on) for head in select_heads(manifest, asked)]


def test_without_a_task_all_heads_are_selected() -> None:
    assert chosen(stored(ANIMALS), None) == [("animals", 0, "animals")]
    multi_task = stored(MOODS, RATING, ANIMALS)
    assert chosen(multi_task, None) == [("moods", 0, "moods"), ("rating", 1, "rating"), ("animals", 2, "animals")]
    assert [head.task for head in select_heads(multi_task, None)] == [MOODS, RATING, ANIMALS]


def test_the_head_of_the_tasks_name_or_of_its_labels() -> None:
    multi_task = stored(ANIMALS, MOODS, MOODS_TOO, RATING)
    assert chosen(multi_task, MOODS_TOO) == [("moods_too", 2, "moods_too")]
    assert chosen(multi_task, task("pets", ["cat", "dog"])) == [("pets", 0, "animals")]
    assert chosen(multi_task, task("stars")) == [("stars", 3, "rating")]
    assert chosen(stored(ANIMALS), task("pets", ["cat", "dog"])) == [("pets", 0, "animals")]


@pytest.mark.parametrize(
    ("manifest", "asked", "messages"),
    [
        (
            stored(ANIMALS),
            MOODS,
            ["mt has no head for task moods", "animals: classification with labels ['cat', 'dog']", "omit +task="],
        ),
        (
            stored(ANIMALS, RATING),
            MOODS,
            ["mt has no head for task moods", "rating: regression", "one of animals, rating"],
        ),
        (
            stored(ANIMALS, MOODS),  # its name, but other labels
            task("animals", ["bad", "good"]),
            ["mt has no head for task animals", "found animals: classification with labels ['cat', 'dog']\n"],
        ),
        (
            stored(MOODS, ANIMALS, MOODS_TOO),
            task("tones", ["bad", "good"]),
            [
                "mt has more than one head for task tones",
                "found moods: classification with labels ['bad', 'good']; moods_too: ",
                "one of moods, animals, moods_too",
            ],
        ),
    ],
)
def test_no_head_or_more_than_one(manifest: Manifest, asked: TaskConfig, messages: list[str]) -> None:
    with pytest.raises(UserError) as error:
        select_heads(manifest, asked)
    assert len(str(error.value).splitlines()) == 2
    for message in messages:
        assert message in str(error.value)
