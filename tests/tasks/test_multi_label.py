"""Sets of labels: how they are read, the loss, the metrics by loops and by scikit-learn, and the threshold."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusion.config.data import DataConfig, SplitConfig
from fusion.config.task import TaskConfig
from fusion.config.training import LossConfig
from fusion.data.encode import label_array
from fusion.data.rows import load_rows, load_splits
from fusion.data.splits import check_held_out_splits
from fusion.errors import UserError
from fusion.tasks.multi_label import MultiLabel, best_threshold

KIND = MultiLabel()
NAMES = ["joy", "anger", "fear"]


def task(**changes: Any) -> TaskConfig:
    settings: dict[str, Any] = {
        "name": "moods",
        "kind": "multi_label",
        "text": "text",
        "label": "moods",
        "labels": NAMES,
        "metrics": ["micro_f1", "macro_f1", "subset_accuracy"],
    }
    return TaskConfig(**settings | changes)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(moods: list[Any], ending: str = "jsonl", split: str = "train") -> DataConfig:
        folder = tmp_path / "moods"
        folder.mkdir(exist_ok=True)
        path = folder / f"{split}.{ending}"
        rows = [{"text": f"t{number}", "moods": value} for number, value in enumerate(moods)]
        if ending == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif ending == "csv":
            path.write_text("text,moods\n" + "".join(f"{row['text']},{row['moods']}\n" for row in rows))
        else:
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return DataConfig(dir=str(tmp_path))

    return written


# --- reading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "moods", "changes"),
    [
        ("jsonl", [["joy", "fear"], [], ["anger"]], {}),
        ("parquet", [["fear", "joy"], [], ["anger"]], {}),
        ("csv", ["joy | fear", "", "anger"], {}),
        ("csv", ["0|2", "", "1"], {}),
        ("jsonl", [[0, 2], [], [1]], {}),
        ("jsonl", [["j", "f"], [], ["a"]], {"label_values": ["j", "a", "f"]}),
        ("jsonl", [["joy", "none", "fear"], ["none"], ["anger"]], {"ignore_labels": ["none"]}),
    ],
)
def test_each_form_gives_indicators(write: Any, ending: str, moods: list[Any], changes: Any) -> None:
    rows = load_rows(task(**changes), write(moods, ending), "train")
    assert rows.labels == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert label_array(rows.labels).dtype == np.int64
    assert KIND.plain_labels(label_array(rows.labels)) == [[0, 2], [], [1]]


def test_ids_of_a_list_of_class_labels_map_to_their_names(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "moods").mkdir()
    features = {
        "text": datasets.Value("string"),
        "moods": datasets.Sequence(datasets.ClassLabel(names=["fear", "anger", "joy"])),
    }
    made = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "moods": [[0], [2, 1]]}, features=datasets.Features(features)
    )
    made.to_parquet(tmp_path / "moods" / "train.parquet")
    rows, way = load_splits(task(), DataConfig(dir=str(tmp_path)), ["train"])
    assert rows["train"].labels == [[0, 0, 1], [1, 1, 0]]
    assert way == "names"


def test_a_test_split_may_be_without_labels(write: Any) -> None:
    for ending, empty in (("jsonl", None), ("csv", "")):
        assert load_rows(task(), write([empty, empty], ending, "test"), "test").labels is None
        (Path(str(write([empty], ending, "test").dir)) / "moods" / f"test.{ending}").unlink()
    rows = load_rows(task(), write([["joy"], None], "jsonl", "test"), "test")
    assert (rows.labels, rows.ignored) == ([[1, 0, 0]], 1)
    assert load_rows(task(), write(["joy", ""], "csv", "validation"), "validation").labels == [[1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("moods", "message"),
    [
        ([["joy"], ["calm"]], r"line 2: moods is 'calm' \(str\); expected one of \"joy\""),
        ([["joy"], "joy"], r"line 2: moods is 'joy' \(str\); expected a list of labels"),
        ([["joy"], None], r"line 2: moods is null; expected a list of labels"),
        ([["joy"], 3], r"line 2: moods is 3 \(int\); expected a list of labels"),
        ([["joy"], ["fear", "joy", "fear"]], r"line 2: moods is .*: duplicate fear"),
        ([["joy"], [["fear"]]], r"line 2: moods is \['fear'\] \(list\); expected one of"),
        ([["joy"], [None]], r"line 2: moods is null; expected one of"),
        (
            [["joy"], [1]],
            r"line 2: moods is 1 \(int\), and 'joy' \(str\) in line 1 is one of names; expected one format",
        ),
        ([[0], [3]], r"line 2: moods is 3 \(int\); expected one of 0 \(joy\), 1 \(anger\), 2 \(fear\)"),
    ],
)
def test_a_wrong_label_is_refused_with_its_row(write: Any, moods: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_rows(task(), write(moods), "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "labels=null: expected at least 1 label name"),
        ({"labels": []}, r"labels=\[\]: expected at least 1 label name"),
        ({"labels": ["joy", "joy"]}, "duplicate joy"),
        ({"label_values": [1, 2]}, "label_values has 2 entries for 3 labels"),
        ({"metrics": ["accuracy"]}, "metrics=\\[accuracy\\]: expected one or more of micro_f1, macro_f1, subset_acc"),
        ({"choices": "c"}, "choices is only allowed for kind=choice, not multi_label"),
    ],
)
def test_a_wrong_task_file_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task(**changes)


def test_settings_of_classes_are_refused(write: Any) -> None:
    for loss, message in (
        (LossConfig(class_weights="balanced"), r"moods has no classes \(multi_label\); leave it out"),
        (LossConfig(label_smoothing=0.1), "moods is a task of kind multi_label, which has no classes; leave it"),
    ):
        with pytest.raises(UserError, match=message):
            loss.check([task()])
    data = write([["joy"]] * 8)
    data.split = SplitConfig(validation=0.5, stratify=True)
    with pytest.raises(UserError, match="of kind multi_label, which has no classes"):
        check_held_out_splits([task()], data)


# --- loss ---------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_binary_cross_entropy() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 3, generator=draw)
    labels = torch.randint(0, 2, (5, 3), generator=draw)
    p = scores.double().sigmoid()
    by_hand = [
        [-(y * q.log() + (1 - y) * (1 - q).log()) for q, y in zip(row, own, strict=True)]
        for row, own in zip(p, labels, strict=True)
    ]
    expected = torch.tensor(by_hand).mean(-1)
    assert torch.allclose(KIND.loss(scores, labels).double(), expected.double(), atol=1e-6)
    assert float(KIND.mean_loss(scores.double(), labels)) == pytest.approx(float(expected.mean()))

    zero = float(KIND.mean_loss(torch.zeros(2, 3), torch.zeros(2, 3)))
    assert KIND.zero_score_loss(task(), np.zeros((2, 3), np.int64), None) == pytest.approx(zero)


# --- metrics ------------------------------------------------------------------------------------------


def by_loops(labels: list[list[int]], predicted: list[list[int]], count: int) -> dict[str, float]:
    def f1(pairs: list[tuple[bool, bool]]) -> float:
        hits = sum(one and other for one, other in pairs)
        named = sum(one for one, _ in pairs) + sum(other for _, other in pairs)
        return 2 * hits / named if named else 0.0

    pairs = [
        [(number in one, number in other) for one, other in zip(labels, predicted, strict=True)]
        for number in range(count)
    ]
    same = [set(one) == set(other) for one, other in zip(labels, predicted, strict=True)]
    return {
        "micro_f1": f1([pair for column in pairs for pair in column]),
        "macro_f1": sum(map(f1, pairs)) / count,
        "subset_accuracy": sum(same) / len(same),
    }


@pytest.mark.parametrize(
    ("labels", "predicted", "expected"),
    [
        ([[0, 1], [2], []], [[0], [1, 2], []], [2 * 2 / 6, (1 + 0 + 1) / 3, 1 / 3]),
        ([[0], [0]], [[0], [0]], [1.0, 1 / 3, 1.0]),  # two labels that no example has, nor is predicted to have
        ([[], []], [[], []], [0.0, 0.0, 1.0]),
        ([[0], [1]], [[], []], [0.0, 0.0, 0.0]),
        ([[], []], [[0], [1]], [0.0, 0.0, 0.0]),
    ],
)
def test_metrics_of_a_worked_example(labels: Any, predicted: Any, expected: list[float]) -> None:
    assert list(KIND.metrics(task(), labels, predicted).values()) == pytest.approx(expected)
    assert by_loops(labels, predicted, 3) == pytest.approx(KIND.metrics(task(), labels, predicted))


def test_metrics_are_those_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    draw = np.random.RandomState(0)
    for _ in range(40):
        true, guess = (draw.rand(2, draw.randint(1, 6), 4) < draw.rand()).astype(int)
        found = KIND.metrics(task(labels=["a", "b", "c", "d"]), KIND.plain_labels(true), KIND.plain_labels(guess))
        assert found == pytest.approx(
            {
                "micro_f1": sklearn.f1_score(true, guess, average="micro", zero_division=0),
                "macro_f1": sklearn.f1_score(true, guess, average="macro", zero_division=0),
                "subset_accuracy": sklearn.accuracy_score(true, guess),
            }
        )


# --- threshold ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["micro_f1", "macro_f1", "subset_accuracy"])
def test_no_other_threshold_is_better(metric: str) -> None:
    draw = np.random.RandomState(1)
    for grid in (5, 1000):  # with many equal probabilities, and with none
        for _ in range(25):
            rows, count = draw.randint(1, 6), draw.randint(1, 4)
            probabilities = draw.randint(0, grid + 1, (rows, count)) / grid
            true = draw.rand(rows, count) < 0.4
            names = [str(number) for number in range(count)]
            asked, labels = task(labels=names, metrics=[metric]), KIND.plain_labels(true)

            def score(threshold: float, asked: Any = asked, labels: Any = labels, p: Any = probabilities) -> float:
                guess = KIND.predict(p.tolist(), {"threshold": threshold})
                return KIND.metrics(asked, labels, guess)[metric]

            edges = sorted({0.0, 1.0, *probabilities.ravel().tolist()})
            tried = [0.0, *((one + other) / 2 for one, other in itertools.pairwise(edges))]
            best = max(map(score, tried))
            chosen = best_threshold(metric, probabilities, true)
            assert score(chosen) == pytest.approx(best)
            closest = min(abs(t - 0.5) for t in tried if score(t) >= best - 1e-9)
            assert abs(chosen - 0.5) == pytest.approx(closest)


def test_the_threshold_is_of_the_first_metric_and_predictions_reach_it() -> None:
    # micro_f1 has its peak at 0.5 (2 of 3 right), subset_accuracy at a higher one.
    outputs, labels = [[0.9, 0.3, 0.1], [0.8, 0.6, 0.1]], [[0], [0, 1]]
    decision = KIND.decision(task(), outputs, labels)
    assert decision == {"threshold": pytest.approx(0.45)}
    assert KIND.predict(outputs, decision) == [[0], [0, 1]]
    assert KIND.predict([[0.45, 0.44, 0.46]], {"threshold": 0.45}) == [[0, 2]]
    assert KIND.predict([[0.5, 0.4, 0.6]], {}) == [[0, 2]]
    assert KIND.decision(task(), [], []) == {}
    # A score that is not a number is no label's.
    decision = KIND.decision(task(), [[0.9, math.nan, 0.1], [0.1, 0.1, math.nan]], [[0], [1]])
    assert decision == {"threshold": 0.5}
    assert KIND.predict([[math.nan, 0.6, 0.1]], decision) == [[1]]


def test_wording() -> None:
    scores = torch.tensor([[2.0, -2.0, 0.5], [-3.0, -3.0, -3.0]])
    lines = list(KIND.lines(task(), scores, None, {"threshold": 0.6}))
    assert [line["labels"] for line in lines] == [["joy", "fear"], []]
    assert lines[0]["scores"] == pytest.approx({"joy": 0.880797, "anger": 0.119203, "fear": 0.622459}, abs=1e-6)
    assert KIND.describe(task(), lines[0], [1, 0, 1]) == {
        "predicted": "joy (0.88), fear (0.62)",
        "truth": "joy, fear",
        "right": True,
    }
    assert KIND.describe(task(), lines[1], [0, 1, 0]) == {"predicted": "no label", "truth": "anger", "right": False}
    assert KIND.wrong([[0], []], [[0], [1]]) == [False, True]
