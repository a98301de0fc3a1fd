"""Where a composition begins: what is found out on the target's rows first, and what it takes over."""

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
from fusion.config.compositions import CONTINUED, KEPT, CompositionConfig
from fusion.config.stages import Stage2Config
from fusion.data.encode import EncodedRows
from fusion.data.loaders import sampled_batches
from fusion.errors import UserError
from fusion.files import write_json
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel
from fusion.model.build import new_head, stored_model
from fusion.model.inference import device_of
from fusion.model.source_attention import measure_attention, most_attended
from fusion.store.artifacts import Artifact, copy_stored, load
from fusion.store.layout import HEAD, WEIGHTS
from fusion.tasks.table import kind_of

log = logging.getLogger(__name__)

CHOSEN = "chosen.json"
_ROWS = 1000  # of the training rows, that are looked at


@dataclass(frozen=True)
class Start:
    """What is decided before the model is built.

    composition: the settings, of a pruned fusion those that it was trained with.
    chosen: what `build_composition` takes beyond them, and the manifest keeps, see `Composition.finds`.
    fusion: the stored fusion whose weights and head the model begins with.
    """

    composition: CompositionConfig
    chosen: dict[str, Any] = field(default_factory=dict)
    fusion: Artifact | None = None

    @property
    def stored(self) -> dict[str, Any]:
        """What the manifest says of the composition."""
        return self.composition.as_stored() | self.chosen

    def head(self, config: Stage2Config, backbone: Backbone) -> TaskHead:
        """A fresh head, or one of the shape that the fusion has."""
        assert config.task is not None
        if self.fusion is None:
            return new_head(config.head, config.task, config.backbone.pooling, backbone)
        return TaskHead(hidden_size=backbone.hidden_size, **self.fusion.manifest.head.shape)

    def fill(self, model: AdaptedModel) -> None:
        """Let the model begin where the fusion ended, and end there too if nothing is to train."""
        if self.fusion is not None:
            copy_stored(model.slot_state(), self.fusion.weights, self.fusion.path / WEIGHTS)
            copy_stored(model.head_state(), self.fusion.head, self.fusion.path / HEAD)
            if not self.composition.train:
                model.freeze()


def find_start(
    config: Stage2Config,
    sources: Sequence[Artifact],
    backbone: Backbone,
    training: EncodedRows,
    validation: dict[str, EncodedRows],
    checkpoints: Path,
) -> Start:
    """Look at the target's rows where the composition asks for it. The backbone stays as it is.

    Args:
        checkpoints: of the run. What is chosen is kept there: a run that is taken up again goes on with it.

    Raises:
        UserError: the stored fusion is damaged or none of this version.
    """
    finds = config.composition.definition.finds
    if finds is None:
        return Start(config.composition)
    file = checkpoints / CHOSEN
    fusion = None
    if config.composition.fusion is not None:
        fusion = load(config.composition.fusion, Path(config.store))
    if config.resume and file.is_file():
        chosen = json.loads(file.read_text(encoding="utf-8"))
    else:
        first = next(iter(validation.values()))
        chosen = {finds: _FIND[finds](config, fusion, sources, backbone, training, first)}
        checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(file, chosen)
    if fusion is None:
        return Start(config.composition, chosen)
    assert fusion.manifest.composition is not None
    return Start(config.composition.pruning_of(fusion.manifest.composition.settings), chosen, fusion)


def _most_attended(
    config: Stage2Config,
    fusion: Artifact | None,
    sources: Sequence[Artifact],
    backbone: Backbone,
    training: EncodedRows,
    validation: EncodedRows,
) -> dict[str, list[int]]:
    """Of each slot, the positions of the sources that it keeps."""
    assert fusion is not None and config.composition.keep is not None
    batches = sampled_batches(training, _ROWS, config.data.batch_size, config.data.tokens_per_batch)
    model = stored_model(fusion, Path(config.store), backbone.copy())
    attention = measure_attention(model, batches, device_of(config.trainer.accelerator))
    return most_attended(attention, [source.manifest for source in sources], config.composition.keep)


def _best_source(
    config: Stage2Config,
    fusion: Artifact | None,
    sources: Sequence[Artifact],
    backbone: Backbone,
    training: EncodedRows,
    validation: EncodedRows,
) -> str:
    names = [source.manifest.name for source in sources]
    assert config.task is not None
    if len(names) == 1:
        return names[0]
    kind = kind_of(config.task)
    if not kind.is_pooled:
        raise UserError(
            f"composition=continued: which of {', '.join(names)} suits {config.task.name} best is found by a linear probe "
            f"of one vector per text, and this is {kind.noun}\nName one of them: 'sources=[{names[0]}]'"
        )
    size, tokens = config.data.batch_size, config.data.tokens_per_batch
    scores = probe(
        sources,
        backbone.copy(),
        config.composition,
        config.head.pooling or config.backbone.pooling,
        config.task,
        partial(sampled_batches, training, _ROWS, size, tokens),
        partial(sampled_batches, validation, None, size, tokens),
        device_of(config.trainer.accelerator),
    )
    best = scores.index(max(scores))
    log.info(
        "%s goes on training: the best %s of a linear head on the states that each source gives (%.4f%s)",
        names[best],
        config.task.metrics[0],
        scores[best],
        ", the first of several" if scores.count(scores[best]) > 1 else "",
    )
    return names[best]


_FIND: dict[str, Callable[..., Any]] = {KEPT: _most_attended, CONTINUED: _best_source}
