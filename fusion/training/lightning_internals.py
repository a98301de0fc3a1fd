"""Everything that the training takes from private parts of Lightning, each with its reason.

An upgrade of Lightning has to check this file; tests/test_resume.py covers most of it.
"""

from __future__ import annotations

from typing import Any, cast

import pytorch_lightning as lightning
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher


def processes_to_start(trainer: lightning.Trainer) -> int:
    """How many processes Lightning would start by itself on this machine; 1 if it starts none.

    Its launcher reruns the command line, which under Hydra would start a whole sweep in each process. No public
    attribute distinguishes this launcher from SLURM's or torchrun's processes, or from strategies that fork.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return 1
    return 1 if launcher.cluster_environment.creates_processes_externally else trainer.num_devices


def leave_signals_alone(trainer: lightning.Trainer) -> None:
    """Keep Lightning from installing signal handlers, for which it has no option.

    They requeue a SLURM job, as submitit does too, and broadcast SIGTERM, which hangs if only one rank received it.
    """
    cast(Any, trainer)._signal_connector.register_signal_handlers = lambda: None


def checkpoint_content(trainer: lightning.Trainer) -> dict[str, Any]:
    """A checkpoint as a dict. `Trainer.save_checkpoint` ends in a barrier, and only the first process writes."""
    return cast(Any, trainer)._checkpoint_connector.dump_checkpoint(weights_only=False)


def can_resume_after(trainer: lightning.Trainer, batch_idx: int) -> bool:
    """Whether a run that resumes after this training batch does what an uninterrupted one does.

    It does not between batches whose gradients are accumulated, nor right before a validation or the end of an epoch:
    Lightning decides on these after `on_train_batch_end`, and would leave them out.
    """
    loop = cast(Any, trainer.fit_loop.epoch_loop)
    stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return stepped and not loop._is_training_done and not loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


def logged_step(trainer: lightning.Trainer) -> int:
    """The step under which Lightning logs validation metrics, which is not `global_step`."""
    return int(cast(Any, trainer.fit_loop.epoch_loop)._batches_that_stepped)


def epochs_done(trainer: lightning.Trainer) -> int:
    """Epochs trained. `current_epoch` is one less where a resumed run had nothing left to train."""
    return int(cast(Any, trainer.fit_loop.epoch_progress.current).processed)


def batches_done(trainer: lightning.Trainer) -> int:
    """Training batches of the current epoch so far."""
    return int(cast(Any, trainer.fit_loop.epoch_loop.batch_progress.current).processed)


def position_of(content: dict[str, Any]) -> dict[str, int]:
    """Where a checkpoint resumes: `{"epoch", "batch", "steps"}`, counted from 0."""
    loops = content["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]["current"]
    between_epochs = epochs["processed"] == epochs["started"]
    return {
        "epoch": epochs["processed"],
        "batch": 0 if between_epochs else batches["processed"],
        "steps": content["global_step"],
    }


def restart_validation(content: dict[str, Any]) -> None:
    """Change a checkpoint written during a validation so that the validation restarts from its first batch.

    Lightning would resume it behind the batches that are done, whose predictions are lost.
    """
    progress = content["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    done = progress["total"]["completed"] - progress["current"]["completed"]
    progress["total"] = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
    progress["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress["is_last_batch"] = False
