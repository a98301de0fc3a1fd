"""The guard over frozen tensors: only what the model declares is trained, and nothing else changes.

All frozen tensors are hashed before and after a training. In between, at each epoch's end, before each validation and
whenever a checkpoint is written, their checksums are compared, at a fraction of the cost: no epoch is scored, and no run
resumes, after a change.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor

from fusion.errors import GuardError, UserError
from fusion.model.adapted import AdaptedModel, hash_of_hashes
from fusion.training.processes import gathered

_SHOWN = 4  # names in a message
_CHUNK = 2**16  # integers that are weighted together in a checksum


class Guard(Callback):
    """Raises if other tensors than the declared ones would be trained, or have changed, in any process.

    It has to be the first callback, so that no other one stores what it refuses.

    Args:
        checkpoints: of the run; they are removed if a change is found at the end of a training only.

    Attributes:
        frozen_hash: of all frozen tensors before the training.

    Raises:
        GuardError: see above, or the processes have different tensors.
        UserError: a checkpoint was trained with other frozen weights.
    """

    def __init__(self, model: AdaptedModel, checkpoints: Path | None = None) -> None:
        self._model = model
        self._checkpoints = checkpoints
        self.frozen_hash = ""
        self._hashes: dict[str, str] = {}
        self._types: dict[str, torch.dtype] = {}
        self._checksums: dict[str, int] = {}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Before a checkpoint is loaded, and before DDP copies the weights of the first process to the others."""
        if stage != "fit":
            return
        self._check_declared()
        _check_shared_memory(self._model)
        frozen, self._hashes = self._model.frozen(), self._model.frozen_hashes()
        self.frozen_hash = hash_of_hashes(self._hashes)
        self._types = {name: tensor.dtype for name, tensor in frozen.items()}
        self._checksums = _checksums(frozen)
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            self._compare_processes()

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """After the model was moved to its device."""
        frozen = self._model.frozen()
        converted = [name for name, tensor in frozen.items() if tensor.dtype != self._types.get(name)]
        if converted:
            raise GuardError(
                f"trainer.precision={trainer.precision} made {frozen[converted[0]].dtype} of frozen tensors: "
                f"{_listed(converted)}; nothing is stored"
            )
        _refuse(_differing(self._checksums, _checksums(frozen)), "before the first step")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._check_optimizers(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            self._check(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 < trainer.num_training_batches:
            return
        self._check_declared()
        # Not at the epoch's end: Lightning clears all gradients before it validates.
        frozen = self._model.frozen().items()
        if reached := [name for name, tensor in frozen if tensor.is_leaf and tensor.grad is not None]:
            raise GuardError(
                f"a gradient reached frozen tensors, {_in_epoch(trainer)}: {_listed(reached)}; nothing is stored"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._check(trainer)
        checkpoint["frozen_hash"] = self.frozen_hash

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        stored = checkpoint["frozen_hash"]
        if stored != self.frozen_hash:
            raise UserError(
                "the run started with other frozen weights: the backbone or a source has changed "
                f"({stored[:8]} in the checkpoint, {self.frozen_hash[:8]} now)\n"
                "Restore them, or start over with resume=false"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        changed = _differing(self._hashes, self._model.frozen_hashes())
        if changed and self._checkpoints is not None and trainer.is_global_zero:
            shutil.rmtree(self._checkpoints, ignore_errors=True)  # it is not known since when
        _refuse(changed, "seen at the end")

    # --- checks -------------------------------------------------------------------------------------

    def _check(self, trainer: Trainer) -> None:
        self._check_declared()
        self._check_optimizers(trainer)
        _refuse(_differing(self._checksums, _checksums(self._model.frozen())), _in_epoch(trainer))

    def _check_declared(self) -> None:
        declared = self._model.trainable()
        ids = {id(parameter) for parameter in declared.values()}
        tensors = self._model.every_tensor().items()
        undeclared = [name for name, tensor in tensors if tensor.requires_grad and id(tensor) not in ids]
        frozen = [name for name, parameter in declared.items() if not parameter.requires_grad]
        if undeclared or frozen:
            raise GuardError(
                f"trainable but not declared: {_listed(undeclared)}; declared but frozen: {_listed(frozen)}; "
                "nothing is stored"
            )

    def _check_optimizers(self, trainer: Trainer) -> None:
        declared = {id(parameter): name for name, parameter in self._model.trainable().items()}
        names = {id(tensor): name for name, tensor in self._model.every_tensor().items()}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        held = {id(parameter): parameter for group in groups for parameter in group["params"]}
        extra = [names.get(key, f"a tensor of shape {tuple(held[key].shape)}") for key in held if key not in declared]
        missing = [name for key, name in declared.items() if key not in held]
        if extra or missing:
            raise GuardError(
                f"the optimizer holds what is not declared: {_listed(extra)}; "
                f"it lacks what is declared: {_listed(missing)}; nothing is stored"
            )

    def _compare_processes(self) -> None:
        """Each process compares all with the first, so that all of them fail alike."""
        shapes = {name: str(tuple(parameter.shape)) for name, parameter in self._model.trainable().items()}
        every = gathered((self._hashes, shapes))
        for rank, (hashes, trained) in enumerate(every):
            for what, own, first in (
                ("has other frozen tensors", hashes, every[0][0]),
                ("would train other parameters", trained, every[0][1]),
            ):
                if names := _differing(first, own):
                    raise GuardError(
                        f"process {rank} {what} than process 0: {_listed(names)}; nothing is stored\n"
                        "The backbone and the store must be the same files for all processes"
                    )


def _check_shared_memory(model: AdaptedModel) -> None:
    """Refuse a trained parameter that is a frozen tensor as well, or shares memory with one."""
    training = {id(parameter): name for name, parameter in model.trainable().items()}
    tuned = {id(parameter) for parameter in model.tuned().values()}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, tensor in model.every_tensor().items():
        of_the_backbone = name.startswith("backbone.") and id(tensor) not in tuned
        if id(tensor) in training and (of_the_backbone or name in buffers):
            raise GuardError(f"{training[id(tensor)]} trains and is the frozen {name}; nothing is stored")
    frozen = [(name, _memory(tensor)) for name, tensor in model.frozen().items() if tensor.numel()]
    for name, parameter in model.trainable().items():
        device, start, end = _memory(parameter)
        for other, (where, first, last) in frozen:
            if device == where and start < last and first < end:
                raise GuardError(f"{name} trains and shares memory with the frozen {other}; nothing is stored")


def _memory(tensor: Tensor) -> tuple[torch.device, int, int]:
    """Device, first byte and the byte after the last one of a tensor's elements."""
    elements = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.device, tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """A checksum of each tensor's bytes, computed where the tensor is: equal on all devices.

    The bytes are read as integers x of up to 64 bits. Within chunks, and then over chunks, it is the sum of (2i + 1) x_i
    modulo 2^64. Odd factors are invertible, so that any change of a single integer changes it, and so does a swap
    within a chunk.
    """
    sums: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().contiguous().flatten()
        size = flat.element_size()
        offsets = (flat.numel() * size, flat.data_ptr(), flat.storage_offset() * size)
        if all(offset % 8 == 0 for offset in offsets):
            size = 8
        integers = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(size, torch.int64))
        odd = torch.arange(1, 2 * _CHUNK, 2, device=flat.device)
        chunks = torch.stack([(chunk * odd[: len(chunk)]).sum() for chunk in integers.split(_CHUNK)])
        weights = torch.arange(1, 2 * len(chunks), 2, device=flat.device)
        sums.setdefault(flat.device, {})[name] = (chunks * weights).sum()
    return {
        name: value
        for of_device in sums.values()  # one transfer per device
        for name, value in zip(of_device, torch.stack(list(of_device.values())).tolist(), strict=True)
    }


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names that one side lacks or that have another value there."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def _refuse(changed: list[str], when: str) -> None:
    if changed:
        raise GuardError(f"a frozen tensor changed in training, {when}: {_listed(changed)}; nothing is stored")


def _in_epoch(trainer: Trainer) -> str:
    return f"in epoch {trainer.current_epoch + 1}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more if names else "nothing"
