"""Raw labels in whatever form a copy of a data set has them."""

from __future__ import annotations

import pytest

from fusion.data.rows import load_rows
from fusion.errors import UserError


def read(task, write, labels, **changes):
    records = [{"text": "t", "label": label} for label in labels]
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
        ([0, 1, 1], {"label_values": ["1", "2"]}),
        ([5, 3, 3], {"label_values": [5, 3]}),
        ([False, True, True], {"label_values": [False, True]}),
        ([0, 1, 1], {"label_values": [False, True]}),
    ],
)
def test_each_form_gives_class_ids(task, write, labels, changes):
    assert read(task, write, labels, **changes) == [0, 1, 1]


@pytest.mark.parametrize(
    ("label", "changes", "said"),
    [
        (2, {}, r"2 \(int\); expected one of 0 \(cat\), 1 \(dog\)"),
        (-1, {}, r"-1 \(int\); .*\n.*ignore_labels=\[-1\]"),
        (0.5, {}, r"0\.5 \(float\)"),
        ("cow", {}, r"'cow' \(str\); .*\n.*ignore_labels=\[\"cow\"\]"),
        ("0", {}, r"'0' \(str\)"),
        (None, {}, r"null; .*\n.*ignore_labels=\[null\]"),
        (["cat"], {}, r"\['cat'\] \(list\)"),
        ("e", {"label_values": ["c", "d"]}, r"'e' \(str\); expected one of \"c\" \(cat\), \"d\" \(dog\)"),
        (0, {"label_values": [1, 2]}, r"0 \(int\); expected one of 1 \(cat\), 2 \(dog\)"),
    ],
)
def test_a_label_outside_names_its_row(task, write, label, changes, said):
    first = (changes.get("label_values") or ["cat" if isinstance(label, str) else 0])[0]
    with pytest.raises(UserError, match=rf"train\.jsonl, line 2: label is {said}"):
        read(task, write, [first, label], **changes)


def test_one_form_serves_a_whole_column(task, write):
    with pytest.raises(UserError, match=r"line 2: label is 0"):
        read(task, write, ["cat", 0, "dog"])


def test_choices_count_from_zero_unless_the_task_says_otherwise(task, write):
    records = [{"text": "t", "a": "x", "b": "y", "label": label} for label in ("1", "2")]
    pairs = task(kind="choice", choices=["a", "b"], label_values=["1", "2"])
    assert load_rows(pairs, write("train.jsonl", records), "train").labels == [0, 1]


def test_values(task, write):
    labels = read(task, write, [0, 2.5, -1], kind="regression")
    assert labels == [0.0, 2.5, -1.0]
    assert all(type(label) is float for label in labels)


@pytest.mark.parametrize(
    ("label", "said"),
    [(float("nan"), "nan"), (float("inf"), "inf"), (None, "null"), ("2.5", "'2.5'"), (True, "True")],
)
def test_a_value_that_is_no_finite_number_names_its_row(task, write, label, said):
    with pytest.raises(UserError, match=rf"line 2: label is {said}.*expected a finite number"):
        read(task, write, [1.5, label], kind="regression")


def test_a_nan_is_ignored_where_null_is(task, write):
    assert read(task, write, [1.5, float("nan"), None], kind="regression", ignore_labels=[None]) == [1.5]
