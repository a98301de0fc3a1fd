"""Frozen weights in jobs with more than one process: never exchanged by DDP, and with `fsdp` stored in shards."""

from __future__ import annotations

import logging
from typing import Any

from pytorch_lightning import Callback, Trainer

from fusion.backbones.sharding import own_shard, shard
from fusion.model.adapted import AdaptedModel
from fusion.training.lightning_internals import ignore_in_ddp
from fusion.training.memory import in_bytes

log = logging.getLogger(__name__)


class FrozenWeights(Callback):
    """Callback that excludes frozen tensors from DDP and, with `shards`, shards the backbone's frozen weights.

    DDP would broadcast all buffers in each step, among them the adapters of a fusion. All processes already have the
    same frozen tensors: `Guard`, which must come before, compares them.
    """

    def __init__(self, model: AdaptedModel, shards: bool) -> None:
        self._model = model
        self._shards = shards

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if trainer.world_size == 1:
            return
        if self._shards:
            model, self._shards = self._model, False  # once, also if a validation follows
            trained = set(model.trainable().values())
            shard(model.backbone, model.layers(), trained, trainer.strategy.root_device.type, trainer.world_size)
            if trainer.is_global_zero:
                weights = list(model.backbone.parameters())
                own, every = (in_bytes(sum(one.nbytes for one in of)) for of in (map(own_shard, weights), weights))
                log.info("backbone sharded over %d processes: %s of %s in each", trainer.world_size, own, every)
        ignore_in_ddp(pl_module, [f"model.{name}" for name in self._model.frozen()])
