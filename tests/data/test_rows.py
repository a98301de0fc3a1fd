"""Rows read from tables, and the messages for invalid ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion.config.data import DataConfig, LimitConfig
from fusion.data.rows import load_rows, rows_of_file
from fusion.errors import UserError

PETS = [{"text": "meow", "label": 0}, {"text": "woof", "label": 1}, {"text": "purr", "label": 0}]


def test_one_text_column(task, write):
    rows = load_rows(task(), write("train.jsonl", PETS), "train")
    assert rows.texts == [("meow",), ("woof",), ("purr",)]
    assert rows.labels == [0, 1, 0]
    assert rows.choices is None
    assert rows.ignored == 0
    assert len(rows) == 3


def test_two_text_columns_keep_their_order(task, write):
    records = [{"b": "second", "a": "first", "label": 1}]
    rows = load_rows(task(text=["a", "b"]), write("train.parquet", records), "train")
    assert rows.texts == [("first", "second")]


def test_parts_have_all_examples_in_order(task, write):
    rows = load_rows(task(), write("train.jsonl", PETS), "train")
    first, second = rows.parts(2)
    assert [len(first), len(second)] == [2, 1]
    assert first.texts + second.texts == rows.texts
    assert [*(first.labels or ()), *(second.labels or ())] == rows.labels
    assert first.choices is None and first.words is None
    assert len({rows.fingerprint, first.fingerprint, second.fingerprint}) == 3  # the cache of tokens is keyed by it
    assert list(rows.parts(3)) == [rows]


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv", "tsv"])
def test_every_ending_gives_the_same_rows(task, write, ending):
    separator = "\t" if ending == "tsv" else ","
    flat = "".join(f"{text}{separator}{label}\n" for text, label in [("text", "label"), ("007", 1), ("null", 0)])
    records = [{"text": "007", "label": 1}, {"text": "null", "label": 0}]
    data = write(f"train.{ending}", flat if ending in ("csv", "tsv") else records)
    rows = load_rows(task(), data, "train")
    assert rows.texts == [("007",), ("null",)]
    assert rows.labels == [1, 0]


def test_a_byte_order_mark_is_not_part_of_a_name(task, write):
    csv = write("train.csv", "\ufefftext,label\nmeow,0\n")
    assert load_rows(task(), csv, "train").labels == [0]
    jsonl = write("validation.jsonl", '\ufeff{"text": "meow", "label": 0}\r\n\r\n')
    assert load_rows(task(), jsonl, "validation").labels == [0]


def test_the_fingerprint_is_of_the_content(task, write):
    data = write("train.jsonl", PETS)
    write("validation.parquet", PETS)
    write("test.jsonl", [*PETS[:2], {"text": "purr", "label": 1}])
    train, same, other = (load_rows(task(), data, split).fingerprint for split in ("train", "validation", "test"))
    assert train == same != other


# --- columns ----------------------------------------------------------------------------------------


def test_columns_apply_to_a_local_copy(task, write):
    pets = task(columns={"text": "sentence"})
    assert load_rows(pets, write("train.jsonl", [{"sentence": "meow", "label": 0}]), "train").texts == [("meow",)]
    both = write("validation.jsonl", [{"sentence": "other", "text": "meow", "label": 0}])
    assert load_rows(pets, both, "validation").texts == [("meow",)]


def test_nested_columns(task, write):
    records = [{"pet": {"says": "meow"}, "answer": [1, 0]}]
    nested = task(text="pet.says", label="answer.1")
    for ending in ("jsonl", "parquet"):
        rows = load_rows(nested, write(f"train.{ending}", records), "train")
        assert (rows.texts, rows.labels) == ([("meow",)], [0])
        (Path(write(f"train.{ending}", records).dir or "") / "pets" / f"train.{ending}").unlink()


def test_a_missing_column_lists_those_that_exist(task, write):
    with pytest.raises(UserError, match=r"train\.jsonl: no column sentence; found text, label\n.*columns\.sentence="):
        load_rows(task(text="sentence"), write("train.jsonl", PETS), "train")
    with pytest.raises(UserError, match="no column gold"):
        load_rows(task(label="gold"), write("train.jsonl", PETS), "train")


# --- texts ------------------------------------------------------------------------------------------


def test_an_empty_text_is_accepted(task, write):
    assert load_rows(task(), write("train.jsonl", [{"text": "", "label": 0}]), "train").texts == [("",)]
    assert load_rows(task(), write("validation.csv", "text,label\n,0\n"), "validation").texts == [("",)]


# --- choices ----------------------------------------------------------------------------------------


def test_choices_in_a_list(task, write):
    records = [
        {"text": "says meow", "options": ["cat", "dog"], "label": 0},
        {"text": "says oink", "options": ["cat", "dog", "pig"], "label": 2},
    ]
    for ending in ("jsonl", "parquet"):
        rows = load_rows(
            task(kind="choice", choices="options", name=ending), write(f"train.{ending}", records, ending), "train"
        )
        assert rows.choices == [["cat", "dog"], ["cat", "dog", "pig"]]
        assert rows.labels == [0, 2]


def test_choices_in_columns_may_be_fewer_in_some_rows(task, write):
    records = [
        {"text": "t", "a": "cat", "b": "dog", "c": "pig", "label": 2},
        {"text": "t", "a": "cat", "b": "dog", "c": None, "label": 1},
    ]
    rows = load_rows(task(kind="choice", choices=["a", "b", "c"]), write("train.parquet", records), "train")
    assert rows.choices == [["cat", "dog", "pig"], ["cat", "dog"]]


def test_choices_in_structs(task, write):
    as_lists = {"text": "t", "options": {"label": ["A", "B"], "text": ["cat", "dog"]}, "label": 1}
    as_structs = {"text": "t", "options": [{"text": "cat"}, {"text": "dog"}], "label": 1}
    for name, record in {"lists": as_lists, "structs": as_structs}.items():
        pets = task(kind="choice", choices="options.text", name=name)
        assert load_rows(pets, write("train.parquet", [record], name), "train").choices == [["cat", "dog"]]


@pytest.mark.parametrize(
    ("options", "label", "message"),
    [
        (["cat"], 0, "options has 1 choices; expected at least 2"),
        ([], 0, "options has 0 choices"),
        ("cat dog", 0, r"options is 'cat dog' \(str\); expected a list"),
        (None, 0, "options is null; expected a list"),
        (["cat", None], 0, "choice 1 of options is null; expected text"),
        (["cat", "dog"], 2, r"label is 2 \(int\), the choice at 2; expected an index from 0 to 1"),
        (["cat", "dog"], -1, r"label is -1 \(int\); expected the index of the correct choice, 0 to 2"),
        (["cat", "dog"], "A", r"label is 'A' \(str\); expected the index"),
    ],
)
def test_bad_choices(task, write, options, label, message):
    good = {"text": "t", "options": ["a", "b", "c"], "label": 0}
    records = [good, {"text": "t", "options": options, "label": label}]
    with pytest.raises(UserError, match=rf"line 2: {message}"):
        load_rows(task(kind="choice", choices="options"), write("train.jsonl", records), "train")


def test_a_choice_fills_the_blank(task, write):
    pets = task(kind="choice", choices=["a", "b"], blank="_")
    records = [{"text": "The cat saw the dog, and _ ran away.", "a": "the cat", "b": "the dog", "label": 1}]
    rows = load_rows(pets, write("train.jsonl", records), "train")
    assert rows.texts == [("The cat saw the dog, and",)]
    assert rows.choices == [["the cat ran away.", "the dog ran away."]]
    with pytest.raises(UserError, match=r"line 1: expected a blank _"):
        load_rows(pets, write("validation.jsonl", [{**records[0], "text": "none"}]), "validation")


# --- rows without a label -----------------------------------------------------------------------------


def test_ignored_rows_are_counted_and_dropped(task, write):
    records = [*PETS, {"text": "?", "label": -1}, {"text": None, "label": -1}]
    rows = load_rows(task(ignore_labels=[-1]), write("train.parquet", records), "train")
    assert (len(rows), rows.ignored) == (3, 2)


def test_a_null_label_is_ignored_only_if_the_task_sets_it(task, write):
    data = write("train.parquet", [*PETS, {"text": "?", "label": None}])
    with pytest.raises(UserError, match=r"row 4: label is null; .*\n.*ignore_labels=\[null\]"):
        load_rows(task(), data, "train")
    rows = load_rows(task(ignore_labels=[None]), data, "train")
    assert (rows.labels, rows.ignored) == ([0, 1, 0], 1)


@pytest.mark.parametrize("label", [{"label": -1}, {"label": None}, {}])
def test_a_test_split_may_be_without_labels(task, write, label):
    data = write("test.jsonl", [{"text": "a", **label}, {"text": "b", **label}])
    rows = load_rows(task(ignore_labels=[-1]), data, "test")
    assert rows.labels is None
    assert rows.texts == [("a",), ("b",)]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_splits_may_not(task, write, split):
    data = write(f"{split}.jsonl", [{"text": "a", "label": -1}, {"text": "b", "label": -1}])
    with pytest.raises(UserError, match=r"none of the 2 rows has a label"):
        load_rows(task(ignore_labels=[-1]), data, split)


# --- limits -----------------------------------------------------------------------------------------


def limited(data: DataConfig, **limits: int) -> DataConfig:
    return DataConfig(dir=data.dir, limit=LimitConfig(**limits))


def test_a_limit_draws_labelled_rows_always_the_same(task, write):
    records = [{"text": f"{number}", "label": number % 2 if number % 3 else -1} for number in range(300)]
    data = write("train.jsonl", records)
    write("validation.jsonl", records)
    pets = task(ignore_labels=[-1])
    drawn = load_rows(pets, limited(data, train=50), "train")
    assert len(drawn) == 50 and drawn.ignored == 100 and drawn.labels is not None
    assert drawn.texts == load_rows(pets, limited(data, train=50), "train").texts
    assert drawn.texts != load_rows(pets, data, "train").texts[:50]
    assert set(drawn.texts) < set(load_rows(pets, limited(data, train=60), "train").texts)
    assert all(
        int(text) % 3 and int(text) % 2 == label for (text,), label in zip(drawn.texts, drawn.labels, strict=True)
    )
    assert len(load_rows(pets, limited(data, train=50), "validation")) == 200
    assert len(load_rows(pets, limited(data, train=5000), "train")) == 200
    # The draw itself is a promise: runs on other machines and of other years must see these rows.
    five = load_rows(pets, limited(data, train=5), "train").texts
    assert [int(text) for (text,) in five] == [59, 130, 137, 223, 283]


def test_the_validation_limit_applies_to_each_validation_split(task, write):
    two = task(hub={"path": "x/y", "splits": {"train": "train", "validation": ["dev_near", "dev_far"]}})
    records = [{"text": f"{number}", "label": 0} for number in range(9)]
    write("dev_near.jsonl", records)
    data = limited(write("dev_far.jsonl", records), validation=4)
    assert [len(load_rows(two, data, split)) for split in ("dev_near", "dev_far")] == [4, 4]


# --- rows to predict on -------------------------------------------------------------------------------


def test_a_file_to_predict_on(task, write, tmp_path):
    folder = tmp_path / "data" / "pets"
    write("train.csv", "text\n12\n")
    assert rows_of_file(task(), folder / "train.csv").texts == [("12",)]
    write("rows.jsonl", [{"text": "meow"}, {"text": "woof", "label": "nonsense"}])
    rows = rows_of_file(task(), folder / "rows.jsonl")
    assert rows.texts == [("meow",), ("woof",)]
    assert rows.labels is None
    write("null.jsonl", [{"text": None}])
    with pytest.raises(UserError, match=r"null\.jsonl, line 1: text is null"):
        rows_of_file(task(), folder / "null.jsonl")
    write("empty.jsonl", "")
    with pytest.raises(UserError, match=r"empty\.jsonl: contains no rows"):
        rows_of_file(task(), folder / "empty.jsonl")
    with pytest.raises(UserError, match=r"rows\.txt: expected a file with one of the extensions \.parquet"):
        rows_of_file(task(), tmp_path / "rows.txt")
