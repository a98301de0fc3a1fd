"""Tokenized examples, and batches of them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusion.data.alignment import windows_of
from fusion.data.batches import Batch
from fusion.data.cache import Arrays, read_arrays, read_or_build, write_arrays
from fusion.data.rows import Rows
from fusion.files import user_cache
from fusion.hub.tokenizer import check_length, empty_text, pair_separator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDING = -100  # of labels that are lists; ignored by `torch.nn.functional.cross_entropy`

_FORMAT = 2  # version of cached token ids
_CHUNK = 8192  # sequences tokenized at a time: their Python lists are many times larger than the arrays

log = logging.getLogger(__name__)


class EncodedRows:
    """A split of n examples as token ids, in flat arrays (those of `_tokenize`)."""

    def __init__(self, arrays: Arrays, rows: Rows, pad_token_id: int, pad_left: bool = False, key: str = "") -> None:
        self._input_ids = arrays["input_ids"]
        self._ends = arrays["ends"]
        self._starts = np.concatenate([np.zeros(1, np.int64), self._ends[:-1]])
        self._token_type_ids = arrays.get("token_type_ids")
        self._word_tokens = arrays.get("word_tokens")
        self._pad_token_id = pad_token_id
        self.pads_left = pad_left
        counts = _counts(rows.choices)
        if (windows := arrays.get("windows")) is not None and windows.max() > 1:
            counts = windows
        self.choice_counts = counts  # (n,) number of sequences of each example (choices or windows), `None` if one each
        self.word_counts = _counts(rows.words)  # (n,) number of words of each example, `None` for plain texts
        self._word_ends = np.cumsum([] if self.word_counts is None else self.word_counts)
        self._first = np.arange(len(rows)) if counts is None else np.cumsum(counts) - counts
        lengths = self._ends - self._starts
        # (n,) number of tokens of each example's longest sequence
        self.lengths: NDArray[np.int64] = lengths if counts is None else np.maximum.reduceat(lengths, self._first)
        self.labels = None if rows.labels is None else label_array(rows.labels)
        self.fingerprint = rows.fingerprint
        self.key = key  # hex digits that identify the token ids
        self.states: NDArray[np.floating] | None = None  # (all tokens, width) features of `fusion.model.feature_cache`
        self.task = 0  # index of the task in a multi-task model
        # Weights in the training loss, float64: (labels,) of each label and (n,) of each example; `None` if all are equal.
        self.class_weights: NDArray[np.float64] | None = None
        self.loss_weights: NDArray[np.float64] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the path of memory-mapped features, so that each DataLoader worker maps the file itself."""
        state = dict(self.__dict__)
        if isinstance(self.states, np.memmap):
            state["states"] = (str(self.states.filename), self.states.dtype.str, self.states.shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.states, tuple):
            filename, dtype, shape = self.states
            self.states = np.memmap(filename, dtype, mode="r", shape=shape)

    @property
    def tokens(self) -> int:
        """Total number of tokens, without padding."""
        return len(self._input_ids)

    def __len__(self) -> int:
        return len(self._first)

    def shape(self, indices: list[int]) -> tuple[int, int]:
        """Return the number of sequences and tokens of a batch of these examples."""
        counts = self.choice_counts
        return len(indices) if counts is None else int(counts[indices].sum()), int(self.lengths[indices].max())

    def batch(
        self, indices: list[int], weights: list[float] | None = None, global_indices: NDArray[np.intp] | None = None
    ) -> Batch:
        """Return a batch, padded to its longest sequence. See `Plan` for `weights` and `global_indices`."""
        tokens, real = self.places(indices)
        input_ids = np.full(real.shape, self._pad_token_id, np.int64)
        input_ids[real] = self._input_ids[tokens]
        types = features = None
        if self._token_type_ids is not None:
            types = np.zeros(real.shape, np.int64)
            types[real] = self._token_type_ids[tokens]
        if self.states is not None:
            features = np.zeros((*real.shape, self.states.shape[1]), self.states.dtype)
            features[real] = self.states[tokens]
        weight = np.ones(len(indices), np.float32) if weights is None else np.array(weights, np.float32)
        counted = np.array(indices)[weight > 0] if global_indices is None else global_indices
        global_weight = None if self.loss_weights is None else float(self.loss_weights[counted].sum())
        words = self._word_positions(indices, real.shape[1])
        labels = None if self.labels is None else self.labels[indices]
        if labels is not None and words is not None:
            labels = labels[:, : words.shape[1]]  # padded to the longest example of the batch, not of the split
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(real.astype(np.int64)),
            token_type_ids=_tensor(types),
            labels=_tensor(labels),
            choice_counts=_tensor(None if self.choice_counts is None else self.choice_counts[indices]),
            rows=torch.tensor(indices, dtype=torch.int64),
            weights=torch.from_numpy(weight),
            global_rows=len(counted),
            features=_feature_tensor(features),
            task=self.task,
            global_weight=global_weight,
            words=_tensor(words),
        )

    def _word_positions(self, indices: list[int], width: int) -> NDArray[np.int64] | None:
        """Return `Batch.words`, with sequences padded to `width`."""
        if self.word_counts is None or self._word_tokens is None:
            return None
        rows = np.asarray(indices, np.intp)
        counts = self.word_counts[rows]
        tokens = self._word_tokens[_ranges(self._word_ends[rows] - counts, counts)]
        sequences = np.searchsorted(self._ends, tokens, side="right")  # indices in the split
        column = tokens - self._starts[sequences]
        if self.pads_left:
            column += width - (self._ends[sequences] - self._starts[sequences])
        windows = np.ones_like(counts) if self.choice_counts is None else self.choice_counts[rows]
        # For each example, the offset between a sequence's index in the split and in the batch.
        shift = np.cumsum(windows) - windows - self._first[rows]
        places = np.full((len(rows), int(counts.max())), -1, np.int64)
        places[np.arange(places.shape[1]) < counts[:, None]] = (sequences + np.repeat(shift, counts)) * width + column
        return places

    def places(self, indices: list[int]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the tokens of the examples as (tokens,) indices in the flat arrays, and as (sequences, width) bool in
        their batch, false for padding.
        """
        if self.choice_counts is None:
            sequences = self._first[indices]
        else:
            sequences = _ranges(self._first[indices], self.choice_counts[indices])
        starts, lengths = self._starts[sequences], self._ends[sequences] - self._starts[sequences]
        width = int(lengths.max())
        shift = (width - lengths if self.pads_left else np.zeros_like(lengths))[:, None]
        positions = np.arange(width)[None, :] - shift
        real = (positions >= 0) & (positions < lengths[:, None])
        return (starts[:, None] + positions)[real], real


def _counts(lists: list[list[str]] | None) -> NDArray[np.int64] | None:
    return None if lists is None else np.array([*map(len, lists)], np.int64)


def _feature_tensor(features: NDArray[Any] | None) -> torch.Tensor | None:
    """Return the features as a tensor; bfloat16, which NumPy lacks, is stored as the 16-bit integers of its bits."""
    tensor = _tensor(features)
    return tensor.view(torch.bfloat16) if tensor is not None and tensor.dtype == torch.int16 else tensor


def _tensor(array: NDArray[Any] | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)


def _ranges(starts: NDArray[np.intp], counts: NDArray[np.int64]) -> NDArray[np.intp]:
    """Concatenate the ranges [start, start + count)."""
    shift = np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return shift + np.arange(len(shift))


def label_array(labels: Sequence[Any]) -> NDArray[Any]:
    """Convert labels to (n,) float32 for values, (n,) int64 for ids, (n, longest) int64 for lists, with `PADDING`."""
    if any(isinstance(label, list) for label in labels):
        longest = max(map(len, labels))
        return np.array([[*label, *[PADDING] * (longest - len(label))] for label in labels], np.int64)
    real = any(isinstance(label, float) for label in labels)
    return np.array(labels, np.float32 if real else np.int64)


def encode(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    cache_dir: Path | str | None = None,
    last_subwords: bool = False,
) -> EncodedRows:
    """Tokenize all examples; pairs are truncated with the strategy `longest_first`.

    An example with choices becomes one pair per choice: its text columns, joined by a space, and the choice. The texts
    of a pair are separated by a newline if the tokenizer does not separate them. A long example of words is split into
    windows, see `data.alignment`.

    Args:
        max_length: in tokens, including special tokens.
        cache_dir: folder of cached token ids. If `None`, it is in the user's cache.
        last_subwords: whether a word is represented by its last instead of its first subword.
    """
    check_length(tokenizer, max_length)
    folder = user_cache() / "tokens" if cache_dir is None else Path(cache_dir).expanduser()
    key = _cache_key(rows, tokenizer, max_length, last_subwords)
    path = folder / f"{key}.safetensors"

    def build() -> Arrays:
        log.info("tokenizing %d examples", len(rows))
        arrays = _tokenize(rows, tokenizer, max_length, last_subwords)
        write_arrays(path, arrays)
        return arrays

    arrays = read_or_build(path, lambda: read_arrays(path), build)
    windows = arrays.get("windows")
    if windows is not None and (longer := int((windows > 1).sum())):
        text = "%d of %d sentences have more than data.max_length=%d tokens: these are split into windows"
        log.info(text, longer, len(windows), max_length)
    return EncodedRows(arrays, rows, tokenizer.pad_token_id or 0, tokenizer.padding_side == "left", key)


def _cache_key(rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int, last_subwords: bool) -> str:
    """Return 40 hex digits that identify the texts, the tokenizer and the maximum length."""
    import tokenizers

    # The serialized tokenizer includes truncation and padding, which an earlier call may have set.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    parts = [
        _FORMAT,
        rows.fingerprint,
        hashlib.sha256(backend.to_str().encode()).hexdigest(),
        tokenizers.__version__,
        sorted(tokenizer.model_input_names),
        tokenizer.truncation_side,
        max_length,
        *([] if rows.words is None else ["words"]),
        *(["last subwords"] if rows.words is not None and last_subwords else []),
        *(["separator", separator] if (separator := pair_separator(tokenizer)) else []),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def _tokenize(rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int, last_subwords: bool) -> Arrays:
    """Tokenize all examples, on all cores unless TOKENIZERS_PARALLELISM=false.

    Returns `input_ids` (all tokens,), the concatenated sequences; `ends` (sequences,), the end of each sequence;
    `token_type_ids` (all tokens,) if the tokenizer has them; for examples of words `word_tokens` (all words,), each
    word's first (or last) token, and `windows` (n,), the number of sequences of each example.
    """
    texts: Sequence[str | tuple[str, ...]] = rows.texts
    if rows.choices is not None:
        texts = [
            (" ".join(parts), choice)
            for parts, choices in zip(rows.texts, rows.choices, strict=True)
            for choice in choices
        ]
    elif len(rows.texts[0]) == 1:
        texts = [text for (text,) in rows.texts]
    if separator := pair_separator(tokenizer):
        texts = [text if isinstance(text, str) else (text[0], separator + text[1]) for text in texts]
    # Calls the fast tokenizer directly: transformers would build lists of all its outputs, including offsets.
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(max_length, strategy="longest_first", direction=tokenizer.truncation_side)
    backend.encode_special_tokens = tokenizer.split_special_tokens
    with_types = "token_type_ids" in tokenizer.model_input_names
    empty = empty_text(tokenizer)
    ids, types = [], []
    lengths: list[int] = []
    word_tokens: list[NDArray[np.int64]] = []
    windows: list[int] = []
    tokens = 0
    for start in range(0, len(texts), _CHUNK):
        if rows.words is None:
            encoded = backend.encode_batch_fast(texts[start : start + _CHUNK])
        else:
            split = windows_of(rows.words[start : start + _CHUNK], tokenizer, max_length, last_subwords)
            windows += map(len, split)
            encoded = [window.encoding for sentence in split for window in sentence]
            for window in chain.from_iterable(split):
                word_tokens.append(window.tokens + tokens)
                tokens += len(window.encoding)
        sequences = [sequence.ids or empty for sequence in encoded]
        lengths += map(len, sequences)
        ids.append(_flat(sequences, np.int32))
        if with_types:
            types.append(_flat((sequence.type_ids or [0] for sequence in encoded), np.uint8))
    arrays = {"input_ids": np.concatenate(ids), "ends": np.cumsum(lengths, dtype=np.int64)}
    if types:
        arrays["token_type_ids"] = np.concatenate(types)
    if rows.words is not None:
        arrays |= {"word_tokens": np.concatenate(word_tokens), "windows": np.array(windows, np.int64)}
    return arrays


def _flat(sequences: Iterable[list[int]], dtype: Any) -> NDArray[Any]:
    return np.fromiter(chain.from_iterable(sequences), dtype)
