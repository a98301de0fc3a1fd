"""A split sampled from the training examples raises an error if an artifact may have been trained on it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from fusion.analysis.inspection import inspect
from fusion.analysis.unseen import check_unseen
from fusion.config.commands import InspectConfig
from fusion.config.data import DataConfig, LimitConfig, SplitConfig
from fusion.config.task import TaskConfig
from fusion.data.splits import drawn_from_train
from fusion.errors import UserError
from fusion.store.lookup import read_manifest
from fusion.tasks.task import HubConfig
from tests.bench import Bench

REFUSED = r"task films: its validation split is sampled from the training examples.*{} was trained on"


def split(data: DataConfig, **values: Any) -> DataConfig:
    return dataclasses.replace(data, split=SplitConfig(**values))


@pytest.fixture
def made(bench: Bench) -> Bench:
    """`films` has only training rows, of which a quarter is the validation split."""
    for name in ("validation", "test"):
        (bench.folder / "data" / "films" / f"{name}.jsonl").unlink()
    bench.data = split(bench.data, validation=0.25)
    bench.stage1("films")
    return bench


def append_rows(bench: Bench, count: int = 8) -> None:
    path = bench.folder / "data" / "films" / "train.jsonl"
    more = [json.dumps({"text": f"a good film {number}", "label": 1}) for number in range(count)]
    path.write_text(path.read_text() + "\n".join(more) + "\n")


def check(bench: Bench, name: str, data: DataConfig, task: str = "films") -> None:
    check_unseen([None, read_manifest(name, bench.folder / "store")], bench.tasks[task], data)


def test_after_the_training_data_has_changed(made: Bench) -> None:
    before = made.evaluate("films")
    append_rows(made)
    with pytest.raises(UserError, match=REFUSED.format("films")) as refusal:
        made.evaluate("films")
    assert "retrain films with overwrite=true" in str(refusal.value)
    assert made.evaluate("films", split="train")["rows"] == 54
    made.stage1("films", overwrite=True)
    assert made.evaluate("films")["rows"] == 18 != before["rows"]


def test_the_number_of_examples_may_be_limited_in_either(made: Bench) -> None:
    """The limit of the training counts: its rows are those that are compared."""
    some = dataclasses.replace(made.data, limit=LimitConfig(train=12, validation=4))
    made.stage1("films", data=some, name="few")
    for name in ("few", "films"):
        check(made, name, made.data)
        check(made, name, some)
    append_rows(made)
    for name in ("few", "films"):
        with pytest.raises(UserError, match=REFUSED.format(name)):
            check(made, name, some)


def test_sources_of_a_fusion_and_initial_weights(made: Bench) -> None:
    """They were trained on the target too, with another draw: its validation rows were seen."""
    made.stage1("plays", data=dataclasses.replace(made.data, split=SplitConfig()))
    made.stage2("films", ["films", "plays"])
    other = split(made.data, validation=0.25, seed=1)
    with pytest.raises(UserError, match=REFUSED.format("films")) as refusal:
        made.stage2("films", ["plays", "films"], data=other, name="other")
    assert "Set data.split.validation=0.25 as in that run" in str(refusal.value)
    with pytest.raises(UserError, match=REFUSED.format("films")):
        made.stage1("films", data=other, init_from="films", name="again")
    made.stage1("films", data=made.data, init_from="films", name="again")
    append_rows(made)
    config = InspectConfig(
        artifact="films-adapterfusion", store=str(made.folder / "store"), data=made.data, accelerator="cpu"
    )
    with pytest.raises(UserError, match=REFUSED.format("films-adapterfusion")):
        inspect(config)


def test_a_fusion_is_scored_on_the_task_of_a_source(made: Bench) -> None:
    made.stage1("plays", data=dataclasses.replace(made.data, split=SplitConfig()))
    made.stage2("plays", ["films", "plays"], data=dataclasses.replace(made.data, split=SplitConfig()))
    task = made.tasks["films"]
    made.evaluate("plays-adapterfusion", task=task)
    made.data = split(made.data, validation=0.25, seed=1)
    with pytest.raises(UserError, match=REFUSED.format("films")):
        made.evaluate("plays-adapterfusion", task=task)


def test_multi_task_adapter(made: Bench) -> None:
    made.multitask("films", "books", name="both")
    assert made.evaluate("both")["metrics"].keys() == {"films/validation", "books/validation"}
    append_rows(made)
    with pytest.raises(UserError, match=REFUSED.format("both")):
        made.evaluate("both")


def test_splits_of_a_task_file(bench: Bench) -> None:
    """`train[75%:]` is drawn from the same file; the record of 0.1 suffices to detect it."""
    for name in ("validation", "test"):
        (bench.folder / "data" / "films" / f"{name}.jsonl").unlink()
    splits: dict[str, Any] = {"train": "train[:75%]", "validation": "train[75%:]", "test": "test"}
    hub = HubConfig(path="org/films", splits=splits)
    bench.tasks["films"] = dataclasses.replace(bench.tasks["films"], hub=hub)
    bench.stage1("films")
    assert bench.evaluate("films")["rows"] == 16
    append_rows(bench)
    with pytest.raises(UserError, match=REFUSED.format("films")):
        bench.evaluate("films")


def test_separate_splits_may_change(bench: Bench) -> None:
    bench.stage1("films")
    append_rows(bench)
    path = bench.folder / "data" / "films" / "validation.jsonl"
    path.write_text(path.read_text() + json.dumps({"text": "a bad film", "label": 0}) + "\n")
    assert bench.evaluate("films")["rows"] == 17


def test_drawn_from_train(bench: Bench) -> None:
    hub = HubConfig(path="org/films", splits={"train": "train[:90%]", "validation": "train[90%:]", "test": "t"})
    far = TaskConfig(name="far", text="text", labels=["a", "b"], metrics=["accuracy"], hub=hub)
    nowhere = dataclasses.replace(bench.data, dir=None)
    names = ("train", "validation", "test")
    assert [drawn_from_train(far, nowhere, name) for name in names] == [False, True, False]
    films = bench.tasks["films"]
    assert [drawn_from_train(films, bench.data, name) for name in names] == [False, False, False]
    (bench.folder / "data" / "films" / "test.jsonl").unlink()
    made = split(bench.data, test=0.1)
    assert [drawn_from_train(films, made, name) for name in names] == [False, False, True]
