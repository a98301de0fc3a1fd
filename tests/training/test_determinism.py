"""The same command trains the same bits, with any number of loader workers; trainer.deterministic reaches torch."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fusion.config.training import TrainerConfig
from fusion.training.fit import CUBLAS, use_deterministic_algorithms
from tests.bench import Bench, same

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import dataclasses, sys
from pathlib import Path
from tests.bench import Bench
from fusion.config.model import AdapterConfig

folder, backbone, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
bench = Bench(folder, backbone)
bench.data = dataclasses.replace(bench.data, workers=workers)
bench.stage1("films", adapter=AdapterConfig(dropout=0.1))
bench.stage1("books", adapter=AdapterConfig(drop="robust"))
bench.stage2("plays", ["films", "books"])
"""


def trained(folder: Path, backbone: Path, workers: int) -> dict[str, str]:
    """The hash of every tensor file that a fresh process stores."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(backbone), str(workers)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = sorted((folder / "store").glob("*/*.safetensors"))
    return {f"{file.parent.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
def test_fresh_processes_give_the_same_bits(tmp_path: Path, tiny_backbone: Path) -> None:
    """Dropout, dropped layers and a fusion, each in a separate process, with and without workers."""
    one = trained(tmp_path / "one", tiny_backbone, workers=0)
    assert set(one) == {
        f"{name}/{part}.safetensors"
        for name in ("films", "books", "plays-adapterfusion")
        for part in ("weights", "head")
    }
    assert len(set(one.values())) == len(one)
    assert trained(tmp_path / "two", tiny_backbone, workers=0) == one
    assert trained(tmp_path / "three", tiny_backbone, workers=2) == one


def test_workers_change_nothing(bench: Bench) -> None:
    bench.stage1("films")
    bench.data = dataclasses.replace(bench.data, workers=2)
    bench.stage1("films", store=str(bench.folder / "other"))
    assert same(bench.weights("films"), bench.weights("films", "other"))


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(CUBLAS, raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop(CUBLAS, None)  # set by what was tested


@pytest.mark.parametrize("asked", [True, "warn"])
def test_deterministic_is_set_in_both_stages_and_changes_nothing_on_a_cpu(
    bench: Bench, as_before: None, monkeypatch: pytest.MonkeyPatch, asked: bool | str
) -> None:
    from fusion.backbones import load

    seen: list[tuple[int, str | None]] = []
    real = load.load_backbone

    def loads(*values: object) -> object:
        seen.append((torch.get_deterministic_debug_mode(), os.environ.get(CUBLAS)))
        return real(*values)  # type: ignore[arg-type]

    bench.stage1("films")
    expected = bench.weights("films")
    bench.stage2("plays", ["films"])
    monkeypatch.setattr(load, "load_backbone", loads)
    trainer = TrainerConfig(accelerator="cpu", max_epochs=2, enable_progress_bar=False, deterministic=asked)
    other = str(bench.folder / "other")
    bench.stage1("films", trainer=trainer, store=other)
    bench.stage2("plays", ["films"], trainer=trainer, store=other)
    # Before the backbone is loaded, and so before it could be on a device.
    assert seen == [(1 if asked == "warn" else 2, ":4096:8")] * 2
    assert same(bench.weights("films", "other"), expected)
    assert same(bench.weights("plays-adapterfusion", "other"), bench.weights("plays-adapterfusion"))


def test_multiple_kinds_of_tasks_train_deterministically(bench: Bench, as_before: None) -> None:
    """No operation of a choice task, a regression or a robust drop is one that torch calls not deterministic."""
    from fusion.config.model import AdapterConfig

    bench.add_quiz()
    bench.add_rating()
    trainer = TrainerConfig(accelerator="cpu", max_epochs=1, enable_progress_bar=False, deterministic=True)
    bench.multitask("films", "quiz", "rating", trainer=trainer, adapter=AdapterConfig(drop="robust"))


def test_a_user_defined_cublas_workspace_is_kept(as_before: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS, ":16:8")
    use_deterministic_algorithms(True)
    assert os.environ[CUBLAS] == ":16:8" and torch.get_deterministic_debug_mode() == 2
    use_deterministic_algorithms(None)  # the next job of a sweep
    assert torch.get_deterministic_debug_mode() == 0
    monkeypatch.delenv(CUBLAS)
    use_deterministic_algorithms(False)
    assert CUBLAS not in os.environ
