"""Frozen means frozen: only what the model declares trains, and nothing else changes.

Hashing every frozen tensor is exact and too dear for each epoch, so a change is looked for in three ways:

hashes      of every tensor, before a training and after it
checksums   of every tensor, whenever a checkpoint is written: a tenth of the cost. Nothing that was trained on
            other weights than the frozen ones can be taken up again
versions    torch counts the writes to a tensor; a look at the counters costs nothing, so it is taken at each
            epoch's end and before each evaluation. A write through `.data` is not counted. What was written to is
            hashed: under DDP, buffers are written to with the values that they have
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
from torch import Tensor

from fusion.backbones.load import hash_tensors
from fusion.errors import GuardError, UserError
from fusion.model.adapted import AdaptedModel, hash_of_hashes
from fusion.training.gathering import gathered

_SHOWN = 4  # names in a message
_CHECKPOINT_KEY = "frozen_hash"


@dataclass(frozen=True)
class _Seen:
    """A frozen tensor as it was last known to be right. It is kept, so that no other can take its address."""

    tensor: Tensor
    address: int
    version: int


class Guard(lightning.Callback):
    """Only what the model declares may train, and nothing else may change, in any process.

    It comes first among the callbacks: what it refuses, no other one writes down.

    Args:
        model: the one that is trained.
        checkpoints: the run's. They are removed where the end of a training shows that they cannot be trusted.

    Attributes:
        frozen_hash: of all that is frozen, before the training; there before a checkpoint is read.

    Raises:
        GuardError: other tensors than the declared ones would train, or did change; processes differ.
        UserError: a checkpoint was made with other frozen weights.
    """

    def __init__(self, model: AdaptedModel, checkpoints: Path | None = None) -> None:
        self._model = model
        self._checkpoints = checkpoints
        self.frozen_hash = ""
        self._hashes: dict[str, str] = {}
        self._types: dict[str, torch.dtype] = {}
        self._checksums: dict[str, int] = {}
        self._seen: dict[str, _Seen] = {}  # empty: no training is under way

    # --- before -------------------------------------------------------------------------------------

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Before a checkpoint is read, and before DDP gives every process the weights of the first."""
        if stage != "fit":
            return
        self._check_declared()
        _check_apart(self._model)
        frozen = self._model.frozen()
        self._hashes = self._model.frozen_hashes()
        self.frozen_hash = hash_of_hashes(self._hashes)
        self._types = {name: tensor.dtype for name, tensor in frozen.items()}
        self._checksums = _checksums(frozen)
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            self._compare_processes(trainer)

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The model is where it will be trained."""
        frozen = self._model.frozen()
        turned = [name for name, tensor in frozen.items() if tensor.dtype != self._types.get(name)]
        if turned:
            raise GuardError(
                f"trainer.precision={trainer.precision} made {frozen[turned[0]].dtype} of frozen tensors: "
                f"{_listed(turned)}; nothing is stored"
            )
        self._seen = {name: _see(tensor) for name, tensor in frozen.items()}
        self._refuse(_differing(self._checksums, _checksums(frozen)), "before the first step")

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._check_optimizers(trainer)

    # --- during -------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._seen:
            self._look(trainer)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 < trainer.num_training_batches:
            return
        self._check_declared()
        # Here and not later: Lightning clears all gradients before it evaluates.
        frozen = self._model.frozen().items()
        reached = [name for name, tensor in frozen if tensor.is_leaf and tensor.grad is not None]
        if reached:
            raise GuardError(
                f"a gradient reached frozen tensors, {_in_epoch(trainer)}: {_listed(reached)}; nothing is stored"
            )

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._look(trainer)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._look(trainer)
        now = _checksums(self._model.frozen())
        self._refuse(_differing(self._checksums, now), _in_epoch(trainer))
        checkpoint[_CHECKPOINT_KEY] = self.frozen_hash

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        made_with = checkpoint.get(_CHECKPOINT_KEY, self.frozen_hash)  # the first checkpoints did not know it
        if made_with != self.frozen_hash:
            raise UserError(
                "the run began with other frozen weights: the backbone or a source is not what it was "
                f"({made_with[:8]} in the checkpoint, {self.frozen_hash[:8]} here).\n"
                "Bring them back, or begin anew with resume=false"
            )

    # --- after --------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._seen = {}
        changed = _differing(self._hashes, self._model.frozen_hashes())
        if changed and self._checkpoints is not None and trainer.is_global_zero:
            shutil.rmtree(self._checkpoints, ignore_errors=True)  # nobody knows since when
        self._refuse(changed, "seen at the end")

    # --- what is looked at --------------------------------------------------------------------------

    def _look(self, trainer: lightning.Trainer) -> None:
        """All that can be seen without reading a tensor."""
        self._check_declared()
        self._check_optimizers(trainer)
        frozen = self._model.frozen()
        suspects = [name for name, tensor in frozen.items() if not _is_as_seen(self._seen.get(name), tensor)]
        broken = self._seen.keys() - frozen.keys() or any(
            hash_tensors([(name, frozen[name])]) != self._hashes.get(name) for name in suspects
        )
        if broken:  # whatever it costs: torch counts not every write, not those of a norm's statistics
            self._refuse(_differing(self._hashes, self._model.frozen_hashes()), _in_epoch(trainer))
        self._seen |= {name: _see(frozen[name]) for name in suspects}

    def _check_declared(self) -> None:
        declared = self._model.trainable()
        by_identity = {id(parameter) for parameter in declared.values()}
        undeclared = sorted(
            name
            for name, tensor in self._model.every_tensor().items()
            if tensor.requires_grad and id(tensor) not in by_identity
        )
        frozen = sorted(name for name, parameter in declared.items() if not parameter.requires_grad)
        if undeclared or frozen:
            raise GuardError(
                f"trainable but not declared: {_listed(undeclared) or 'nothing'}; "
                f"declared but frozen: {_listed(frozen) or 'nothing'}; nothing is stored"
            )

    def _check_optimizers(self, trainer: lightning.Trainer) -> None:
        declared = {id(parameter): name for name, parameter in self._model.trainable().items()}
        names = {id(tensor): name for name, tensor in self._model.every_tensor().items()}
        given = [
            parameter
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        held = {id(parameter) for parameter in given}
        more = [
            names.get(id(p), f"a tensor of shape {tuple(p.shape)}") for p in given if id(p) not in declared
        ]
        missing = [name for key, name in declared.items() if key not in held]
        if more or missing:
            raise GuardError(
                f"the optimizer holds what is not declared: {_listed(more) or 'nothing'}; "
                f"it lacks what is declared: {_listed(missing) or 'nothing'}; nothing is stored"
            )

    def _compare_processes(self, trainer: lightning.Trainer) -> None:
        """Every process says the same as the first, or all of them fail alike."""
        shapes = {name: str(tuple(parameter.shape)) for name, parameter in self._model.trainable().items()}
        every = gathered((self._hashes, shapes))
        for rank, (hashes, theirs) in enumerate(every):
            if names := _differing(every[0][0], hashes):
                raise GuardError(
                    f"process {rank} has other frozen tensors than process 0: {_listed(names)}; nothing is stored.\n"
                    "The backbone and the store must be the same files for all of them"
                )
            if names := _differing(every[0][1], theirs):
                raise GuardError(
                    f"process {rank} would train other parameters than process 0: {_listed(names)}; "
                    "nothing is stored"
                )

    def _refuse(self, changed: list[str], when: str) -> None:
        if changed:
            raise GuardError(
                f"a frozen tensor changed in training, {when}: {_listed(changed)}; nothing is stored"
            )


def _check_apart(model: AdaptedModel) -> None:
    """What trains shares no memory with what is frozen.

    Raises:
        GuardError: it does, or a parameter that trains stands for a frozen one as well.
    """
    training = {id(parameter): name for name, parameter in model.trainable().items()}
    tuned = {id(parameter) for parameter in model.tuned().values()}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, tensor in model.every_tensor().items():
        of_the_backbone = name.startswith("backbone.") and id(tensor) not in tuned
        if id(tensor) in training and (of_the_backbone or name in buffers):
            raise GuardError(f"{training[id(tensor)]} trains and is the frozen {name}; nothing is stored")
    frozen = model.frozen()
    spans = [
        *((*span, True, name) for name, tensor in model.trainable().items() for span in _memory(tensor)),
        *((*span, False, name) for name, tensor in frozen.items() for span in _memory(tensor)),
    ]
    furthest: dict[tuple[str, bool], tuple[int, str]] = {}  # by device and whether it trains: end, name
    for device, start, end, trains, name in sorted(spans):
        other_end, other = furthest.get((device, not trains), (0, ""))
        if other_end > start:
            first, second = (name, other) if trains else (other, name)
            raise GuardError(f"{first} trains and shares memory with the frozen {second}; nothing is stored")
        furthest[device, trains] = max(furthest.get((device, trains), (0, "")), (end, name))


def _memory(tensor: Tensor) -> Iterable[tuple[str, int, int]]:
    """Device, first byte and the byte after the last one of a tensor's elements; nothing for an empty one."""
    if tensor.numel():
        elements = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        yield str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The sum of each tensor's bytes, taken as integers of up to 64 bits, modulo 2^64: the same on any device."""
    sums: dict[torch.device, list[Tensor]] = {}
    names: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().contiguous().flatten()
        wide = flat.numel() * flat.element_size() % 8 == 0 and flat.data_ptr() % 8 == 0
        size = 8 if wide and flat.storage_offset() * flat.element_size() % 8 == 0 else flat.element_size()
        as_integers = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(size, torch.int64))
        sums.setdefault(tensor.device, []).append(as_integers.sum(dtype=torch.int64))
        names.setdefault(tensor.device, []).append(name)
    return {
        name: value
        for device, values in sums.items()
        for name, value in zip(names[device], torch.stack(values).tolist(), strict=True)
    }


def _see(tensor: Tensor) -> _Seen:
    return _Seen(tensor, tensor.data_ptr(), _version(tensor))


def _is_as_seen(seen: _Seen | None, tensor: Tensor) -> bool:
    if seen is None or seen.tensor is not tensor:
        return False
    return (seen.address, seen.version) == (tensor.data_ptr(), _version(tensor))


def _version(tensor: Tensor) -> int:
    """How often it was written to; -1 for one that does not count, which a frozen tensor was never."""
    return -1 if tensor.is_inference() else tensor._version


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names that are missing on one side or have another value there."""
    return sorted(
        name for name in {*one, *other} if name not in one or name not in other or one[name] != other[name]
    )


def _in_epoch(trainer: lightning.Trainer) -> str:
    return f"in epoch {trainer.current_epoch + 1}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
