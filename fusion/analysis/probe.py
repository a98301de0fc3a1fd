"""Which source's adapter suits a target best, by a cheap look: a linear head on the pooled states it gives.

Shapes: S texts, B rows, D hidden size, K outputs of the head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fusion.backbones.load import Backbone
from fusion.config.compositions import MEAN, CompositionConfig
from fusion.config.task import TaskConfig
from fusion.data.batches import Batch
from fusion.layers.heads import TaskHead, pool
from fusion.model.adapted import AdaptedModel
from fusion.model.build import build_composition
from fusion.store.artifacts import Artifact
from fusion.tasks.table import kind_of
from fusion.training.metrics import score

log = logging.getLogger(__name__)

Batches = Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class States:
    """Pooled states of some rows: (S, D) float64; labels: (B,); choice_counts: (B,) where S is not B."""

    pooled: Tensor
    labels: Tensor
    choice_counts: Tensor | None


class PooledStates(TaskHead):
    """A head that scores nothing: it hands the pooled states on."""

    def forward(self, hidden: Tensor, attention_mask: Tensor, words: Tensor | None = None) -> Tensor:
        """hidden: (S, T, D), attention_mask: (S, T) -> (S, D), of words (B, W, D)."""
        return pool(hidden, attention_mask, self.pooling, words)


def probe(
    sources: Sequence[Artifact],
    backbone: Backbone,
    composition: CompositionConfig,
    pooling: str,
    task: TaskConfig,
    training: Batches,
    validation: Batches,
    device: torch.device,
) -> list[float]:
    """The task's first metric on the validation rows, for each source alone.

    The backbone is frozen and so is the adapter; only a linear head is fitted, to convergence, on the
    training rows.

    Args:
        backbone: is changed in place; give a copy.
        composition: says in which layers the adapters act.
        training, validation: give the batches, once for each source.
    """
    scores = []
    for source, look in zip(sources, looks(sources, backbone, composition, pooling, device), strict=True):
        found = probe_score(look(training()), look(validation()), task)
        log.info("probe of %s: %s %.4f", source.manifest.name, task.metrics[0], found)
        scores.append(found)
    return scores


def probe_score(training: States, validation: States, task: TaskConfig) -> float:
    """The task's first metric on the validation rows, by the linear head that fits the training rows best."""
    scores = linear_scores(training, validation, task)
    return score(task, scores, validation.labels.numpy())[task.metrics[0]]


def looks(
    sources: Sequence[Artifact],
    backbone: Backbone,
    composition: CompositionConfig,
    pooling: str,
    device: torch.device,
) -> Iterator[Callable[[Iterable[Batch]], States]]:
    """For each source a function of batches: the pooled states with its adapter alone; arguments as of `probe`."""
    settings = CompositionConfig(MEAN, layers=composition.layers, drop=composition.drop)
    model = AdaptedModel(
        backbone,
        build_composition(settings, sources, backbone),
        sources[0].manifest.placement["adapter.reads"],
        PooledStates(backbone.hidden_size, 1, pooling),
    )
    model = model.to(device).eval()
    for position in range(len(sources)):
        on = torch.arange(len(sources), device=device) == position  # the mean of one source is that source
        yield partial(pooled_states, model, on=on, device=device)


@torch.no_grad()
def pooled_states(model: AdaptedModel, batches: Iterable[Batch], on: Tensor, device: torch.device) -> States:
    """What the head would get of each text with the sources that are on; on: (N,) bool."""
    pooled, labels, counts = [], [], []
    for batch in batches:
        assert batch.labels is not None
        batch = batch.to(device)
        states = model(batch.input_ids, batch.attention_mask, batch.token_type_ids, sources_on=on)
        pooled.append(states.cpu().double())
        labels.append(batch.labels.cpu())  # type: ignore[union-attr]
        if batch.choice_counts is not None:
            counts.append(batch.choice_counts.cpu())
    return States(torch.cat(pooled), torch.cat(labels), torch.cat(counts) if counts else None)


def linear_scores(training: States, other: States, task: TaskConfig) -> Tensor:
    """Scores (B, K) of the other rows by the linear head that fits the training rows best.

    With n training rows it minimises, over standardised states, the mean loss and ‖W‖² / 2n:
    cross-entropy, over the labels or over a row's choices, or the squared error of standardised values.
    """
    mean, deviation = training.pooled.mean(0), training.pooled.std(0, correction=0).clamp(min=1e-6)
    kind = kind_of(task)
    outputs = kind.head_outputs(task)
    weight = torch.zeros(training.pooled.shape[1], outputs, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(outputs, dtype=torch.float64, requires_grad=True)
    labels = kind.probe_labels(training.labels)

    def scores(states: States) -> Tensor:
        each = ((states.pooled - mean) / deviation) @ weight + bias
        if states.choice_counts is None:
            return each
        rows = each.squeeze(-1).split(states.choice_counts.tolist())
        return pad_sequence(list(rows), batch_first=True, padding_value=float("-inf"))

    def loss() -> Tensor:
        return kind.mean_loss(scores(training), labels) + weight.pow(2).sum() / (2 * len(labels))

    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def step() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    optimizer.step(step)
    with torch.no_grad():
        return scores(other)
