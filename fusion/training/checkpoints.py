"""Checkpoints of a training: what trains, the optimizer and the place in the data, whole or not at all.

There are no states of random generators to keep: the order of the rows and the dropout of a batch are pure
functions of the seed, the epoch and the batch.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import time
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
from lightning_fabric.plugins import CheckpointIO

from fusion.errors import first_line
from fusion.files import write_json
from fusion.runs.output import BEFORE, LAST, POSITION
from fusion.training.interrupts import Interrupts
from fusion.training.module import TaskModule

_FORMER = re.compile(r"^(model\.)?fillings\.")  # parameters of slot modules in checkpoints of version 0.1

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"  # key of a checkpoint: the hash of the tokenizer that gave the token ids
_ENDING = ".part"


class Checkpoints(lightning.Callback):
    """Writes a checkpoint each epoch, every so many minutes, and before a signal is obeyed.

    Only the first process writes, by itself: the others have the same weights. A checkpoint that cannot be written
    costs a warning; the last good one stays.

    Args:
        folder: of the run; None: nothing is written, and signals are obeyed between two batches.
        minutes: between two checkpoints within an epoch; None: none there.
        interrupts: entered by then.
        tokenizer: its hash, which is kept beside the weights.
    """

    def __init__(
        self,
        folder: Path | None,
        minutes: float | None,
        interrupts: Interrupts,
        tokenizer: str | None = None,
    ) -> None:
        self._folder = folder
        self._seconds = None if minutes is None else 60.0 * minutes
        self._interrupts = interrupts
        self._tokenizer = tokenizer
        self._written = 0.0
        self._warned = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._interrupts.arm()
        self._written = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not trainer.is_global_zero:
            return
        due = self._seconds is not None and time.monotonic() - self._written >= self._seconds
        stopping = self._interrupts.pending is not None
        if (due or stopping) and (self._folder is None or _goes_on_here(trainer, batch_idx)):
            self._save(trainer, pl_module)
            self._interrupts.obey()

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        within = trainer.state.fn == "fit" and not trainer.sanity_checking
        if within and trainer.is_global_zero and self._interrupts.pending is not None:
            self._save(trainer, pl_module, validating=True)
            self._interrupts.obey()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_global_zero:
            self._save(trainer, pl_module)
            self._interrupts.obey()

    def _save(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, validating: bool = False
    ) -> None:
        assert isinstance(module, TaskModule)
        if self._folder is None or not module.is_finite():
            return
        # Lightning's save_checkpoint ends in a barrier, where the other processes are not.
        content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        epochs = content["loops"]["fit_loop"]["epoch_progress"]["current"]
        batches = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        ended = epochs["processed"] == epochs["started"]
        content["position"] = {
            "epoch": epochs["processed"],
            "batch": 0 if ended else batches["processed"],
            "steps": trainer.global_step,
        }
        if self._tokenizer is not None:
            content[TOKENIZER] = self._tokenizer
        if validating:
            _rewind_validation(content["loops"]["fit_loop"])
        try:
            write_checkpoint(self._folder, content)
        except OSError as error:
            log.log(
                logging.DEBUG if self._warned else logging.WARNING,
                "no checkpoint could be written to %s (%s): training goes on, and an interruption would lose what "
                "came after the last good one",
                self._folder,
                error.strerror or error,
            )
            self._warned = True
        else:
            self._warned = False
        self._written = time.monotonic()


def _goes_on_here(trainer: lightning.Trainer, batch_idx: int) -> bool:
    """Whether a training that is taken up after this batch does what it would have done without an interruption.

    Not within batches whose gradients add up, and not before a validation or the end of the epoch, which come next.
    """
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return stepped and not loop._is_training_done and not loop._should_check_val_fx(fetcher)


def _rewind_validation(loops: dict[str, Any]) -> None:
    """Says of a validation that is under way that its first batch was under way, so that it begins anew."""
    progress = loops["epoch_loop.val_loop.batch_progress"]
    done = progress["total"]["completed"] - progress["current"]["completed"]
    progress["total"] = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
    progress["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress["is_last_batch"] = False


def write_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint and then puts it in the place of the last one, which stays as the one before.

    Raises:
        OSError: it could not be written; what was there is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".*{_ENDING}"):  # of a writer that was killed
        left.unlink(missing_ok=True)
    part = folder / f".{LAST}{_ENDING}"
    try:
        with part.open("wb") as file:
            # By way of memory: torch's own writer makes a crash, and no OSError, of a disk that fills up.
            buffer = io.BytesIO()
            torch.save(content, buffer)
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        # Of the checkpoint before; where the disk is full, no new one is written.
        (folder / POSITION).unlink(missing_ok=True)
        if (folder / LAST).exists():
            os.replace(folder / LAST, folder / BEFORE)
        os.replace(part, folder / LAST)
        write_json(folder / POSITION, content["position"])
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The last good checkpoint of a run; None: there is none."""
    for name in (LAST, BEFORE):
        path = folder / name
        if not path.is_file():
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                if (broken := archive.testzip()) is not None:
                    raise OSError(f"{broken} has another checksum")
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if not {"position", "loops", "state_dict", "optimizer_states"} <= content.keys():
                raise OSError("it is none of this version")
            return _with_present_names(content)
        except Exception as error:  # zip, zlib, pickle and torch errors share no base
            log.warning("checkpoint %s is damaged (%s): not used", path, first_line(error))
    return None


def _with_present_names(content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of version 0.1 with the present names of parameters: `fillings.` is `slots.` now."""

    def renamed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            _FORMER.sub(r"\1slots.", str(key)) if isinstance(key, str) else key: renamed(inner)
            for key, inner in value.items()
        }

    if any(_FORMER.match(name) for name in content["state_dict"]):
        content = renamed(content)
        content.pop("frozen_hash", None)  # a hash over the former names
    return content


class Loaded(CheckpointIO):
    """Hands Lightning a checkpoint that was read and checked already; ours are written without it."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._content

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def remove_checkpoint(self, path: Any) -> None:
        raise NotImplementedError
