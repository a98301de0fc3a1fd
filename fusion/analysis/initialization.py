"""Data-dependent initialization of compositions: source selection, and copied weights of a stored fusion."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fusion.analysis.probe import probe
from fusion.backbones.load import Backbone
from fusion.config.compositions import CompositionConfig
from fusion.config.stages import Stage2Config
from fusion.config.task import TaskConfig
from fusion.data.encode import EncodedRows
from fusion.data.loaders import sampled_batches
from fusion.errors import UserError
from fusion.files import write_json
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel
from fusion.model.build import new_head, pooling_of, stored_model
from fusion.model.inference import device_of
from fusion.model.source_attention import measure_attention, most_attended
from fusion.store.artifacts import Artifact, copy_stored, load
from fusion.store.layout import HEAD, WEIGHTS
from fusion.tasks.table import kind_of

log = logging.getLogger(__name__)

CHOSEN = "chosen.json"
_ROWS = 1000  # maximum number of training examples for source selection


@dataclass(frozen=True)
class Initialization:
    composition: CompositionConfig  # for a pruned fusion, the settings that the fusion was trained with
    chosen: dict[str, Any] = field(default_factory=dict)  # selected sources, see `Composition.finds`
    fusion: Artifact | None = None  # stored fusion that weights and head are initialized from

    @property
    def stored(self) -> dict[str, Any]:
        return self.composition.as_stored() | self.chosen

    def new_head(self, config: Stage2Config, backbone: Backbone) -> TaskHead:
        """Return a new head, with the shape of the head of `fusion` if there is one."""
        assert config.task is not None
        if self.fusion is None:
            return new_head(config.head, config.task, config.backbone.pooling, backbone)
        return TaskHead(hidden_size=backbone.hidden_size, **self.fusion.manifest.head.shape)

    def copy_weights(self, model: AdaptedModel) -> None:
        """Copy the weights of `fusion`, and freeze them unless `composition.train` is set."""
        if self.fusion is not None:
            copy_stored(model.weight_state(), self.fusion.weights, self.fusion.path / WEIGHTS)
            copy_stored(model.head.state(), self.fusion.head, self.fusion.path / HEAD)
            if not self.composition.train:
                model.freeze()


def initialize(
    config: Stage2Config,
    sources: Sequence[Artifact],
    backbone: Backbone,
    training: EncodedRows,
    validation: EncodedRows,
    checkpoints: Path,
) -> Initialization:
    """Select sources on the target's examples if the composition requires it. The backbone is not modified.

    The selection is saved in `checkpoints`, and reused by a resumed run. Raises UserError if the stored fusion is
    damaged, or the task type does not support linear probes.
    """
    composition, finds = config.composition, config.composition.definition.finds
    if finds is None:
        return Initialization(composition)
    assert config.task is not None
    store, device = Path(config.store), device_of(config.trainer.accelerator)
    size, tokens = config.data.batch_size, config.data.tokens_per_batch
    few = partial(sampled_batches, training, _ROWS, size, tokens)
    fusion = None if composition.fusion is None else load(composition.fusion, store)
    file, chosen = checkpoints / CHOSEN, {}
    if config.resume and file.is_file():
        chosen = json.loads(file.read_text(encoding="utf-8"))
    elif fusion is not None:
        assert composition.keep is not None
        attention = measure_attention(stored_model(fusion, store, backbone.copy()), few(), device)
        chosen[finds] = most_attended(attention, [source.manifest for source in sources], composition.keep)
    else:
        held_out = partial(sampled_batches, validation, None, size, tokens)
        pooling = pooling_of(config.head, config.backbone.pooling, backbone)
        probed = (sources, backbone.copy(), composition, pooling, config.task, few, held_out, device)
        chosen[finds] = best_source([s.manifest.name for s in sources], config.task, partial(probe, *probed))
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_json(file, chosen)
    if fusion is None:
        return Initialization(composition, chosen)
    assert fusion.manifest.composition is not None
    return Initialization(composition.pruning_of(fusion.manifest.composition.settings), chosen, fusion)


def best_source(names: Sequence[str], task: TaskConfig, probe_scores: Callable[[], list[float]]) -> str:
    """Return the source with the best linear probe, or the first of these. Raises UserError if it cannot be probed."""
    if len(names) == 1:
        return names[0]
    kind = kind_of(task)
    if not kind.is_pooled:
        raise UserError(
            f"composition=continued selects a source by linear probes, which a task of kind {task.kind} such as {task.name} does not "
            f"support\nSet a single source out of {', '.join(names)}, e.g. 'sources=[{names[0]}]'"
        )
    scores = probe_scores()
    best = names[scores.index(max(scores))]
    log.info("continuing training of %s: best %s among the linear probes (%.4f)", best, task.metrics[0], max(scores))
    return best
