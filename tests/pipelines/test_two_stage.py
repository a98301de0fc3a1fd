"""The comparison over seeds: its statistics, and the commands it runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pipelines import commands
from pipelines.two_stage import compare, main, verdict
from tests.pipelines.manifests import save_manifest

SINGLE, FUSION = [0.70, 0.72, 0.68, 0.75, 0.71], [0.74, 0.73, 0.71, 0.77, 0.76]


def test_means_and_verdict() -> None:
    compared = compare(SINGLE, FUSION)
    means = [compared[key] for key in ("single", "fusion", "difference")]
    assert means == pytest.approx([0.712, 0.742, 0.03])
    assert verdict(compared) == "fusion is better"
    assert verdict(compare(FUSION, SINGLE)) == "fusion is worse"
    assert verdict(compare(SINGLE, SINGLE[::-1])) == "no significant difference"
    assert verdict(compare([0.5], [0.9])) == "no significant difference"
    assert verdict(compare([0.5, 0.6], [0.5, 0.6])) == "no significant difference"


@pytest.mark.parametrize("seeds", [2, 5, 12, 30])
def test_the_interval_is_that_of_a_paired_t_test(seeds: int) -> None:
    draw = np.random.RandomState(seeds)
    single, fusion = draw.rand(seeds).tolist(), draw.rand(seeds).tolist()
    compared = compare(single, fusion)
    interval = stats.ttest_rel(fusion, single).confidence_interval(0.95)
    assert (compared["low"], compared["high"]) == pytest.approx((interval.low, interval.high))


def test_each_seed_fuses_its_own_single_adapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(commands, "call", lambda module, overrides: calls.append([module, *overrides]))
    for name, score in {
        "rte-seed-1": 0.5,
        "rte-seed-2": 0.6,
        "rte-adapterfusion-seed-1": 0.7,
        "rte-adapterfusion-seed-2": 0.8,
    }.items():
        save_manifest(tmp_path / "store", name, metrics={"validation": {"accuracy": score}})
    assert main(["targets=[rte]", "seeds=[1,2]", "sources=[mnli,rte,cb]", f"output={tmp_path}"]) == 0
    sources, single, fusion = calls
    assert sources[:3] == ["fusion.stage1", "-m", "+task=mnli,rte,cb"]
    assert {"+task=rte", "seed=1,2", "name=rte-seed-${seed}"} <= set(single)
    own = {"sources=[mnli,cb,rte-seed-${seed}]", "name=rte-adapterfusion-seed-${seed}"}
    assert {"seed=1,2", *own} <= set(fusion)
    content = json.loads((tmp_path / "rte.json").read_text())["targets"]["rte"]["accuracy"]
    assert (content["singles"], content["fusions"]) == ([0.5, 0.6], [0.7, 0.8])
