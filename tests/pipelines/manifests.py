"""Stored artifacts without weights, for workflows that only read manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusion.store.manifest import Manifest
from tests.store.conftest import build, put


def save_manifest(store: Path, name: str, **changes: Any) -> Manifest:
    """A stored artifact as far as the workflows read it: a manifest, and no weights."""
    values: dict[str, Any] = {
        "name": name,
        "task": {"name": "cb"},
        "metrics": {"validation": {"accuracy": 0.5, "macro_f1": 0.25}},
        "run": {"identity": "i", "config": {}, "overrides": [], "directory": "runs"},
        "result": {"parameters": {"trainable": 1000}, "speed": {"seconds_per_step": 0.25}, "best_epoch": 2},
        "files": files(4000, name),
    }
    manifest = build(backbone={"layers": 7}, **(values | changes))
    put(store / name, manifest)
    return manifest


def files(size: int, sha256: str) -> dict[str, Any]:
    weights = {"bytes": size, "sha256": sha256}
    return {"weights.safetensors": weights, "head.safetensors": {"bytes": 800, "sha256": "h"}}
