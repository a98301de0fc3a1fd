"""Manifests and tensors of small artifacts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion.store.layout import HEAD, MANIFEST, WEIGHTS
from fusion.store.manifest import Manifest


@pytest.fixture(autouse=True)
def _nothing_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes on artifacts of version 0.1 appear once per process; artifacts of different tests may have equal hashes."""
    monkeypatch.setattr("fusion.store.artifacts._NOTED", set())


FILES = {WEIGHTS: {"sha256": "1" * 64, "bytes": 10}, HEAD: {"sha256": "2" * 64, "bytes": 20}}


def build(name: str = "mnli", kind: str = "adapter", **changes: Any) -> Manifest:
    """A manifest without files. `backbone`, `adapter`, `composition` are changed key by key."""
    backbone = {
        "name_or_path": "tiny",
        "revision": None,
        "fingerprint": "f" * 64,
        "family": "bert",
        "hidden_size": 8,
        "layers": 2,
    }
    adapter = {
        "name": "pfeiffer",
        "sites": ["feedforward"],
        "reads": "normed",
        "reduction_factor": 4.0,
        "bottleneck_size": None,
        "nonlinearity": "relu",
        "scaling": 1.0,
        "init": "bert",
        "dropout": 0.0,
        "layers": None,
        "bottleneck_sizes": {"0.feedforward": 2, "1.feedforward": 2},
    }
    composition = {"name": "adapterfusion", "value_matrix": True, "temperature": 1.0, "value_penalty": 0.01}
    values: dict[str, Any] = {
        "kind": kind,
        "name": name,
        "task": {"name": name, "kind": "classification", "labels": ["no", "yes"]},
        "backbone": backbone | changes.pop("backbone", {}),
        "adapter": adapter | changes.pop("adapter", {}) if kind == "adapter" else None,
        "composition": composition | changes.pop("composition", {}) if kind == "fusion" else None,
        "head": {"pooling": "cls", "layers": 1, "outputs": 2, "dropout": 0.1},
        "sources": [{"name": "a", "hash": "b"}] if kind == "fusion" else [],
        "data": {"max_length": 16, "fingerprints": {"train": "0" * 64}},
        "metrics": {"validation": {"accuracy": 0.5}},
        "seed": 3,
        "run": {"identity": "0123456789ab", "config": {"optim.lr": 1e-4}, "overrides": [], "directory": "out"},
        "versions": {"torch": torch.__version__},
        "result": {"best_epoch": 1},
    }
    return Manifest.of(**(values | changes))


def put(folder: Path, manifest: Manifest) -> Path:
    """Write a manifest as an artifact has it, and files of its sizes without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = manifest.changed(files=manifest.content["files"] or FILES)
    (folder / MANIFEST).write_text(manifest.to_json())
    for name, file in manifest.files.items():
        (folder / name).write_bytes(bytes(file.bytes))
    return folder


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a child process; return its id."""
    if child := os.fork():
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    """Wait for a child process; a negative number is the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def make_manifest() -> Callable[..., Manifest]:
    return build


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """Some of every kind of tensor that has to survive."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4, 8, generator=generator)
    return {
        "0.feedforward.down.weight": wide,
        "0.feedforward.up.weight": wide.t(),  # shares memory with the first, and is not contiguous
        "1.feedforward.down.weight": torch.nn.Parameter(torch.randn(2, 3, generator=generator)),
        "half": torch.randn(5, generator=generator).to(torch.float16),
        "brain": torch.randn(5, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(float("nan")),
        "empty": torch.empty(0, 8),
        "expanded": torch.ones(1).expand(3),
    }


@pytest.fixture
def head() -> dict[str, torch.Tensor]:
    return {"output.weight": torch.linspace(-1, 1, 16).reshape(2, 8), "output.bias": torch.zeros(2)}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "store"
