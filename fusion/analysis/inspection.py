"""Look into a stored fusion on a split of its task: who is listened to, word by word, and who is needed.

Nothing is trained. What comes out is plain and goes into inspection.json, which the report reads.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion.analysis.ablation import Scored, prune_greedily, prune_in_order, without_each
from fusion.analysis.token_attention import chosen_rows, words_of
from fusion.analysis.unseen import check_unseen
from fusion.backbones.load import load_backbone
from fusion.config.commands import InspectConfig
from fusion.config.data import DataConfig, LimitConfig
from fusion.config.task import TaskConfig
from fusion.data.encode import EncodedRows, encode
from fusion.data.loaders import evaluation_loader
from fusion.data.rows import Rows, load_splits
from fusion.data.splits import evaluation_splits
from fusion.errors import UserError
from fusion.model.build import backbone_of, stored_model
from fusion.model.head_selection import decision_of, own_tasks
from fusion.model.inference import device_of, predict
from fusion.model.source_attention import measure_attention
from fusion.store.artifacts import load
from fusion.store.compatibility import check_attends
from fusion.store.lookup import source_manifests
from fusion.store.manifest import Manifest
from fusion.store.trained_data import as_trained, data_folder_of
from fusion.tasks.kind import Decision
from fusion.tasks.table import kind_of
from fusion.training.metrics import predicted, score_predictions

TEXT = 2000  # characters of a row's text that are kept
GREEDY = 8  # sources: of more, every step looks at the first one's scores alone

log = logging.getLogger(__name__)


def data_of(manifest: Manifest, asked: DataConfig) -> DataConfig:
    """The data that the artifact was trained on, but for what is asked for: the folder, lengths, limits, batches.

    A relative folder that is not here is looked for where the training was started.
    """
    flat = {
        key.removeprefix("data."): value
        for key, value in manifest.run.config.items()
        if key.startswith("data.")
    }
    folder = data_folder_of(manifest) if asked.dir is None else asked.dir
    limits = {
        split: getattr(asked.limit, split) or flat.get(f"limit.{split}")
        for split in ("train", "validation", "test")
    }
    return dataclasses.replace(
        as_trained(manifest, asked, manifest.task.name),
        dir=folder,
        limit=LimitConfig(**limits),
        max_length=asked.max_length or manifest.data.max_length,
    )


def inspect(config: InspectConfig) -> dict[str, Any]:
    """What inspection.json holds.

    name, hash, task, split, fingerprint, rows: what was looked at. sources: names, in order. slots: names, L of them.
    metrics: with all sources. labels, predicted: row by row, with all sources. attention: by slot, each source's mean weight and the entropy, see `SourceAttention`.
    masked: by source, the metrics without it and what is predicted then, row by row. pruned: `{"kept": [names], "metrics"}` from all sources down to one,
    or null; the one to go is looked for anew at each step, of more than GREEDY sources once. words: the chosen rows, see `words_of`.

    Raises:
        UserError: the artifact, its sources, backbone or data are missing, or it is nothing to look into.
    """
    started = time.monotonic()
    device = device_of(config.accelerator)
    artifact = load(config.artifact, Path(config.store))
    manifest = artifact.manifest
    check_attends(manifest, f"artifact={config.artifact}", "name a fusion")
    task, data = own_tasks(manifest)[0], data_of(manifest, config.data)
    kind, decision = kind_of(task), decision_of(manifest)
    assert data.max_length is not None
    name, revision = backbone_of(manifest, config.backbone)
    backbone = load_backbone(name, revision, config.backbone.trust_remote_code, data.max_length)
    model = stored_model(artifact, artifact.path.parent, backbone, config.drop)
    split = evaluation_splits(task, config.split, data)[0]
    check_unseen([manifest, *source_manifests(manifest, artifact.path.parent)], task, data, split)
    rows = load_splits(task, data, [split], manifest.labels_read_as(task.name))[0][split]
    if rows.labels is None:
        raise UserError(f"split={split}: its rows have no labels to score against; expected a labelled split")
    if isinstance(config.words, list) and max(config.words) >= len(rows):
        raise UserError(
            f"words={config.words}: row {max(config.words)} is not there; the split has rows 0 to {len(rows) - 1}"
        )
    encoded = encode(rows, backbone.tokenizer, data.max_length, data.cache_dir)
    sources = [source.name for source in manifest.sources]

    def run(kept: Sequence[int] | None = None) -> Tensor:
        on = None
        if kept is not None:
            on = torch.tensor([n in kept for n in range(len(sources))], device=device)
        size, tokens = data.batch_size, data.tokens_per_batch
        return predict(model, encoded, size, device, tokens_per_batch=tokens, sources_on=on).scores

    def scored(kept: Sequence[int]) -> Scored:
        return _scored(task, run(kept), encoded, decision)

    batches = evaluation_loader(encoded, data.batch_size, tokens_per_batch=data.tokens_per_batch)
    assert encoded.labels is not None
    labels = kind.plain_labels(encoded.labels)
    attention = measure_attention(model, batches, device)
    scores = run()
    full = _scored(task, scores, encoded, decision)
    log.info("%s on %s %s (%d rows): %s", manifest.name, task.name, split, len(rows), full)
    masked = without_each(len(sources), scored) if len(sources) > 1 else []
    for source, one in zip(sources, masked, strict=False):
        log.info("without %s: %s", source, one)
    pruned = None
    if config.prune and masked:
        prune = prune_greedily if len(sources) <= GREEDY else prune_in_order
        pruned = prune(len(sources), scored, full, masked)
    words = []
    if all(slot.entropy is not None for slot in attention.values()):
        assert full.predicted is not None
        wrong = kind.wrong(labels, full.predicted)
        asked = config.words if isinstance(config.words, list) else chosen_rows(wrong, config.words)
        for row in asked:
            text = kind.text_of(full.predicted[row])
            shown = words_of(model, encoded, row, text, backbone.tokenizer, device)
            words.append({"row": row, **_said(task, rows, row, text, scores[row], decision), **shown})
    return {
        "name": manifest.name,
        "artifact": str(artifact.path),
        "hash": manifest.hash,
        "task": task.name,
        "split": split,
        "fingerprint": encoded.fingerprint,
        "rows": len(rows),
        "backbone": manifest.backbone.name_or_path,
        "composition": manifest.content["composition"],
        "drop": config.drop,
        "sources": sources,
        "slots": list(attention),
        "metrics": full.metrics,
        "labels": labels,
        "predicted": full.predicted,
        "attention": {slot: {"mean": one.mean, "entropy": one.entropy} for slot, one in attention.items()},
        "masked": {
            source: {**one.plain(), "predicted": one.predicted}
            for source, one in zip(sources, masked, strict=False)
        },
        "pruned": None
        if pruned is None
        else [{"kept": [sources[n] for n in step.kept], **step.scored.plain()} for step in pruned],
        "words": words,
        "speed": {"seconds": time.monotonic() - started},
    }


def _scored(task: TaskConfig, scores: Tensor, rows: EncodedRows, decision: Decision) -> Scored:
    assert rows.labels is not None
    kind = kind_of(task)
    loss = kind.mean_loss(scores.float(), torch.from_numpy(rows.labels))
    predictions = predicted(task, scores, rows.labels, decision)
    return Scored(
        score_predictions(task, predictions, kind.plain_labels(rows.labels)), float(loss), predictions
    )


def _said(
    task: TaskConfig, rows: Rows, row: int, text: int, scores: Tensor, decision: Decision
) -> dict[str, Any]:
    """Text, prediction and truth of a row, as a person reads them."""
    assert rows.labels is not None
    parts = list(rows.texts[row])
    if rows.choices is not None:
        parts.append(rows.choices[row][text])
    count = None if rows.choices is None else len(rows.choices[row])
    described = kind_of(task).describe(task, scores, rows.labels[row], count, decision)
    return {"texts": [part[:TEXT] for part in parts], **described}
