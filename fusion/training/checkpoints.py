"""Checkpoints: the trained parameters, the optimizer and the position in the data, written atomically.

No state of a random generator is stored: the order of the examples and the dropout of a batch are pure functions of the
seed, the epoch and the batch. Signals (SIGINT, SIGTERM and those of schedulers) are deferred until one is written.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import threading
import time
import zipfile
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import Callback, Trainer

from fusion.errors import UserError, first_line
from fusion.files import atomic_path, remove_partial, write_json
from fusion.runs.output import BEFORE, LAST, POSITION
from fusion.runs.signals import ECHO, SIGNALS, Forward, Terminated
from fusion.training import lightning_internals as internals
from fusion.training.module import TaskModule

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"  # the hash of the tokenizer of the token ids
FORMAT = 2  # of the content; version 0.1 stored none


class Interrupts:
    """Once armed, the first signal only sets `pending`; a second one, later than `ECHO` seconds, is handled at once.

    `obey` calls the previous handler: Ctrl-C raises KeyboardInterrupt, SIGTERM raises Terminated, submitit's handler
    requeues the job. A scheduler's signal without a handler ends the run like SIGTERM. The previous handlers are
    restored at the end.
    """

    def __init__(self) -> None:
        self.pending: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            # None: set outside Python. SIG_IGN: the user wants it ignored, as with nohup.
            self._before = {n: h for n, h in handlers.items() if h not in (None, signal.SIG_IGN)}
        return self

    def arm(self) -> None:
        """Defer signals from now on, except those that a rank forwards to the process that started it."""
        for number, handler in self._before.items():
            if not isinstance(handler, Forward):
                signal.signal(number, self._defer)

    def obey(self) -> None:
        """Call the handler of the pending signal, if there is one."""
        if self.pending is None:
            return
        number, self.pending = self.pending, None
        self._act(number, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is None:
            self.obey()

    def _defer(self, number: int, frame: FrameType | None) -> None:
        if self.pending is None:
            self.pending, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since > ECHO:
            self._act(signal.Signals(number), frame)

    def _act(self, number: signal.Signals, frame: FrameType | None) -> None:
        handler = self._before[number]
        if callable(handler):
            handler(number, frame)
        else:
            raise Terminated(number.name)


class Checkpoints(Callback):
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

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._interrupts.arm()
        self._written = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        due = time.monotonic() - self._written >= self._seconds or self._interrupts.pending is not None
        if trainer.is_global_zero and due and (self._folder is None or internals.can_resume_after(trainer, batch_idx)):
            self._save(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fitting and trainer.is_global_zero and self._interrupts.pending is not None:
            self._save(trainer, pl_module, validating=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, module: TaskModule, validating: bool = False) -> None:
        """Write a checkpoint of finite weights, then handle a pending signal."""
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
    """Refuse a checkpoint that was trained on the token ids of another tokenizer."""
    stored = checkpoint[TOKENIZER]
    if None not in (stored, tokenizer) and stored != tokenizer:
        raise UserError(
            f"the checkpoint was trained with another tokenizer (hash {str(stored)[:8]}, now {str(tokenizer)[:8]})\n"
            "Restore the backbone's tokenizer files, or start over with resume=false"
        )


class Loaded(TorchCheckpointIO):
    """Gives Lightning a checkpoint that has been read and checked already."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__()
        self._content = content

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._content
