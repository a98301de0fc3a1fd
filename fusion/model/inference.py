"""Run a model over encoded rows without training.

Shapes: B rows of a batch, S texts of a batch, T tokens, K outputs, N sources or tasks.
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

from fusion.backbones.load import Backbone, load_backbone
from fusion.config.commands import UseConfig
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
from fusion.runs.memory import keep_freed_memory
from fusion.store.artifacts import Artifact, load


@dataclass(frozen=True)
class LoadedModel:
    """The model of an artifact, with the backbone that it was built from (for the tokenizer)."""

    artifact: Artifact
    model: AdaptedModel
    backbone: Backbone
    max_length: int
    device: torch.device


@dataclass(frozen=True)
class Predictions:
    """Of all rows, in their order.

    Attributes:
        scores: (rows, K); multiple choice: (rows, most choices); tagging: (rows, most words, K). -inf where a row has
            fewer.
        attention: by slot, (rows, N), the mean over the row's real tokens; empty unless requested.
    """

    scores: Tensor
    attention: dict[str, Tensor]
    seconds: float
    tokens: int


def load_model(config: UseConfig) -> LoadedModel:
    """Load the artifact that a command uses.

    Raises:
        UserError: the device, the artifact, a source or the backbone is missing or does not fit.
    """
    device = device_of(config.accelerator)
    artifact = load(config.artifact, Path(config.store))
    name, revision = backbone_of(artifact.manifest, config.backbone)
    max_length = config.data.max_length or artifact.manifest.data.max_length
    backbone = load_backbone(name, revision, config.backbone.trust_remote_code, max_length)
    model = stored_model(artifact, artifact.path.parent, backbone, config.drop)
    return LoadedModel(artifact, model, backbone, max_length, device)


def device_of(accelerator: str) -> torch.device:
    """The device of a setting: `auto` is a GPU if there is one; anything else is a device of torch's.

    Raises:
        UserError: the device is not available.
    """
    if accelerator == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cuda" if accelerator == "gpu" else accelerator)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"accelerator={accelerator}: not available; expected auto, cpu or gpu") from error
    return device


def forward(model: AdaptedModel, batch: Batch, **options: Any) -> Tensor:
    """The scores of a batch; options are those of `AdaptedModel.forward`."""
    scores: Tensor = model(
        batch.input_ids,
        batch.attention_mask,
        batch.token_type_ids,
        batch.choice_counts,
        task=batch.task,
        words=batch.words,
        **options,
    )
    return scores


@torch.inference_mode()
def predict(
    model: AdaptedModel,
    rows: EncodedRows,
    batch_size: int,
    device: torch.device,
    attention: bool = False,
    tokens_per_batch: int | None = None,
    first_layer: int = 0,
    sources_on: Tensor | None = None,
    advance: Callable[[int], None] | None = None,
) -> Predictions:
    """Scores of all rows; batches are sorted by length, and the results are in the rows' order.

    Args:
        first_layer: slots in lower layers are inactive (AdapterDrop).
        sources_on: (N,) bool, the sources that take part; None: all.
        advance: called after each batch with its number of rows.
    """
    keep_freed_memory()
    model = model.to(device).eval()
    started, tokens = time.monotonic(), 0
    places: list[Tensor] = []
    scores: list[Tensor] = []
    weights: dict[str, list[Tensor]] = {}
    for batch in evaluation_loader(rows, batch_size, tokens_per_batch=tokens_per_batch):
        tokens += batch.input_ids.numel()
        batch = batch.to(device)
        recorded: dict[str, Tensor] = {}
        record = recorded.__setitem__ if attention else None
        found = forward(model, batch, sources_on=sources_on, record=record, first_layer=first_layer)
        scores.extend(found.cpu())
        places.append(batch.rows.cpu())
        for slot, values in recorded.items():
            means = _row_means(values, batch.attention_mask, batch.choice_counts)
            weights.setdefault(slot, []).append(means.cpu())
        if advance is not None:
            advance(len(batch.rows))
    order = torch.argsort(torch.cat(places))
    return Predictions(
        scores=pad_sequence(scores, batch_first=True, padding_value=float("-inf"))[order],
        attention={slot: torch.cat(parts)[order] for slot, parts in weights.items()},
        seconds=time.monotonic() - started,
        tokens=tokens,
    )


def _row_means(values: Tensor, mask: Tensor, choice_counts: Tensor | None) -> Tensor:
    """values: (S, T, N), mask: (S, T) -> (B, N): the mean over all real tokens of a row's texts."""
    real = mask.unsqueeze(-1).to(values.dtype)
    sums, counts = (values * real).sum(1), real.sum(1)
    if choice_counts is not None:
        row = torch.repeat_interleave(torch.arange(len(choice_counts), device=values.device), choice_counts)
        sums = sums.new_zeros(len(choice_counts), sums.shape[1]).index_add(0, row, sums)
        counts = counts.new_zeros(len(choice_counts), 1).index_add(0, row, counts)
    return sums / counts


class MultiTaskModel(nn.Module):
    """Scores of each row by the adapters and heads of N tasks: the layers below the lowest adapter are run once for all.

    AdapterDrop (Rücklé et al. 2021, §3.2): the more of the first layers are without adapters, the more the tasks share.

    Args:
        adapters: of each task, by slot address.
        reads: what all of them read, see `fusion.backbones.wirings`.
        heads: of each task.

    Raises:
        ValueError: no task, or not as many heads as tasks.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapters: Sequence[Mapping[str, BottleneckAdapter]],
        reads: str,
        heads: Sequence[TaskHead],
    ) -> None:
        super().__init__()
        if not adapters or len(adapters) != len(heads):
            raise ValueError(f"{len(adapters)} tasks and {len(heads)} heads")
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
        """input_ids, attention_mask, token_type_ids: (S, T) -> for each task (S, K)."""
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
