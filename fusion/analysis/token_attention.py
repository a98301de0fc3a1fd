"""Token-level source attention of single rows.

Shapes: L slots, T tokens of a text, N sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusion.data.batches import Batch
from fusion.model.adapted import AdaptedModel
from fusion.model.inference import forward
from fusion.reporting.inspections import pack


def select_rows(wrong: Sequence[bool], count: int) -> list[int]:
    """Rows to show: half of them wrongly predicted if there are enough, evenly spread over the split."""
    groups = [[row for row, is_wrong in enumerate(wrong) if is_wrong is kind] for kind in (True, False)]
    first = min(len(groups[0]), max(count // 2, count - len(groups[1])))
    return sorted([*_spread(groups[0], first), *_spread(groups[1], count - first)])


def _spread(rows: Sequence[int], count: int) -> list[int]:
    count = min(count, len(rows))
    return [rows[n * len(rows) // count] for n in range(count)]


@torch.inference_mode()
def token_attention(model: AdaptedModel, batch: Batch, text: int, tokenizer: Any) -> dict[str, Any]:
    """The tokens of a text of a batch, and their source attention in each slot.

    Args:
        model, batch: on the same device.
        text: the index of the text in the batch.

    Returns:
        tokens: T texts; a leading space starts a word (`" film"`), no space continues it (`"ing"`).
        special: the positions of special tokens such as [CLS].
        weights: base64 of uint8 (L, T, N): 255 is a weight of 1.
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
    """Mark the start of words by a space, for WordPiece (`##ing`), byte-level BPE (`Ġfilm`) and SentencePiece (`▁film`)."""
    if any(token.startswith(("Ġ", "▁")) for token in tokens):
        return [" " + token[1:] if token.startswith(("Ġ", "▁")) else token.removeprefix("##") for token in tokens]
    return [token[2:] if token.startswith("##") else " " + token for token in tokens]
