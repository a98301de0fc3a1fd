"""Checks of a loaded backbone: complete and finite weights, a working forward pass, and a matching tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fusion.backbones.family import Family
from fusion.backbones.files import FIX, FIX_TYPE
from fusion.backbones.forward import last_hidden_states
from fusion.errors import UserError
from fusion.hub.tokenizer import check_length

log = logging.getLogger(__name__)
_FLOATS = {"F64", "F32", "F16", "BF16"}
_BUFFERS = ("position_ids", "token_type_ids")  # integer tensors in old checkpoints, which the model computes itself
TYPES = "token_type_ids"


def fit_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    family: Family,
    name_or_path: str,
    max_length: int | None,
) -> None:
    """Adapt a tokenizer to its model. Raises UserError if they, or `max_length` (if set), are incompatible.

    Without a padding token, EOS is used: padding is masked. Token types are omitted if the model has at most one. A
    model whose positions count padding is padded on the right, since the logits of a text would otherwise depend on the
    other texts of its batch.
    """
    types = getattr(config, "type_vocab_size", 0)
    if types <= 1:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != TYPES]
    if not family.positions_follow_padding:
        tokenizer.padding_side = "right"
    what = f"backbone {name_or_path}"
    if tokenizer.pad_token_id is None and not family.positions_follow_padding:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        log.info("%s: its tokenizer has no padding token; %s is used", what, tokenizer.pad_token or "id 0")
    vocabulary = tokenizer.get_vocab()
    token = max(vocabulary, key=vocabulary.__getitem__)
    beyond = sum(number >= config.vocab_size for number in vocabulary.values())
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    pair = backend.encode("a", "a")
    problem = ""
    if beyond:
        problem = (
            f"has {len(vocabulary)} tokens, but the model has embeddings for {config.vocab_size}: {token!r} has id "
            f"{vocabulary[token]}{f', and {beyond - 1} more ids are too large' if beyond > 1 else ''}"
        )
    elif max(pair.ids, default=0) >= config.vocab_size:
        problem = f"adds a special token with id {max(pair.ids)}, but the model has embeddings for {config.vocab_size}"
    elif TYPES in tokenizer.model_input_names and max(pair.type_ids, default=0) >= types:
        problem = f"returns token type {max(pair.type_ids)}, but the model has type_vocab_size={types}"
    elif family.positions_follow_padding and tokenizer.pad_token_id != config.pad_token_id:
        problem = (
            f"pads with id {tokenizer.pad_token_id}, but the model has pad_token_id={config.pad_token_id}, which its "
            "position ids depend on"
        )
    if problem:
        raise UserError(
            f"{what}: its tokenizer {problem}\n"
            "Use the tokenizer of the model, or a different copy of both: backbone.name_or_path=FOLDER"
        )
    if max_length is None:
        return
    table = positions = getattr(config, "max_position_embeddings", None)  # T5 has relative positions
    if table is not None and family.positions_follow_padding:
        positions = table - (config.pad_token_id or 0) - 1
    if positions is not None and max_length > positions:
        how = f" (max_position_embeddings={table}, minus padding)" if positions != table else ""
        raise UserError(
            f"data.max_length={max_length}: {what} has only {positions} positions{how}\n"
            f"Set data.max_length={positions} or less"
        )
    check_length(tokenizer, max_length)


def check_types(folder: Path) -> set[str]:
    """Return the dtypes of the weights in safetensors files, such as BF16.

    Raises UserError if a file has weights other than floats of 16 bits or more, or cannot be read.
    """
    found = set()
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({error})\n{FIX}") from None
        for name, dtype in types.items():
            if name.endswith(_BUFFERS):
                continue
            found.add(dtype)
            if dtype not in _FLOATS:
                what = f"{name} has dtype {dtype}, expected a float of 16 bits or more"
                raise UserError(f"{path}: {what}: quantized weights are not supported\n{FIX_TYPE}")
    return found


def check_complete(loading: Mapping[str, Any], model: PreTrainedModel, family: Family, what: str) -> None:
    """Raise UserError if tensors are missing, unexpected or mismatched, except for poolers and pre-training heads.

    Args:
        loading: loading info of `from_pretrained`, which initializes missing tensors randomly.
    """
    prefix = model.base_model_prefix  # such as `bert`, which tensor names have in checkpoints with a head
    used = tuple(f"{name}." for name in (*dict(model.named_children()), *family.optional))
    missing = sorted(name for name in loading["missing_keys"] if name.startswith(used))
    unexpected = sorted(loading["unexpected_keys"])
    extra = [name for name in unexpected if name.removeprefix(f"{prefix}.").startswith(used)]
    if missing:
        found = f"; unexpected keys: {_listed(unexpected)}" if unexpected else ""
        raise UserError(f"{what}: missing keys in the checkpoint: {_listed(missing)}{found}\n{FIX}")
    if extra:
        raise UserError(f"{what}: unexpected keys in the checkpoint: {_listed(extra)}\n{FIX}")
    for name, stored, expected in loading["mismatched_keys"]:
        raise UserError(f"{what}: {name} has shape {list(stored)}, but config.json expects {list(expected)}\n{FIX}")


def check_finite(name: str, weight: Tensor, what: str) -> None:
    """Raise UserError if a weight is NaN or infinite."""
    if weight.numel() and not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
        raise UserError(f"{what}: {name} contains NaN or infinite values\n{FIX}")


@torch.no_grad()
def check_runs(model: PreTrainedModel, family: Family, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Raise UserError if the model fails on a short text, e.g. for invalid configs."""
    batch = {name: Tensor(ids).long() for name, ids in tokenizer(["a"]).items()}
    try:
        if not last_hidden_states(model, family, **batch).isfinite().all():
            raise ValueError("its output is not finite")
    except Exception as error:  # the model's code may raise any error
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{what}: the forward pass fails ({type(error).__name__}: {text})\n{FIX}") from error


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"
