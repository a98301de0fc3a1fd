"""The feature cache: frozen features of every example, computed once and stored on disk for all epochs and runs.

With the dtype of the backbone, logits equal those of the full forward pass up to rounding. All features are computed
before training, always in batches of the same examples, so that a resumed run reads bit-identical features.
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
from fusion.data.cache import cached_states
from fusion.data.encode import EncodedRows
from fusion.data.loaders import evaluation_loader
from fusion.errors import UserError
from fusion.files import user_cache
from fusion.model.adapted import AdaptedModel

log = logging.getLogger(__name__)

_FORMAT = 3
_TOKENS = 4096  # tokens per batch: a constant, so that features are the same in every run


def cache_features(
    model: AdaptedModel,
    splits: Iterable[EncodedRows],
    config: BackboneConfig,
    fingerprint: str,
    device: torch.device,
    cache_dir: str | None = None,
    once: bool = False,
) -> str | None:
    """Attach frozen features to every split and let the model read them, depending on `config.cache`.

    Raises UserError if a dtype is set and the cache is too large or not writable, or a feature exceeds its range.

    Args:
        splits: all splits that the model is trained and evaluated on.
        fingerprint: fingerprint of the backbone.
        cache_dir: cache directory. If `None`, the user's cache directory.
        once: whether the run reads each example only once, so that a cache would not save time.

    Returns:
        The dtype of the features, or `None` without a cache: with `off`, or with `auto` if no layer is below the lowest
        slot, the features exceed `backbone.cache_gb`, or the directory cannot be written.
    """
    asked, splits = config.cache, list(splits)
    if asked == "off" or config.dropout or model.tuning.parameters:
        return None
    if asked == "auto" and (model.boundary == 0 or once):
        return None
    dtype = str(model.dtype).removeprefix("torch.") if asked == "auto" else asked
    width, limit = model.hidden_size, int(config.cache_gb * 1e9)
    stored = "int16" if dtype == "bfloat16" else dtype  # its bits, since NumPy has no such type
    needed = sum(rows.tokens for rows in splits) * width * np.dtype(stored).itemsize
    why = ""
    if needed > limit:
        size = f"take {needed / 1e9:.1f} GB as {dtype}, more than backbone.cache_gb={config.cache_gb:g}"
        why, fix = f"the frozen features of these examples {size}", "Increase backbone.cache_gb, or set"
    elif not model.has_features:
        why, fix = "all adapters are in the decoder", "Set"
    elif any(rows.pads_left for rows in splits):
        why, fix = "the tokenizer pads on the left, so features depend on the other examples in the batch", "Set"
    if why:
        _log_or_raise(asked, why, f"{fix} backbone.cache=off")
        return None
    folder = (user_cache() if cache_dir is None else Path(cache_dir).expanduser()) / "prefix"
    try:
        model.to(device)
        states = [
            cached_states(
                folder / _key(model, rows, fingerprint, dtype, device),
                (rows.tokens, width),
                stored,
                limit,
                lambda array, rows=rows: _build(model, rows, array, device, dtype),  # type: ignore[misc]
            )
            for rows in splits
        ]
    except OSError as error:
        fix = "Set a different folder with data.cache_dir=DIR, or backbone.cache=off"
        _log_or_raise(asked, f"{folder} cannot be written ({error})", fix, error)
        return None
    finally:
        model.to("cpu")
    for rows, array in zip(splits, states, strict=True):
        rows.states = array
    model.take_features()
    return dtype


def _log_or_raise(asked: str, why: str, fix: str, error: OSError | None = None) -> None:
    """Log why there is no cache (`auto`), or raise (if a dtype is set)."""
    if asked != "auto":
        raise UserError(f"backbone.cache={asked}: {why}\n{fix}") from error
    log.log(logging.INFO if error is None else logging.WARNING, "%s: frozen features are computed in each epoch", why)


def _build(model: AdaptedModel, rows: EncodedRows, states: NDArray[Any], device: torch.device, dtype: str) -> None:
    log.info(
        "computing the frozen features of %d examples (%.0f MB, below %s)",
        len(rows),
        states.nbytes / 1e6,
        "the head" if model.boundary is None else f"layer {model.boundary}",
    )
    for batch in evaluation_loader(rows, batch_size=1, tokens_per_batch=_TOKENS):
        tokens, real = rows.places(batch.rows.tolist())
        batch = batch.to(device)
        features = model.frozen_features(batch.input_ids, batch.attention_mask, batch.token_type_ids)
        values = features.to(getattr(torch, dtype)).cpu()[torch.from_numpy(real)]
        if not values.isfinite().all():
            raise UserError(
                f"backbone.cache={dtype}: a frozen feature exceeds the range of this dtype\n"
                "Set backbone.cache=float32, or backbone.cache=off"
            )
        states[tokens] = (values.view(torch.int16) if dtype == "bfloat16" else values).numpy()


def _key(model: AdaptedModel, rows: EncodedRows, fingerprint: str, dtype: str, device: torch.device) -> str:
    """Return a hash (40 hex digits) of everything that the features depend on."""
    parts = [
        _FORMAT,
        rows.key,
        fingerprint,
        str(model.dtype),
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
