"""Which file, and which part of it, a split is."""

from __future__ import annotations

import pytest

from fusion.config.data import DataConfig, SplitConfig
from fusion.data.rows import load_rows
from fusion.data.splits import check_source, drawn_from_train, evaluation_splits, locate
from fusion.errors import UserError

MNLI = {"path": "x/y", "splits": {"train": "train", "validation": ["near", "far"], "test": "test"}}
PARTS = {"path": "x/y", "splits": {"train": "train[:80%]", "validation": "train[80%:]", "test": "test"}}
ROWS = [{"text": f"{number}", "label": 0} for number in range(50)]


def test_two_validation_sets(task):
    mnli = task(hub=MNLI)
    assert evaluation_splits(mnli, "validation", DataConfig()) == ["near", "far"]
    assert evaluation_splits(mnli, "far", DataConfig()) == ["far"]
    assert evaluation_splits(mnli, "train", DataConfig()) == ["train"]
    assert evaluation_splits(mnli, "test", DataConfig()) == ["test"]
    assert not drawn_from_train(mnli, DataConfig(), "validation")


def test_a_split_that_a_task_does_not_have(task):
    with pytest.raises(
        UserError, match="task pets has no split dev: expected one of train, validation, test, near, far"
    ):
        evaluation_splits(task(hub=MNLI), "dev", DataConfig())
    with pytest.raises(UserError, match="has no split test: expected one of train"):
        evaluation_splits(task(hub={"path": "x/y", "splits": {"train": "train"}}), "test", DataConfig())
    with pytest.raises(UserError, match="has no split dev"):
        evaluation_splits(task(corpus="movies"), "dev", DataConfig())
    with pytest.raises(UserError) as without_hint:
        evaluation_splits(task(hub=MNLI), "dev", DataConfig())
    assert not str(without_hint.value).endswith("\n")


@pytest.mark.parametrize(
    ("splits", "message"),
    [({"train": ["a", "b"]}, "train is a and b on the Hub"), ({"test": "test"}, "has no split train")],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_held_out_splits_need_one_train_split(task, splits, message: str, split: str) -> None:
    held_out = DataConfig(split=SplitConfig(validation=0.1))
    with pytest.raises(UserError, match=message):
        locate(task(hub={"path": "x/y", "splits": splits}), held_out, split)


@pytest.mark.parametrize(
    ("files", "names"), [(["near", "far"], ["near", "far"]), (["far"], ["far"]), (["validation"], ["validation"])]
)
def test_a_local_folder_has_the_sets_that_it_has(task, write, files, names):
    for name in files:
        data = write(f"{name}.jsonl", ROWS)
    mnli = task(hub=MNLI)
    assert evaluation_splits(mnli, "validation", data) == names
    assert [len(load_rows(mnli, data, name)) for name in names] == [50] * len(names)


def test_the_first_validation_set_may_be_called_validation(task, write):
    data = write("validation.jsonl", ROWS)
    assert len(load_rows(task(hub=MNLI), data, "near")) == 50
    with pytest.raises(UserError, match=r"has no far: it contains validation\.jsonl"):
        load_rows(task(hub=MNLI), data, "far")


def test_the_hub_name_of_a_split_names_its_file(task, write):
    data = write("dev.jsonl", ROWS)
    renamed = task(hub={"path": "x/y", "splits": {"train": "train", "validation": "dev"}})
    assert evaluation_splits(renamed, "validation", data) == ["dev"]
    assert len(load_rows(renamed, data, "validation")) == 50


def test_a_missing_split_lists_the_files(task, write, tmp_path):
    data = write("train.jsonl", ROWS)
    write("notes.txt", "not data")
    with pytest.raises(
        UserError,
        match=r"has no validation: it contains notes\.txt, train\.jsonl\nExpected validation with an extension \.parquet",
    ):
        load_rows(task(), data, "validation")
    with pytest.raises(
        UserError, match=r"has no vaidation: it contains notes\.txt, train\.jsonl; did you mean validation\?\n"
    ):
        load_rows(task(), data, "vaidation")
    with pytest.raises(
        UserError, match=r"or a save_to_disk folder; for training, set data\.split\.validation=0\.1 to [a-z ]*$"
    ):
        load_rows(task(), data, "validation")
    with pytest.raises(UserError, match="has no folder birds: it contains pets"):
        load_rows(task(name="birds"), data, "train")
    with pytest.raises(UserError, match="no such folder"):
        load_rows(task(), DataConfig(dir=str(tmp_path / "nowhere")), "train")
    with pytest.raises(UserError, match=r"has neither hub nor corpus.*\nSet data\.dir=DIR"):
        load_rows(task(), DataConfig(), "train")


def test_the_source_is_checked_without_reading(task, write):
    data = write("train.parquet", b"no parquet")
    write("validation.parquet", b"no parquet")
    check_source(task(), data)
    with pytest.raises(UserError, match="has no test"):
        check_source(task(), data, ["test"])
    with pytest.raises(UserError, match="neither hub nor corpus"):
        check_source(task(), DataConfig())
    check_source(task(hub=MNLI), DataConfig())
    check_source(task(corpus="movies"), DataConfig())


# --- a part of a split --------------------------------------------------------------------------------


def test_parts_divide_the_rows_of_one_file(task, write):
    pets = task(hub=PARTS)
    data = write("train.jsonl", ROWS)
    train, validation = (load_rows(pets, data, split).texts for split in ("train", "validation"))
    assert (len(train), len(validation)) == (40, 10)
    assert sorted(train + validation) == sorted((row["text"],) for row in ROWS)
    assert [int(text) for (text,) in validation] != list(range(40, 50)), "shuffled: a file may be sorted by label"
    assert load_rows(pets, data, "validation").texts == validation
    assert evaluation_splits(pets, "validation", data) == ["validation"]


def test_a_folder_with_a_file_per_split_is_used_whole(task, write):
    write("train.jsonl", ROWS)
    data = write("validation.jsonl", ROWS[:7])
    pets = task(hub=PARTS)
    assert len(load_rows(pets, data, "train")) == 50
    assert len(load_rows(pets, data, "validation")) == 7


def test_a_part_of_too_few_rows(task, write):
    with pytest.raises(UserError, match="contains no rows"):
        load_rows(
            task(hub={"path": "x/y", "splits": {"train": "train[:10%]", "validation": "train[10%:]"}}),
            write("train.jsonl", ROWS[:2]),
            "train",
        )


@pytest.mark.parametrize("name", ["train[90%:80%]", "train[x]", "train[:100%]", "[:10%]"])
def test_an_invalid_part(task, write, name):
    with pytest.raises(UserError, match="expected a name, or a part such as"):
        load_rows(task(hub={"path": "x/y", "splits": {"train": name}}), write("train.jsonl", ROWS), "train")
