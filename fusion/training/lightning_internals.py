"""All uses of the private API of Lightning and of DDP in training, each with its reason.

tests/test_resume.py covers most of them.
"""

from __future__ import annotations

from typing import Any, cast

import pytorch_lightning as lightning
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.nn.parallel import DistributedDataParallel


def processes_to_start(trainer: lightning.Trainer) -> int:
    """Return the number of processes that Lightning would use on this machine, or 1 if it launches none.

    Lightning's launcher reruns the command line, which under Hydra would start a whole sweep in each process. No public
    attribute distinguishes this launcher from SLURM's or torchrun's processes, or from strategies that fork.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return 1
    return 1 if launcher.cluster_environment.creates_processes_externally else trainer.num_devices


def ignore_in_ddp(module: lightning.LightningModule, names: list[str]) -> None:
    """Let DDP neither broadcast these tensors at the start nor, if they are buffers, in each step.

    torch has no public argument for it; `broadcast_buffers=False` would still broadcast them at the start.
    """
    cast(Any, DistributedDataParallel)._set_params_and_buffers_to_ignore_for_model(module, names)


def leave_signals_alone(trainer: lightning.Trainer) -> None:
    """Prevent Lightning from installing signal handlers, which no option disables.

    The handlers requeue a SLURM job, as submitit does too, and broadcast SIGTERM, which hangs if only one rank got it.
    """
    cast(Any, trainer)._signal_connector.register_signal_handlers = lambda: None


def set_epochs(trainer: lightning.Trainer, epochs: int, evaluate_every: int | None) -> None:
    """Set the number of epochs, and after how many of them the model is evaluated.

    They depend on the number of batches, and this on the number of processes, which the trainer determines. No public
    method changes them.
    """
    trainer.fit_loop.max_epochs = epochs
    cast(Any, trainer).check_val_every_n_epoch = evaluate_every


def checkpoint_content(trainer: lightning.Trainer) -> dict[str, Any]:
    """Return a checkpoint as a dict. `Trainer.save_checkpoint` has a barrier, but only rank 0 writes checkpoints."""
    return cast(Any, trainer)._checkpoint_connector.dump_checkpoint(weights_only=False)


def can_resume_after(trainer: lightning.Trainer, batch_idx: int) -> bool:
    """Return whether a run that resumes after this training batch is equivalent to an uninterrupted run.

    It is not between batches whose gradients are accumulated, nor right before a validation or the end of an epoch,
    which Lightning would skip, since it checks for them after `on_train_batch_end`.
    """
    loop = cast(Any, trainer.fit_loop.epoch_loop)
    stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return stepped and not loop._is_training_done and not loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


def logged_step(trainer: lightning.Trainer) -> int:
    """Return the step under which Lightning logs validation metrics, which is not `global_step`."""
    return int(cast(Any, trainer.fit_loop.epoch_loop)._batches_that_stepped)


def epochs_done(trainer: lightning.Trainer) -> int:
    """Return the number of trained epochs. `current_epoch` is one less if a resumed run had nothing left to train."""
    return int(cast(Any, trainer.fit_loop.epoch_progress.current).processed)


def batches_done(trainer: lightning.Trainer) -> int:
    """Return the number of training batches processed in the current epoch."""
    return int(cast(Any, trainer.fit_loop.epoch_loop.batch_progress.current).processed)


def position_of(content: dict[str, Any]) -> dict[str, int]:
    """Return the position from which a checkpoint resumes: `{"epoch", "batch", "steps"}`, zero-based."""
    loops = content["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]["current"]
    between_epochs = epochs["processed"] == epochs["started"]
    batch = 0 if between_epochs else batches["processed"]
    return {"epoch": epochs["processed"], "batch": batch, "steps": content["global_step"]}


def restart_validation(content: dict[str, Any]) -> None:
    """Let the validation of a checkpoint start over, since the predictions of its completed batches are lost."""
    progress = content["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    done = progress["total"]["completed"] - progress["current"]["completed"]
    progress["total"] = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
    progress["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress["is_last_batch"] = False
