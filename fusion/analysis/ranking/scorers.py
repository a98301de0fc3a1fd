"""Scorers of source adapters. Each returns one score per source; higher is better.

Shapes: N sources, D hidden size.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion.analysis.probe import States, logme_score, pooled_states, probe_score
from fusion.backbones.forward import last_hidden_states
from fusion.backbones.load import Backbone
from fusion.config.commands import RankConfig
from fusion.config.compositions import CompositionConfig
from fusion.config.data import DataConfig
from fusion.config.stages import StageConfig
from fusion.config.task import TaskConfig
from fusion.config.training import OptimConfig, TrainerConfig
from fusion.data.batches import Batch
from fusion.data.encode import EncodedRows, encode
from fusion.data.loaders import sampled_batches
from fusion.data.rows import load_splits
from fusion.errors import UserError, first_line
from fusion.layers.heads import pool
from fusion.model.adapted import AdaptedModel
from fusion.model.build import build_composition, new_head, pooling_of
from fusion.model.inference import device_of
from fusion.model.source_attention import SourceAttention, measure_attention
from fusion.store.artifacts import Artifact
from fusion.store.compatibility import as_trained, limit_of
from fusion.store.manifest import Manifest
from fusion.training.fit import FitSpec, fit
from fusion.training.module import Objective
from fusion.training.task_rows import TaskRows

_TEXTS = 32  # batch size of the embeddings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScorerInputs:
    config: RankConfig
    task: TaskConfig
    sources: Sequence[Artifact]  # adapters with the same placement, trained on `backbone`
    backbone: Backbone  # must not be modified
    rows: TaskRows  # of the target
    folder: Path  # the run directory

    @property
    def device(self) -> torch.device:
        return device_of(self.config.accelerator)

    @cached_property
    def states(self) -> list[list[States]]:
        """States of the target's training examples and first validation split, for each source."""
        config = self.config
        size, tokens = config.data.batch_size, config.data.tokens_per_batch
        splits = self.rows.training[0], next(iter(self.rows.validation.values()))
        return pooled_states(
            self.sources,
            self.backbone.copy(),
            CompositionConfig(),
            pooling_of(config.head, config.backbone.pooling, self.backbone),
            [partial(sampled_batches, rows, None, size, tokens) for rows in splits],
            self.device,
        )


def similarity(inputs: ScorerInputs) -> list[float | None]:
    """Compute the cosine similarity of source and target datasets in the frozen backbone, without labels or training.

    The embedding of a dataset is TextEmb of Vu et al. 2020, "Exploring and Predicting Transferability across NLP Tasks"
    (§4.1): the last hidden states, averaged over the tokens of each text and then over texts. The score is `None` if
    the examples of a source cannot be read. Poth et al. 2021, "What to Pre-Train on? Efficient Intermediate Task
    Selection", compare TextEmb with other scores.
    """
    config, backbone = inputs.config, inputs.backbone.copy()
    target = mean_embedding(backbone, inputs.rows.training, inputs.device)
    scores: list[float | None] = []
    for source in inputs.sources:
        try:
            rows = source_rows(source.manifest, config.data, config.rows, backbone.tokenizer)
        except UserError as error:
            reason = first_line(error)
            log.info("similarity: no score for %s; its examples cannot be read: %s", source.manifest.name, reason)
            scores.append(None)
        else:
            own = mean_embedding(backbone, rows, inputs.device)
            scores.append(float(torch.nn.functional.cosine_similarity(target, own, dim=0)))
    return scores


def mean_embedding(backbone: Backbone, tasks: Sequence[EncodedRows], device: torch.device) -> Tensor:
    """Average the `text_embedding` over tasks. Returns (D,) float64."""
    every = [text_embedding(backbone, sampled_batches(rows, None, _TEXTS), device) for rows in tasks]
    return torch.stack(every).mean(0)


@torch.inference_mode()
def text_embedding(backbone: Backbone, batches: Iterable[Batch], device: torch.device) -> Tensor:
    """Average the last hidden states over the non-padding tokens of each text, then over texts. Returns (D,) float64."""
    model = backbone.model.to(device).eval()  # type: ignore[arg-type]
    total, texts = torch.zeros(backbone.hidden_size, dtype=torch.float64), 0
    for batch in batches:
        batch = batch.to(device)
        hidden = last_hidden_states(model, backbone.family, batch.input_ids, batch.attention_mask, batch.token_type_ids)
        total += pool(hidden, batch.attention_mask, "mean").double().sum(0).cpu()
        texts += len(hidden)
    return total / texts


def source_rows(source: Manifest, data: DataConfig, at_most: int, tokenizer: Any) -> list[EncodedRows]:
    """Return training examples of each task of a source, about `at_most` in total.

    They are read from the source's `data.dir`, or else from the `data.dir` of this command; raises UserError if neither
    contains them. A limit selects the first examples of a fixed shuffle, so the source was trained on all of them.
    """
    assert data.max_length is not None
    trained = source.run.config.get("data.limit.train")
    limit = max(2, at_most // len(source.tasks))
    limit = min(trained, limit) if isinstance(trained, int) else limit
    found = []
    for stored in source.tasks:
        task = stored.as_config(source.name)
        errors = []
        for folder in _folders(source, data):
            place = as_trained(source, DataConfig(dir=folder, limit=limit_of(source, limit)), task.name)
            try:
                rows, _ = load_splits(task, place, ["train"], source.data.labels.get(str(task.name)))
            except UserError as error:
                errors.append(error)
                continue
            found.append(encode(rows["train"], tokenizer, data.max_length, data.cache_dir))
            break
        else:
            raise errors[0]
    return found


def _folders(source: Manifest, data: DataConfig) -> list[str | None]:
    """Return the values of `data.dir` to try, in order; `None` is the Hub or the packaged corpus of the task."""
    trained = source.run.config.get("data.dir")
    if not isinstance(trained, str):
        return list(dict.fromkeys((data.dir, None)))
    there = str(Path(source.run.folder or ".") / Path(trained).expanduser())
    return [there, trained, *([] if data.dir is None else [data.dir])]


def logme(inputs: ScorerInputs) -> list[float]:
    return [logme_score(training, inputs.task) for training, _ in inputs.states]


def probe(inputs: ScorerInputs) -> list[float]:
    return [probe_score(training, validation, inputs.task) for training, validation in inputs.states]


def attention(inputs: ScorerInputs) -> list[float]:
    """Return the `relative_attention` of an AdapterFusion trained for `config.epochs`.

    Pfeiffer et al. 2021, "AdapterFusion" (§5.2, figure 6), interpret the attention of a fully trained fusion as the
    usefulness of its sources.
    """
    config, composition, backbone = inputs.config, CompositionConfig(), inputs.backbone.copy()
    torch.manual_seed(config.seed)
    model = AdaptedModel(
        backbone,
        build_composition(composition, inputs.sources, backbone),
        inputs.sources[0].manifest.reads,
        new_head(config.head, inputs.task, config.backbone.pooling, backbone),
    )
    trainer = TrainerConfig(
        accelerator=config.accelerator,
        devices=1,
        max_epochs=config.epochs,
        check_val_every_n_epoch=config.epochs,  # the validation metrics are not used
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    settings = StageConfig(
        task=inputs.task,
        data=config.data,
        optim=OptimConfig(lr=config.lr, patience=None),
        trainer=trainer,
        resume=False,
        seed=config.seed,
    )
    objective = Objective(composition.loss_weights())
    fit(FitSpec(model, settings, inputs.rows, objective, inputs.folder / "no checkpoints"))
    size, tokens = config.data.batch_size, config.data.tokens_per_batch
    measured = measure_attention(model, sampled_batches(inputs.rows.training[0], None, size, tokens), inputs.device)
    gc.collect()  # the Trainer is in a reference cycle with the model
    return relative_attention(measured, [source.manifest for source in inputs.sources])


def relative_attention(attention: Mapping[str, SourceAttention], sources: Sequence[Manifest]) -> list[float]:
    """Return the attention of each source relative to uniform attention (1), averaged over the slots of the source."""
    slots = [set(source.bottleneck_sizes) for source in sources]
    scores = []
    for position, own in enumerate(slots):
        relative = [
            measured.mean[position] * sum(slot in others for others in slots)
            for slot, measured in attention.items()
            if slot in own
        ]
        scores.append(sum(relative) / len(relative))
    return scores


SCORERS: dict[str, Callable[[ScorerInputs], Sequence[float | None]]] = {
    "similarity": similarity,
    "logme": logme,
    "probe": probe,
    "attention": attention,
}
