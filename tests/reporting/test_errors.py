"""Errors and calibration against loops over the examples, and the score by number of training examples."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest

from fusion import stage1
from fusion.config.data import LimitConfig
from fusion.config.stages import Stage1Config
from fusion.reporting.contents import Contents, tables_of
from fusion.reporting.errors import Bin, by_labels, calibration, errors_of, expected_error, training_rows
from fusion.reporting.reading import read_runs
from fusion.reporting.statistics import Predictions
from fusion.reporting.targets import targets_of
from tests.bench import Bench
from tests.test_report import done


def outcomes(bench: Bench, number: int) -> dict[str, Any]:
    return json.loads((bench.folder / "runs" / str(number) / "outcomes.json").read_text())["validation"]


def test_calibration_by_hand() -> None:
    confidence = np.array([0.5, 0.55, 0.61, 0.95, 1.0, 1.0])
    right = np.array([False, True, True, True, True, False])
    bins = calibration(confidence, right)
    assert bins == [
        Bin(pytest.approx(0.525), 0.5, 2),  # type: ignore[arg-type]
        Bin(pytest.approx(0.61), 1.0, 1),  # type: ignore[arg-type]
        Bin(pytest.approx(2.95 / 3), pytest.approx(2 / 3), 3),  # type: ignore[arg-type]
    ]
    expected = (2 * 0.025 + 1 * 0.39 + 3 * (2.95 / 3 - 2 / 3)) / 6
    assert expected_error(bins) == pytest.approx(expected)
    assert expected_error(calibration(np.array([0.8] * 10), np.arange(10) < 8)) == pytest.approx(0.0)


def test_stored_confidences_and_errors(bench: Bench) -> None:
    bench.stage1("films")
    stored = outcomes(bench, bench.runs)
    assert set(stored) == {"fingerprint", "labels", "predicted", "confidence", "errors"}
    assert len(stored["confidence"]) == 16 and all(0.5 <= value <= 1 for value in stored["confidence"])
    lines = (bench.folder / "data" / "films" / "validation.jsonl").read_text().splitlines()
    wrong = [row for row in range(16) if stored["labels"][row] != stored["predicted"][row]]
    ordered = sorted(wrong, key=lambda row: -stored["confidence"][row])
    assert wrong and [error["row"] for error in stored["errors"]] == ordered[:20]
    for error in stored["errors"]:
        row = error["row"]
        assert error["text"] == [json.loads(lines[row])["text"]]
        assert (error["label"], error["predicted"]) == tuple(
            ["bad", "good"][stored[key][row]] for key in ("labels", "predicted")
        )
        assert error["confidence"] == stored["confidence"][row]
    found = bench.evaluate("films", split="validation")
    evaluated = outcomes(bench, bench.runs)
    assert found["metrics"] and evaluated["errors"] == stored["errors"]
    assert evaluated["confidence"] == pytest.approx(stored["confidence"], abs=1e-4)


def test_choices_and_values(bench: Bench) -> None:
    bench.add_quiz()
    bench.stage1("quiz")
    stored = outcomes(bench, bench.runs)
    lines = (bench.folder / "data" / "quiz" / "validation.jsonl").read_text().splitlines()
    for error in stored["errors"]:
        choices = json.loads(lines[error["row"]])["choices"]
        assert error["label"] == "a good film" and error["predicted"] in choices
    bench.add_rating()
    result = bench.stage1("rating")
    assert set(outcomes(bench, bench.runs)) == {"fingerprint", "labels", "predicted"}
    assert training_rows(result, None) == 40


def test_the_report_shows_errors_and_the_number_of_examples(bench: Bench) -> None:
    for rows in (16, 48):
        data = dataclasses.replace(bench.data, limit=LimitConfig(train=rows))
        for seed in (0, 1):
            config = Stage1Config(**bench.settings("films", name=f"films-{rows}-{seed}", data=data, seed=seed))
            done(bench, stage1, "stage1", config)
    runs = [outcomes(bench, number) for number in (1, 2)]
    found = read_runs([bench.folder / "runs"])
    targets = targets_of(found)
    (errors,) = errors_of(targets[0]).values()
    assert errors.classes.names == ["bad", "good"] and errors.classes.count.sum() == 16
    for place, own in enumerate(errors.classes.f1):
        each = []
        for run in runs:
            pairs = list(zip(run["labels"], run["predicted"], strict=True))
            hits = pairs.count((place, place))
            both = run["labels"].count(place) + run["predicted"].count(place)
            each.append(2 * hits / both if both else 0.0)
        assert own == pytest.approx(sum(each) / 2)
    for label in (0, 1):
        predicted = [
            p for run in runs for p, true in zip(run["predicted"], run["labels"], strict=True) if true == label
        ]
        assert errors.confusion[label].tolist() == pytest.approx([predicted.count(n) / len(predicted) for n in (0, 1)])
    each = [
        expected_error(calibration(np.array(run["confidence"]), np.array(run["labels"]) == np.array(run["predicted"])))
        for run in runs
    ]
    assert errors.ece == pytest.approx(sum(each) / 2)
    assert sum(one.size for one in errors.bins) == 32
    (methods,) = by_labels(targets).values()
    assert {method: [(rows, len(scores)) for rows, scores in points] for method, points in methods.items()} == {
        "single adapter": [(16, 2), (48, 2)]
    }
    contents = Contents(found, targets)
    names = {one.name: one.frame for one in tables_of(contents)}
    assert len(names["classes"]) == 4 and len(names["labels"]) == 2
    assert names["calibration"]["predictions"].sum() == 64
    _, page = bench.report()
    assert "Errors and calibration" in page and "Score by number of training examples" in page
    assert f"ECE {errors.ece:.3f}" in page
    for error in runs[0]["errors"][:10]:
        assert re.search(rf"example {error['row']}, prediction <strong>{error['predicted']}</strong>", page)


def test_invalid_or_missing_confidences_are_omitted() -> None:
    content: dict[str, Any] = {"fingerprint": "f", "labels": [0, 1], "predicted": [0, 0]}
    error = {"row": 1, "text": ["a"], "label": "x", "predicted": "y", "confidence": 0.9}
    for more, confidence, errors in (
        ({}, None, []),
        ({"confidence": [0.5, 0.9], "errors": [error]}, [0.5, 0.9], [error]),
        ({"confidence": [0.5]}, None, []),
        ({"confidence": [0.5, float("nan")]}, None, []),
        ({"confidence": "high"}, None, []),
        ({"confidence": [0.5, 0.9], "errors": [{"row": 1}]}, [0.5, 0.9], []),
    ):
        found = Predictions.of(content | more)
        assert found is not None and list(found.errors) == errors
        assert (None if found.confidence is None else found.confidence.tolist()) == confidence


def test_the_number_of_training_examples() -> None:
    speed = {"examples_per_second": 125.0, "seconds": 6.0}
    assert training_rows({"speed": speed, "epochs": 3}, 500) == 250  # the limit is above the number of examples
    assert training_rows({"speed": speed, "epochs": 4}, 500) == 500  # the last epoch is not complete
    assert training_rows({"speed": speed, "epochs": 4}, None) is None
    assert training_rows({}, 500) == 500
