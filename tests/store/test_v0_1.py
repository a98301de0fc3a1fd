"""Artifacts that version 0.1 stored (see v0_1/make.py) load, evaluate as they did, and can be fused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import pearsonr, spearmanr

from fusion import evaluate, stage2
from fusion.config.commands import EvaluateConfig
from fusion.config.data import DataConfig
from fusion.config.model import BackboneConfig
from fusion.config.stages import Stage2Config
from fusion.config.task import TaskConfig
from fusion.config.training import OptimConfig, TrainerConfig
from fusion.model.from_manifests import tensor_shapes
from fusion.runs.run import Run
from fusion.store.artifacts import verify
from fusion.store.lookup import read_manifest

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


def test_what_is_covered() -> None:
    """Every kind, composition, site, reading, and kind of task that 0.1 knew, and each optional key."""
    manifests = {name: read_manifest(name, STORED / "store") for name in EVALUATED}
    assert {m.kind for m in manifests.values()} == {"adapter", "fusion", "head", "lora", "bitfit", "full"}
    compositions = {m.composition.settings.name for m in manifests.values() if m.composition is not None}
    assert compositions == {
        *("adapterfusion", "sequence", "static", "mean", "average", "pruned", "continued"),
        *("scalearn", "scalearn_uniform", "scalearn_pp", "scalearn_uniform_pp"),
    }
    keys = {
        key for m in manifests.values() for key in (*(m.content["composition"] or {}), *(m.content["adapter"] or {}))
    }
    assert {"rank", "target_adapter", "train", "fusion", "keep", "kept", "continued", "drop", "shared"} < keys
    adapters = [m.adapter.settings for m in manifests.values() if m.adapter is not None]
    assert {site for a in adapters for site in a.sites} == {"before_attention", "attention", "feedforward"}
    assert {a.reads for a in adapters} == {"output", "normed", "input"}
    assert {t.kind for m in manifests.values() for t in m.tasks} == {"classification", "regression", "choice"}
    assert {len(m.tasks) for m in manifests.values()} == {1, 2, 3}
    for one in EVALUATED.values():  # a constant prediction would hide a wrong weight
        assert all(len(set(p)) > 1 for p in one["predicted"].values())


@pytest.mark.parametrize("name", EVALUATED)
def test_it_evaluates_as_in_0_1(place: Path, name: str) -> None:
    expected = EVALUATED[name]
    result, outcomes = evaluated(name)
    assert result["hash"] == expected["hash"]  # what fusions name their sources by
    assert outcomes.keys() == expected["predicted"].keys()
    for split, predicted in expected["predicted"].items():
        if isinstance(predicted[0], int):
            assert outcomes[split]["predicted"] == predicted
            # 0.1 stored single precision.
            assert result["metrics"][split] == pytest.approx(expected["metrics"][split], rel=1e-6)
        else:
            # The last digits of a regression depend on the processor. A correlation of predictions that hardly differ
            # amplifies them, so the metrics are compared with those of the predictions at hand.
            ours = outcomes[split]["predicted"]
            assert ours == pytest.approx(predicted, rel=1e-5)
            labels = [
                json.loads(line)["score"] for line in Path("data/similar/validation.jsonl").read_text().splitlines()
            ]
            metrics = {"pearson": pearsonr(ours, labels)[0], "spearman": spearmanr(ours, labels)[0]}
            assert result["metrics"][split] == pytest.approx(metrics, rel=1e-6)


@pytest.mark.parametrize("name", EVALUATED)
def test_it_is_written_again_as_0_1_wrote_it(name: str) -> None:
    """Byte for byte, but for the checksum, which came later: keys, their order, values."""
    manifest = read_manifest(name, STORED / "store")
    values = json.loads(manifest.to_json())
    assert values.pop("checksum") is not None
    written = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    assert written == (STORED / "store" / name / "manifest.json").read_text()


def test_they_verify(place: Path) -> None:
    verdicts = list(verify(place / "store", tensor_shapes))
    assert [verdict.place for verdict in verdicts] == [*sorted(EVALUATED), ".replaced/replaced-97937089"]
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
    assert [source.hash for source in manifest.sources] == [EVALUATED[name]["hash"] for name in ("films", "books")]
    assert manifest.checksum is not None
    assert evaluated("new")[0]["metrics"] == result["metrics"]
