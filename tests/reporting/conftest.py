"""Hand-written run folders, so small that the expected report can be computed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

LABELS = [0, 1] * 10
Write = Callable[..., Path]


def outcomes(wrong: int, fingerprint: str = "rows") -> dict[str, Any]:
    """Twenty rows with wrong predictions for the first `wrong`."""
    predicted = [1 - label if row < wrong else label for row, label in enumerate(LABELS)]
    return {"fingerprint": fingerprint, "labels": LABELS, "predicted": predicted}


def config_of(task: str, seed: int, **changes: Any) -> dict[str, Any]:
    """The config of a stage 1 run; double underscores in keys are dots."""
    config: dict[str, Any] = {
        "seed": seed,
        "task": {"name": task, "kind": "classification", "metrics": ["accuracy"]},
        "data": {"dir": None, "limit": {"train": 100}},
        "backbone": {"name_or_path": "tiny"},
        "optim": {"lr": 1e-3},
        "method": {"name": "adapter"},
        "store": "store",
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        inner = config
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return config


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write("tweets", seed=1, score=0.8, method__name="head")` writes a run folder and returns its path."""
    count = 0

    def run(
        task: str = "tweets",
        *,
        seed: int = 1,
        score: float | None = 0.8,
        wrong: int | None = None,
        command: str = "stage1",
        status: str = "done",
        sources: list[str] | None = None,
        artifact: str | None = None,
        split: str = "validation",
        result: dict[str, Any] | None = None,
        before: str | None = None,
        **changes: Any,
    ) -> Path:
        nonlocal count
        count += 1
        folder = tmp_path / "runs" / f"{count:03d}"
        folder.mkdir(parents=True)
        if sources is not None:
            command = "stage2"
            changes = {"composition": {"name": "adapterfusion"}, "sources": sources, "method": None} | changes
        config = config_of(task, seed, **changes)
        if config.get("method") is None:
            config.pop("method", None)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "status.json").write_text(
            json.dumps(
                {
                    "status": status,
                    "before": before,
                    "command": command,
                    "overrides": [f"+task={task}", f"seed={seed}"],
                    "ended": f"2026-01-01T00:00:{count:02d}+00:00",
                }
            )
        )
        if status == "done":
            content = {
                "stage": 2 if command == "stage2" else 1,
                "task": task,
                "name": artifact or f"{task}-{count}",
                "seed": seed,
                "metrics": {} if score is None else {split: {"accuracy": score}},
                "best_epoch": 2,
                "epochs": 2,
                "parameters": {"trainable": 100, "frozen": 1000, "stored_bytes": 400},
                "speed": {"seconds": 2.0, "tokens_per_second": 50.0, "peak_memory_bytes": 1e9},
                "sources": sources or [],
                "artifact": str(tmp_path / "store" / (artifact or f"{task}-{count}")),
            }
            (folder / "result.json").write_text(json.dumps(content | (result or {})))
        if wrong is not None:
            (folder / "outcomes.json").write_text(json.dumps({split: outcomes(wrong)}))
        return folder

    return run
