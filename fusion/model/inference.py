"""Inference on encoded examples, with one or multiple tasks.

Shapes: B examples of a batch, S texts of a batch, T tokens, K outputs, N sources or tasks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fusion.backbones.load import Backbone
from fusion.config.commands import UseConfig
from fusion.config.data import DataConfig
from fusion.data.batches import Batch
from fusion.data.encode import EncodedRows
from fusion.data.loaders import evaluation_loader
from fusion.errors import UserError
from fusion.layers.bank import AdapterBank, TaskSwitch
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.layers.slot_module import SlotModule
from fusion.model.adapted import AdaptedModel
from fusion.model.build import backbone_of, stored_model
from fusion.runs.memory import collect_as_usual, keep_freed_memory
from fusion.store.artifacts import Artifact, load


@dataclass(frozen=True)
class LoadedModel:
    """Model of an artifact, with its backbone, which has the tokenizer."""

    artifact: Artifact
    model: AdaptedModel
    backbone: Backbone
    max_length: int
    device: torch.device


@dataclass(frozen=True)
class Predictions:
    """Logits of all examples, in input order.

    Attributes:
        scores: logits (examples, K); multiple choice: (examples, max choices); tagging: (examples, max words, K).
            Padded with -inf.
        attention: attention weights by slot, (examples, N), averaged over non-padding tokens; empty unless requested.
    """

    scores: Tensor
    attention: dict[str, Tensor]
    seconds: float
    tokens: int


def load_model(config: UseConfig, fold: bool = False) -> LoadedModel:
    """Load the artifact that a command uses; with `fold`, see `AdaptedModel.merged`.

    Raises UserError if anything is missing or incompatible.
    """
    device = device_of(config.accelerator)
    artifact = load(config.artifact, Path(config.store))
    max_length = config.data.max_length or artifact.manifest.data.max_length
    backbone = backbone_of(artifact.manifest, config.backbone, max_length)
    model = stored_model(artifact, artifact.path.parent, backbone, config.drop, fold)
    return LoadedModel(artifact, model, backbone, max_length, device)


def device_of(accelerator: str) -> torch.device:
    """Return the device for `auto` (a GPU if available), `gpu` or a torch device. Raises UserError if unavailable."""
    if accelerator == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cuda" if accelerator == "gpu" else accelerator)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"accelerator={accelerator}: not available; expected auto, cpu or gpu") from error
    return device


def forward(model: AdaptedModel, batch: Batch, **options: Any) -> Tensor:
    """Return the logits of a batch; `options` are passed to `AdaptedModel.forward`."""
    inputs = batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.choice_counts
    logits: Tensor = model(*inputs, task=batch.task, words=batch.words, **options)
    return logits


@torch.inference_mode()
def predict(
    model: AdaptedModel,
    rows: EncodedRows,
    data: DataConfig,
    device: torch.device,
    attention: bool = False,
    first_layer: int = 0,
    sources_on: Tensor | None = None,
    advance: Callable[[int], None] | None = None,
) -> Predictions:
    """Compute the logits of all examples, in input order. Batches are sorted by length.

    Args:
        first_layer, sources_on: see `AdaptedModel.forward`.
        advance: called after each batch with its number of examples.
    """
    keep_freed_memory()
    collect_as_usual()
    model = model.to(device).eval()
    started, tokens = time.monotonic(), 0
    indices: list[Tensor] = []
    scores: list[Tensor] = []
    weights: dict[str, list[Tensor]] = {}
    for batch in evaluation_loader(rows, data.batch_size, tokens_per_batch=data.tokens_per_batch):
        tokens += batch.input_ids.numel()
        batch = batch.to(device)
        recorded: dict[str, Tensor] = {}
        record = recorded.__setitem__ if attention else None
        found = forward(model, batch, sources_on=sources_on, record=record, first_layer=first_layer)
        scores.extend(found.cpu())
        indices.append(batch.rows.cpu())
        for slot, values in recorded.items():
            means = _example_means(values, batch.attention_mask, batch.choice_counts)
            weights.setdefault(slot, []).append(means.cpu())
        if advance is not None:
            advance(len(batch.rows))
    order = torch.argsort(torch.cat(indices))
    return Predictions(
        scores=pad_sequence(scores, batch_first=True, padding_value=float("-inf"))[order],
        attention={slot: torch.cat(parts)[order] for slot, parts in weights.items()},
        seconds=time.monotonic() - started,
        tokens=tokens,
    )


def _example_means(values: Tensor, mask: Tensor, choice_counts: Tensor | None) -> Tensor:
    """Average values (S, T, N) over the non-padding tokens, mask (S, T), of each example's texts: (B, N)."""
    real = mask.unsqueeze(-1).to(values.dtype)
    sums, counts = (values * real).sum(1), real.sum(1)
    if choice_counts is not None:
        example = torch.repeat_interleave(torch.arange(len(choice_counts), device=values.device), choice_counts)
        sums = sums.new_zeros(len(choice_counts), sums.shape[1]).index_add(0, example, sums)
        counts = counts.new_zeros(len(choice_counts), 1).index_add(0, example, counts)
    return sums / counts


class MultiTaskModel(nn.Module):
    """Model that computes the logits of N tasks with their adapters and heads, sharing the layers below all adapters.

    AdapterDrop (Rücklé et al. 2021, §3.2): the more first layers have no adapters, the more computation is shared.

    Args:
        adapters: adapters of each task, by slot address.
        reads: input of all adapters, see `fusion.backbones.slots`.
        heads: head of each task.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapters: Sequence[Mapping[str, BottleneckAdapter]],
        reads: str,
        heads: Sequence[TaskHead],
    ) -> None:
        super().__init__()
        slot_modules: dict[str, SlotModule] = {}
        for slot in sorted({slot for own in adapters for slot in own}):
            present = [task for task, own in enumerate(adapters) if slot in own]
            bank = AdapterBank([adapters[task][slot] for task in present], present, len(adapters))
            slot_modules[slot] = TaskSwitch(bank)
        self.model = AdaptedModel(backbone, slot_modules, reads, heads[0])
        self.model.take_features()
        self.heads = nn.ModuleList(heads)
        self.eval()

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> list[Tensor]:
        """Return the logits (S, K) of each task; input_ids, attention_mask, token_type_ids: (S, T)."""
        tasks = len(self.heads)
        hidden = self.model.frozen_features(input_ids, attention_mask, token_type_ids)
        if self.model.boundary is None:  # no adapter anywhere
            return [head(hidden, attention_mask) for head in self.heads]
        states = self.model.hidden_states(
            input_ids.repeat(tasks, 1),
            attention_mask.repeat(tasks, 1),
            None if token_type_ids is None else token_type_ids.repeat(tasks, 1),
            members=torch.arange(tasks, device=input_ids.device).repeat_interleave(len(input_ids)),
            features=hidden.repeat(tasks, 1, 1),
        )
        return [head(own, attention_mask) for head, own in zip(self.heads, states.chunk(tasks), strict=True)]
