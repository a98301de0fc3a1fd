"""The feature cache: frozen features of every row, computed once and kept on disk for all epochs, seeds and runs.

The hidden states that enter the lowest layer with a slot do not depend on anything that trains. With float32, scores
equal those of the full forward pass up to rounding, and lower layers are not run at all. All features are computed
before training, always in batches of the same rows, so that a resumed run reads the same bits.
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
_TOKENS = 4096  # per batch: a constant, so that a row's features are the same in every run


def cache_features(
    model: AdaptedModel,
    splits: Iterable[EncodedRows],
    config: BackboneConfig,
    fingerprint: str,
    device: torch.device,
    cache_dir: str | None = None,
    once: bool = False,
) -> str | None:
    """Attach the frozen features to every split and let the model start from them, depending on `config.cache`.

    Args:
        splits: everything that the model is trained and evaluated on.
        fingerprint: of the backbone.
        device: computes the features.
        cache_dir: the cache folder; None: the user's cache.
        once: whether the run reads each row only once, so that a cache would not pay.

    Returns:
        float32 or float16; None if the whole model is run: with `off`, or with `auto` because no layer is below the
        lowest slot, there is too little space, or the folder cannot be written.

    Raises:
        UserError: a cache of a given type does not fit, cannot be written, or is too imprecise.
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
        _go_without(asked, why, "Raise backbone.cache_gb, or set backbone.cache=off")
        return None
    if any(rows.pads_left for rows in splits):
        why = "the tokenizer pads on the left, so that a row's features depend on the rows beside it"
        _go_without(asked, why, "Set backbone.cache=off")
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
        fix = "Set another folder with data.cache_dir=DIR, or backbone.cache=off"
        _go_without(asked, f"{folder} cannot be written ({error})", fix, error)
        return None
    finally:
        model.to("cpu")
    for rows, array in zip(splits, states, strict=True):
        rows.states = array
    model.take_features()
    return dtype


def _go_without(asked: str, why: str, fix: str, error: OSError | None = None) -> None:
    """Without a cache: `auto` logs why, a given type is refused."""
    if asked != "auto":
        raise UserError(f"backbone.cache={asked}: {why}\n{fix}") from error
    log.log(logging.INFO if error is None else logging.WARNING, "%s: frozen features are computed in each epoch", why)


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
        batch = batch.to(device)
        features = model.frozen_features(batch.input_ids, batch.attention_mask, batch.token_type_ids)
        values = features.float().cpu().numpy()[real]
        if states.dtype == np.float16 and np.abs(values).max() > largest:
            raise UserError(
                f"backbone.cache={states.dtype}: a frozen feature exceeds its range\n"
                "Set backbone.cache=float32, or backbone.cache=off"
            )
        states[tokens] = values


def _key(model: AdaptedModel, rows: EncodedRows, fingerprint: str, dtype: str, device: torch.device) -> str:
    """40 hex digits over everything that determines the bits."""
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
