"""Every task file, on a few rows as the hub has them, on flattened copies, and on real data where there is some."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from fusion.config.data import DataConfig
from fusion.config.task import TaskConfig
from fusion.data.rows import load_rows
from fusion.data.splits import SPLITS, evaluation_splits, locate
from fusion.tasks.task import HubConfig

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "conf" / "task"
PAPER = """mnli qqp sst2 winogrande imdb hellaswag socialiqa cosmosqa scitail argument csqa boolq mrpc sick rte cb"""
REST_OF_GLUE = "cola stsb qnli wnli"
MORE = "snli copa mr subj ag_news trec"
DEMO = "movies products editorials tweets movies_rating products_rating editorials_rating tweets_rating"
KNOWN = [*PAPER.split(), *REST_OF_GLUE.split(), *MORE.split(), *DEMO.split(), "go_emotions"]
NAMES = sorted(path.stem for path in TASKS.iterdir())


def read_task(name: str) -> TaskConfig:
    fields = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
    hub = fields.pop("hub", None)
    return TaskConfig(name=name, hub=HubConfig(**hub) if hub else None, **fields)


def pair(first: str, second: str) -> dict[str, str]:
    return {first: "one", second: "two"}


# name: (a row as the hub has it, its raw labels, what they are, the first row's texts, its choices)
HUB_ROWS: dict[str, tuple[dict[str, Any], list[Any], list[Any], tuple[str, ...], list[str] | None]] = {
    "mnli": (pair("premise", "hypothesis"), [0, 1, 2], [0, 1, 2], ("one", "two"), None),
    "snli": (pair("premise", "hypothesis"), [2, -1, 0], [2, 0], ("one", "two"), None),
    "cb": (pair("premise", "hypothesis"), [0, 1, 2], [0, 1, 2], ("one", "two"), None),
    "qqp": (pair("question1", "question2"), [0, 1], [0, 1], ("one", "two"), None),
    "mrpc": (pair("sentence1", "sentence2"), [0, 1], [0, 1], ("one", "two"), None),
    "rte": (pair("sentence1", "sentence2"), [0, 1], [0, 1], ("one", "two"), None),
    "wnli": (pair("sentence1", "sentence2"), [0, 1], [0, 1], ("one", "two"), None),
    "qnli": (pair("question", "sentence"), [0, 1], [0, 1], ("one", "two"), None),
    "sick": (pair("sentence_A", "sentence_B"), [0, 1, 2], [0, 1, 2], ("one", "two"), None),
    "scitail": (pair("sentence1", "sentence2"), ["entailment", "neutral"], [0, 1], ("one", "two"), None),
    "stsb": (pair("sentence1", "sentence2"), [3.5, 0.0, -1.0], [3.5, 0.0], ("one", "two"), None),
    "boolq": (pair("question", "passage"), [True, False], [1, 0], ("one", "two"), None),
    "argument": (
        pair("topic", "sentence"),
        ["NoArgument", "Argument_for", "Argument_against"],
        [0, 1, 2],
        ("one", "two"),
        None,
    ),
    "sst2": ({"sentence": "one"}, [0, 1], [0, 1], ("one",), None),
    "cola": ({"sentence": "one"}, [0, 1], [0, 1], ("one",), None),
    "imdb": ({"text": "one"}, [0, 1], [0, 1], ("one",), None),
    "mr": ({"text": "one"}, [0, 1], [0, 1], ("one",), None),
    "subj": ({"text": "one", "label_text": "-"}, [0, 1], [0, 1], ("one",), None),
    "ag_news": ({"text": "one"}, [0, 3], [0, 3], ("one",), None),
    "trec": ({"text": "one", "fine_label": 40}, [0, 5], [0, 5], ("one",), None),
    "winogrande": (
        {"sentence": "It fits, as the _ is big.", "option1": "box", "option2": "ball"},
        ["1", "2", ""],
        [0, 1],
        ("It fits, as the",),
        ["box is big.", "ball is big."],
    ),
    "hellaswag": ({"ctx": "one", "endings": list("abcd")}, ["0", "3", ""], [0, 3], ("one",), list("abcd")),
    "socialiqa": (
        {**pair("context", "question"), "answerA": "a", "answerB": "b", "answerC": "c"},
        ["1", "3"],
        [0, 2],
        ("one", "two"),
        list("abc"),
    ),
    "cosmosqa": (
        {**pair("context", "question"), **{f"answer{number}": "abcd"[number] for number in range(4)}},
        [0, 3, -1],
        [0, 3],
        ("one", "two"),
        list("abcd"),
    ),
    "csqa": (
        {"question": "one", "choices": {"label": list("ABCDE"), "text": list("abcde")}},
        ["A", "E", ""],
        [0, 4],
        ("one",),
        list("abcde"),
    ),
    "copa": (
        {**pair("premise", "question"), "choice1": "a", "choice2": "b"},
        [0, 1, -1],
        [0, 1],
        ("one", "two"),
        ["a", "b"],
    ),
    "go_emotions": (
        {"text": "one"},
        [[27], [0, 2], []],
        [[number in ids for number in range(28)] for ids in ([27], [0, 2], [])],
        ("one",),
        None,
    ),
    **{
        name: ({"text": "one"}, ["negative", "neutral", "positive"], [0, 1], ("one",), None)
        for name in ("movies", "products", "editorials", "tweets")
    },
    **{
        f"{name}_rating": ({"text": "one"}, [-3.5, 0.0], [-3.5, 0.0], ("one",), None)
        for name in ("movies", "products", "editorials", "tweets")
    },
}

# Copies that others have made: flattened choices, other names, names or numbers for labels.
COPIES = [
    ("csqa", {"question": "one", "choices": list("abcde")}, "label", [0, 4], [0, 4]),
    ("copa", {**pair("premise", "question"), "choices": ["a", "b"]}, "label", [0, 1], [0, 1]),
    ("subj", {"sentence": "one"}, "label", [0, 1], [0, 1]),
    ("boolq", pair("question", "passage"), "label", [0, 1], [0, 1]),
    ("boolq", pair("question", "passage"), "label", ["False", "True"], [0, 1]),
    ("scitail", pair("premise", "hypothesis"), "label", ["entails", "neutral"], [0, 1]),
    ("winogrande", {"sentence": "a _ b", "option1": "x", "option2": "y"}, "answer", [1, 2], [0, 1]),
    ("sick", pair("sentence_A", "sentence_B"), "label", ["neutral", "contradiction"], [1, 2]),
    ("trec", {"text": "one"}, "label", [0, 5], [0, 5]),
]


def test_shipped_task_files():
    assert len(PAPER.split()) == 16
    assert len(KNOWN) == 35 and set(KNOWN) <= set(NAMES)
    assert set(KNOWN) <= set(HUB_ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_file_matches_the_schema(name):
    text = (TASKS / f"{name}.yaml").read_text()
    fields = yaml.safe_load(text)
    assert set(fields) <= {field.name for field in dataclasses.fields(TaskConfig)} - {"name"}
    assert "_target_" not in text and "${" not in text
    task = read_task(name)
    assert (task.hub is None) != (task.corpus is None) or name == "argument"
    if task.hub is not None:
        assert set(task.hub.splits) <= set(SPLITS) and {"train", "validation"} <= set(task.hub.splits)
        for split in task.hub.splits:
            for published in evaluation_splits(task, split, DataConfig()):
                assert locate(task, DataConfig(), published).part.name


def test_mnli_has_two_validation_splits():
    assert evaluation_splits(read_task("mnli"), "validation", DataConfig()) == [
        "validation_matched",
        "validation_mismatched",
    ]


def load(name: str, records: list[dict[str, Any]], folder: Path, split: str = "train"):
    (folder / name).mkdir()
    for file in {split, "validation"}:  # with a file for validation, train is not shared out
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / name / f"{file}.parquet")
    return load_rows(read_task(name), DataConfig(dir=str(folder)), split)


@pytest.mark.parametrize("name", HUB_ROWS)
def test_rows_in_the_form_of_the_hub(name, tmp_path):
    row, raw, labels, texts, choices = HUB_ROWS[name]
    rows = load(name, [{**row, read_task(name).label: label} for label in raw], tmp_path)
    assert rows.labels == labels
    assert rows.ignored == len(raw) - len(labels)
    assert rows.texts == [texts] * len(labels)
    assert rows.choices == (None if choices is None else [choices] * len(labels))


@pytest.mark.parametrize(("name", "row", "column", "raw", "labels"), COPIES)
def test_rows_of_a_copy(name, row, column, raw, labels, tmp_path):
    rows = load(name, [{**row, column: label} for label in raw], tmp_path)
    assert rows.labels == labels
    assert rows.choices is None or rows.choices[0] in (list("abcde"), ["a", "b"], ["x b", "y b"])


@pytest.mark.parametrize("name", ["mnli", "csqa", "winogrande", "hellaswag", "cosmosqa", "stsb", "cb"])
def test_a_test_split_without_labels(name, tmp_path):
    row, raw, *_ = HUB_ROWS[name]
    task = read_task(name)
    unlabelled = task.ignore_labels[0]
    assert type(unlabelled) is type(raw[0]) or isinstance(raw[0], float)
    assert load(name, [{**row, task.label: unlabelled}] * 3, tmp_path, "test").labels is None


# --- real data ----------------------------------------------------------------------------------------

REAL = Path(os.environ.get("FUSION_DATA_DIR") or ROOT.parent / "shared" / "data")


def counts() -> dict[str, list[int | None]]:
    """The table of the folder's own README: task, rows of train, validation and test."""
    readme = REAL / "README.md"
    lines = readme.read_text().splitlines() if readme.is_file() else []
    found = [re.match(r"\| (\w+) \| (\d+)/(\d+)/(\d+|–) \|", line) for line in lines]
    return {row[1]: [None if n == "–" else int(n) for n in row.groups()[1:]] for row in found if row}


@pytest.mark.skipif(not counts(), reason="no folder of real data")
def test_real_data_has_its_rows():
    """More of the same on real rows; what is promised is proved above, on rows written here."""
    table = counts()
    assert sorted(table) == sorted(path.name for path in REAL.iterdir() if path.is_dir())
    data = DataConfig(dir=str(REAL))
    for name, expected in table.items():
        for split, rows in zip(SPLITS, expected, strict=True):
            if rows is not None:
                loaded = load_rows(read_task(name), data, split)
                assert (len(loaded), loaded.ignored) == (rows, 0), f"{name} {split}"
                assert loaded.labels is not None
