"""Checks that a tokenizer and a model belong together."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fusion.backbones.family import Family
from fusion.errors import UserError
from fusion.hub.tokenizer import check_length

_FIX = "Use the tokenizer of the model, or another copy of both: backbone.name_or_path=FOLDER"
TYPES = "token_type_ids"


def adjust(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, family: Family) -> None:
    """Adapt a tokenizer to its model: no token types if the model has a single one, and the right padding side.

    A model whose positions count padding must be padded on the right: on the left, a text's scores would depend on the
    other texts of its batch.
    """
    if config.type_vocab_size == 1:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != TYPES]
    if not family.positions_follow_padding:
        tokenizer.padding_side = "right"


def check_pair(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, family: Family, name_or_path: str) -> None:
    """Refuse a tokenizer whose output the model cannot read or would misread.

    Raises:
        UserError: states both numbers.
    """
    what = f"backbone {name_or_path}"
    vocabulary = tokenizer.get_vocab()
    token = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[token] >= config.vocab_size:
        beyond = sum(number >= config.vocab_size for number in vocabulary.values())
        raise UserError(
            f"{what}: its tokenizer has {len(vocabulary)} tokens, and the model has embeddings for {config.vocab_size}: "
            f"{token!r} has id {vocabulary[token]}{f', and {beyond - 1} more are too large' if beyond > 1 else ''}\n{_FIX}"
        )
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    pair = backend.encode("a", "a")
    if max(pair.ids, default=0) >= config.vocab_size:
        raise UserError(
            f"{what}: its tokenizer adds a special token with id {max(pair.ids)}, and the model has embeddings for "
            f"{config.vocab_size}\n{_FIX}"
        )
    if TYPES in tokenizer.model_input_names and max(pair.type_ids, default=0) >= config.type_vocab_size:
        raise UserError(
            f"{what}: its tokenizer gives token type {max(pair.type_ids)}, and the model has "
            f"type_vocab_size={config.type_vocab_size}\n{_FIX}"
        )
    if family.positions_follow_padding and tokenizer.pad_token_id != config.pad_token_id:
        raise UserError(
            f"{what}: its tokenizer pads with id {tokenizer.pad_token_id}, and the model has "
            f"pad_token_id={config.pad_token_id}, from which it counts positions\n{_FIX}"
        )


def check_max_length(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, family: Family, name_or_path: str, max_length: int
) -> None:
    """Refuse sequences longer than the model's positions or the tokenizer's limit.

    Raises:
        UserError: states both numbers.
    """
    positions = family.positions(config.max_position_embeddings, config.pad_token_id)
    if max_length > positions:
        table = config.max_position_embeddings
        how = f" (max_position_embeddings={table}, less padding)" if positions != table else ""
        raise UserError(
            f"data.max_length={max_length}: backbone {name_or_path} has {positions} positions{how}\n"
            f"Expected data.max_length={positions} or less"
        )
    check_length(tokenizer, max_length)
