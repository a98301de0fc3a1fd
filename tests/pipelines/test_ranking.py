"""The evaluation of the ranking: the commands it runs, and the agreement with the gains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines import commands, ranking
from pipelines.ranking import RankingConfig, agreements, cost, gains, main
from tests.pipelines.manifests import save_manifest

SOURCES = ["snli", "rte", "sst2"]
RANKED: dict[str, Any] = {
    "methods": ["similarity", "probe"],
    "sources": [
        {"name": "rte", "mean_rank": 1.25, "scores": {"similarity": 0.9, "probe": 0.7}},
        {"name": "sst2", "mean_rank": 2.0, "scores": {"similarity": None, "probe": 0.7}},
        {"name": "snli", "mean_rank": 2.5, "scores": {"similarity": 0.2, "probe": 0.7}},
    ],
    "seconds": {"loading": 1.0, "similarity": 2.5, "states": 4.0, "probe": 3.0},
    "agreement": {},
}
for _source in RANKED["sources"]:
    _source["ranks"] = {method: None if score is None else 1.0 for method, score in _source["scores"].items()}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A finished evaluation with two seeds, and gains of +0.1, -0.05 and 0 on average."""
    scores = {"alone": [0.5, 0.6], "after-rte": [0.65, 0.65], "after-snli": [0.4, 0.6], "after-sst2": [0.4, 0.7]}
    for name, values in scores.items():
        for seed, value in enumerate(values, 1):
            metrics = {"validation": {"accuracy": value, "macro_f1": 0.0}}
            save_manifest(tmp_path / "store", f"cb-{name}-seed-{seed}", metrics=metrics)
    return tmp_path


def rank_into(output: Path) -> None:
    folder = output / "runs" / "cb-ranking"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(RANKED))


def test_a_gain_is_paired_by_seed(output: Path) -> None:
    config = RankingConfig(sources=SOURCES, targets=["cb"], seeds=[1, 2], output=str(output))
    found = gains(config, "cb")
    assert list(found) == SOURCES
    assert found["rte"] == pytest.approx([0.15, 0.05]) and found["sst2"] == pytest.approx([-0.1, 0.1])


def test_agreement_of_the_methods_with_the_gains() -> None:
    found = agreements(RANKED, {"snli": -0.05, "rte": 0.1, "sst2": 0.0}, top=1)
    assert set(found) == {"similarity", "probe", "mean rank"}
    of_two_sources = {"kendall": 1.0, "spearman": 1.0, "top_gain": 0.1}
    assert found["similarity"] == pytest.approx(of_two_sources)
    assert (found["probe"]["kendall"], found["probe"]["spearman"]) == (None, None), "all scores are equal"
    assert found["mean rank"]["kendall"] == pytest.approx(1.0) and found["mean rank"]["top_gain"] == 0.1
    other = agreements(RANKED, {"snli": 0.3, "rte": -0.1, "sst2": 0.1}, top=2)
    assert other["mean rank"]["kendall"] == pytest.approx(-1.0)
    assert other["mean rank"]["top_gain"] == pytest.approx(0.0)


def test_the_cost_of_a_method_includes_shared_states() -> None:
    costs = [cost(RANKED["seconds"], method) for method in ("similarity", "probe", "mean rank")]
    assert costs == [2.5, 7.0, None]


def test_the_commands_and_the_report(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []

    def call(module: str, overrides: list[str]) -> float:
        calls.append([module, *overrides])
        if module == "fusion.rank":
            rank_into(output)
        return 0.0

    for module in (commands, ranking):
        monkeypatch.setattr(module, "call", call)
    arguments = ["sources=[snli,rte,sst2]", "targets=[cb]", "seeds=[1,2]", "data_dir=data", f"output={output}"]
    assert main(arguments) == 0
    sources, ranked, alone, after = calls
    assert sources[:3] == ["fusion.stage1", "-m", "+task=snli,rte,sst2"]
    assert ranked[:2] == ["fusion.rank", "+task=cb"]
    folder = f"hydra.run.dir={output}/runs/cb-ranking"
    assert {"sources=[snli,rte,sst2]", "data.dir=data", folder} <= set(ranked)
    assert {"+task=cb", "seed=1,2", "name=cb-alone-seed-${seed}"} <= set(alone)
    same = set(RankingConfig().target_overrides)
    assert same <= set(alone) and same <= set(after)  # one budget
    assert after[0] == "fusion.stage2"
    assert {"composition=continued", "sources=[snli],[rte],[sst2]"} <= set(after)
    assert "name=cb-after-${sources.0}-seed-${seed}" in after
    content = json.loads((output / "cb.json").read_text())["targets"]["cb"]
    assert set(content) == {"alone", "gains", "methods", "seconds", "agreement", "ranking"}
    assert content["methods"]["similarity"]["kendall"] == 1.0
    shown = capsys.readouterr().out
    assert "0.100 ± 0.071" in shown and "best source" in shown
    calls.clear()
    assert main(arguments) == 0
    assert [module for module, *_ in calls] == ["fusion.stage1"] * 2 + ["fusion.stage2"], "ranked already"
