"""Metrics and predictions of a stored artifact on a split."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from fusion.analysis.unseen import check_unseen
from fusion.config.commands import EvaluateConfig
from fusion.data.encode import encode
from fusion.data.rows import load_splits
from fusion.data.splits import evaluation_splits
from fusion.errors import UserError
from fusion.model.head_selection import select_heads
from fusion.model.inference import LoadedModel, predict
from fusion.store.compatibility import as_trained
from fusion.store.lookup import source_manifests
from fusion.tasks.table import kind_of
from fusion.training.predictions import RowPredictions

# Returns a context manager of the function that advances a progress bar, given its title and the number of examples.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None] | None]]


@dataclass
class Evaluation:
    """Metrics and predictions by split, with examples, padded tokens and seconds of the forward passes."""

    tasks: list[str]
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    stored: dict[str, dict[str, Any]] = field(default_factory=dict)  # for `write_predictions`
    lines: list[str] = field(default_factory=list)  # one for each split, to print
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0


def evaluate_model(loaded: LoadedModel, config: EvaluateConfig, progress: Progress) -> Evaluation:
    """Evaluate the model of an artifact with each of the selected heads.

    Raises UserError if the data is missing or has no labels.
    """
    manifest, backbone = loaded.artifact.manifest, loaded.backbone
    heads = select_heads(manifest, config.task)
    trained = [manifest, *source_manifests(manifest, loaded.artifact.path.parent)]
    found = Evaluation([str(head.task.name) for head in heads])
    data_of = {head.index: as_trained(manifest, config.data, head.task.name) for head in heads}
    splits = [
        (head, split) for head in heads for split in evaluation_splits(head.task, config.split, data_of[head.index])
    ]
    for head, split in splits:
        task, kind, data = head.task, kind_of(head.task), data_of[head.index]
        check_unseen(trained, task, data, split)
        rows = load_splits(task, data, [split], manifest.data.labels.get(str(task.name)))[0][split]
        if rows.labels is None:
            raise UserError(f"split={split} has no labels, so metrics cannot be computed; use fusion.predict")
        encoded = encode(rows, backbone.tokenizer, loaded.max_length, config.data.cache_dir, backbone.family.causal)
        encoded.task = head.index
        with progress(f"{manifest.name} on {task.name} {split}", len(rows)) as advance:
            scored = predict(loaded.model, encoded, config.data, loaded.device, advance=advance)
        assert encoded.labels is not None
        predictions = kind.predict(kind.outputs(scored.scores), head.decision)
        labels = kind.plain_labels(encoded.labels)
        key = split if len(heads) == 1 else f"{task.name}/{split}"
        metrics = kind.metrics(task, labels, predictions)
        by_row = RowPredictions(list(range(len(rows))), predictions, labels, kind.confidence(scored.scores))
        found.metrics[key] = metrics
        found.stored[key] = by_row.as_stored(encoded, task, rows)
        found.examples += len(rows)
        found.seconds += scored.seconds
        found.tokens += scored.tokens
        by = f", head of {head.trained_on}" if manifest.multitask and head.trained_on != task.name else ""
        dropped = f", {config.drop} layers dropped" if config.drop else ""
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        found.lines.append(f"{manifest.name} on {task.name} {split} ({len(rows)} examples{by}{dropped}): {shown}")
    return found
