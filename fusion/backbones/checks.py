"""Checks of a loaded backbone: complete and finite weights, a working forward pass, and a matching tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fusion.backbones.families import Family
from fusion.backbones.files import FIX
from fusion.errors import UserError
from fusion.hub.tokenizer import check_length

_FLOATS = {"F64", "F32", "F16", "BF16"}
_BUFFERS = ("position_ids", "token_type_ids")  # integer tensors in old checkpoints, which the model computes itself
_FIX_PAIR = "Use the tokenizer of the model, or a different copy of both: backbone.name_or_path=FOLDER"
TYPES = "token_type_ids"


def fit_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    family: Family,
    name_or_path: str,
    max_length: int | None,
) -> None:
    """Adapt a tokenizer to its model, and raise if they are incompatible.

    Token types are omitted if the model has a single type. A model whose positions count padding is padded on the
    right, since the logits of a text would otherwise depend on the other texts of its batch.

    Args:
        max_length: maximum sequence length in tokens. If `None`, it is not checked.

    Raises:
        UserError: if token ids, token types, padding or `max_length` are incompatible with the model.
    """
    if config.type_vocab_size == 1:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != TYPES]
    if not family.positions_follow_padding:
        tokenizer.padding_side = "right"
    what = f"backbone {name_or_path}"
    vocabulary = tokenizer.get_vocab()
    token = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[token] >= config.vocab_size:
        beyond = sum(number >= config.vocab_size for number in vocabulary.values())
        raise UserError(
            f"{what}: its tokenizer has {len(vocabulary)} tokens, but the model has embeddings for {config.vocab_size}: "
            f"{token!r} has id {vocabulary[token]}{f', and {beyond - 1} more ids are too large' if beyond > 1 else ''}\n"
            f"{_FIX_PAIR}"
        )
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    pair = backend.encode("a", "a")
    if max(pair.ids, default=0) >= config.vocab_size:
        raise UserError(
            f"{what}: its tokenizer adds a special token with id {max(pair.ids)}, but the model has embeddings for "
            f"{config.vocab_size}\n{_FIX_PAIR}"
        )
    if TYPES in tokenizer.model_input_names and max(pair.type_ids, default=0) >= config.type_vocab_size:
        raise UserError(
            f"{what}: its tokenizer returns token type {max(pair.type_ids)}, but the model has "
            f"type_vocab_size={config.type_vocab_size}\n{_FIX_PAIR}"
        )
    if family.positions_follow_padding and tokenizer.pad_token_id != config.pad_token_id:
        raise UserError(
            f"{what}: its tokenizer pads with id {tokenizer.pad_token_id}, but the model has "
            f"pad_token_id={config.pad_token_id}, which its position ids depend on\n{_FIX_PAIR}"
        )
    if max_length is None:
        return
    table = config.max_position_embeddings
    positions = family.positions(table, config.pad_token_id)
    if max_length > positions:
        how = f" (max_position_embeddings={table}, minus padding)" if positions != table else ""
        raise UserError(
            f"data.max_length={max_length}: {what} has only {positions} positions{how}\n"
            f"Set data.max_length={positions} or less"
        )
    check_length(tokenizer, max_length)


def check_types(folder: Path) -> None:
    """Raise if a safetensors file contains integer weights, which would be converted to floats.

    Raises:
        UserError: if a weight is not a float of at least 16 bits, or a file cannot be read.
    """
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({error})\n{FIX}") from None
        for name, dtype in types.items():
            if dtype not in _FLOATS and not name.endswith(_BUFFERS):
                raise UserError(
                    f"{path}: {name} has dtype {dtype}, expected a float of 16 bits or more: quantized weights are not "
                    "supported\nUse a copy in float32, float16 or bfloat16: backbone.name_or_path=FOLDER"
                )


def check_complete(loading: Mapping[str, Any], family: Family, prefix: str, what: str) -> None:
    """Raise if a checkpoint has missing, unexpected or mismatched tensors, except for poolers and pre-training heads.

    transformers would initialize missing tensors randomly.

    Args:
        loading: loading info of `from_pretrained`.
        prefix: base model prefix, such as `bert`, which tensor names have in checkpoints with a head.

    Raises:
        UserError: if tensors are missing, unexpected or have the wrong shape.
    """

    def used(name: str) -> bool:
        return name.partition(".")[0] in family.roots

    missing = [name for name in sorted(loading["missing_keys"]) if used(name)]
    unexpected = sorted(loading["unexpected_keys"])
    extra = [name for name in unexpected if used(name.removeprefix(f"{prefix}."))]
    if missing:
        found = f"; unexpected keys: {_listed(unexpected)}" if unexpected else ""
        raise UserError(f"{what}: missing keys in the checkpoint: {_listed(missing)}{found}\n{FIX}")
    if extra:
        raise UserError(f"{what}: unexpected keys in the checkpoint: {_listed(extra)}\n{FIX}")
    for name, stored, expected in loading["mismatched_keys"]:
        raise UserError(f"{what}: {name} has shape {list(stored)}, but config.json expects {list(expected)}\n{FIX}")


@torch.no_grad()
def check_runs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Raise if a weight is NaN or infinite, or the model fails on a short text.

    Some invalid values in config.json only fail in the forward pass.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() and not torch.stack(torch.aminmax(parameter)).isfinite().all():
            raise UserError(f"{what}: {name} contains NaN or infinite values\n{FIX}")
    batch = {name: Tensor(ids).long() for name, ids in tokenizer(["a"]).items()}
    try:
        if not model(**batch).last_hidden_state.isfinite().all():
            raise ValueError("its output is not finite")
    except Exception as error:  # the model's code may raise any error
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{what}: the forward pass fails ({type(error).__name__}: {text})\n{FIX}") from error


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"
