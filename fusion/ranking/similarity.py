"""How alike two data sets look to the frozen backbone: no adapter, no label, no training.

The text embedding of Vu et al. 2020, "Exploring and Predicting Transferability across NLP Tasks" (§4.1, TextEmb):
the mean over a data set's texts of the mean over a text's tokens of the last layer's states. Two data sets are as
alike as the cosine of their embeddings. Poth et al. 2021, "What to Pre-Train on? Efficient Intermediate Task
Selection", find it a good first look.

Shapes: S texts of a batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fusion.backbones.load import Backbone
from fusion.data.batches import Batch
from fusion.layers.heads import pool


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
