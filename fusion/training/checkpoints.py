"""Checkpoints: the trained parameters, the optimizer and the position in the data, written atomically.

No state of a random generator is stored: the order of the examples and the dropout of a batch are pure functions of the
seed, the epoch and the batch.
"""

from __future__ import annotations

import io
import logging
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
from lightning_fabric.plugins import CheckpointIO

from fusion.errors import UserError, first_line
from fusion.files import atomic_path, remove_partial, write_json
from fusion.runs.output import BEFORE, LAST, POSITION
from fusion.training import lightning_internals as internals
from fusion.training.interrupts import Interrupts
from fusion.training.module import TaskModule

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"  # the hash of the tokenizer of the token ids
FORMAT = 2  # of the content; version 0.1 stored none


class Checkpoints(lightning.Callback):
    """Writes a checkpoint after each epoch, at a time interval, and before a signal is handled.

    Only the first process writes, since all have the same weights. If a checkpoint cannot be written, a warning is
    logged and the previous one is kept.

    Args:
        folder: of the run; None: no checkpoint is written, and signals are handled between two batches.
        minutes: the interval within an epoch; None: no checkpoint there.
        tokenizer: the hash of the tokenizer.
    """

    def __init__(
        self, folder: Path | None, minutes: float | None, interrupts: Interrupts, tokenizer: str | None
    ) -> None:
        self._folder = folder
        self._seconds = float("inf") if minutes is None else 60.0 * minutes
        self._interrupts = interrupts
        self._tokenizer = tokenizer
        self._written = 0.0
        self._failed = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._interrupts.arm()
        self._written = time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = time.monotonic() - self._written >= self._seconds or self._interrupts.pending is not None
        if trainer.is_global_zero and due and (self._folder is None or internals.can_resume_after(trainer, batch_idx)):
            self._save(trainer, pl_module)

    def on_validation_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fitting and trainer.is_global_zero and self._interrupts.pending is not None:
            self._save(trainer, pl_module, validating=True)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_global_zero:
            self._save(trainer, pl_module)

    def _save(self, trainer: lightning.Trainer, module: lightning.LightningModule, validating: bool = False) -> None:
        """Write a checkpoint of finite weights, then handle a pending signal."""
        assert isinstance(module, TaskModule)
        if self._folder is not None and module.is_finite():
            content = internals.checkpoint_content(trainer)
            content |= {"format": FORMAT, "position": internals.position_of(content), TOKENIZER: self._tokenizer}
            if validating:
                internals.restart_validation(content)
            try:
                write_checkpoint(self._folder, content)
                self._failed = False
            except OSError as error:
                log.log(
                    logging.DEBUG if self._failed else logging.WARNING,
                    "no checkpoint could be written to %s (%s): training continues, and an interruption would lose "
                    "the progress since the last one",
                    self._folder,
                    error.strerror or error,
                )
                self._failed = True
            self._written = time.monotonic()
        self._interrupts.obey()


def write_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically, and keep the previous one beside it.

    Raises:
        OSError: it could not be written; the existing files are unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial(folder / LAST)  # of a writer that was killed
    # torch.save aborts the process, without an OSError, if it writes to a disk that is full.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(folder / LAST) as part:
        with part.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        (folder / POSITION).unlink(missing_ok=True)
        if (folder / LAST).exists():
            os.replace(folder / LAST, folder / BEFORE)
    write_json(folder / POSITION, content["position"])


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint of a run that is intact; None if none is."""
    for path in (folder / LAST, folder / BEFORE):
        if not path.is_file():
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                if (broken := archive.testzip()) is not None:
                    raise OSError(f"wrong checksum of {broken}")
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if content.get("format") == FORMAT:
                return content
            log.warning("checkpoint %s was written by another version: not used", path)
        except Exception as error:  # errors of zipfile, zlib, pickle and torch share no base class
            log.warning("checkpoint %s is damaged (%s): not used", path, first_line(error))
    return None


def check_tokenizer(checkpoint: dict[str, Any], tokenizer: str | None) -> None:
    """
    Raises:
        UserError: the checkpoint was trained on the token ids of another tokenizer.
    """
    stored = checkpoint[TOKENIZER]
    if None not in (stored, tokenizer) and stored != tokenizer:
        raise UserError(
            f"the checkpoint was trained with another tokenizer (hash {str(stored)[:8]}, now {str(tokenizer)[:8]})\n"
            "Restore the backbone's tokenizer files, or start over with resume=false"
        )


class Loaded(CheckpointIO):
    """Gives Lightning a checkpoint that has been read and checked already."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._content

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def remove_checkpoint(self, path: Any) -> None:
        raise NotImplementedError
