"""Memory freed by a step is kept; the model of a job is freed before the next one."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from fusion import stage1
from fusion.backbones import load
from fusion.runs.memory import keep_freed_memory
from fusion.training import fit
from tests.bench import Bench

FAULTS = """
import resource, sys, torch
from fusion.runs.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    kept = [torch.ones(1 << 20) for _ in range(30)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be set")
def test_steps_of_the_same_size_cause_no_page_faults() -> None:
    # Set by hand, the threshold no longer grows with use: without the call every large block is mapped again.
    mapped = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17), "MALLOC_TRIM_THRESHOLD_": str(1 << 17)}

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, env=mapped, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 100 < faults("leave")


def test_without_glibc_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False


class Alive:
    """Counts the backbones of earlier jobs that are alive whenever another one is loaded, and at the end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: list[int] = []
        self._models: list[weakref.ref[Any]] = []
        original = load.load_backbone

        def counted(*arguments: Any) -> load.Backbone:
            self.counts.append(self.now())
            backbone = original(*arguments)
            self._models.append(weakref.ref(backbone.model))
            return backbone

        monkeypatch.setattr(load, "load_backbone", counted)
        copy = load.Backbone.copy

        def counted_copy(backbone: load.Backbone) -> load.Backbone:
            other = copy(backbone)
            self._models.append(weakref.ref(other.model))
            return other

        monkeypatch.setattr(load.Backbone, "copy", counted_copy)

    def now(self) -> int:
        return sum(model() is not None for model in self._models)


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Alive]:
    """The garbage collector runs only where it is called."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the program sets it; this restores it
    root = logging.getLogger()
    before, level, handler = root.handlers[:], root.level, signal.getsignal(signal.SIGTERM)
    gc.collect()
    gc.disable()
    yield Alive(monkeypatch)
    gc.enable()
    root.handlers[:], root.level = before, level
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("method", ["full", pytest.param("adapter", marks=pytest.mark.slow)])
def test_a_sweep_holds_one_model_at_a_time(
    bench: Bench, alive: Alive, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Also after a job that failed, here the second one."""
    checked: list[Any] = []

    def failing_once(model: Any) -> None:
        checked.append(type(model))
        if len(checked) == 2:
            raise RuntimeError("boom")

    monkeypatch.setattr(fit, "_check_finite", failing_once)
    (bench.folder / "conf" / "task").mkdir(parents=True)
    task = "kind: classification\ntext: text\nlabels: [bad, good]\nmetrics: [accuracy]\n"
    (bench.folder / "conf" / "task" / "films.yaml").write_text(task)
    monkeypatch.chdir(bench.folder)
    words = [
        "-m", "+task=films", "data.dir=data", "data.cache_dir=cache", f"backbone.name_or_path={bench.backbone}",
        "backbone.pooling=mean", "trainer.accelerator=cpu", "trainer.max_epochs=1", "data.max_length=16",
        f"method={method}", "logger=none", "seed=1,2,3",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["stage1", *words])
    with pytest.raises(SystemExit) as ended:
        stage1.main()
    assert ended.value.code == 1
    statuses = [json.loads(file.read_text())["status"] for file in sorted(bench.folder.glob("**/status.json"))]
    assert statuses == ["done", "failed", "done"]
    assert (alive.counts, alive.now()) == ([0, 0, 0], 0)


def test_the_short_run_of_a_ranking_frees_its_model(bench: Bench, alive: Alive) -> None:
    bench.stage1("films")
    bench.stage1("books")
    gc.collect()
    bench.rank("plays", sources=["films", "books"], methods=["attention"], epochs=1)
    assert alive.now() == 0
