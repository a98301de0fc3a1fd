"""Runs whose validation split is a part of train: the same examples wherever the artifact is used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from fusion import evaluate
from fusion.analysis.inspection import inspected_data
from fusion.config.commands import EvaluateConfig
from fusion.config.data import DataConfig, SplitConfig
from fusion.config.stages import Stage1Config
from fusion.data.rows import load_rows
from fusion.errors import UserError
from fusion.runs.identity import identity
from fusion.stages.stage1 import check_stage1
from fusion.store.compatibility import as_trained, note_ambiguous_labels
from fusion.store.lookup import read_manifest
from fusion.store.manifest import Manifest
from tests.bench import Bench


@pytest.fixture
def made(bench: Bench) -> Bench:
    """`films` has train alone, and an adapter was trained on seven eighths of it."""
    for name in ("validation", "test"):
        (bench.folder / "data" / "films" / f"{name}.jsonl").unlink()
    bench.result = bench.stage1("films", data=split(bench.data, validation=0.125, stratify=True))
    return bench


def split(data: DataConfig, **values: Any) -> DataConfig:
    return dataclasses.replace(data, split=SplitConfig(**values))


def outcomes_of(bench: Bench) -> dict[str, Any]:
    """Of the last run."""
    return json.loads((bench.folder / "runs" / str(bench.runs) / "outcomes.json").read_text())


def test_evaluate_scores_the_examples_of_the_training(made: Bench) -> None:
    trained = outcomes_of(made)
    result = made.evaluate("films")
    assert result["metrics"] == made.result["metrics"] and result["rows"] == 8
    assert outcomes_of(made) == trained
    assert made.evaluate("films", split="train")["rows"] == 56
    manifest = read_manifest("films", made.folder / "store")
    used = as_trained(manifest, made.data, "films")
    rows = load_rows(made.tasks["films"], used, "validation")
    assert manifest.data.fingerprints["validation"] == rows.fingerprint
    assert inspected_data(manifest, made.data).split == used.split == SplitConfig(0.125, stratify=True)


def test_other_splits_than_those_of_the_training_are_refused(made: Bench) -> None:
    manifest = read_manifest("films", made.folder / "store")
    for asked in ({"validation": 0.25}, {"validation": 0.125}, {"validation": 0.125, "stratify": True, "seed": 1}):
        config = EvaluateConfig(
            artifact="films", store=str(made.folder / "store"), data=split(made.data, **asked), accelerator="cpu"
        )
        with pytest.raises(
            UserError,
            match=r"films was trained with a different split \(data\.split\.validation=0\.125 data\.split\.stratify=true\)",
        ):
            evaluate.check(config, made.run("evaluate", config))
    assert as_trained(manifest, split(made.data, validation=0.125, stratify=True), "films").split.stratify
    other = split(made.data, validation=0.25)
    assert as_trained(manifest, other, "books") is other


def test_no_split_is_made_for_an_artifact_that_was_trained_without(bench: Bench) -> None:
    bench.stage1("books")
    (bench.folder / "data" / "books" / "validation.jsonl").unlink()
    with pytest.raises(UserError, match="has no validation"):
        bench.evaluate("books")
    manifest = read_manifest("books", bench.folder / "store")
    with pytest.raises(
        UserError, match=r"data\.split\.validation=0\.1: books was trained with a different split \(none\)"
    ):
        as_trained(manifest, split(bench.data, validation=0.1), "books")


def test_quoting_is_that_of_the_training_where_none_is_set(bench: Bench) -> None:
    bench.stage1("books", data=dataclasses.replace(bench.data, quoting="csv"))
    manifest = read_manifest("books", bench.folder / "store")
    assert as_trained(manifest, bench.data, "books").quoting == "csv"
    assert as_trained(manifest, dataclasses.replace(bench.data, quoting="none"), "books").quoting == "none"


def test_identity(made: Bench) -> None:
    def of(data: DataConfig) -> str:
        return identity(made.run("stage1", Stage1Config(**made.settings("films", data=data))).config)

    config = made.run("stage1", Stage1Config(**made.settings("films"))).config
    before = config | {"data": {k: v for k, v in config["data"].items() if k not in ("split", "quoting")}}
    assert identity(before) == of(made.data)  # as a run of 0.1
    asked: tuple[dict[str, Any], ...] = (
        {},
        {"validation": 0.1},
        {"test": 0.1},
        {"validation": 0.1, "seed": 1},
        {"validation": 0.1, "stratify": True},
    )
    assert len({of(split(made.data, **values)) for values in asked}) == len(asked)
    stored = read_manifest("films", made.folder / "store").run.config
    assert {key: stored[key] for key in stored if key.startswith("data.split")} == {
        "data.split.validation": 0.125,
        "data.split.stratify": True,
    }


def test_multiple_tasks(made: Bench) -> None:
    """A task with a validation split and one without."""
    data = split(made.data, validation=0.25)
    result = made.multitask("films", "books", data=data, name="both")
    assert set(result["metrics"]) == {"films/validation", "books/validation"}
    scored = made.evaluate("both")
    assert scored["metrics"] == result["metrics"] and scored["rows"] == 16 + 16
    with pytest.raises(UserError, match=r"books, plays already has a validation split"):
        made.multitask("books", "plays", data=data)


def test_refused_before_anything_is_loaded(bench: Bench) -> None:
    config = Stage1Config(**bench.settings("films", data=split(bench.data, validation=0.1)), name="films")
    with pytest.raises(UserError, match="films already has a validation split; leave it out"):
        check_stage1(config, bench.run("stage1", config))


def test_a_fusion_and_a_ranking(made: Bench) -> None:
    made.stage1("books")
    data = split(made.data, validation=0.125, stratify=True)
    fused = made.stage2("films", ["films", "books"], data=data)
    assert made.evaluate("films-adapterfusion")["metrics"] == fused["metrics"]
    ranked = made.rank("films", data=data, include_target=True, methods=["similarity"])
    assert {source["name"] for source in ranked["sources"]} == {"films", "books"}


def test_labels_that_version_0_1_may_have_misread(
    make_manifest: Callable[..., Manifest], caplog: pytest.LogCaptureFixture
) -> None:
    """Tasks where a name could be the id of another label, with no record of how the labels were read."""
    ambiguous = (["true", "false"], ["True", "False"], ["1", "2", "3"], ["0", "2"])
    clear = (["false", "true"], ["0", "1", "2"], ["bad", "good"])
    task = {"name": "films", "kind": "classification"}
    recorded = {"max_length": 16, "fingerprints": {}, "labels": {"films": "names"}}
    for labels in (*ambiguous, *clear):
        note_ambiguous_labels(make_manifest("films", task=task | {"labels": labels}, data=recorded))
    note_ambiguous_labels(make_manifest("films", task=task | {"labels": ["1", "2"], "label_values": ["1", "2"]}))
    assert caplog.records == []
    for labels in (*ambiguous, *clear):
        note_ambiguous_labels(make_manifest("films", task=task | {"labels": labels}))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * len(ambiguous)
    assert "films: version 0.1 may have read the labels true, false of films as ids" in caplog.text


def test_the_warning_comes_before_a_result_of_0_1_is_used(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """In `predict`, and where stage 1 finds the run done already."""
    path = bench.folder / "store" / "films" / "manifest.json"
    bench.stage1("films")
    values = json.loads(path.read_text())
    values.pop("checksum")
    values["data"].pop("labels")
    values["task"]["labels"] = ["true", "false"]
    path.write_text(json.dumps(values))
    caplog.set_level("INFO")
    bench.predict("films", [{"text": "the cat was good"}])
    assert caplog.text.count("may have read the labels true, false of films as ids") == 1
    caplog.clear()
    bench.stage1("films")
    assert "films is already done" in caplog.text
    assert caplog.text.count("may have read the labels true, false of films as ids") == 1
