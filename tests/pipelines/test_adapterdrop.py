"""The AdapterDrop workflow: its commands, its summary, and scores and timings with a tiny backbone."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion.config.model import AdapterConfig
from pipelines import commands
from pipelines.adapterdrop import DropConfig, name_of, scores_by_drop, summary, timings, train
from tests.bench import Bench


def test_both_kinds_are_trained_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(commands, "call", lambda module, overrides: calls.append([module, *overrides]))
    train(DropConfig(tasks=["cb"], seeds=[1, 2], rows=50, output="out", data_dir="data"))
    plain, robust = (set(call) for call in calls)
    for one, other, kind, drop in ((plain, robust, "plain", "null"), (robust, plain, "robust", "robust")):
        names = {f"name=cb-{kind}-seed-${{seed}}", f"hydra.sweep.dir=out/runs/cb-{kind}"}
        assert one - other == {f"adapter.drop={drop}", *names}
    assert {"fusion.stage1", "-m", "seed=1,2", "data.limit.train=50", "data.dir=data"} <= plain


def test_kept_is_the_share_of_the_score_without_dropping() -> None:
    scores = {
        "plain": {"a-plain-seed-1": [0.8, 0.4], "a-plain-seed-2": [1.0, 0.5]},
        "robust": {"a-robust-seed-1": [0.5, 0.4], "a-robust-seed-2": [1.0, 1.0]},
    }
    found = summary(scores)
    assert found["score"] == {"plain": [0.9, pytest.approx(0.45)], "robust": [0.75, pytest.approx(0.7)]}
    assert found["kept"]["plain"] == pytest.approx([1.0, 0.5])
    assert found["kept"]["robust"] == pytest.approx([1.0, 0.9])
    assert found["difference"] == pytest.approx([0.0, 0.4])
    assert found["standard_error"] == pytest.approx([0.0, 0.1])


def test_scores_and_timings_of_stored_adapters(tmp_path: Path, tiny_backbone: Path) -> None:
    bench = Bench(tmp_path / "a folder", tiny_backbone)
    output = tmp_path / "out"
    for kind, drop in (("plain", None), ("robust", "robust")):
        name = name_of("films", kind, 1)
        bench.stage1("films", name=name, adapter=AdapterConfig(drop=drop), store=str(output / "store"))
    data = str(bench.folder / "data")
    config = DropConfig(tasks=["films"], seeds=[1], output=str(output), data_dir=data, at_once=3, rounds=2)
    whole = bench.evaluate(str(output / "store" / "films-plain-seed-1"))["metrics"]["validation"]["accuracy"]
    scores = scores_by_drop(config, "films-plain-seed-1")
    assert len(scores) == 4 and scores[0] == pytest.approx(whole, abs=1e-6)
    found = timings(config)
    assert (found["half"], found["layers"], found["tasks"]) == (1, 3, 3)
    models = [f"{count}, {drop} dropped" for count in ("one", "several") for drop in ("none", "half")]
    assert set(found["seconds"]) == {"backbone", *models}
    assert {len(seconds) for seconds in found["seconds"].values()} == {2}
    assert all(gain > 0 for gains in found["gain"].values() for gain in gains)
