"""Splits made of the training rows: fixed, disjoint, in the labels' proportions, refused where they cannot be."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fusion.config.data import DataConfig, LimitConfig, SplitConfig
from fusion.config.task import TaskConfig
from fusion.data.rows import load_rows
from fusion.data.splits import Holdout, check_held_out_splits, check_source, evaluation_splits
from fusion.errors import UserError

ROWS = [{"text": f"row {number}", "label": int(number % 5 == 0)} for number in range(60)]

Task = Callable[..., TaskConfig]
Write = Callable[..., DataConfig]


def parts(count: int, labels: list[int] | None = None, seed: int = 0, **fractions: float) -> dict[str, list[int]]:
    """Each part by its name, and train."""
    return {
        split: Holdout(split, fractions, seed, labels is not None).rows(count, labels, "here")
        for split in ("train", *fractions)
    }


# --- the draw -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stratify", [False, True])
def test_every_example_is_in_one_part(stratify: bool) -> None:
    draw = random.Random(0)
    for _ in range(200):
        count = draw.randrange(12, 80)
        labels = [draw.choice([0, 0, 0, 0, 1, 1, 2]) for _ in range(count)] if stratify else None
        found = parts(count, labels, draw.randrange(9), validation=0.2, test=0.15)
        rows = [row for part in found.values() for row in part]
        assert sorted(rows) == list(range(count))
        assert all(part == sorted(part) and part for part in found.values())


@pytest.mark.parametrize(("count", "fraction", "size"), [(10, 0.1, 1), (60, 0.1, 6), (25, 0.1, 3), (3, 0.4, 1)])
def test_sizes(count: int, fraction: float, size: int) -> None:
    assert len(parts(count, validation=fraction)["validation"]) == size


def test_the_draw_never_changes() -> None:
    """A version that draws otherwise would train on rows that an artifact of today was evaluated on."""
    assert parts(20, validation=0.25)["validation"] == [1, 3, 8, 9, 14]
    assert parts(20, [0] * 15 + [1] * 5, validation=0.2)["validation"] == [1, 3, 14, 16]


def test_the_seed_alone_changes_it() -> None:
    one = parts(60, validation=0.1)
    assert one == parts(60, validation=0.1)
    assert one["validation"] != parts(60, seed=1, validation=0.1)["validation"]
    assert parts(60, validation=0.1, test=0.2)["validation"] == one["validation"]


def test_labels_in_their_proportions() -> None:
    draw = random.Random(1)
    for _ in range(100):
        labels = [draw.choice([0, 0, 0, 0, 0, 1, 1, 2]) for _ in range(draw.randrange(40, 200))]
        found = parts(len(labels), labels, validation=0.1, test=0.2)
        total = Counter(labels)
        for split, fraction in (("validation", 0.1), ("test", 0.2)):
            counts = Counter(labels[row] for row in found[split])
            assert sum(counts.values()) == int(fraction * len(labels) + 0.5)
            assert all(abs(counts[label] - fraction * total[label]) < 1 for label in total)
        assert {labels[row] for row in found["train"]} == set(total)


def test_a_label_with_one_example_stays_in_train() -> None:
    labels = [0] * 9 + [1]
    for seed in range(20):
        found = parts(10, labels, seed, validation=0.5)
        assert 9 in found["train"] and len(found["validation"]) == 5


@pytest.mark.parametrize(
    ("count", "labels", "fractions", "message"),
    [
        (
            4,
            None,
            {"validation": 0.1},
            r"here: data\.split\.validation=0\.1 of 4 training examples leave no example for validation",
        ),
        (
            40,
            None,
            {"validation": 0.5, "test": 0.01},
            r"data\.split\.test=0\.01 of 40 training examples leave no example for test",
        ),
        (2, [0, 1], {"validation": 0.5}, "no example for validation"),
        (2, None, {"validation": 0.49, "test": 0.5}, "no example for train"),
        (1, None, {"validation": 0.9}, "no example for train"),
    ],
)
def test_an_empty_part(count: int, labels: Any, fractions: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parts(count, labels, 0, **fractions)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"validation": 0.0}, r"data\.split\.validation=0\.0: expected a finite number > 0 and < 1"),
        ({"test": 1.0}, r"data\.split\.test=1\.0: expected a finite number > 0 and < 1"),
        ({"validation": 10.0}, "expected a finite number > 0 and < 1"),
        ({"validation": float("nan")}, "expected a finite number > 0 and < 1"),
        ({"validation": 0.5, "test": 0.5}, "leave no training examples"),
        ({"validation": 0.1, "seed": -1}, r"data\.split\.seed=-1"),
        ({"stratify": True}, r"data\.split\.stratify=true: only applies to held-out splits"),
        ({"seed": 3}, r"data\.split\.seed=3: only applies to held-out splits"),
    ],
)
def test_invalid_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SplitConfig(**values)


# --- of a task ----------------------------------------------------------------------------------------


def split(data: DataConfig, **values: Any) -> DataConfig:
    return replace(data, split=SplitConfig(**values))


def test_a_folder_with_only_train(task: Task, write: Write) -> None:
    pets = task()
    plain = write("train.jsonl", ROWS)
    data = split(plain, validation=0.1, test=0.2)
    check_held_out_splits([pets], data)
    check_source(pets, data, ["train", "validation", "test"])
    assert evaluation_splits(pets, "validation", data) == ["validation"]
    loaded = {name: load_rows(pets, data, name) for name in ("train", "validation", "test")}
    assert [len(rows) for rows in loaded.values()] == [42, 6, 12]
    texts = [text for rows in loaded.values() for text in rows.texts]
    assert sorted(texts) == sorted((row["text"],) for row in ROWS)
    labels = dict(zip((row["text"] for row in ROWS), (row["label"] for row in ROWS), strict=True))
    assert all([labels[text] for (text,) in rows.texts] == rows.labels for rows in loaded.values())
    with pytest.raises(UserError, match=r"data\.split\.test=0\.1 to hold out a tenth"):
        load_rows(pets, split(plain, validation=0.1), "test")


def test_stratified(task: Task, write: Write) -> None:
    data = split(write("train.jsonl", ROWS), validation=0.25, stratify=True)
    assert Counter(load_rows(task(), data, "validation").labels) == {0: 12, 1: 3}


def test_a_limit_is_applied_after_the_draw(task: Task, write: Write) -> None:
    data = split(write("train.jsonl", ROWS), validation=0.5)
    limited = replace(data, limit=LimitConfig(train=7, validation=3))
    for name, count in (("train", 7), ("validation", 3)):
        few, every = (load_rows(task(), one, name).texts for one in (limited, data))
        assert len(few) == count and set(few) < set(every)


def test_rows_without_a_label_are_dropped_first(task: Task, write: Write) -> None:
    rows = [row | {"label": -1} if number % 3 == 0 else row for number, row in enumerate(ROWS)]
    data = split(write("train.jsonl", rows), validation=0.1, test=0.1)
    loaded = [load_rows(task(ignore_labels=[-1]), data, name) for name in ("train", "validation", "test")]
    assert [len(rows) for rows in loaded] == [32, 4, 4]
    assert len({text for rows in loaded for text in rows.texts}) == 40


def test_choices_and_values(task: Task, write: Write) -> None:
    rows = [{"text": f"{number}", "options": ["a", "b"], "label": number % 2} for number in range(20)]
    choice = task(name="quiz", kind="choice", choices="options")
    data = split(write("train.jsonl", rows, "quiz"), validation=0.2)
    loaded = load_rows(choice, data, "validation")
    assert loaded.choices == [["a", "b"]] * 4
    assert loaded.labels == [int(text) % 2 for (text,) in loaded.texts]
    rating = task(name="rating", kind="regression")
    data = split(write("train.jsonl", [{"text": f"{n}", "label": n / 2} for n in range(20)], "rating"), validation=0.2)
    loaded = load_rows(rating, data, "validation")
    assert loaded.labels == [int(text) / 2 for (text,) in loaded.texts]


def test_an_existing_split_is_read(task: Task, write: Write) -> None:
    write("validation.jsonl", ROWS[:5])
    plain = write("train.jsonl", ROWS)
    data = split(plain, validation=0.1)
    with pytest.raises(UserError, match=r"data\.split\.validation=0\.1: pets already has a validation split"):
        check_held_out_splits([task()], data)
    assert load_rows(task(), data, "validation").texts == load_rows(task(), plain, "validation").texts
    assert len(load_rows(task(), data, "train")) == 60
    only_test = split(plain, validation=0.1, test=0.1)
    assert len(load_rows(task(), only_test, "train")) == 54


def test_only_tasks_without_the_split_draw_it(task: Task, write: Write) -> None:
    write("validation.jsonl", ROWS[:5], "whole")
    write("train.jsonl", ROWS, "whole")
    data = split(write("train.jsonl", ROWS), validation=0.1, stratify=True)
    check_held_out_splits([task(name="whole"), task()], data)
    with pytest.raises(UserError, match="whole, whole already has a validation split"):
        check_held_out_splits([task(name="whole"), task(name="whole")], data)
    assert [len(load_rows(task(name=name), data, "train")) for name in ("whole", "pets")] == [60, 54]


@pytest.mark.parametrize("kind", ["regression", "choice"])
def test_nothing_to_stratify_by(task: Task, write: Write, kind: str) -> None:
    data = split(write("train.jsonl", ROWS), validation=0.1, stratify=True)
    other = task(kind=kind, **({"choices": "options"} if kind == "choice" else {}))
    with pytest.raises(UserError, match=f"pets is of kind {kind}, which has no classes"):
        check_held_out_splits([other], data)


def test_a_task_of_the_hub(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusion.data import rows
    from fusion.data.formats import record_table

    asked: list[str] = []

    def table(hub: Any, name: str, cure: str) -> Any:
        asked.append(name)
        return record_table(ROWS, where=f"hub, {name}")

    monkeypatch.setattr(rows, "hub_table", table)
    hub = task(hub={"path": "x/y", "splits": {"train": "training", "test": "test"}})
    with pytest.raises(UserError, match=r"has no split validation: .*\nfor training, set data\.split\.validation=0\.1"):
        evaluation_splits(hub, "validation", DataConfig())
    data = split(DataConfig(), validation=0.1)
    check_held_out_splits([hub], data)
    check_source(hub, data)
    assert [len(load_rows(hub, data, name)) for name in ("train", "training", "validation")] == [54, 54, 6]
    assert asked == ["training"] * 3
    with pytest.raises(UserError, match="pets already has a test split"):
        check_held_out_splits([hub], split(DataConfig(), test=0.1))


def test_a_corpus_has_all_splits(task: Task) -> None:
    with pytest.raises(UserError, match="pets already has a validation split"):
        check_held_out_splits([task(corpus="movies")], split(DataConfig(), validation=0.1))


def test_parts_of_the_hub_are_split_further(task: Task, write: Write) -> None:
    shares = task(hub={"path": "x/y", "splits": {"train": "train[:50%]", "test": "train[50%:]"}})
    data = split(write("train.jsonl", ROWS), validation=0.2)
    loaded = {name: set(load_rows(shares, data, name).texts) for name in ("train", "validation", "test")}
    assert [len(texts) for texts in loaded.values()] == [24, 6, 30]
    assert len(set.union(*loaded.values())) == 60
