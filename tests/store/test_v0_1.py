"""Artifacts that version 0.1 stored (see v0_1/make.py) load, evaluate as they did, and can be fused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fusion import evaluate, stage2
from fusion.config import (
    BackboneConfig,
    DataConfig,
    EvaluateConfig,
    OptimConfig,
    Stage2Config,
    TaskConfig,
    TrainerConfig,
)
from fusion.run import Run
from fusion.store.manifest import read_manifest
from fusion.store.verifying import verify

STORED = Path(__file__).parent / "v0_1"
EVALUATED: dict[str, dict[str, Any]] = json.loads((STORED / "evaluated.json").read_text())
DATA = DataConfig(dir="data", batch_size=8, max_length=16, cache_dir="cache")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, as the working folder: the manifests' paths are relative."""
    for name in ("backbone", "data", "store"):
        shutil.copytree(STORED / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, config: Any) -> Run:
    directory = Path("runs") / f"{command}-{len(list(Path('runs').glob('*')))}"
    directory.mkdir(parents=True)
    return Run(command, directory, (), dataclasses.asdict(config), command)


def evaluated(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """result.json and outcomes.json of `evaluate`."""
    config = EvaluateConfig(artifact=name, store="store", data=DATA, accelerator="cpu")
    one = run("evaluate", config)
    evaluate.check(config, one)
    result = evaluate.main.__wrapped__(config, one)  # type: ignore[attr-defined]
    return result, json.loads((one.directory / "outcomes.json").read_text())


def test_the_kinds() -> None:
    kinds = {name: read_manifest(name, STORED / "store").kind for name in EVALUATED}
    assert set(kinds.values()) == {"adapter", "fusion", "head", "lora", "bitfit", "full"}
    assert "multitask" in kinds
    predictions = [set(p) for one in EVALUATED.values() for p in one["predicted"].values()]
    assert predictions == [{0, 1}] * len(predictions)  # a constant prediction would hide a wrong weight


@pytest.mark.parametrize("name", EVALUATED)
def test_it_evaluates_as_in_0_1(place: Path, name: str) -> None:
    expected = EVALUATED[name]
    result, outcomes = evaluated(name)
    assert result["hash"] == expected["hash"]  # what fusions name their sources by
    assert {split: rows["predicted"] for split, rows in outcomes.items()} == expected["predicted"]
    for split, metrics in expected["metrics"].items():  # 0.1 stored single precision
        assert result["metrics"][split] == pytest.approx(metrics, rel=1e-6)


def test_they_verify(place: Path) -> None:
    verdicts = list(verify(place / "store"))
    assert [verdict.place for verdict in verdicts] == sorted(EVALUATED)
    assert not [str(verdict) for verdict in verdicts if verdict.problem]
    assert all("has no checksum" in str(verdict) for verdict in verdicts)


def test_their_adapters_can_be_fused(place: Path) -> None:
    config = Stage2Config(
        task=TaskConfig(name="films", text="text", labels=["bad", "good"], metrics=["accuracy"]),
        sources=["films", "books"],
        name="new",
        data=DATA,
        backbone=BackboneConfig(name_or_path="backbone", pooling="mean"),
        optim=OptimConfig(lr=1e-2, patience=None),
        trainer=TrainerConfig(accelerator="cpu", max_epochs=1, enable_progress_bar=False),
        store="store",
    )
    result = stage2.main.__wrapped__(config, run("stage2", config))  # type: ignore[attr-defined]
    manifest = read_manifest("new", place / "store")
    assert [source["hash"] for source in manifest.sources] == [
        EVALUATED[name]["hash"] for name in ("films", "books")
    ]
    assert manifest.checksum is not None
    assert evaluated("new")[0]["metrics"] == result["metrics"]
