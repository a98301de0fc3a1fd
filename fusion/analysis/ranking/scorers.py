"""The looks that are taken at the sources: of each a score a source, higher is better."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fusion.analysis.probe import States, looks, probe_score
from fusion.analysis.ranking.attention import attention_of_short_run
from fusion.analysis.ranking.logme import logme
from fusion.analysis.ranking.similarity import cosine, kept_embedding
from fusion.analysis.ranking.source_rows import source_rows
from fusion.backbones.load import Backbone
from fusion.config.commands import RankConfig
from fusion.config.compositions import CompositionConfig
from fusion.data.encode import EncodedRows
from fusion.data.loaders import sampled_batches
from fusion.errors import UserError, first_line
from fusion.model.inference import device_of
from fusion.runs.memory import free_cycles
from fusion.store.artifacts import Artifact
from fusion.training.task_rows import TaskRows

log = logging.getLogger(__name__)


class Looks:
    """A method for each of `fusion.config.stages.RANKINGS`.

    Args:
        sources: made for this backbone, in one placement.
        backbone: stays as it is.
        rows: of the target; all of them are looked at.
        folder: of the run.
    """

    def __init__(
        self,
        config: RankConfig,
        sources: Sequence[Artifact],
        backbone: Backbone,
        rows: TaskRows,
        folder: Path,
    ) -> None:
        assert config.task is not None
        self.config, self.sources, self.backbone = config, sources, backbone
        self.rows, self.folder, self.task = rows, folder, config.task
        self.device = device_of(config.accelerator)

    def similarity(self) -> list[float | None]:
        """None for a source whose own rows cannot be read, which is said."""
        config = self.config
        plain, scores = self.backbone.copy(), list[float | None]()
        target = self._embedding(plain, self.rows.training)
        for source in self.sources:
            try:
                rows = source_rows(source.manifest, config.data, config.rows, self.backbone.tokenizer)
            except UserError as error:
                said = first_line(error)
                log.info("similarity: none for %s, its rows cannot be read: %s", source.manifest.name, said)
                scores.append(None)
            else:
                scores.append(cosine(target, self._embedding(plain, rows)))
        return scores

    def _embedding(self, plain: Backbone, several: Sequence[EncodedRows]) -> Tensor:
        """(D,), the mean over the tasks."""
        cache = self.config.data.cache_dir
        return torch.stack([kept_embedding(plain, rows, self.device, cache) for rows in several]).mean(0)

    @cached_property
    def states(self) -> list[tuple[States, States]]:
        """Of each source, the pooled states of the target's training rows and of its first validation split."""
        config = self.config
        size, tokens = config.data.batch_size, config.data.tokens_per_batch
        splits = self.rows.training[0], next(iter(self.rows.validation.values()))
        pooling = config.head.pooling or config.backbone.pooling
        found = []
        for look in looks(self.sources, self.backbone.copy(), CompositionConfig(), pooling, self.device):
            training, validation = (look(sampled_batches(rows, None, size, tokens)) for rows in splits)
            found.append((training, validation))
        return found

    def logme(self) -> list[float]:
        return [logme(training, self.task) for training, _ in self.states]

    def probe(self) -> list[float]:
        return [probe_score(training, validation, self.task) for training, validation in self.states]

    def attention(self) -> list[float]:
        scores = attention_of_short_run(
            self.config, self.sources, self.backbone.copy(), self.rows, self.folder
        )
        free_cycles()
        return scores
