"""The frozen prefix of every row, computed once and kept on disk: epochs, seeds and runs start from there.

What the backbone computes below its lowest slot depends on nothing that trains. With float32 the
scores are those of the whole pass up to rounding, and the lower layers are not run at all, forward or
backward. All states are there before the first of them is used, always made in batches of the same
rows: a run that is taken up again sees the same bits.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fusion.config import BackboneConfig
from fusion.data.cache import user_cache
from fusion.data.encode import EncodedRows
from fusion.data.loaders import evaluation_loader
from fusion.data.states import kept_states
from fusion.errors import UserError
from fusion.model import AdaptedModel

log = logging.getLogger(__name__)

_FORMAT = 1
_BATCH = 32  # rows that are computed together: of no setting, so that a row's state is the same in every run


def keep_prefix(
    model: AdaptedModel,
    splits: Iterable[EncodedRows],
    config: BackboneConfig,
    fingerprint: str,
    device: torch.device,
    cache_dir: str | None = None,
) -> str | None:
    """Give every split its states and let the model start from them, where `config.cache` asks for it.

    Args:
        splits: all that the model will be trained and evaluated on.
        fingerprint: the backbone's.
        device: where the states are computed.
        cache_dir: where they are kept; None: the user's cache.

    Returns:
        float32 or float16, or None where the model runs whole: asked for, or under `auto` because there
        is little below the lowest slot, too little room, or a folder that cannot be written.

    Raises:
        UserError: a cache that was asked for by name does not fit, cannot be written, or loses too much.
    """
    asked = config.cache
    splits = list(splits)
    if asked == "off" or config.dropout or (asked == "auto" and _first_layer(model) == 0):
        return None
    dtype = "float32" if asked == "auto" else asked
    width = _width(model, splits[0], device)
    needed = sum(rows.tokens for rows in splits) * width * np.dtype(dtype).itemsize
    limit = int(config.cache_gb * 1e9)
    room = f"backbone.cache: the frozen prefix of these rows takes {needed / 1e9:.1f} GB as {dtype}"
    if needed > limit:
        message = f"{room}, more than backbone.cache_gb={config.cache_gb:g}"
        if asked == "auto":
            log.info("%s: computed anew in each epoch", message)
            return None
        raise UserError(f"{message}\nRaise backbone.cache_gb, or say backbone.cache=off")
    folder = (user_cache() if cache_dir is None else Path(cache_dir).expanduser()) / "prefix"
    model.to(device)
    try:
        states = [
            kept_states(
                folder / _key(model, rows, fingerprint, dtype, device),
                (rows.tokens, width),
                dtype,
                limit,
                lambda array, rows=rows: _build(model, rows, array, device),  # type: ignore[misc]
            )
            for rows in splits
        ]
    except OSError as error:
        if asked == "auto":
            log.warning(
                "%s cannot be written (%s): the frozen prefix is computed anew in each epoch", folder, error
            )
            return None
        raise UserError(
            f"backbone.cache={asked}: {folder} cannot be written ({error})\n"
            "Give another folder with data.cache_dir=DIR, or say backbone.cache=off"
        ) from error
    finally:
        model.to("cpu")
    for rows, array in zip(splits, states, strict=True):
        rows.states = array
    model.make_prefix_skippable()
    return dtype


def _first_layer(model: AdaptedModel) -> int | None:
    """The layer of the lowest slot; None: no slot, all is prefix."""
    return None if model.entry is None else int(model.entry.split(".")[0])


def _width(model: AdaptedModel, rows: EncodedRows, device: torch.device) -> int:
    batch = rows.batch([0])
    model.to(device)
    return model.prefix_states(*_inputs(batch, device)).shape[-1]


def _inputs(batch: Any, device: torch.device) -> tuple[Any, ...]:
    batch = batch.to(device)
    return batch.input_ids, batch.attention_mask, batch.token_type_ids


def _build(model: AdaptedModel, rows: EncodedRows, states: NDArray[Any], device: torch.device) -> None:
    log.info(
        "computing the frozen prefix of %d rows, once (%.0f MB, below %s)",
        len(rows),
        states.nbytes / 1e6,
        model.entry or "the head",
    )
    largest = np.finfo(states.dtype).max
    for batch in evaluation_loader(rows, _BATCH):
        tokens, real = rows.places(batch.rows.tolist())
        values = model.prefix_states(*_inputs(batch, device)).float().cpu().numpy()[real]
        if not np.abs(values).max() <= largest:
            raise UserError(
                f"backbone.cache={states.dtype}: a value of the frozen prefix is beyond its range\n"
                "Say backbone.cache=float32, or backbone.cache=off"
            )
        states[tokens] = values


def _key(model: AdaptedModel, rows: EncodedRows, fingerprint: str, dtype: str, device: torch.device) -> str:
    """40 hex digits that stand for all that decides the bits."""
    parts = [
        _FORMAT,
        rows.key,
        fingerprint,
        model.entry,
        model.reads,
        dtype,
        _BATCH,
        torch.__version__,
        device.type,
        torch.cuda.get_device_name(device) if device.type == "cuda" else torch.get_num_threads(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]
