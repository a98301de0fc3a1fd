"""Similarity of data sets in the frozen backbone, without adapters, labels or training.

The text embedding of Vu et al. 2020, "Exploring and Predicting Transferability across NLP Tasks" (§4.1, TextEmb): the mean
over a data set's texts of the mean of the last hidden states over a text's tokens. The similarity of two data sets is the
cosine of their embeddings. Poth et al. 2021, "What to Pre-Train on? Efficient Intermediate Task Selection", compare it with
other scores.

Shapes: S texts of a batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion.backbones.load import Backbone
from fusion.config.data import DataConfig, LimitConfig
from fusion.data.batches import Batch
from fusion.data.encode import EncodedRows, encode
from fusion.data.loaders import sampled_batches
from fusion.data.rows import load_splits
from fusion.errors import UserError
from fusion.layers.heads import pool
from fusion.store.trained_data import as_trained

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

_BATCH_SIZE = 32


def mean_embedding(backbone: Backbone, tasks: Sequence[EncodedRows], device: torch.device) -> Tensor:
    """(D,) float64: the mean over the tasks of the `text_embedding` of all rows."""
    return torch.stack(
        [text_embedding(backbone, sampled_batches(rows, None, _BATCH_SIZE), device) for rows in tasks]
    ).mean(0)


@torch.inference_mode()
def text_embedding(backbone: Backbone, batches: Iterable[Batch], device: torch.device) -> Tensor:
    """(D,) float64: the mean over all texts, each the mean over its real tokens."""
    model = backbone.model.to(device).eval()  # type: ignore[arg-type]
    total, texts = torch.zeros(backbone.hidden_size, dtype=torch.float64), 0
    for batch in batches:
        batch = batch.to(device)
        types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **types)
        hidden = output.last_hidden_state
        total += pool(hidden, batch.attention_mask, "mean").double().sum(0).cpu()
        texts += len(hidden)
    return total / texts


def source_rows(source: Manifest, data: DataConfig, at_most: int, tokenizer: Any) -> list[EncodedRows]:
    """The training rows of each task of a source, at most so many in all.

    They are read from the source's `data.dir`, else from that of this command. A limit selects the first rows of a fixed
    shuffle, so these are among the rows of the source's own training.

    Raises:
        UserError: they are in none of these places; the error of the first one.
    """
    assert data.max_length is not None
    trained = source.run.config.get("data.limit.train")
    limit = max(2, at_most // len(source.tasks))
    limit = min(trained, limit) if isinstance(trained, int) else limit
    found = []
    for stored in source.tasks:
        task = stored.as_config(source.name)
        errors = []
        for folder in _folders(source, data):
            place = as_trained(source, DataConfig(dir=folder, limit=LimitConfig(train=limit)), task.name)
            try:
                rows, _ = load_splits(task, place, ["train"], source.labels_read_as(task.name))
            except UserError as error:
                errors.append(error)
                continue
            found.append(encode(rows["train"], tokenizer, data.max_length, data.cache_dir))
            break
        else:
            raise errors[0]
    return found


def _folders(source: Manifest, data: DataConfig) -> list[str | None]:
    """Values of `data.dir` to try, in order; None: the hub, or the task's own corpus."""
    trained, started = source.run.config.get("data.dir"), source.run.folder
    folders: list[str | None] = []
    if isinstance(trained, str):
        if isinstance(started, str):
            folders.append(str(Path(started) / Path(trained).expanduser()))
        folders.append(trained)
    if data.dir is not None:
        folders.append(data.dir)
    if not isinstance(trained, str):
        folders.append(None)
    return folders
