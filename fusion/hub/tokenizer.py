"""Load a backbone's tokenizer, and hash everything that determines its token ids."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError, first_line
from fusion.hub.access import from_cache_or_hub, own_code_refused, warn_of_own_code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIX = "Use a folder or a cached model: backbone.name_or_path=FOLDER, or backbone=minilm, which does not need the Hub"

_UNUSUAL = "\N{SNOWMAN}\N{BEAMED SIXTEENTH NOTES}\N{CJK UNIFIED IDEOGRAPH-4E00}"  # hardly in any vocabulary


def load_tokenizer(
    name_or_path: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a backbone, trying the local cache first.

    Raises UserError if it is missing or corrupted, has no fast version or no vocabulary, or requires untrusted code.
    """
    # Set explicitly, so that tokenizers does not warn about forks when a loader starts its workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import AutoTokenizer

    what, is_folder = f"tokenizer {name_or_path}", Path(name_or_path).is_dir()

    def load(cached_only: bool) -> PreTrainedTokenizerBase:
        with own_code_refused(what):
            loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                name_or_path,
                revision=revision or "main",
                local_files_only=cached_only,
                trust_remote_code=trust_remote_code,
            )
        # With only config.json in the cache, transformers creates a tokenizer without vocabulary.
        if cached_only and not is_folder and _has_no_words(loaded):
            raise OSError("its vocabulary is not in the local cache")
        return loaded

    try:
        tokenizer = load(True) if is_folder else from_cache_or_hub(load, what, _FIX)
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.encode(_UNUSUAL)  # fails without an unknown token
    except UserError:
        raise
    except BaseException as error:  # a panic of the Rust library is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{what} cannot be loaded ({first_line(error)})\n"
            "Copy its files again, or use a different copy of the backbone: backbone.name_or_path=FOLDER"
        ) from error
    if not trust_remote_code:
        warn_of_own_code(tokenizer.init_kwargs.get("auto_map"), what)
    if not tokenizer.is_fast:
        raise UserError(
            f"{what} has no fast version ({type(tokenizer).__name__}): expected a tokenizer.json\n"
            "Use a different backbone: backbone.name_or_path=FOLDER"
        )
    if _has_no_words(tokenizer):
        raise UserError(
            f"{what} has {len(tokenizer)} tokens, all of them special: its vocabulary is missing\n"
            "Save tokenizer.json or vocab.txt next to the weights, or use a different copy: backbone.name_or_path=FOLDER"
        )
    return tokenizer


def _has_no_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    special = set(tokenizer.all_special_tokens)
    special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return len(tokenizer) <= len(special) and set(tokenizer.get_vocab()) <= special


def check_length(tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Raise UserError if `max_length` exceeds the tokenizer's limit."""
    limit = tokenizer.model_max_length
    if max_length > limit:
        raise UserError(
            f"data.max_length={max_length}: the tokenizer {tokenizer.name_or_path} supports at most {limit} tokens\n"
            f"Set data.max_length={limit} or less"
        )


def pair_separator(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what is inserted between the texts of a pair: a newline if the tokenizer has no special token there."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    sequences = backend.encode("a", "a").sequence_ids  # None for special tokens
    between = sequences[: sequences.index(1)] if 1 in sequences else [None]
    return "" if between[-1] is None else "\n"


def empty_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a text without any token, if the tokenizer adds no special tokens: a single token."""
    found = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return [next((int(number) for number in found if number is not None), 0)]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 of everything that determines token ids and types: equal hashes mean equal ids for any text.

    Not included: decoding, padding, the maximum length, and the versions and layout of the files.
    """
    backend = tokenizer.backend_tokenizer
    digest = hashlib.sha256()
    for part in (backend.normalizer, backend.pre_tokenizer, backend.model, backend.post_processor):
        state = b"" if part is None else part.__getstate__()
        digest.update(f"{len(state)} ".encode())
        digest.update(state)
    rest: list[Any] = [
        [
            [number, token.content, token.single_word, token.lstrip, token.rstrip, token.normalized, token.special]
            for number, token in sorted(backend.get_added_tokens_decoder().items())
        ],
        tokenizer.truncation_side,
        bool(tokenizer.split_special_tokens),
        "token_type_ids" in tokenizer.model_input_names,
    ]
    if separator := pair_separator(tokenizer):
        rest.append(separator)
    digest.update(json.dumps(rest).encode())
    return digest.hexdigest()
