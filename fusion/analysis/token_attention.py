"""Rows word by word: for each token, what every source got in every slot.

Shapes: L slots, T tokens of a text, N sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusion.data.encode import EncodedRows
from fusion.model.adapted import AdaptedModel
from fusion.reporting.packing import pack


def chosen_rows(wrong: Sequence[bool], count: int) -> list[int]:
    """Which rows to show: half of them answered wrongly, where there are so many, spread evenly over the split."""
    groups = [[row for row, is_wrong in enumerate(wrong) if is_wrong is kind] for kind in (True, False)]
    first = min(len(groups[0]), max(count // 2, count - len(groups[1])))
    return sorted([*_spread(groups[0], first), *_spread(groups[1], count - first)])


def _spread(rows: Sequence[int], count: int) -> list[int]:
    count = min(count, len(rows))
    return [rows[n * len(rows) // count] for n in range(count)]


@torch.inference_mode()
def words_of(
    model: AdaptedModel, rows: EncodedRows, row: int, text: int, tokenizer: Any, device: torch.device
) -> dict[str, Any]:
    """The tokens of one row and the weights of the sources there.

    Args:
        text: which of the row's texts, of a row of choices; 0 otherwise.
        tokenizer: turns ids into tokens.

    Returns:
        tokens: T texts, each with whether it begins a word (`" film"`) or goes on with one (`"ing"`).
        special: the places of [CLS], [SEP] and the like.
        weights: base64 of uint8 (L, T, N): 255 is a share of 1.
    """
    model = model.to(device).eval()
    batch = rows.batch([row]).to(device)
    recorded: dict[str, Tensor] = {}
    model(
        batch.input_ids,
        batch.attention_mask,
        batch.token_type_ids,
        batch.choice_counts,
        record=recorded.__setitem__,
        task=rows.task,
        words=batch.words,
    )
    real = batch.attention_mask[text].bool()
    ids = batch.input_ids[text][real].tolist()
    weights = torch.stack([slot[text][real] for slot in recorded.values()]).float().cpu().numpy()
    special = set(tokenizer.all_special_ids)
    return {
        "tokens": _shown(tokenizer.convert_ids_to_tokens(ids)),
        "special": [place for place, id in enumerate(ids) if id in special],
        "weights": pack(weights),
    }


def _shown(tokens: Sequence[str]) -> list[str]:
    """WordPiece (`##ing`), byte-level BPE (`Ġfilm`) and SentencePiece (`▁film`) in one way: a blank begins a word."""
    wordpiece = any(token.startswith("##") for token in tokens)
    marked = any(token.startswith(("Ġ", "▁")) for token in tokens)
    shown = []
    for token in tokens:
        if token.startswith("##") and wordpiece:
            shown.append(token[2:])
        elif token.startswith(("Ġ", "▁")):
            shown.append(" " + token[1:])
        else:
            shown.append(token if marked else " " + token)
    return shown
