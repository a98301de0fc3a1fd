"""Run a model over rows without training: scores, and on demand what its fusion attends to.

Shapes: B rows of a batch, S texts of a batch, T tokens, K outputs, N sources.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.data.encode import EncodedRows
from fusion.data.loaders import evaluation_loader
from fusion.errors import UserError
from fusion.model.adapted import AdaptedModel
from fusion.runs.memory import keep_freed_memory


@dataclass(frozen=True)
class Predictions:
    """For all rows, in their order.

    scores: (rows, K), or for choices (rows, most choices), or for words (rows, most words, K), -inf where a row has
        fewer.
    attention: slot name -> (rows, N), the mean over the row's real tokens; empty unless asked for.
    """

    scores: Tensor
    attention: dict[str, Tensor]
    seconds: float
    tokens: int


def device_of(accelerator: str) -> torch.device:
    """`auto` takes a GPU where there is one; anything else is a device of torch's.

    Raises:
        UserError: there is no such device.
    """
    if accelerator == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cuda" if accelerator == "gpu" else accelerator)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"accelerator={accelerator}: there is none here; expected auto, cpu or gpu"
        ) from error
    return device


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
    """Scores of every row; batches are sorted by length and the results put back in order.

    Args:
        first_layer: the slots of the layers below it stay empty (AdapterDrop).
        sources_on: (N,) bool, which sources take part; None: all.
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
        scores.append(
            model(
                batch.input_ids,
                batch.attention_mask,
                batch.token_type_ids,
                batch.choice_counts,
                sources_on=sources_on,
                record=recorded.__setitem__ if attention else None,
                first_layer=first_layer,
                task=batch.task,
                words=batch.words,
            ).cpu()
        )
        places.append(batch.rows.cpu())
        for slot, values in recorded.items():
            weights.setdefault(slot, []).append(
                _row_means(values, batch.attention_mask, batch.choice_counts).cpu()
            )
        if advance is not None:
            advance(len(batch.rows))
    order = torch.argsort(torch.cat(places))
    return Predictions(
        scores=_stacked(scores)[order],
        attention={slot: torch.cat(parts)[order] for slot, parts in weights.items()},
        seconds=time.monotonic() - started,
        tokens=tokens,
    )


def _stacked(parts: list[Tensor]) -> Tensor:
    widest = max(part.shape[1] for part in parts)
    padded = [
        torch.nn.functional.pad(
            part, (0, 0) * (part.ndim - 2) + (0, widest - part.shape[1]), value=float("-inf")
        )
        for part in parts
    ]
    return torch.cat(padded)


def _row_means(values: Tensor, mask: Tensor, choice_counts: Tensor | None) -> Tensor:
    """values: (S, T, N), mask: (S, T) -> (B, N): the mean over all real tokens of a row's texts."""
    real = mask.unsqueeze(-1).to(values.dtype)
    sums, counts = (values * real).sum(1), real.sum(1)
    if choice_counts is not None:
        row = torch.repeat_interleave(torch.arange(len(choice_counts), device=values.device), choice_counts)
        sums = sums.new_zeros(len(choice_counts), sums.shape[1]).index_add(0, row, sums)
        counts = counts.new_zeros(len(choice_counts), 1).index_add(0, row, counts)
    return sums / counts
