"""Linear probe and LogME: scores of source adapters computed from pooled hidden states.

Shapes: S texts, B examples, D hidden size, K outputs of the head.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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
from fusion.training.predictions import score

_STEPS = 100  # maximum number of LogME iterations
_SMALLEST = 1e-12  # lower bound of denominators

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class States:
    pooled: Tensor  # (S, D) float64
    labels: Tensor  # (B,) or (B, ...)
    choice_counts: Tensor | None  # (B,), number of texts per example; None: one


Batches = Callable[[], Iterable[Batch]]


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
    """Return the `probe_score` of each source. See `pooled_states` for the arguments."""
    states = pooled_states(sources, backbone, composition, pooling, [training, validation], device)
    scores = [probe_score(fitted, held_out, task) for fitted, held_out in states]
    for source, found in zip(sources, scores, strict=True):
        log.info("probe of %s: %s %.4f", source.manifest.name, task.metrics[0], found)
    return scores


@torch.no_grad()
def pooled_states(
    sources: Sequence[Artifact],
    backbone: Backbone,
    composition: CompositionConfig,
    pooling: str,
    splits: Sequence[Batches],
    device: torch.device,
) -> list[list[States]]:
    """Compute the states of each split for each source alone, in the layers of `composition`. Modifies the backbone."""
    settings = CompositionConfig(MEAN, layers=composition.layers, drop=composition.drop)
    model = AdaptedModel(
        backbone,
        build_composition(settings, sources, backbone),
        sources[0].manifest.reads,
        TaskHead(backbone.hidden_size, 1, pooling),  # not used
    )
    model = model.to(device).eval()

    def states(batches: Iterable[Batch], on: Tensor) -> States:
        pooled, labels, counts = [], [], []
        for batch in batches:
            assert batch.labels is not None
            labels.append(batch.labels)
            if batch.choice_counts is not None:
                counts.append(batch.choice_counts)
            batch = batch.to(device)
            hidden = model.hidden_states(batch.input_ids, batch.attention_mask, batch.token_type_ids, sources_on=on)
            pooled.append(pool(hidden, batch.attention_mask, pooling).cpu().double())
        return States(torch.cat(pooled), torch.cat(labels), torch.cat(counts) if counts else None)

    alone = torch.eye(len(sources), dtype=torch.bool, device=device)  # the mean of one source is that source
    return [[states(batches(), on) for batches in splits] for on in alone]


def probe_score(training: States, validation: States, task: TaskConfig) -> float:
    """Return the task's first metric on the validation examples, for a linear head fitted on the training examples."""
    scores = linear_scores(training, validation, task)
    return score(task, scores, validation.labels.numpy())[task.metrics[0]]


def linear_scores(training: States, other: States, task: TaskConfig) -> Tensor:
    """Return the logits (B, K) on the `other` examples of a linear head fitted on the training examples.

    For n training examples, minimizes the mean loss + ‖W‖² / 2n over standardized states. The loss is the cross-entropy
    over the labels or over the choices of an example, or the squared error of standardized labels.
    """
    mean, deviation = training.pooled.mean(0), training.pooled.std(0, correction=0).clamp(min=1e-6)
    kind = kind_of(task)
    outputs = kind.head_outputs(task)
    weight = torch.zeros(training.pooled.shape[1], outputs, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(outputs, dtype=torch.float64, requires_grad=True)
    labels = kind.probe_labels(training.labels)

    def scores(states: States) -> Tensor:
        by_text = ((states.pooled - mean) / deviation) @ weight + bias
        if states.choice_counts is None:
            return by_text
        rows = by_text.squeeze(-1).split(states.choice_counts.tolist())
        return pad_sequence(list(rows), batch_first=True, padding_value=float("-inf"))

    def step() -> float:
        optimizer.zero_grad()
        loss = kind.mean_loss(scores(training), labels) + weight.pow(2).sum() / (2 * len(labels))
        loss.backward()
        return float(loss.detach())

    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )
    optimizer.step(step)
    with torch.no_grad():
        return scores(other)


def logme_score(states: States, task: TaskConfig) -> float:
    """Return the LogME score (higher is better), or NaN if all labels are equal.

    You et al. 2021, "LogME: Practical Assessment of Pre-trained Models for Transfer Learning": the log evidence per
    example, p(y | F) = ∫ p(w) p(y | F, w) dw, of a Bayesian linear regression with w ~ N(0, I / α) and
    y ~ N(F w, I / β), maximized over α and β. For classification, the mean over the one-hot columns.
    """
    targets = kind_of(task).columns(task, states.labels, states.choice_counts)
    columns = [y for y in targets.T if y.unique().numel() > 1]  # a label may not occur
    if not columns:
        return math.nan
    features = states.pooled.double()
    u, s, _ = torch.linalg.svd(features, full_matrices=False)
    return math.fsum(_evidence(features, u, s, y) for y in columns) / len(columns)


def _evidence(features: Tensor, u: Tensor, s: Tensor, y: Tensor) -> float:
    """Maximize the log evidence per example over α and β with the fixed-point iteration of the paper (algorithm 1).

    features: (B, D) = u · diag(s) · vᵀ; u: (B, min(B, D)), s: (min(B, D),), y: (B,).
    """
    rows, width = features.shape
    sigma = s.square()
    z = u.T @ y
    residual = float((y - u @ z).square().sum())  # cannot be explained by any w

    def norms(scale: float) -> tuple[float, float]:
        """Return |m|² and |F m - y|² for `scale` = α / β."""
        weight = float((sigma * z.square() / (sigma + scale).square()).sum())
        error = float((z.square() * (scale / (sigma + scale)).square()).sum()) + residual
        return weight, error

    alpha = beta = 1.0
    for _ in range(_STEPS):
        scale = alpha / beta
        gamma = float((sigma / (sigma + scale)).sum())
        weight, error = norms(scale)
        alpha = max(gamma / max(weight, _SMALLEST), _SMALLEST)
        beta = max((rows - gamma) / max(error, _SMALLEST), _SMALLEST)
        if abs(alpha / beta - scale) <= 1e-6 * scale:
            break
    weight, error = norms(alpha / beta)
    determinant = float((alpha + beta * sigma).log().sum()) + (width - len(s)) * math.log(alpha)
    evidence = width * math.log(alpha) + rows * math.log(beta) - beta * error - alpha * weight - determinant
    return (evidence - rows * math.log(2 * math.pi)) / (2 * rows)
