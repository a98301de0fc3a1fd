"""Raw labels in whatever form a copy of a data set has them."""

from __future__ import annotations

import json
from itertools import product

import pyarrow
import pyarrow.parquet
import pytest

from fusion.config.data import DataConfig
from fusion.data.formats import record_table
from fusion.data.rows import load_rows, load_splits
from fusion.errors import UserError
from fusion.tasks.columns import Column
from fusion.tasks.labels import Labels
from fusion.text import hydra_value


def read(task, write, raw, **changes):
    records = [{"text": "t", "label": label} for label in raw]
    return load_rows(task(**changes), write("train.jsonl", records), "train").labels


@pytest.mark.parametrize(
    ("labels", "changes"),
    [
        ([0, 1, 1], {}),
        ([0.0, 1.0, 1.0], {}),  # what a null elsewhere in the column makes of integers
        ([False, True, True], {}),
        (["cat", "dog", "dog"], {}),
        (["c", "d", "d"], {"label_values": ["c", "d"]}),
        (["cat", "dog", "dog"], {"label_values": ["c", "d"]}),
        ([0, 1, 1], {"label_values": ["c", "d"]}),
        (["1", "2", "2"], {"label_values": ["1", "2"]}),
        ([1, 2, 2], {"label_values": ["1", "2"]}),
        ([5, 3, 3], {"label_values": [5, 3]}),
        ([False, True, True], {"label_values": [False, True]}),
        ([0, 1, 1], {"label_values": [False, True]}),
    ],
)
def test_each_form_gives_class_ids(task, write, labels, changes):
    assert read(task, write, labels, **changes) == [0, 1, 1]


@pytest.mark.parametrize(
    ("label", "changes", "message"),
    [
        (2, {}, r"2 \(int\); expected one of 0 \(cat\), 1 \(dog\)"),
        (-1, {}, r"-1 \(int\); .*\n.*ignore_labels=\[-1\]"),
        (0.5, {}, r"0\.5 \(float\)"),
        (
            "cow",
            {},
            r"'cow' \(str\); expected one of \"cat\", \"dog\"\n.*ignore_labels=\[cow\].*, or add it to the task file .a new class to labels",
        ),
        ("0", {}, r"'0' \(str\)"),
        (None, {}, r"null; .*\n.*ignore_labels=\[null\]"),
        (["cat"], {}, r"\['cat'\] \(list\)"),
        ("e", {"label_values": ["c", "d"]}, r"'e' \(str\); expected one of \"c\" \(cat\), \"d\" \(dog\)"),
        (0, {"label_values": [1, 2]}, r"0 \(int\); expected one of 1 \(cat\), 2 \(dog\)"),
        (0, {"label_values": ["1", "2"]}, r"0 \(int\); expected one of \"1\" \(cat\), \"2\" \(dog\)"),
    ],
)
def test_a_label_outside_names_its_row(task, write, label, changes, message):
    first = (changes.get("label_values") or ["cat" if isinstance(label, str) else 0])[0]
    with pytest.raises(UserError, match=rf"train\.jsonl, line 2: label is {message}"):
        read(task, write, [first, label], **changes)


def test_one_form_applies_to_a_whole_column(task, write):
    with pytest.raises(UserError, match=r"line 2: label is 0"):
        read(task, write, ["cat", 0, "dog"])


def test_choices_count_from_zero_by_default(task, write):
    records = [{"text": "t", "a": "x", "b": "y", "label": label} for label in ("1", "2")]
    pairs = task(kind="choice", choices=["a", "b"], label_values=["1", "2"])
    assert load_rows(pairs, write("train.jsonl", records), "train").labels == [0, 1]


def test_values(task, write):
    labels = read(task, write, [0, 2.5, -1], kind="regression")
    assert labels == [0.0, 2.5, -1.0]
    assert all(type(label) is float for label in labels)


@pytest.mark.parametrize(
    ("label", "message"),
    [(float("nan"), "nan"), (float("inf"), "inf"), (None, "null"), ("2.5", "'2.5'"), (True, "True")],
)
def test_a_non_finite_value_names_its_row(task, write, label, message):
    with pytest.raises(UserError, match=rf"line 2: label is {message}.*expected a finite number"):
        read(task, write, [1.5, label], kind="regression")


def test_the_override_for_one_more_ignored_label_keeps_the_others(task, write):
    """The override for one row keeps the label that is ignored already."""
    with pytest.raises(UserError, match=r"'task\.ignore_labels=\[unknown,null,4\]'"):
        read(task, write, ["cat", "unknown", None, 4], labels=["cat", "dog"], ignore_labels=["unknown", None])


def test_a_nan_is_ignored_where_null_is(task, write):
    assert read(task, write, [1.5, float("nan"), None], kind="regression", ignore_labels=[None]) == [1.5]


# --- one meaning in every column, split and format ---------------------------------------------------


def written(labels, ending):
    """A file of these raw labels, in bytes."""
    if ending in ("csv", "tsv"):
        mark = {"csv": ",", "tsv": "\t"}[ending]
        as_text = [label if isinstance(label, str) else json.dumps(label) for label in labels]
        return "".join(f"{text}{mark}{label}\n" for text, label in [("text", "label"), *(("t", x) for x in as_text)])
    return [{"text": "t", "label": label} for label in labels]


FIVE = ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("raw", "names", "ids"),
    [
        ([True, False, True], ["true", "false"], [0, 1, 0]),
        ([True, False, True], ["false", "true"], [1, 0, 1]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
        (["true", "false"], ["true", "false"], [0, 1]),
        (["TRUE", "FALSE"], ["true", "false"], [0, 1]),
        ([True, True], ["no", "yes"], [1, 1]),
        ([True, False], ["0", "1"], [1, 0]),
        ([1, 2, 3, 4], FIVE, [0, 1, 2, 3]),
        ([1, 2, 3, 4, 5], FIVE, [0, 1, 2, 3, 4]),
        ([1.0, 2.0], FIVE, [0, 1]),
        (["1", "2"], FIVE, [0, 1]),
        ([1], FIVE, [0]),
        ([0, 1], ["1", "0"], [1, 0]),
        ([0, 0], ["1", "0"], [1, 1]),
        ([-1, 0, 1], ["-1", "0", "1"], [0, 1, 2]),
        ([0.5, 1.5], ["0.5", "1.5"], [0, 1]),
        (["01", "1"], ["1", "01"], [1, 0]),
        ([0, 2, 1], ["cat", "dog", "pig"], [0, 2, 1]),
        (["cat", "dog"], ["dog", "cat"], [1, 0]),
    ],
)
def test_a_name_means_its_label_in_every_format(task, write, ending, raw, names, ids):
    data = write(f"train.{ending}", written(raw, ending))
    assert load_splits(task(labels=names), data, ["train"])[0]["train"].labels == ids


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("raw", "names", "message"),
    [
        ([0, 1], FIVE, r"label is '?0'? .*expected one of \"1\", \"2\""),
        ([0, 1], ["true", "false"], r"label is '?0'? .*expected one of \"true\", \"false\""),
        ([True, False], ["1", "0"], r"label is '?[Tt]rue'? .*expected one of \"1\", \"0\""),
        ([True, False], ["cat", "dog", "pig"], r"label is '?[Tt]rue'? .*expected one of 0 \(cat\)"),
    ],
)
def test_an_ambiguous_number_or_boolean_is_not_an_id(task, write, ending, raw, names, message):
    with pytest.raises(UserError, match=message):
        load_rows(task(labels=names), write(f"train.{ending}", written(raw, ending)), "train")


@pytest.mark.parametrize("names", [FIVE[:3], ["a", "b", "c"], ["true", "false", "maybe"], ["c", "1", "b"]])
@pytest.mark.parametrize("values", [None, ["x", "y", "z"], [3, 2, 1], ["b", "c", "a"]])
def test_a_label_means_the_same_whatever_else_is_in_the_column(task, names, values):
    """Every column of up to three raw labels is refused, or read as each of its labels alone."""
    every = [0, 1, 2, 3, "1", "a", "b", "c", "x", True]
    labels = Labels(task(labels=names, label_values=values))

    def ids(column):
        table = record_table([{"label": raw} for raw in column], where="here")
        raw = Column(list(column), table)
        try:
            return labels.read(raw, labels.keys(raw), list(range(len(column))))[0]
        except UserError:
            return None

    alone = {(type(raw), raw): ids([raw]) for raw in every}
    columns = 0
    for size in (2, 3):
        for column in product(every, repeat=size):
            together = ids(column)
            if together is not None:
                columns += 1
                assert together == [alone[type(raw), raw][0] for raw in column], column
    assert columns >= 2


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_an_ignored_label_changes_no_other(task, write, ending):
    own = task(labels=["true", "false"], ignore_labels=["unknown"])
    write(f"train.{ending}", written([True, "unknown", False], ending))
    data = write(f"validation.{ending}", written([True, False], ending))
    rows, way = load_splits(own, data, ["train", "validation"])
    assert [one.labels for one in rows.values()] == [[0, 1], [0, 1]] and way == "names"


def test_all_splits_are_read_alike(task, write):
    write("train.jsonl", written(["cat", "dog"], "jsonl"))
    data = write("validation.jsonl", written([0, 1], "jsonl"))
    with pytest.raises(UserError, match=r"validation.jsonl: its labels are ids, but those of train are names"):
        load_splits(task(), data, ["train", "validation"])
    values = [["cat", 0], ["dog", 1]]
    rows, way = load_splits(task(label_values=values), data, ["train", "validation"])
    assert [one.labels for one in rows.values()] == [[0, 1], [0, 1]] and way == "label_values"


@pytest.mark.parametrize("kind", ["classification", "choice"])
def test_numbers_that_may_count_from_one_are_refused(task, write, kind):
    changes = {"kind": kind, "choices": ["a", "b", "c", "d"]} if kind == "choice" else {"labels": list("abcd")}

    def records(*labels):
        return [{"text": "t", "label": label, **{name: name for name in "abcd"}} for label in labels]

    write("train.jsonl", records(1, 2, 3))
    data = write("validation.jsonl", records(2, 1))
    message = "label is 1 to 3 and never 0, .*zero-based or one-based\n.*1: 'task.label_values=\\[1,2,3,4\\]'.*'task.label_values="
    with pytest.raises(UserError, match=message):
        load_splits(task(**changes), data, ["train", "validation"])
    counted = task(**changes, label_values=[1, 2, 3, 4])
    assert load_splits(counted, data, ["train"])[0]["train"].labels == [0, 1, 2]
    from_zero = task(**changes, label_values=[0, 1, 2, 3])
    assert load_splits(from_zero, data, ["train"])[0]["train"].labels == [1, 2, 3]
    # A 0 in any split shows that they count from 0, and so does the stored training.
    assert load_splits(task(**changes), data, ["train"], "ids")[0]["train"].labels == [1, 2, 3]
    rows, way = load_splits(task(**changes), write("validation.jsonl", records(0)), ["train", "validation"])
    assert rows["train"].labels == [1, 2, 3] and way == "ids"
    data = write("train.jsonl", records(1, 2, 3, 4))
    with pytest.raises(UserError, match=r"start at 1: 'task.label_values=\[1,2,3,4\]'") as refusal:
        load_rows(task(**changes), data, "train")
    assert "ignore_labels" not in str(refusal.value)


def test_no_name_is_proposed_as_an_ignored_label(task, write):
    for labels, changes in [
        (["cat", 0], {}),
        ([1, "x", 2], {"labels": FIVE}),
        (["b", "a"], {"labels": ["a", "b"], "label_values": ["b", "c"]}),
        ([1, "01"], {"labels": ["1", "01"]}),
    ]:
        with pytest.raises(UserError) as refusal:
            read(task, write, labels, **changes)
        for name in (*changes.get("labels", ()), "cat", "dog", 0, 1, 2):
            assert f"ignore_labels=[{hydra_value(name)}]" not in str(refusal.value)


def test_ignored_labels_are_compared_as_labels_are(task, write):
    for raw, ignored in [("-1", -1), (-1, "-1"), (-1.0, -1), (None, ""), ("", None), ("true", True)]:
        assert read(task, write, ["cat", raw, "dog"], ignore_labels=[ignored]) == [0, 1]
    csv = write("validation.csv", "text,label\nt,0\nt,-1\nt,\nt,1\n")
    assert load_rows(task(ignore_labels=[-1, None]), csv, "validation").labels == [0, 1]
    assert load_rows(task(ignore_labels=["-1", ""]), csv, "validation").labels == [0, 1]


def test_the_values_of_a_csv_do_not_depend_on_a_label_that_is_ignored(task, write):
    own = task(kind="regression", ignore_labels=["unknown"])
    data = write("train.csv", "text,label\nt,1\nt,unknown\nt,2.5\nt, -3e1\n")
    assert load_rows(own, data, "train").labels == [1.0, 2.5, -30.0]
    data = write("validation.csv", "text,label\nt,1\nt,nan\n")
    assert load_rows(task(kind="regression", ignore_labels=[None]), data, "validation").labels == [1.0]
    for value in ("x", "true", "inf", "1_0", "0x1", "1" * 5000):
        with pytest.raises(UserError, match=r"row 2: label is .*expected a finite number"):
            load_rows(task(kind="regression"), write("train.csv", f"text,label\nt,1\nt,{value}\n"), "train")


# --- names in the file -------------------------------------------------------------------------------


def with_classes(path, labels, names, column="label", **others):
    """A parquet file as the hub's library writes it, with the names of its classes."""
    features = {column: {"names": names, "_type": "ClassLabel"}}
    table = pyarrow.table({"text": ["t"] * len(labels), column: labels, **others})
    kept = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table.replace_schema_metadata(kept), path)


def read_classes_of(task, write, tmp_path, raw, names, **changes):
    data = write("test.jsonl", "")
    others = {name: ["t"] * len(raw) for name in changes.get("choices", ())}
    with_classes(tmp_path / "data" / "pets" / "train.parquet", raw, names, **others)
    return load_splits(task(**changes), data, ["train"])[0]["train"].labels


@pytest.mark.parametrize(
    ("names", "changes", "ids"),
    [
        (["cat", "dog"], {}, [0, 1, 1]),
        (["dog", "cat"], {}, [1, 0, 0]),
        (["dog", "cat"], {"label_values": ["c", "d"]}, [1, 0, 0]),
        (["d", "c"], {"label_values": ["c", "d"]}, [1, 0, 0]),
        (["1", "0"], {"labels": ["0", "1"]}, [1, 0, 0]),
        (["true", "false"], {"labels": ["False", "True"]}, [1, 0, 0]),
        (["neg", "pos"], {"labels": ["negative", "positive"]}, [0, 1, 1]),
        (["a", "b"], {"kind": "choice", "choices": ["a", "b"]}, [0, 1, 1]),
        (["b", "a"], {"kind": "choice", "choices": ["a", "b"]}, [1, 0, 0]),
        (["B", "A"], {"kind": "choice", "choices": ["a", "b"], "label_values": ["A", "B"]}, [1, 0, 0]),
        (["0", "1"], {"kind": "choice", "choices": ["a", "b"]}, [0, 1, 1]),
    ],
)
def test_ids_of_a_class_label_map_to_its_names(task, write, tmp_path, names, changes, ids):
    assert read_classes_of(task, write, tmp_path, [0, 1, 1], names, **changes) == ids


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        (["neg", "pos"], {}),
        (["pos", "neg"], {"labels": ["negative", "positive"]}),
        (["yes", "no"], {"kind": "choice", "choices": ["a", "b"]}),
    ],
)
def test_other_names_of_a_class_label_are_refused(task, write, tmp_path, names, changes):
    with pytest.raises(UserError, match=rf"row 1: label is 0 .*ClassLabel is '{names[0]}'.*\n.*label_values"):
        read_classes_of(task, write, tmp_path, [0, 1, 1], names, **changes)


def test_a_class_can_be_ignored_by_name_or_id(task, write, tmp_path):
    for ignored in (["pig", -1], [0, -1]):
        labels = read_classes_of(task, write, tmp_path, [0, 1, -1, 2], ["pig", "dog", "cat"], ignore_labels=ignored)
        assert labels == [1, 0]


def test_a_hub_column_has_its_names_too(task, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with_classes(tmp_path / "pets" / "train.parquet", [0, 1, 1], ["dog", "cat"], column="gold")
    own = task(hub={"path": str(tmp_path / "pets"), "splits": {"train": "train"}}, columns={"label": "gold"})
    assert load_rows(own, DataConfig(), "train").labels == [1, 0, 0]


# --- multiple raw values for one label ---------------------------------------------------------------


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_label_may_have_multiple_raw_values(task, write, ending):
    own = task(label_values=[["A", 1, "one"], "B"])
    data = write(f"train.{ending}", written(["A", 1, "one", "B", "1"], ending))
    assert load_rows(own, data, "train").labels == [0, 0, 0, 1, 0]
    data = write(f"train.{ending}", written(["A", "two"], ending))
    with pytest.raises(UserError, match=r"'two' \(str\); expected one of \"A\" or 1 or \"one\" \(cat\), \"B\" \(dog"):
        load_rows(own, data, "train")


def test_one_raw_value_maps_to_one_label(task, write):
    with pytest.raises(UserError, match=r"label_values: 1 \(int\) and '1' \(str\) are the same raw label"):
        read(task, write, [1], label_values=[["A", 1], ["B", "1"]])
    assert read(task, write, ["01", "1"], label_values=["1", "01"]) == [1, 0]


def test_label_values_take_precedence_over_names(task, write):
    assert read(task, write, ["dog", "cat"], label_values=["dog", "cat"]) == [0, 1]
    assert read(task, write, [1, 0], labels=["1", "2"], label_values=[0, 1]) == [1, 0]


def test_shards_with_other_names_of_a_class_label_are_refused(task, tmp_path):
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        with_classes(tmp_path / "pets" / f"train-0000{number}-of-00002.parquet", [0, 1], names)
    with pytest.raises(UserError, match=r"00001-of-00002.parquet: column label differs from train-00000"):
        load_rows(task(), DataConfig(dir=str(tmp_path)), "train")
