"""Alignment of words and tokens: the token that represents each word, and windows of long sentences.

A word is predicted from its first sub-word (Devlin et al. 2019, section 5.3), or in a decoder from its last, the only
one that has read the whole word; its other sub-words and the special tokens have no label. A sentence that is too long
is split into windows between words. A word that the tokenizer removes, such as a zero-width space, is replaced by the
unknown token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusion.errors import UserError
from fusion.text import shown

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # if the tokenizer has no unknown token


class Window(NamedTuple):
    """Words of a sentence as one sequence with special tokens; `tokens` (words,): index of each word's token."""

    encoding: Encoding
    tokens: NDArray[np.int64]


def windows_of(
    sentences: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, max_length: int, last_subwords: bool = False
) -> list[list[Window]]:
    """Split each sentence into windows, usually one.

    The words are joined by a space, so that any tokenizer sees the text as in pre-training, and are located
    by token offsets (`word_ids()` follows the tokenizer's own words, and tokenizing given words changes the ids).

    `max_length` includes special tokens; a longer word is truncated. Raises UserError if the tokenizer has neither a
    token for a word nor an unknown token.

    Args:
        last_subwords: whether a word is represented by its last token instead of its first.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    found: list[dict[int, Window]] = [{} for _ in sentences]  # windows by the index of their first word
    # Pieces to encode: index of the sentence, index of the first word, words. Long pieces are split and encoded again.
    pieces = [(number, 0, list(words)) for number, words in enumerate(sentences)]
    while pieces:
        texts = [" ".join(words) for *_, words in pieces]
        encoded = zip(pieces, backend.encode_batch(texts), strict=True)
        pieces = []
        for (number, start, words), encoding in encoded:
            first = first_tokens(words, encoding)
            if (missing := np.flatnonzero(first < 0)).size:
                words, encoding = _with_unknown(tokenizer, words, missing)
                first = first_tokens(words, encoding)
            if len(encoding) > max_length and len(words) > 1:
                limit = max_length - backend.num_special_tokens_to_add(False)
                cuts = _cuts(first, len(encoding), limit)
                pieces += [(number, start + cut, words[cut:end]) for cut, end in pairwise(cuts)]
                continue
            if len(encoding) > max_length:
                backend.enable_truncation(max_length)
                encoding = backend.encode(words[0])
                backend.no_truncation()
                first = first_tokens(words, encoding)
            found[number][start] = Window(encoding, last_tokens(words, encoding) if last_subwords else first)
    return [[windows[start] for start in sorted(windows)] for windows in found]


def first_tokens(words: Sequence[str], encoding: Encoding) -> NDArray[np.int64]:
    """Return the first token (words,) of each word in the encoding of the joined words, or -1 if it has none."""
    starts, ends, offsets, real = _offsets(words, encoding)
    if not len(real):
        return np.full(len(words), -1, np.int64)
    token = np.searchsorted(offsets[real, 1], starts, side="right")
    overlaps = token < len(real)
    token = np.minimum(token, len(real) - 1)
    overlaps &= offsets[real[token], 0] < ends
    return np.where(overlaps, real[token], -1)


def last_tokens(words: Sequence[str], encoding: Encoding) -> NDArray[np.int64]:
    """Return the last token (words,) of each word. Every word must have a token, see `first_tokens`."""
    _, ends, offsets, real = _offsets(words, encoding)
    return real[np.searchsorted(offsets[real, 0], ends, side="left") - 1]


def _offsets(
    words: Sequence[str], encoding: Encoding
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.intp]]:
    """Return starts and ends (words,) of the words in the joined text, offsets (tokens, 2), and the tokens of words."""
    ends = np.fromiter(accumulate(len(word) + 1 for word in words), np.int64) - 1
    starts = ends - np.fromiter(map(len, words), np.int64)
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    return starts, ends, offsets, np.flatnonzero(offsets[:, 1] > offsets[:, 0])  # special tokens are empty


def _cuts(first: NDArray[np.int64], tokens: int, limit: int) -> list[int]:
    """Return the first word of each window of at most `limit` tokens, and the end. No window is empty.

    `first` (words,) has two or more entries, `tokens` is the length of the whole sequence.
    """
    ends = np.append(first[1:], tokens)
    cuts = [0]
    while cuts[-1] < len(first):
        fitting = int(np.searchsorted(ends, first[cuts[-1]] + limit, side="right"))
        cuts.append(max(fitting, cuts[-1] + 1))
    # Each window has fewer words than the sentence, so splitting terminates regardless of how windows are tokenized.
    return cuts if len(cuts) > 2 else [0, len(first) // 2, len(first)]


def _with_unknown(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], missing: NDArray[np.intp]
) -> tuple[list[str], Encoding]:
    """Replace the words at the indices `missing` by the unknown token. Returns the words and their encoding."""
    unknown = str(tokenizer.unk_token or _REPLACEMENT)
    replaced = list(words)
    for number in missing:
        replaced[number] = unknown
    encoding = tokenizer.backend_tokenizer.encode(" ".join(replaced))
    if (first_tokens(replaced, encoding) < 0).any():
        raise UserError(
            f"tokenizer {tokenizer.name_or_path} has no token for the word {shown(words[int(missing[0])])}, nor for "
            f"{shown(unknown)} as a replacement; remove the word, or use a tokenizer with an unknown token"
        )
    return replaced, encoding
