"""Inspection of a stored fusion on a split of its task: source attention, ablation and pruning, without training.

Shapes: L slots, T tokens of a text, N sources.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusion.analysis.unseen import check_unseen
from fusion.config.commands import InspectConfig
from fusion.config.data import DataConfig, LimitConfig
from fusion.data.batches import Batch
from fusion.data.encode import encode
from fusion.data.loaders import evaluation_loader
from fusion.data.rows import load_splits
from fusion.data.splits import evaluation_splits
from fusion.errors import UserError
from fusion.model.adapted import AdaptedModel
from fusion.model.head_selection import select_heads
from fusion.model.inference import forward, load_model, predict
from fusion.model.source_attention import measure_attention
from fusion.reporting.records import pack
from fusion.store.compatibility import as_trained, data_folder_of
from fusion.store.lookup import source_manifests
from fusion.store.manifest import Manifest
from fusion.tasks.table import kind_of

TEXT = 2000  # maximum number of stored characters per text
GREEDY = 8  # maximum number of sources for greedy pruning

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of a fusion with a subset of its sources."""

    metrics: dict[str, float]  # the first one is compared
    loss: float  # mean over the examples, breaks ties
    predictions: Sequence[Any] = ()

    @property
    def key(self) -> tuple[float, float]:
        return next(iter(self.metrics.values())), -self.loss

    def as_json(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "loss": self.loss}

    def __str__(self) -> str:
        return "  ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())


Evaluate = Callable[[Sequence[int]], Evaluation]  # evaluates the fusion with only the sources at these indices


def inspected_data(manifest: Manifest, data: DataConfig) -> DataConfig:
    """Return the data settings of the artifact's training run; settings of `data` take precedence if they are set."""
    trained = manifest.run.config
    limits = {split: limit or trained.get(f"data.limit.{split}") for split, limit in asdict(data.limit).items()}
    folder = data_folder_of(manifest) if data.dir is None else data.dir
    return replace(as_trained(manifest, data, manifest.task.name), dir=folder, limit=LimitConfig(**limits))


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Return the content of inspection.json.

    `masked`: metrics and predictions without each source. `pruned`: metrics from all sources down to one, or null if
    `prune` is false. `words`: selected examples, see `token_attention`. Raises UserError if the artifact, its sources,
    the backbone or the data are missing or incompatible.
    """
    started = time.monotonic()
    loaded = load_model(config)
    manifest, model, device = loaded.artifact.manifest, loaded.model, loaded.device
    head, data = select_heads(manifest, None)[0], inspected_data(manifest, config.data)
    task, kind = head.task, kind_of(head.task)
    split = evaluation_splits(task, config.split, data)[0]
    check_unseen([manifest, *source_manifests(manifest, loaded.artifact.path.parent)], task, data, split)
    rows = load_splits(task, data, [split], manifest.data.labels.get(str(task.name)))[0][split]
    if rows.labels is None:
        raise UserError(f"split={split} has no labels, so metrics cannot be computed; expected a labeled split")
    if isinstance(config.words, list) and max(config.words) >= len(rows):
        raise UserError(f"words={config.words}: expected indices of examples from 0 to {len(rows) - 1}")
    backbone = loaded.backbone
    encoded = encode(rows, backbone.tokenizer, loaded.max_length, data.cache_dir, backbone.family.causal)
    assert encoded.labels is not None
    label_tensor, labels = torch.from_numpy(encoded.labels), kind.plain_labels(encoded.labels)
    names = [source.name for source in manifest.sources]

    def evaluate(sources: Sequence[int]) -> tuple[Tensor, Evaluation]:
        all_on = len(sources) == len(names)
        on = None if all_on else torch.tensor([n in sources for n in range(len(names))], device=device)
        scores = predict(model, encoded, data, device, sources_on=on).scores
        predictions = kind.predict(kind.outputs(scores), head.decision)
        loss = float(kind.mean_loss(scores.float(), label_tensor))
        return scores, Evaluation(kind.metrics(task, labels, predictions), loss, predictions)

    batches = evaluation_loader(encoded, data.batch_size, tokens_per_batch=data.tokens_per_batch)
    attention = measure_attention(model, batches, device)
    scores, full = evaluate(range(len(names)))
    log.info("%s on %s %s (%d examples): %s", manifest.name, task.name, split, len(rows), full)
    ablated = ablate_each(len(names), lambda sources: evaluate(sources)[1]) if len(names) > 1 else []
    masked = dict(zip(names, ablated, strict=False))
    for source, one in masked.items():
        log.info("without %s: %s", source, one)
    pruned = None
    if config.prune and ablated:
        pruned = prune(full, ablated, lambda sources: evaluate(sources)[1], len(names) <= GREEDY)
    words = []
    if all(slot.entropy is not None for slot in attention.values()):
        wrong = kind.wrong(labels, full.predictions)
        for row in config.words if isinstance(config.words, list) else select_rows(wrong, config.words):
            choices = None if rows.choices is None else rows.choices[row]
            text = 0 if choices is None else int(full.predictions[row])
            texts = [*rows.texts[row], *([] if choices is None else [choices[text]])]
            counts = None if choices is None else [len(choices)]
            (line,) = kind.lines(task, scores[None, row], counts, head.decision)
            words.append(
                {"row": row, "texts": [part[:TEXT] for part in texts]}
                | kind.describe(task, line, rows.labels[row])
                | token_attention(model, encoded.batch([row]).to(device), text, loaded.backbone.tokenizer)
            )
    return {
        "name": manifest.name,
        "artifact": str(loaded.artifact.path),
        "hash": manifest.hash,
        "task": task.name,
        "split": split,
        "fingerprint": encoded.fingerprint,
        "rows": len(rows),
        "backbone": manifest.backbone.name_or_path,
        "composition": manifest.content["composition"],
        "drop": config.drop,
        "sources": names,
        "slots": list(attention),
        "metrics": full.metrics,
        "labels": labels,
        "predicted": full.predictions,
        "attention": {slot: {"mean": one.mean, "entropy": one.entropy} for slot, one in attention.items()},
        "masked": {source: one.as_json() | {"predicted": one.predictions} for source, one in masked.items()},
        "pruned": pruned and [{"kept": [names[n] for n in sources]} | one.as_json() for sources, one in pruned],
        "words": words,
        "speed": {"seconds": time.monotonic() - started},
    }


def ablate_each(count: int, evaluate: Evaluate) -> list[Evaluation]:
    return [evaluate([n for n in range(count) if n != removed]) for removed in range(count)]


def prune(
    full: Evaluation, ablated: Sequence[Evaluation], evaluate: Evaluate, greedy: bool
) -> list[tuple[tuple[int, ...], Evaluation]]:
    """Repeatedly remove the least important source until one is left; ties are broken by the last source.

    Returns the indices of the remaining sources and their evaluation, for N steps.

    Args:
        ablated: result of `ablate_each`.
        greedy: re-evaluate the removal of each remaining source at every step, with N(N - 1)/2 - 1 more evaluations.
            Otherwise sources are removed in the order given by `ablated`, with N - 2 more evaluations.
    """
    remaining = tuple(range(len(ablated)))
    steps = [(remaining, full)]
    without = dict(enumerate(ablated))
    while len(remaining) > 1:
        if greedy and len(steps) > 1:
            without = {n: evaluate([other for other in remaining if other != n]) for n in remaining}
        removed = max(remaining, key=lambda n: (without[n].key, n))
        remaining = tuple(n for n in remaining if n != removed)
        known = greedy or len(steps) == 1
        steps.append((remaining, without[removed] if known else evaluate(remaining)))
        log.info("%d of %d sources: %s", len(remaining), len(ablated), steps[-1][1])
    return steps


def select_rows(wrong: Sequence[bool], count: int) -> list[int]:
    """Select examples evenly from the split, half of them misclassified if possible."""
    groups = [[row for row, is_wrong in enumerate(wrong) if is_wrong is kind] for kind in (True, False)]
    first = min(len(groups[0]), max(count // 2, count - len(groups[1])))
    return sorted([*_spread(groups[0], first), *_spread(groups[1], count - first)])


def _spread(rows: Sequence[int], count: int) -> list[int]:
    count = min(count, len(rows))
    return [rows[n * len(rows) // count] for n in range(count)]


@torch.inference_mode()
def token_attention(model: AdaptedModel, batch: Batch, text: int, tokenizer: Any) -> dict[str, Any]:
    """Return the tokens of a text of the batch, given its index, and their source attention in each slot.

    Returns:
        tokens: T strings; a leading space marks the start of a word (`" film"`), others continue it (`"ing"`).
        special: positions of special tokens such as [CLS].
        weights: uint8 (L, T, N) in base64, where 255 is a weight of 1.
    """
    recorded: dict[str, Tensor] = {}
    forward(model.eval(), batch, record=recorded.__setitem__)
    real = batch.attention_mask[text].bool()
    ids = batch.input_ids[text][real].tolist()
    weights = torch.stack([slot[text][real] for slot in recorded.values()])
    special = set(tokenizer.all_special_ids)
    return {
        "tokens": _with_spaces(tokenizer.convert_ids_to_tokens(ids)),
        "special": [position for position, id in enumerate(ids) if id in special],
        "weights": pack(weights.float().cpu().numpy()),
    }


def _with_spaces(tokens: Sequence[str]) -> list[str]:
    """Mark word starts with a space, for WordPiece (`##ing`), byte-level BPE (`Ġfilm`) and SentencePiece (`▁film`)."""
    if any(token.startswith(("Ġ", "▁")) for token in tokens):
        return [" " + token[1:] if token.startswith(("Ġ", "▁")) else token.removeprefix("##") for token in tokens]
    return [token[2:] if token.startswith("##") else " " + token for token in tokens]
