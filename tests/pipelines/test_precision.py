"""The comparison of dtypes: the commands it runs, and its differences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines import commands
from pipelines.precision import main
from tests.pipelines.manifests import save_manifest


def test_the_runs_differ_in_the_dtype_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(commands, "call", lambda module, overrides: calls.append([module, *overrides]))
    scores = {"float32": {1: 0.70, 2: 0.72}, "bfloat16": {1: 0.71, 2: 0.70}}
    for method, more in (("adapter", 0.0), ("lora", 0.1), ("fusion", 0.2)):
        for dtype, by_seed in scores.items():
            for seed, score in by_seed.items():
                for task, extra in (("rte", 0.0), ("cb", 0.05)):
                    metrics = {"validation": {"accuracy": score + more + extra, "macro_f1": 0.1}}
                    save_manifest(tmp_path / "store", f"{task}-{method}-{dtype}-seed-{seed}", metrics=metrics)
    assert main(["tasks=[rte,cb]", "seeds=[1,2]", f"output={tmp_path}"]) == 0

    def general(words: list[str]) -> set[str]:
        return {word.replace("bfloat16", "float32") for word in words}

    assert [call[0] for call in calls] == 2 * ["fusion.stage1", "fusion.stage1", "fusion.stage2"]
    for exact, half in zip(calls[:3], calls[3:], strict=True):
        assert "backbone.dtype=float32" in exact and "backbone.dtype=bfloat16" in half
        assert general(exact) == general(half)
        assert {"+task=rte,cb", "seed=1,2", "trainer.max_epochs=1"} <= set(exact)
    assert "method=lora" in calls[1]
    assert "sources=[rte-adapter-bfloat16-seed-${seed},cb-adapter-bfloat16-seed-${seed}]" in calls[5]
    assert "name=${task.name}-fusion-bfloat16-seed-${seed}" in calls[5]
    found = json.loads((tmp_path / "precision.json").read_text())["methods"]
    assert list(found) == ["adapter", "lora", "fusion"] and list(found["lora"]) == ["rte", "cb", "all"]
    assert found["lora"]["rte"]["float32"] == pytest.approx([0.8, 0.82])
    assert found["lora"]["rte"]["difference"] == pytest.approx(-0.005)
    both = found["fusion"]["all"]
    assert both["bfloat16"] == pytest.approx([0.91, 0.90, 0.96, 0.95])
    assert both["low"] < both["difference"] == pytest.approx(-0.005) and both["high"] > 0
