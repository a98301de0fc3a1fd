"""How alike two data sets look to the frozen backbone: no adapter, no label, no training.

The text embedding of Vu et al. 2020, "Exploring and Predicting Transferability across NLP Tasks" (§4.1, TextEmb):
the mean over a data set's texts of the mean over a text's tokens of the last layer's states. Two data sets are as
alike as the cosine of their embeddings. Poth et al. 2021, "What to Pre-Train on? Efficient Intermediate Task
Selection", find it a good first look.

Shapes: S texts of a batch, T tokens, D hidden size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from fusion.backbones.load import Backbone
from fusion.data.batches import Batch
from fusion.data.cache import user_cache, write_cache_file
from fusion.data.encode import EncodedRows
from fusion.data.loaders import sampled_batches
from fusion.layers.heads import pool

_FORMAT = 1
_BATCH_SIZE = 32  # of no setting: an embedding is the same whoever makes it


def kept_embedding(
    backbone: Backbone, rows: EncodedRows, device: torch.device, cache_dir: str | None
) -> Tensor:
    """`text_embedding` of all rows: (D,) float64, made once and kept in the user's cache (or `cache_dir`)."""
    parts = [_FORMAT, rows.key, backbone.fingerprint, torch.__version__, version("transformers"), device.type]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]
    folder = user_cache() if cache_dir is None else Path(cache_dir).expanduser()
    path = folder / "embeddings" / f"{key}.json"
    found = _read(path, backbone.hidden_size)
    if found is None:
        found = text_embedding(backbone, sampled_batches(rows, None, _BATCH_SIZE), device)
        write_cache_file(path, json.dumps(found.tolist()).encode())
    return found


def _read(path: Path, width: int) -> Tensor | None:
    """None: there is none, or something else stands there, which is made anew."""
    try:
        values = torch.tensor(json.loads(path.read_bytes()), dtype=torch.float64)
    except (OSError, ValueError, TypeError, RuntimeError, RecursionError):
        return None
    return values if values.shape == (width,) and values.isfinite().all() else None


@torch.inference_mode()
def text_embedding(backbone: Backbone, batches: Iterable[Batch], device: torch.device) -> Tensor:
    """(D,) float64: the mean over all texts, each the mean over its real tokens."""
    model = backbone.model.to(device).eval()  # type: ignore[arg-type]
    total, texts = torch.zeros(backbone.hidden_size, dtype=torch.float64), 0
    for batch in batches:
        batch = batch.to(device)
        types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
        hidden = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, **types
        ).last_hidden_state
        total += pool(hidden, batch.attention_mask, "mean").double().sum(0).cpu()
        texts += len(hidden)
    return total / texts


def cosine(one: Tensor, other: Tensor) -> float:
    """one, other: (D,) -> their cosine."""
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))
