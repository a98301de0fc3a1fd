"""Checkpoints: trainable parameters, optimizer state and the position in the data, written atomically.

RNG states are not saved: example order and dropout masks are pure functions of seed, epoch and batch. Signals (SIGINT,
SIGTERM and those of schedulers) are deferred until a checkpoint is written.
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
from types import FrameType
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

TOKENIZER = "tokenizer"  # key of the tokenizer's hash
FORMAT = 2  # format version; checkpoints of release 0.1 have none


class Interrupts:
    """Context manager that defers signals after `arm`: the first signal only sets `pending`.

    `handle_pending` calls the previous handler: Ctrl-C raises KeyboardInterrupt, SIGTERM raises Terminated, submitit's
    handler requeues the job; a scheduler's signal without a handler raises Terminated. A second signal more than `ECHO`
    seconds later is handled immediately. The previous handlers are restored on exit.
    """

    def __init__(self) -> None:
        self.pending: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            # None: the handler was not installed from Python. SIG_IGN: ignored by the user, e.g. with nohup.
            self._before = {n: h for n, h in handlers.items() if h not in (None, signal.SIG_IGN)}
        return self

    def arm(self) -> None:
        """Start deferring signals, except those that a rank forwards to its launcher."""
        for number, handler in self._before.items():
            if not isinstance(handler, Forward):
                signal.signal(number, self._defer)

    def handle_pending(self) -> None:
        """Call the previous handler of the pending signal, if any."""
        if self.pending is None:
            return
        number, self.pending = self.pending, None
        self._act(number, None)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is None:
            self.handle_pending()

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
    """Callback that writes a checkpoint after each epoch, every `minutes`, and before a signal is handled.

    Only rank 0 writes, since all ranks have the same weights. If a checkpoint cannot be written, a warning is logged
    and the previous checkpoint is kept. If `folder` is `None`, signals are handled between batches without checkpoints.
    """

    def __init__(
        self, folder: Path | None, minutes: float | None, interrupts: Interrupts, tokenizer: str | None
    ) -> None:
        self._folder = folder
        self._seconds = float("inf") if minutes is None else 60.0 * minutes
        self._interrupts = interrupts
        self._tokenizer = tokenizer
        self._failed = False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._interrupts.arm()
        self._written = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        due = time.monotonic() - self._written >= self._seconds or self._interrupts.pending is not None
        if trainer.is_global_zero and due and (self._folder is None or internals.can_resume_after(trainer, batch_idx)):
            self._save(trainer, pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, *batch: Any) -> None:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fitting and trainer.is_global_zero and self._interrupts.pending is not None:
            self._save(trainer, pl_module, validating=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, module: TaskModule, validating: bool = False) -> None:
        """Write a checkpoint if all weights are finite, then handle a pending signal."""
        if self._folder is not None and module.is_finite():
            content = internals.checkpoint_content(trainer)
            content |= {"format": FORMAT, "position": internals.position_of(content), TOKENIZER: self._tokenizer}
            if validating:
                internals.restart_validation(content)
            try:
                write_checkpoint(self._folder, content)
                self._failed = False
            except OSError as error:
                text = (
                    "the checkpoint could not be written to %s (%s): training continues, but an interruption would lose "
                    "the progress since the last checkpoint"
                )
                level = logging.DEBUG if self._failed else logging.WARNING
                log.log(level, text, self._folder, error.strerror or error)
                self._failed = True
            self._written = time.monotonic()
        self._interrupts.handle_pending()


def write_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically, and keep the previous one. Raises OSError; existing files are then unchanged."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial(folder / LAST)  # from a process that was killed
    # When the disk is full, torch.save to a file aborts the process without an OSError.
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
    """Return the last intact checkpoint of a run, or `None`."""
    for path in (folder / LAST, folder / BEFORE):
        if not path.is_file():
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                if (broken := archive.testzip()) is not None:
                    raise OSError(f"checksum mismatch in {broken}")
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if content.get("format") == FORMAT:
                return content
            log.warning("checkpoint %s ignored: it was written by a different version", path)
        except Exception as error:  # errors of zipfile, zlib, pickle and torch share no base class
            log.warning("checkpoint %s ignored: it is damaged (%s)", path, first_line(error))
    return None


def check_tokenizer(checkpoint: dict[str, Any], tokenizer: str | None) -> None:
    """Raise UserError if a checkpoint was trained with a different tokenizer."""
    stored = checkpoint[TOKENIZER]
    if None not in (stored, tokenizer) and stored != tokenizer:
        raise UserError(
            f"the checkpoint was trained with a different tokenizer (hash {str(stored)[:8]}, now {str(tokenizer)[:8]})\n"
            "Restore the backbone's tokenizer files, or start over with resume=false"
        )


class Loaded(TorchCheckpointIO):
    """Checkpoint plugin that passes an already loaded checkpoint to Lightning."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__()
        self._content = content

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._content
