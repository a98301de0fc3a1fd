"""Checkpoint files: atomic, the last intact one is read, nothing in them is executed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as lightning
import torch

from fusion.config.training import OptimConfig
from fusion.errors import TrainingError
from fusion.training import checkpoints
from fusion.training import fit as fit_module
from fusion.training.checkpoints import BEFORE, LAST, POSITION, read_checkpoint, write_checkpoint
from tests.bench import Bench, add_callback, same, trainer_config


def content(number: int) -> dict[str, Any]:
    return {
        "format": checkpoints.FORMAT,
        "position": {"epoch": number, "batch": 0, "steps": number},
        "state_dict": {"weight": torch.full((300,), float(number))},
    }


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path / "none") is None
    for number in range(4):
        write_checkpoint(tmp_path / "run", content(number))
    assert {file.name for file in (tmp_path / "run").iterdir()} == {LAST, BEFORE, POSITION}
    read = read_checkpoint(tmp_path / "run")
    assert read is not None and read["position"]["epoch"] == 3
    assert json.loads((tmp_path / "run" / POSITION).read_text()) == {"epoch": 3, "batch": 0, "steps": 3}
    (tmp_path / "run" / LAST).unlink()  # killed between the two renames
    read = read_checkpoint(tmp_path / "run")
    assert read is not None and read["position"]["epoch"] == 2


def test_a_checkpoint_of_another_version_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = content(1)
    del old["format"]  # as of version 0.1
    write_checkpoint(tmp_path, old)
    assert read_checkpoint(tmp_path) is None
    assert "written by a different version" in caplog.text


def test_if_one_is_damaged_the_previous_one_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Any change of the content; padding of the archive may change."""
    draw = random.Random(5)
    write_checkpoint(tmp_path, content(1))
    write_checkpoint(tmp_path, content(2))
    whole = (tmp_path / LAST).read_bytes()
    taken = {1: 0, 2: 0}
    for _ in range(150):
        damaged = bytearray(whole)
        if draw.random() < 0.3:
            damaged = damaged[: draw.randrange(len(whole))]
        else:
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        (tmp_path / LAST).write_bytes(damaged)
        read = read_checkpoint(tmp_path)
        assert read is not None
        number = read["position"]["epoch"]
        assert torch.equal(read["state_dict"]["weight"], torch.full((300,), float(number)))
        taken[number] += 1
    assert taken[1] > 60
    assert "last.ckpt ignored: it is damaged" in caplog.text
    (tmp_path / LAST).write_bytes(b"")
    (tmp_path / BEFORE).write_bytes(b"PK")
    assert read_checkpoint(tmp_path) is None


class Opened:
    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return (os.system, ("touch executed",))


def test_no_code_in_a_checkpoint_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content(1) | {"more": Opened()}, tmp_path / LAST)
    (tmp_path / BEFORE).write_bytes(pickle.dumps(Opened()))
    assert read_checkpoint(tmp_path) is None
    assert not (tmp_path / "executed").exists()


def test_a_failed_write_keeps_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, content(1))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_checkpoint(tmp_path, content(2))
    assert {file.name for file in tmp_path.iterdir()} == {LAST, POSITION}
    read = read_checkpoint(tmp_path)
    assert read is not None and read["position"]["epoch"] == 1


def test_a_full_disk_is_a_warning(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = bench.stage1("films")
    weights = bench.weights("films")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "write_checkpoint", full)
    found = bench.stage1("films", overwrite=True)
    assert found["metrics"] == expected["metrics"] and same(bench.weights("films"), weights)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert (
        len([line for line in warnings if "the checkpoint could not be written" in line]) == 1
    )  # and not once an epoch


def test_a_full_store_keeps_the_training(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusion.training import stage

    bench.stage1("films", name="other")
    save = stage.save

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stage, "save", full)
    why = r"films cannot be written \(No space left on device\)\.\nFree disk space or fix the folder, then rerun the same command: "
    without = trainer_config(enable_checkpointing=False)
    with pytest.raises(TrainingError, match=f"{why}it starts over, since there is no checkpoint$"):
        bench.stage1("films", trainer=without)
    with pytest.raises(TrainingError, match=f"{why}it resumes at epoch 3, batch 1 "):
        bench.stage1("films")
    monkeypatch.setattr(stage, "save", save)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(fit_module.TaskModule, "training_step", never)
    bench.stage1("films")
    assert same(bench.weights("films"), bench.weights("other"))


class Poison(lightning.Callback):
    """Makes the weights infinite before a step."""

    def __init__(self, epoch: int, batch: int, before: dict[str, torch.Tensor]) -> None:
        self.at = (epoch, batch)
        self.before = before  # filled in: the weights at the start of the epoch

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, fit_module.TaskModule)
        if (trainer.current_epoch, batch_idx) == (self.at[0], 0):
            state = module.model.weight_state().items()
            self.before.update({name: tensor.detach().clone() for name, tensor in state})
        if (trainer.current_epoch, batch_idx) == self.at:
            next(iter(module.model.trainable().values())).data.fill_(float("inf"))


def poisoned(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, epoch: int, batch: int
) -> tuple[str, dict[str, torch.Tensor]]:
    """The message, and the weights at the start of that epoch."""
    before: dict[str, torch.Tensor] = {}
    with monkeypatch.context() as patch:
        add_callback(patch, Poison(epoch, batch, before), first=True)
        with pytest.raises(TrainingError) as caught:
            bench.stage1("films", optim=OptimConfig(lr=5e-3, patience=None))
    return str(caught.value), before


def test_a_non_finite_loss_names_step_and_examples_and_keeps_the_best_epoch(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 4th batch of the second epoch, though losses are checked every ten steps."""
    message, before = poisoned(bench, monkeypatch, 1, 3)
    assert "the loss is nan at step 11 (examples " in message and "of train, zero-based): training stopped." in message
    assert "Lower optim.lr" in message and "The best epoch so far (1: validation " in message
    assert not (bench.folder / "store" / "films").exists()
    kept = bench.evaluate("films-diverged")
    assert set(kept["metrics"]["validation"]) == {"accuracy", "macro_f1"}
    assert same(bench.weights("films-diverged"), before)
    # The same command fails again from the last checkpoint, and replaces the artifact it kept.
    assert poisoned(bench, monkeypatch, 1, 3)[0] == message
    bench.stage1("films")  # without the fault, it finishes
    assert (bench.folder / "store" / "films").exists()


def test_a_non_finite_loss_in_the_first_epoch_stores_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    message, _ = poisoned(bench, monkeypatch, 0, 6)
    assert "at step 6 " in message and "kept" not in message
    assert not (bench.folder / "store").exists() or not list((bench.folder / "store").glob("films*"))
