"""Cross-fitting, source dropout and the prior, through both stages on a tiny backbone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion.config.compositions import CompositionConfig
from fusion.config.data import DataConfig, LimitConfig
from fusion.data.rows import folds_of, load_rows
from fusion.errors import UserError
from fusion.training.module import TaskModule
from tests.bench import Bench, same

LIMIT = LimitConfig(train=40, train_seed=3)
FOLDS = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Bench:
    """Two sources, the target's own adapter, and its adapters for cross-fitting."""
    bench = Bench(tmp_path_factory.mktemp("cross fitting"), tiny_backbone)
    bench.data = dataclasses.replace(bench.data, limit=LIMIT)
    bench.stage1("books")
    bench.stage1("films")
    for fold in range(FOLDS):
        data = dataclasses.replace(bench.data, leave_out=f"{fold}/{FOLDS}")
        bench.stage1("films", name=f"films-without-{fold}-of-{FOLDS}", data=data)
    return bench


def fused(
    bench: Bench, artifact: str, sources: tuple[str, ...] = ("books", "films"), **settings: Any
) -> dict[str, Any]:
    return bench.stage2(
        "films", list(sources), name=artifact, composition=CompositionConfig(**settings), overwrite=True
    )


def test_folds_are_stratified_and_complete(trained: Bench) -> None:
    task, data = trained.tasks["films"], trained.data
    rows = load_rows(task, data, "train")
    folds = folds_of(task, rows, FOLDS)
    assert len(rows) == 40 and sorted(folds.tolist()) == sorted([0, 1, 2, 3] * 10)
    labels = torch.tensor(rows.labels)
    for label in (0, 1):
        counts = [int((labels[torch.from_numpy(folds == fold)] == label).sum()) for fold in range(FOLDS)]
        assert max(counts) - min(counts) <= 1
    seen = []
    for fold in range(FOLDS):
        part = load_rows(task, dataclasses.replace(data, leave_out=f"{fold}/{FOLDS}"), "train")
        assert len(part) == 30
        left_out = [text for text, of in zip(rows.texts, folds, strict=True) if of == fold]
        assert part.texts == [text for text, of in zip(rows.texts, folds, strict=True) if of != fold]
        seen += left_out
        for split in ("validation", "test"):
            assert load_rows(task, data, split).fingerprint == load_rows(task, trained.data, split).fingerprint
    assert sorted(seen) == sorted(rows.texts)


def test_other_samples_have_other_examples(trained: Bench) -> None:
    task, data = trained.tasks["films"], trained.data
    texts = [
        load_rows(task, dataclasses.replace(data, limit=LimitConfig(train=count, train_seed=seed)), "train").texts
        for count, seed in ((40, 3), (40, 4), (20, 3), (40, None))
    ]
    assert texts[0] == load_rows(task, data, "train").texts
    assert texts[1] != texts[0] != texts[3]
    assert set(texts[2]) < set(texts[0])


def test_each_example_trains_with_an_adapter_that_has_not_seen_it(
    trained: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of each training example, recomputed with a fusion of the adapter of its fold."""
    seen: list[tuple[int, int]] = []
    sampled = TaskModule.sampled

    def spy(module: TaskModule, batch: Any, number: int) -> dict[str, Any]:
        options = sampled(module, batch, number)
        seen.extend(zip(batch.rows.tolist(), options["folds"].tolist(), strict=True))
        return options

    monkeypatch.setattr(TaskModule, "sampled", spy)
    result = fused(trained, "crossed", cross_fit=FOLDS)
    monkeypatch.undo()
    rows = load_rows(trained.tasks["films"], trained.data, "train")
    folds = folds_of(trained.tasks["films"], rows, FOLDS)
    assert set(seen) == set(enumerate(folds.tolist()))
    manifest = json.loads((trained.folder / "store" / "crossed" / "manifest.json").read_text())
    assert manifest["composition"]["cross_fit"] == FOLDS
    assert [source["name"] for source in manifest["sources"]] == ["books", "films"]
    assert len(manifest["run"]["config"]["inputs.folds"]) == FOLDS
    plain = fused(trained, "plain")
    assert trained.weights("crossed").keys() == trained.weights("plain").keys()
    assert not same(trained.weights("crossed"), trained.weights("plain"))
    assert result["parameters"]["trainable"] == plain["parameters"]["trainable"]
    # After training, the fusion uses the adapter that was trained on all examples.
    metrics = trained.evaluate("crossed", split="validation")["metrics"]["validation"]
    assert metrics == pytest.approx(result["metrics"]["validation"])


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "sequence", "cross_fit": FOLDS, "source_dropout": 0.3},
        {"name": "static", "cross_fit": FOLDS},
        {"name": "mean", "cross_fit": FOLDS, "target_adapter": True},
        {"name": "scalearn", "cross_fit": FOLDS, "source_dropout": 0.5, "dropped": "own"},
        {"name": "scalearn_pp", "source_dropout": 0.5},
        {"null_source": True, "prior": "own", "prior_own": 0.9, "prior_penalty": 0.1, "cross_fit": FOLDS},
        {"prior": "uniform", "source_dropout": 0.5, "drop": "robust"},
    ],
    ids=lambda settings: str(settings.get("name", "adapterfusion")),
)
def test_the_settings_of_each_composition_are_stored_and_evaluated(trained: Bench, settings: dict[str, Any]) -> None:
    result = fused(trained, "combined", **settings)
    stored = json.loads((trained.folder / "store" / "combined" / "manifest.json").read_text())["composition"]
    assert stored.items() >= {"name": "adapterfusion", **settings}.items()
    found = trained.evaluate("combined", split="validation")["metrics"]["validation"]
    assert found == pytest.approx(result["metrics"]["validation"])


def test_loss_terms_are_logged(trained: Bench) -> None:
    fused(trained, "penalized", prior="own", prior_penalty=0.5)
    history = (trained.folder / "runs" / str(trained.runs) / "history.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in history[1:]]
    terms = [line["train/prior_penalty_loss"] for line in lines if "train/prior_penalty_loss" in line]
    assert terms and terms[0] == pytest.approx(0.0, abs=1e-6) and terms[-1] > 0.0
    total = next(line for line in lines if "train/prior_penalty_loss" in line)
    parts = sum(total[f"train/{term}_loss"] for term in ("task", "value_penalty", "prior_penalty"))
    assert total["train/loss"] == pytest.approx(parts, rel=1e-5)
    fused(trained, "unpenalized", prior="own")
    history = (trained.folder / "runs" / str(trained.runs) / "history.jsonl").read_text().splitlines()
    assert not any("prior_penalty" in line for line in history)


def test_a_pruned_fusion_keeps_its_prior_and_null_source(trained: Bench) -> None:
    fused(trained, "whole", sources=("books", "films"), prior="own", prior_own=0.8, null_source=True)
    pruned = CompositionConfig("pruned", fusion="whole", keep=1)
    trained.stage2("films", [], name="pruned", composition=pruned, overwrite=True)
    stored = json.loads((trained.folder / "store" / "pruned" / "manifest.json").read_text())["composition"]
    assert (stored["prior"], stored["prior_own"], stored["null_source"]) == ("own", 0.8, True)


@pytest.mark.parametrize(
    ("settings", "sources", "message"),
    [
        ({"cross_fit": 4}, ("books",), "composition.cross_fit=4: no source was trained on films; add its adapter"),
        ({"prior": "own"}, ("books",), "composition.prior=own: no source was trained on films"),
        ({"source_dropout": 0.5, "dropped": "own"}, ("books",), "composition.dropped=own: no source was trained on"),
        (
            {"cross_fit": 2},
            ("books", "films"),
            "composition.cross_fit=2: no films-without-0-of-2, films-without-1-of-2 in the store",
        ),
    ],
)
def test_missing_adapters_are_named(
    trained: Bench, settings: dict[str, Any], sources: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError) as error:
        fused(trained, "missing", sources, **settings)
    assert message in str(error.value)
    if settings == {"cross_fit": 2}:
        command = str(error.value).splitlines()[1]
        assert command.startswith("Train with: python -m fusion.stage1 -m ")
        assert command.endswith("seed=42 name=films data.leave_out=0/2,1/2")


def test_adapters_of_other_examples_or_settings_are_refused(trained: Bench) -> None:
    data = dataclasses.replace(trained.data, limit=LimitConfig(train=40, train_seed=5))
    with pytest.raises(
        UserError, match=r"films-without-0-of-4 was not trained on the examples of this run without fold 0"
    ):
        trained.stage2("films", ["books", "films"], data=data, name="x", composition=CompositionConfig(cross_fit=4))
    trained.stage1("films", name="other", seed=1)
    for fold in range(2):
        data = dataclasses.replace(trained.data, leave_out=f"{fold}/2")
        trained.stage1("films", name=f"other-without-{fold}-of-2", data=data)
    with pytest.raises(UserError, match=r"other-without-0-of-2 was not trained with the settings of other: seed 42"):
        trained.stage2("films", ["books", "other"], name="x", composition=CompositionConfig(cross_fit=2))


@pytest.mark.parametrize("value", ["5/5", "1", "-1/5", "0/1", 3, "a/b", "0/5 ", ""])
def test_invalid_folds_are_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"data\.leave_out=.*: expected FOLD/FOLDS such as 0/5"):
        DataConfig(leave_out=value)


def test_a_seed_without_a_limit_and_too_many_folds_are_refused(trained: Bench) -> None:
    with pytest.raises(UserError, match=r"data\.limit\.train_seed=1: has no effect without data\.limit\.train=N"):
        LimitConfig(train_seed=1)
    data = dataclasses.replace(trained.data, leave_out="0/41")
    with pytest.raises(UserError, match="task films: 40 examples cannot be divided into 41 folds"):
        load_rows(trained.tasks["films"], data, "train")
