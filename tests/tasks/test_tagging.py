"""`kind: tagging`: labels per word, the loss against torch's own, and entities against a slow count."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from fusion.config.data import DataConfig
from fusion.config.model import HeadConfig
from fusion.config.stages import Stage1Config
from fusion.config.task import TaskConfig
from fusion.config.training import LossConfig
from fusion.data.rows import Rows, load_rows, load_splits, rows_of_file
from fusion.errors import UserError
from fusion.layers.heads import TaskHead
from fusion.tasks import tagging
from fusion.tasks.tagging import Tagging, entity_counts, entity_scores
from fusion.tasks.task import HubConfig

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
TAGGING = Tagging()
CONF = Path(__file__).parents[2] / "conf" / "task"
WORDS = [["Anna", "saw", "New", "York"], ["it", "is"]]
NAMED = [["B-PER", "O", "B-LOC", "I-LOC"], ["O", "O"]]
IDS = [[1, 0, 3, 4], [0, 0]]


def make_task(**changes: Any) -> TaskConfig:
    fields: dict[str, Any] = {
        "name": "people",
        "kind": "tagging",
        "text": "tokens",
        "label": "ner_tags",
        "labels": TAGS,
        "metrics": ["entity_f1", "entity_precision", "entity_recall", "token_accuracy"],
        "columns": {"tokens": "0", "ner_tags": "1"},
    }
    return TaskConfig(**fields | changes)


def conll(words: Sequence[Sequence[str]], tags: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        "".join(f"{word}\t{tag}\n" for word, tag in zip(*pair, strict=True)) for pair in zip(words, tags, strict=True)
    )


Write = Callable[..., DataConfig]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(content: Any, split: str = "train", ending: str = "jsonl") -> DataConfig:
        folder = tmp_path / "data" / "people"
        folder.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            content = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{split}.{ending}").write_text(content, encoding="utf-8")
        return DataConfig(dir=str(tmp_path / "data"))

    return put


def rows(words: Any, tags: Any) -> list[dict[str, Any]]:
    return [{"tokens": w, "ner_tags": t} for w, t in zip(words, tags, strict=True)]


# --- entities -----------------------------------------------------------------------------------------


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Word by word, as conlleval's startOfChunk and endOfChunk decide."""
    found, start = set(), 0
    for place, (before, tag, after) in enumerate(zip(["O", *tags], tags, [*tags[1:], "O"], strict=False)):
        if tag == "O":
            continue
        if before == "O" or tag[0] == "B" or before[2:] != tag[2:]:
            start = place
        if after == "O" or after[0] == "B" or after[2:] != tag[2:]:
            found.add((start, place, tag[2:]))
    return found


def test_entities_equal_those_of_a_reference_count() -> None:
    draw = random.Random(0)
    labels = ["O", "O", "B-a", "I-a", "B-b-c", "I-b-c"]
    sizes = [draw.randrange(12) for _ in range(300)]
    true, predicted = ([draw.choices(labels, k=size) for size in sizes] for _ in range(2))
    predicted = [one if draw.random() < 0.3 else other for one, other in zip(true, predicted, strict=True)]
    expected = [
        (len(spans(one) & spans(other)), len(spans(other)), len(spans(one)))
        for one, other in zip(true, predicted, strict=True)
    ]
    counts = entity_counts(true, predicted)
    assert counts.tolist() == [list(row) for row in expected]
    right, found, there = np.array(expected).sum(0)
    precision, recall = right / found, right / there
    assert entity_scores(counts) == pytest.approx(
        {
            "entity_f1": 2 * precision * recall / (precision + recall),
            "entity_precision": precision,
            "entity_recall": recall,
        }
    )


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["O", "I-PER"], 1),  # invalid BIO: an entity starts anyway
        (["B-PER", "I-LOC"], 2),
        (["I-PER", "B-PER", "I-PER"], 2),  # IOB1
        (["B-PER", "B-PER"], 2),
        ([], 0),
    ],
)
def test_entities_from_tags(tags: list[str], expected: int) -> None:
    assert entity_counts([tags], [tags]).tolist() == [[expected] * 3]


def test_no_predicted_and_no_true_entities() -> None:
    nothing = {"entity_f1": 0.0, "entity_precision": 0.0, "entity_recall": 0.0}
    assert entity_scores(entity_counts([["O"]], [["O"]])) == nothing
    assert entity_scores(entity_counts([["B-a"]], [["O"]])) == nothing
    assert entity_scores(entity_counts([["O"]], [["B-a"]])) == nothing


def test_metrics_of_ids() -> None:
    predicted = [[1, 0, 3, 0], [0, 0]]
    assert TAGGING.metrics(make_task(), IDS, predicted) == {
        "entity_f1": 0.5,
        "entity_precision": 0.5,
        "entity_recall": 0.5,
        "token_accuracy": 5 / 6,
    }
    parts = make_task(labels=["NOUN", "VERB"], metrics=["token_accuracy"])
    assert TAGGING.metrics(parts, [[0, 1], [1]], [[0, 0], [1]]) == {"token_accuracy": 2 / 3}


# --- loss and predictions -----------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_mean_of_torch_over_words(smoothing: float) -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 4, 5)
    labels = torch.tensor([[1, 0, 3, 4], [0, 2, -100, -100], [-100] * 4])
    scores[labels < 0] = float("-inf")
    scores.requires_grad_(True)
    weights = TAGGING.loss_weights(labels.numpy(), None)
    assert weights.tolist() == [4.0, 2.0, 0.0]
    per_row = TAGGING.loss(scores, labels, smoothing=smoothing)
    mean = per_row.sum() / weights.sum()
    given = scores.detach().clone().requires_grad_(True)
    expected = F.cross_entropy(given[labels >= 0], labels[labels >= 0], label_smoothing=smoothing)
    torch.testing.assert_close(mean, expected)
    assert per_row[2] == 0
    mean.backward()
    expected.backward()
    torch.testing.assert_close(scores.grad, given.grad)
    if not smoothing:
        torch.testing.assert_close(TAGGING.mean_loss(scores, labels), expected)


def test_predictions_exclude_padding() -> None:
    scores = torch.full((2, 3, 2), float("-inf"))
    scores[0] = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 3.0]])
    scores[1, 0] = torch.tensor([float("nan"), 0.0])  # of a training that diverged: still a word
    assert TAGGING.outputs(scores) == [[1, 0, 1], [0]]
    task = make_task(labels=["O", "B-a"])
    first, second = TAGGING.lines(task, scores, None, {})
    assert first["labels"] == ["B-a", "O", "B-a"] and len(first["scores"]) == 3
    assert first["scores"][2] == pytest.approx(float(torch.tensor([0.0, 3.0]).softmax(0)[1]))
    assert second["labels"] == ["O"] and len(second["scores"]) == 1
    assert TAGGING.plain_labels(torch.tensor([[1, 0, 1], [0, -100, -100]])) == [[1, 0, 1], [0]]
    described = TAGGING.describe(task, first, [1, 0, 0])
    assert described == {"predicted": "B-a O B-a", "truth": "B-a O O", "right": False}


def test_the_head_scores_words_whatever_the_pooling_is() -> None:
    head = TAGGING.make_head(4, 3, "mean", layers=2, dropout=0.5)
    assert isinstance(head, TaskHead) and head.pooling == "words" and head.dense is not None


# --- reading ------------------------------------------------------------------------------------------


def test_files_with_words_and_tags(write: Write, tmp_path: Path) -> None:
    data = write(rows(WORDS, NAMED))
    read = load_rows(make_task(), data, "train")
    assert (read.words, read.labels, read.texts) == (WORDS, IDS, [("Anna saw New York",), ("it is",)])
    write(conll(WORDS, NAMED), "validation", "conll")
    write(rows(WORDS, IDS), "test")
    by_split, way = load_splits(make_task(), data, ["train", "validation"])
    assert by_split["validation"].labels == IDS and way == "names"
    assert by_split["validation"].fingerprint == read.fingerprint
    assert load_rows(make_task(), data, "test").labels == IDS
    with pytest.raises(UserError, match="expected one format in all splits"):
        load_splits(make_task(), data, ["train", "test"])


def test_predict_needs_only_words(tmp_path: Path) -> None:
    path = tmp_path / "sentences.conll"
    path.write_text("Anna\nsaw\n\nit\n")
    read = rows_of_file(make_task(), path)
    assert read.words == [["Anna", "saw"], ["it"]] and read.labels is None
    path = tmp_path / "sentences.jsonl"
    path.write_text('{"tokens": []}\n{"tokens": ["a"]}\n')
    assert rows_of_file(make_task(), path).words == [[], ["a"]]  # a prediction for each row


def test_different_word_boundaries_are_different_rows(write: Write) -> None:
    def fingerprint(words: list[str]) -> str:
        return load_rows(make_task(), write(rows([words], [["O"] * len(words)])), "train").fingerprint

    assert fingerprint(["New York", "it"]) != fingerprint(["New", "York it"])


def test_a_row_without_words_is_dropped(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    data = write(rows([*WORDS, []], [*NAMED, []]))
    read = load_rows(make_task(), data, "train")
    assert (read.words, read.labels) == (WORDS, IDS)
    assert "1 of 3 rows have no words and are dropped" in caplog.text
    with pytest.raises(UserError, match="all 1 rows have no words"):
        load_rows(make_task(), write(rows([[]], [[]])), "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (rows([["a", "b"]], [["O"]]), r"line 1: ner_tags has 1 labels for 2 words; expected one per word"),
        (rows([["a"], []], [["O"], ["O"]]), r""),
        (rows([["a"]], ["O"]), r"line 1: ner_tags is 'O' \(str\); expected a list of labels"),
        (rows([["a"]], [None]), r"line 1: ner_tags is null; expected a list"),
        (rows(["a"], [["O"]]), r"line 1: tokens is 'a' \(str\); expected a list of words"),
        (rows([["a", 1]], [["O", "O"]]), r"line 1: word 2 of tokens is 1 \(int\); expected text"),
        (rows([["\ud800"]], [["O"]]), r"line 1: word 1 of tokens has a lone surrogate"),
        (
            rows([["a"], ["b", "Rome"]], [["O"], ["O", "B-GPE"]]),
            r"line 2: ner_tags is 'B-GPE' \(str\); expected one of .*O.*I-LOC",
        ),
        ([{"tokens": ["a"]}], r"no column ner_tags; found tokens"),
    ],
)
def test_invalid_rows_are_refused(content: Any, message: str, write: Write) -> None:
    if not message:
        assert load_rows(make_task(), write(content), "train").labels == [[0]]
        return
    with pytest.raises(UserError, match=message):
        load_rows(make_task(), write(content), "train")


def test_an_unknown_tag_of_a_conll_file(write: Write) -> None:
    data = write("a\tO\n\nb\tO\nRome\tB-GPE\n", ending="conll")
    with pytest.raises(UserError, match=r"train\.conll, sentence at line 3: ner_tags is 'B-GPE' .*; exp"):
        load_rows(make_task(), data, "train")
    with pytest.raises(UserError, match=r"no column 3; found 0, 1|no column ner_tags; found 0, 1"):
        load_rows(make_task(columns={"tokens": "0", "ner_tags": "3"}), data, "train")


@pytest.mark.parametrize("name", ["conll2003", "wnut17"])
def test_shipped_task_files_read_the_hubs_form_and_conlls(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    task = TaskConfig(**content | {"name": name, "hub": HubConfig(**content["hub"])})
    names = task.labels
    tags = [[names[1], names[2], "O"], [names[-2]]]
    words = [["New", "York", "is"], ["it"]]
    # The hub's ids count in another order here: only the names matter.
    order = list(reversed(names))
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=order)),
        }
    )
    ids = [[order.index(tag) for tag in row] for row in tags]
    data = datasets.Dataset.from_dict({"id": ["0", "1"], "tokens": words, "ner_tags": ids}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    read = load_rows(task, DataConfig(), "train")
    assert read.labels == [[names.index(tag) for tag in row] for row in tags] and read.words == words
    columns = int(task.columns["ner_tags"]) - 1
    folder = tmp_path / name
    folder.mkdir()
    between = "x\t" * columns
    sentences = [
        "".join(f"{w}\t{between}{t}\n" for w, t in zip(*pair, strict=True)) for pair in zip(words, tags, strict=True)
    ]
    (folder / "train.conll").write_text("-DOCSTART- -X- O O\n\n" + "\n".join(sentences))
    local: Rows = load_rows(task, DataConfig(dir=str(tmp_path)), "train")
    assert (local.words, local.labels) == (read.words, read.labels)
    assert local.fingerprint == read.fingerprint


# --- settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": ["a", "b"]}, r"text=\[a,b\]: expected one column, with a list of words"),
        ({"labels": ["O"]}, "expected at least 2 label names"),
        ({"labels": ["O", "O"]}, "duplicate O"),
        ({"labels": ["O", "B-a", "E-a"]}, r"entity_f1 needs BIO labels \(O, B-TYPE, I-TYPE\), but labels contains E-a"),
        ({"labels": ["O", "B-"]}, r"labels contains B-;"),
        ({"label_values": [1, 2]}, "label_values has 2 entries for 5 labels"),
        ({"ignore_labels": [-1]}, "ignore_labels=.*.*every word has a label; leave it out"),
        ({"metrics": ["accuracy"]}, "metrics=\\[accuracy\\]: expected one or more of entity_f1, entity_pre"),
        ({"choices": "c"}, "choices is only allowed for kind=choice, not tagging"),
    ],
)
def test_invalid_task_files_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(**changes)


def test_entities_need_nervaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tagging, "can_count_entities", lambda: False)
    with pytest.raises(UserError, match=r"entity_f1 needs the package nervaluate \(Python 3\.11"):
        make_task()
    assert make_task(metrics=["token_accuracy"]).metrics == ["token_accuracy"]


def test_settings_that_do_not_apply_are_refused() -> None:
    with pytest.raises(UserError, match=r"head\.pooling=mean: people is a task of kind tagging, whose head"):
        Stage1Config(task=make_task(), head=HeadConfig(pooling="mean"))
    with pytest.raises(UserError, match=r"people has no classes \(tagging\); leave it out"):
        LossConfig(class_weights="balanced").check([make_task()])
    LossConfig(label_smoothing=0.1).check([make_task()])
