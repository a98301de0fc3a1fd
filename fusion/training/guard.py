"""The guard callback: only parameters that the model declares trainable are trained, and no other tensor changes.

All frozen tensors are hashed before and after training. In between, cheaper checksums are compared at the end of each
epoch, before each validation and whenever a checkpoint is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor

from fusion.backbones.sharding import is_sharded, own_shard
from fusion.errors import GuardError, UserError
from fusion.model.adapted import AdaptedModel, hash_of_hashes
from fusion.training.processes import gathered

_SHOWN = 4  # names in a message
_CHUNK = 2**16  # integers per chunk of a checksum


class Guard(Callback):
    """Callback that raises if undeclared tensors would be trained or have changed in any process.

    It must be the first callback, so that no other callback saves weights that fail its checks. The run's `checkpoints`
    directory is removed if a change is found only at the end of training.

    Raises:
        GuardError: if an undeclared tensor would be trained or has changed, or if processes have different tensors.
        UserError: if a checkpoint was trained with different frozen weights.
    """

    def __init__(self, model: AdaptedModel, checkpoints: Path | None = None) -> None:
        self._model = model
        self._checkpoints = checkpoints
        self.frozen_hash = ""  # of all frozen tensors before training
        self._hashes: dict[str, str] = {}
        self._types: dict[str, torch.dtype] = {}
        self._checksums: dict[str, int] = {}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Hash the frozen tensors, before a checkpoint is loaded and before DDP broadcasts the weights of rank 0."""
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
        """Check the frozen tensors after the model was moved to its device."""
        frozen = self._model.frozen()
        if converted := [name for name, tensor in frozen.items() if tensor.dtype != self._types.get(name)]:
            raise GuardError(
                f"trainer.precision={trainer.precision} converted frozen tensors to {frozen[converted[0]].dtype}: "
                f"{_listed(converted)}; no artifact was saved"
            )
        if any(is_sharded(tensor) for tensor in frozen.values()):
            _raise_if(_differing(self._hashes, self._model.frozen_hashes()), "before the first step")
            self._checksums = _checksums(frozen)  # of this process's shards
        else:
            _raise_if(_differing(self._checksums, _checksums(frozen)), "before the first step")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._check_optimizers(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            self._check(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 < trainer.num_training_batches:
            return
        self._check_declared()
        # Not at the end of the epoch: Lightning clears all gradients before validation.
        frozen = self._model.frozen().items()
        if reached := [name for name, tensor in frozen if tensor.is_leaf and tensor.grad is not None]:
            raise GuardError(
                f"frozen tensors received a gradient {_in_epoch(trainer)}: {_listed(reached)}; no artifact was saved"
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
                "the run started with different frozen weights: the backbone or a source has changed "
                f"({stored[:8]} in the checkpoint, {self.frozen_hash[:8]} now)\n"
                "Restore them, or start over with resume=false"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        changed = _differing(self._hashes, self._model.frozen_hashes())
        if changed and self._checkpoints is not None and trainer.is_global_zero:
            shutil.rmtree(self._checkpoints, ignore_errors=True)  # any of them may contain the change
        _raise_if(changed, "found at the end")

    def _check(self, trainer: Trainer) -> None:
        self._check_declared()
        self._check_optimizers(trainer)
        _raise_if(_differing(self._checksums, _checksums(self._model.frozen())), _in_epoch(trainer))

    def _check_declared(self) -> None:
        declared = self._model.trainable()
        ids = {id(parameter) for parameter in declared.values()}
        tensors = self._model.every_tensor().items()
        undeclared = [name for name, tensor in tensors if tensor.requires_grad and id(tensor) not in ids]
        frozen = [name for name, parameter in declared.items() if not parameter.requires_grad]
        if undeclared or frozen:
            raise GuardError(
                f"parameters that require a gradient but are not declared trainable: {_listed(undeclared)}; "
                f"declared trainable but frozen: {_listed(frozen)}; no artifact was saved"
            )

    def _check_optimizers(self, trainer: Trainer) -> None:
        declared = {id(parameter): name for name, parameter in self._model.trainable().items()}
        names = {id(tensor): name for name, tensor in self._model.every_tensor().items()}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        found = {id(parameter): parameter for group in groups for parameter in group["params"]}
        extra = [names.get(key, f"a tensor of shape {tuple(found[key].shape)}") for key in found if key not in declared]
        missing = [name for key, name in declared.items() if key not in found]
        if extra or missing:
            raise GuardError(
                f"the optimizer has undeclared parameters: {_listed(extra)}; "
                f"missing parameters: {_listed(missing)}; no artifact was saved"
            )

    def _compare_processes(self) -> None:
        """Compare every process with process 0, in all processes, so that all of them raise the same error."""
        shapes = {name: str(tuple(parameter.shape)) for name, parameter in self._model.trainable().items()}
        every = gathered((self._hashes, shapes))
        faults = "has different frozen tensors", "would train different parameters"
        for rank, of_rank in enumerate(every):
            for what, own, first in zip(faults, of_rank, every[0], strict=True):
                if names := _differing(first, own):
                    raise GuardError(
                        f"process {rank} {what} than process 0: {_listed(names)}; no artifact was saved\n"
                        "All processes must read the same backbone and store"
                    )


def _check_shared_memory(model: AdaptedModel) -> None:
    """Raise GuardError if a trainable parameter is also a frozen tensor or shares memory with one."""
    training = {id(parameter): name for name, parameter in model.trainable().items()}
    tuned = {id(parameter) for parameter in model.tuning.parameters.values()}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, tensor in model.every_tensor().items():
        of_the_backbone = name.startswith("backbone.") and id(tensor) not in tuned
        if id(tensor) in training and (of_the_backbone or name in buffers):
            raise GuardError(f"the trainable {training[id(tensor)]} is also the frozen {name}; no artifact was saved")
    frozen = [(name, _memory(tensor)) for name, tensor in model.frozen().items() if tensor.numel()]
    for name, parameter in model.trainable().items():
        device, start, end = _memory(parameter)
        for other, (other_device, first, last) in frozen:
            if device == other_device and start < last and first < end:
                raise GuardError(f"the trainable {name} shares memory with the frozen {other}; no artifact was saved")


def _memory(tensor: Tensor) -> tuple[torch.device, int, int]:
    """Return the device of a tensor and the addresses of its first byte and of the byte after its last."""
    elements = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.device, tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return a checksum of each tensor's bytes, computed on the tensor's device but equal on all devices.

    The bytes are viewed as integers x of up to 64 bits. The checksum is the sum of (2i + 1) x_i modulo 2^64, within
    chunks and then over chunks. Odd factors are invertible, so any change of a single integer and any swap within a
    chunk changes the checksum.
    """
    sums: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        flat = own_shard(tensor.detach()).contiguous().flatten()
        size = flat.element_size()
        if flat.numel() * size % 8 == 0:  # depends on the content only, so that it is the same on all devices
            if flat.data_ptr() % 8 or flat.storage_offset() * size % 8:
                flat = flat.clone()  # the view below requires aligned memory
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
    """Return the names that are missing from one of the mappings or whose values differ."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def _raise_if(changed: list[str], when: str) -> None:
    if changed:
        raise GuardError(f"frozen tensors changed during training, {when}: {_listed(changed)}; no artifact was saved")


def _in_epoch(trainer: Trainer) -> str:
    return f"in epoch {trainer.current_epoch + 1}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more if names else "nothing"
