"""A run that is interrupted anywhere and resumed stores the same bits as an uninterrupted one."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import pytorch_lightning as lightning
import torch
from safetensors.torch import load_file

from fusion.config.compositions import CompositionConfig
from fusion.config.methods import MethodConfig
from fusion.config.model import AdapterConfig, HeadConfig
from fusion.config.training import OptimConfig
from fusion.runs.signals import Terminated
from tests.bench import Bench, add_callback, trainer_config

# An epoch has 8 batches, and 2 of validation.


class Cut(lightning.Callback):
    """Interrupts the run by an exception or a signal at one hook."""

    def __init__(self, hook: str, epoch: int, batch: int, number: signal.Signals | None = None) -> None:
        self.hook, self.epoch, self.batch, self.number = hook, epoch, batch, number
        self.happened = False

    def _at(self, hook: str, trainer: lightning.Trainer, batch: int) -> None:
        if self.happened or (hook, trainer.current_epoch, batch) != (self.hook, self.epoch, self.batch):
            return
        self.happened = True
        if self.number is None:
            raise RuntimeError("the power went")
        os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: lightning.Trainer, *rest: Any) -> None:
        self._at("start", trainer, rest[-1])

    def on_train_batch_end(self, trainer: lightning.Trainer, *rest: Any) -> None:
        self._at("end", trainer, rest[-1])

    def on_validation_batch_end(self, trainer: lightning.Trainer, *rest: Any) -> None:
        self._at("validation", trainer, rest[3])

    def on_train_epoch_end(self, trainer: lightning.Trainer, *rest: Any) -> None:
        self._at("epoch", trainer, 0)


KINDS: dict[str, dict[str, Any]] = {
    "adapter": {},
    "accumulating": {"trainer": {"accumulate_grad_batches": 3}},
    "often evaluated": {"trainer": {"val_check_interval": 0.25}},
    "patient": {"optim": {"patience": 1, "lr": 0.05}, "trainer": {"max_epochs": 6}},
    "steps": {"trainer": {"max_steps": 13}},
    "every other epoch": {"trainer": {"check_val_every_n_epoch": 2, "max_epochs": 3}},
    "robust": {"adapter": AdapterConfig(dropout=0.2, drop="robust")},
    "workers": {"workers": 2},
    "lora": {"method": MethodConfig("lora", dropout=0.1)},
    "several": {"tasks": ("films", "books")},
    "fusion": {
        "sources": ["plays", "books"],
        "composition": CompositionConfig(dropout=0.1, source_dropout=0.5, prior="uniform", prior_penalty=0.1),
    },
}


def train(bench: Bench, kind: str, store: str, cut: Cut | None = None) -> dict[str, Any]:
    asked = dict(KINDS[kind])
    trainer = trainer_config(**asked.pop("trainer", {}))
    optim = {"lr": 5e-3, "patience": None} | asked.pop("optim", {})
    workers = asked.pop("workers", 0)
    settings: dict[str, Any] = {
        "store": str(bench.folder / store),
        "name": "x",
        "head": HeadConfig(dropout=0.3),
        "trainer": trainer,
        "optim": OptimConfig(**optim),
        "data": dataclasses.replace(bench.data, workers=workers),
        "checkpoint_minutes": None if cut is None else 0.0,  # no effect on the result
    }
    tasks, sources = asked.pop("tasks", None), asked.pop("sources", None)
    if sources is None and "adapter" not in asked:
        asked["adapter"] = AdapterConfig(dropout=0.2)
    with pytest.MonkeyPatch.context() as patch:
        if cut is not None:
            add_callback(patch, cut, first=True)
        if sources is not None:
            found = [str(bench.folder / "store" / name) for name in sources]
            return bench.stage2("films", found, **settings, **asked)
        if tasks is not None:
            return bench.multitask(*tasks, **settings, **asked)
        return bench.stage1("films", **settings, **asked)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{k}": v for part in ("weights", "head") for k, v in load_file(folder / f"{part}.safetensors").items()
    }


Place = tuple[str, int, int]
PLACES: list[Place] = [
    ("start", 0, 0),
    ("start", 0, 3),
    ("end", 0, 5),
    ("start", 0, 7),
    ("validation", 0, 0),
    ("validation", 0, 1),
    ("epoch", 0, 0),
    ("start", 1, 0),
    ("start", 1, 4),
    ("end", 1, 7),
    ("validation", 1, 1),
    ("epoch", 1, 0),
]
HOW = {None: "killed", signal.SIGTERM: "terminated"}
FEW = [(None, PLACES[8]), (signal.SIGTERM, PLACES[4])]


@pytest.fixture
def sigterm_raises() -> Iterator[None]:
    """SIGTERM raises, as in a command."""

    def end(number: int, frame: object) -> NoReturn:
        raise Terminated("SIGTERM")

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_stores_the_same_bits(bench: Bench, kind: str, sigterm_raises: None) -> None:
    there = 1 if kind == "every other epoch" else 2  # the first epoch is not evaluated there
    assert interruptions_without_difference(bench, kind, FEW) == there


def test_the_speed_of_a_resumed_run_includes_the_time_before(bench: Bench) -> None:
    class SlowCut(Cut):
        def on_train_batch_start(self, trainer: lightning.Trainer, *rest: Any) -> None:
            if trainer.global_step == 0:
                time.sleep(3.0)
            super().on_train_batch_start(trainer, *rest)

    kind = next(iter(KINDS))
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        train(bench, kind, "store", SlowCut("end", 1, 0))
    speed = train(bench, kind, "store")["speed"]
    assert 3.0 < speed["seconds"] < time.monotonic() - began
    assert speed["examples_per_second"] * speed["seconds"] == pytest.approx(2 * 64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_interrupted_anywhere_stores_the_same_bits(bench: Bench, kind: str, sigterm_raises: None) -> None:
    assert interruptions_without_difference(bench, kind, [(how, place) for how in HOW for place in PLACES]) >= 14


def interruptions_without_difference(bench: Bench, kind: str, cuts: list[tuple[signal.Signals | None, Place]]) -> int:
    """Interrupt a run at each place, resume it and compare; returns how many places the run has."""
    if "sources" in KINDS[kind]:
        bench.stage1("plays")
        bench.stage1("books")
    expected = train(bench, kind, "whole")
    weights = stored(bench.folder / "whole" / "x")
    happened = 0
    for number, place in cuts:
        cut = Cut(*place, number)
        store = f"{HOW[number]}-{'-'.join(map(str, place))}"
        folder = bench.folder / store
        try:
            again = train(bench, kind, store, cut)
        except (RuntimeError, Terminated) as error:
            assert isinstance(error, RuntimeError if number is None else Terminated)
            assert not (folder / "x").exists()
            again = train(bench, kind, store)
        else:
            assert not cut.happened, f"{store}: cut, and yet it ended"
        happened += cut.happened
        found = stored(folder / "x")
        assert found.keys() == weights.keys()
        different = [name for name, tensor in weights.items() if not torch.equal(found[name], tensor)]
        assert not different, (store, different)
        for key in ("metrics", "best_epoch", "epochs"):
            assert again[key] == expected[key], (store, key)
        assert not list((folder / ".runs").glob("*")), store
    return happened
