"""Frozen features of every row, computed once and kept on disk: epochs, seeds and runs start from there.

The hidden states that enter the lowest layer with a slot depend on nothing that trains. With float32 the
scores are those of the whole pass up to rounding, and the lower layers are not run at all, forward or
backward. All states are there before the first of them is used, always made in batches of the same
rows: a run that is taken up again sees the same bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fusion.config.model import BackboneConfig
from fusion.data.cache import user_cache
from fusion.data.encode import EncodedRows
from fusion.data.loaders import evaluation_loader
from fusion.data.states import cached_states
from fusion.errors import UserError
from fusion.model.adapted import AdaptedModel

log = logging.getLogger(__name__)

_FORMAT = 3
_TOKENS = 4096  # that are computed together: of no setting, so that a row's state is the same in every run


def cache_features(
    model: AdaptedModel,
    splits: Iterable[EncodedRows],
    config: BackboneConfig,
    fingerprint: str,
    device: torch.device,
    cache_dir: str | None = None,
    once: bool = False,
) -> str | None:
    """Give every split its states and let the model start from them, where `config.cache` asks for it.

    Args:
        splits: all that the model will be trained and evaluated on.
        fingerprint: the backbone's.
        device: where the states are computed.
        cache_dir: where they are kept; None: the user's cache.
        once: whether the run sees each row only once, so that it gains nothing itself.

    Returns:
        float32 or float16, or None where the model runs whole: asked for, or under `auto` because no
        layer lies below the lowest slot, there is too little room, or a folder that cannot be written.

    Raises:
        UserError: a cache that was asked for by name does not fit, cannot be written, or loses too much.
    """
    asked, splits = config.cache, list(splits)
    if asked == "off" or config.dropout or model.tuning is not None:
        return None
    if asked == "auto" and (model.boundary == 0 or once):
        return None
    dtype = "float32" if asked == "auto" else asked
    width = model.hidden_size
    needed = sum(rows.tokens for rows in splits) * width * np.dtype(dtype).itemsize
    limit = int(config.cache_gb * 1e9)
    if needed > limit:
        why = (
            f"the frozen features of these rows take {needed / 1e9:.1f} GB as {dtype}, more than "
            f"backbone.cache_gb={config.cache_gb:g}"
        )
        _go_without(asked, why, "Raise backbone.cache_gb, or say backbone.cache=off")
        return None
    if any(rows.pads_left for rows in splits):
        why = "the tokenizer pads on the left, so that a row's features depend on the rows beside it"
        _go_without(asked, why, "Say backbone.cache=off")
        return None
    folder = (user_cache() if cache_dir is None else Path(cache_dir).expanduser()) / "prefix"
    try:
        model.to(device)
        states = [
            cached_states(
                folder / _key(model, rows, fingerprint, dtype, device),
                (rows.tokens, width),
                dtype,
                limit,
                lambda array, rows=rows: _build(model, rows, array, device),  # type: ignore[misc]
            )
            for rows in splits
        ]
    except OSError as error:
        cure = "Give another folder with data.cache_dir=DIR, or say backbone.cache=off"
        _go_without(asked, f"{folder} cannot be written ({error})", cure, error)
        return None
    finally:
        model.to("cpu")
    for rows, array in zip(splits, states, strict=True):
        rows.states = array
    model.take_features()
    return dtype


def _go_without(asked: str, why: str, cure: str, error: OSError | None = None) -> None:
    """What `auto` may do where there can be no cache, and one that was asked for by name may not."""
    if asked != "auto":
        raise UserError(f"backbone.cache={asked}: {why}\n{cure}") from error
    log.log(
        logging.INFO if error is None else logging.WARNING,
        "%s: the frozen features are computed again in each epoch",
        why,
    )


def _inputs(batch: Any, device: torch.device) -> tuple[Any, ...]:
    batch = batch.to(device)
    return batch.input_ids, batch.attention_mask, batch.token_type_ids


def _build(model: AdaptedModel, rows: EncodedRows, states: NDArray[Any], device: torch.device) -> None:
    log.info(
        "computing the frozen features of %d rows, once (%.0f MB, below %s)",
        len(rows),
        states.nbytes / 1e6,
        "the head" if model.boundary is None else f"layer {model.boundary}",
    )
    largest = np.finfo(states.dtype).max
    for batch in evaluation_loader(rows, batch_size=1, tokens_per_batch=_TOKENS):
        tokens, real = rows.places(batch.rows.tolist())
        values = model.frozen_features(*_inputs(batch, device)).float().cpu().numpy()[real]
        if states.dtype == np.float16 and np.abs(values).max() > largest:
            raise UserError(
                f"backbone.cache={states.dtype}: a frozen feature is beyond its range\n"
                "Say backbone.cache=float32, or backbone.cache=off"
            )
        states[tokens] = values


def _key(model: AdaptedModel, rows: EncodedRows, fingerprint: str, dtype: str, device: torch.device) -> str:
    """40 hex digits that stand for all that decides the bits."""
    parts = [
        _FORMAT,
        rows.key,
        fingerprint,
        model.boundary,
        dtype,
        _TOKENS,
        torch.__version__,
        version("transformers"),
        getattr(getattr(model.backbone, "config", None), "_attn_implementation", None),
        torch.get_float32_matmul_precision(),
        device.type,
        torch.cuda.get_device_name(device) if device.type == "cuda" else torch.get_num_threads(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]
