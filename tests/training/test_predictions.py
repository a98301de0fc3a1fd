"""outcomes.json: labels and predictions of the evaluated rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.training.predictions import RowPredictions
from tests.bench import Bench, trainer_config


def read(bench: Bench) -> dict[str, Any]:
    return json.loads((bench.folder / "runs" / str(bench.runs) / "outcomes.json").read_text())


def labels_of(path: Path) -> list[int]:
    return [json.loads(line)["label"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("settings", "rows"), [({}, 16), ({"limit_val_batches": 1}, 8), ({"limit_val_batches": 0.5}, 8)]
)
def test_labels_and_predictions_are_of_the_same_examples(bench: Bench, settings: dict[str, Any], rows: int) -> None:
    result = bench.stage1("films", trainer=trainer_config(max_epochs=1, **settings))
    found = read(bench)["validation"]
    every = labels_of(bench.folder / "data/films/validation.jsonl")
    numbers = found.get("rows", list(range(len(every))))
    assert ("rows" in found) == (len(numbers) < 16)
    assert found["labels"] == [every[row] for row in numbers]
    assert len(found["predicted"]) == len(numbers) == rows
    right = np.mean(np.array(found["labels"]) == found["predicted"])
    assert result["metrics"]["validation"]["accuracy"] == right  # in double precision


def test_selections_of_a_split_have_different_fingerprints(bench: Bench) -> None:
    prints = set()
    for batches in (1.0, 1):
        bench.stage1("films", trainer=trainer_config(max_epochs=1, limit_val_batches=batches), overwrite=True)
        prints.add(read(bench)["validation"]["fingerprint"])
    assert len(prints) == 2


def test_tasks_that_are_limited_together(bench: Bench) -> None:
    bench.multitask("films", "books", trainer=trainer_config(max_epochs=1, limit_val_batches=1))
    found = read(bench)
    assert set(found) == {"films/validation", "books/validation"}
    for name, split in found.items():
        every = labels_of(bench.folder / "data" / name.split("/")[0] / "validation.jsonl")
        assert split["labels"] == [every[row] for row in split["rows"]] and len(split["predicted"]) == 8


def test_parts_are_gathered_in_the_order_of_the_examples() -> None:
    parts = [RowPredictions([4, 1], [[4, 0], [1]], [0, 1]), RowPredictions([], [], []), RowPredictions([0], [[]], [1])]
    scored = RowPredictions.gathered(parts)
    assert scored == RowPredictions([0, 1, 4], [[], [1], [4, 0]], [1, 1, 0])
