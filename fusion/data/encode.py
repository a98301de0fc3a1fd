"""Rows of text as token ids, made once and kept on disk for the next run.

A cache file is a safetensors file of flat arrays, named by the hash of all that decides its content. It says this
name itself and is checked when it is read: whatever else lies in its place is made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fusion.data.alignment import windows_of
from fusion.data.batches import Batch
from fusion.data.cache import cache_lock, keep, user_cache
from fusion.data.rows import Rows
from fusion.errors import first_line
from fusion.files import remove_partial
from fusion.hub.tokenizer import check_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDING = -100  # of labels that are lists; what `torch.nn.functional.cross_entropy` ignores

_FORMAT = 2
_CHUNK = 8192  # sequences tokenised at a time: their Python lists are many times the size of the arrays
_SAID = "key and crc32"  # one entry: several would come in any order, and a file of other bytes each time
_TYPES = {
    "input_ids": np.int32,
    "ends": np.int64,
    "token_type_ids": np.uint8,
    "word_tokens": np.int64,
    "windows": np.int64,
}

log = logging.getLogger(__name__)


class EncodedRows:
    """A split as token ids, in flat arrays.

    Attributes:
        lengths: (rows,) tokens of each row, of its longest choice where it has choices.
        labels: (rows,) int64 or float32, or (rows, longest) int64 where a label is a list, shorter ones padded with
            `PADDING`; None without labels.
        choice_counts: (rows,) the sequences of each row, its choices or windows; None: one each.
        fingerprint: that of the rows.
        key: hex digits that stand for the token ids.
        states: (all tokens, width), the cached frozen features of each token, see `fusion.model.feature_cache`; None: there are none.
        task: whose rows they are, where several tasks are trained or scored by one model.
        class_weights: (labels,) float64, the weight of each label in the training loss; None: all count alike.
        loss_weights: (rows,) float64, what each row counts for in the mean of the training loss; None: all count alike.
    """

    def __init__(
        self,
        input_ids: NDArray[np.int32],
        ends: NDArray[np.int64],
        token_type_ids: NDArray[np.uint8] | None,
        rows: Rows,
        pad_token_id: int,
        pad_left: bool = False,
        key: str = "",
        word_tokens: NDArray[np.int64] | None = None,
        windows: NDArray[np.int64] | None = None,
    ) -> None:
        """
        Args:
            input_ids: (all tokens,) the sequences one after another.
            ends: (sequences,) where each sequence ends.
            token_type_ids: (all tokens,) or None.
            word_tokens: (all words,) which of all tokens each word of `rows.words` begins with.
            windows: (rows,) the sequences of each sentence.
        """
        self._input_ids = input_ids
        self._ends = ends
        self._starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        self._token_type_ids = token_type_ids
        self._pad_token_id = pad_token_id
        self._pad_left = pad_left
        counts = (
            None if rows.choices is None else np.array([len(choices) for choices in rows.choices], np.int64)
        )
        if windows is not None and windows.max() > 1:
            counts = windows
        self._word_tokens = word_tokens
        self.word_counts: NDArray[np.int64] | None = None  # (rows,)
        if rows.words is not None:
            self.word_counts = np.array([len(words) for words in rows.words], np.int64)
            self._word_ends = np.cumsum(self.word_counts)
        self.choice_counts: NDArray[np.int64] | None = counts
        self._first = np.arange(len(rows)) if counts is None else np.cumsum(counts) - counts
        sequence_lengths = self._ends - self._starts
        self.lengths: NDArray[np.int64] = (
            sequence_lengths if counts is None else np.maximum.reduceat(sequence_lengths, self._first)
        )
        self.labels: NDArray[Any] | None = None
        if rows.labels is not None:
            self.labels = label_array(rows.labels)
        self.fingerprint = rows.fingerprint
        self.key = key
        self.states: NDArray[np.floating] | None = None
        self.task = 0
        self.class_weights: NDArray[np.float64] | None = None
        self.loss_weights: NDArray[np.float64] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a loader's worker: states on disk are mapped there again, not copied."""
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
    def pads_left(self) -> bool:
        return self._pad_left

    @property
    def tokens(self) -> int:
        """Tokens of all rows, padding left out."""
        return len(self._input_ids)

    def __len__(self) -> int:
        return len(self._first)

    def batch(
        self,
        indices: list[int],
        weights: list[float] | None = None,
        global_rows: int | None = None,
        global_indices: NDArray[np.intp] | None = None,
    ) -> Batch:
        """Rows padded to the longest sequence among them.

        Args:
            weights: 0.0 for a filler row, 1.0 (all, by default) for a row that counts.
            global_rows: rows that count over all devices; those of this batch by default.
            global_indices: which rows those are; likewise.
        """
        counts = None if self.choice_counts is None else self.choice_counts[indices]
        tokens, real = self.places(indices)
        input_ids = np.full(real.shape, self._pad_token_id, np.int64)
        input_ids[real] = self._input_ids[tokens]
        types = None
        if self._token_type_ids is not None:
            types = np.zeros(real.shape, np.int64)
            types[real] = self._token_type_ids[tokens]
        features = None
        if self.states is not None:
            features = np.zeros((*real.shape, self.states.shape[1]), np.float32)
            features[real] = self.states[tokens]
        weight = np.ones(len(indices), np.float32) if weights is None else np.array(weights, np.float32)
        global_weight = None
        if self.loss_weights is not None:
            everyone = np.array(indices)[weight > 0] if global_indices is None else global_indices
            global_weight = float(self.loss_weights[everyone].sum())
        words = self._places_of_words(indices, real.shape[1])
        labels = None if self.labels is None else self.labels[indices]
        if labels is not None and words is not None:
            labels = labels[:, : words.shape[1]]  # padded to the longest of the batch, not of the split
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(real.astype(np.int64)),
            token_type_ids=None if types is None else torch.from_numpy(types),
            labels=None if labels is None else torch.from_numpy(labels),
            choice_counts=None if counts is None else torch.from_numpy(counts),
            rows=torch.tensor(indices, dtype=torch.int64),
            weights=torch.from_numpy(weight),
            global_rows=int((weight > 0).sum()) if global_rows is None else global_rows,
            features=None if features is None else torch.from_numpy(features),
            task=self.task,
            global_weight=global_weight,
            words=None if words is None else torch.from_numpy(words),
        )

    def _places_of_words(self, indices: list[int], width: int) -> NDArray[np.int64] | None:
        """`Batch.words` of these rows, whose sequences are padded to `width`."""
        if self.word_counts is None or self._word_tokens is None:
            return None
        rows = np.asarray(indices, np.intp)
        counts = self.word_counts[rows]
        tokens = self._word_tokens[_ranges(self._word_ends[rows] - counts, counts)]
        sequences = np.searchsorted(self._ends, tokens, side="right")  # of the split
        column = tokens - self._starts[sequences]
        if self._pad_left:
            column += width - (self._ends[sequences] - self._starts[sequences])
        windows = np.ones_like(counts) if self.choice_counts is None else self.choice_counts[rows]
        # By how much a sequence's number in the batch differs from that in the split, for each row.
        shift = np.cumsum(windows) - windows - self._first[rows]
        places = np.full((len(rows), int(counts.max())), -1, np.int64)
        places[np.arange(places.shape[1]) < counts[:, None]] = (
            sequences + np.repeat(shift, counts)
        ) * width + column
        return places

    def places(self, indices: list[int]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Where the tokens of these rows lie in the flat arrays: (real tokens,), and in their batch:
        (sequences, width) bool, true for a real token."""
        if self.choice_counts is None:
            sequences = self._first[indices]
        else:
            sequences = _ranges(self._first[indices], self.choice_counts[indices])
        starts, lengths = self._starts[sequences], self._ends[sequences] - self._starts[sequences]
        width = int(lengths.max())
        shift = (width - lengths if self._pad_left else np.zeros_like(lengths))[:, None]
        positions = np.arange(width)[None, :] - shift
        real = (positions >= 0) & (positions < lengths[:, None])
        return (starts[:, None] + positions)[real], real


def _ranges(starts: NDArray[np.intp], counts: NDArray[np.int64]) -> NDArray[np.intp]:
    """The numbers start, start + 1, …, `counts` of them for each start, one after another."""
    shift = np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return shift + np.arange(len(shift))


def label_array(labels: Sequence[Any]) -> NDArray[Any]:
    """(rows,) float32 of values, (rows,) int64 of ids, (rows, longest) int64 of lists of them."""
    if any(isinstance(label, list) for label in labels):
        longest = max(map(len, labels))
        return np.array([[*label, *[PADDING] * (longest - len(label))] for label in labels], np.int64)
    real = any(isinstance(label, float) for label in labels)
    return np.array(labels, np.float32 if real else np.int64)


def encode(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int, cache_dir: Path | str | None = None
) -> EncodedRows:
    """Token ids of all rows; a pair too long loses tokens of its longer part.

    A row with choices becomes one pair for each: its text columns, joined by a space, and the choice. A row of words
    that is too long becomes several sequences, see `data.alignment`.

    Args:
        max_length: tokens of a sequence, special tokens included.
        cache_dir: where token ids are kept; None: the user's cache.

    Raises:
        UserError: max_length is more than the tokenizer's own, or leaves no room for text.
    """
    check_length(tokenizer, max_length)
    folder = user_cache() / "tokens" if cache_dir is None else Path(cache_dir).expanduser()
    key = _key(rows, tokenizer, max_length)
    path = folder / f"{key}.safetensors"
    arrays = _read(path, rows, tokenizer, max_length)
    if arrays is None:
        with cache_lock(path) as alone:
            if alone:
                remove_partial(path)
            # Again: another process may have made it meanwhile. What is wrong with it has been said by then.
            arrays = _read(path, rows, tokenizer, max_length, quiet=True)
            if arrays is None:
                log.info("tokenising %d rows, once", len(rows))
                arrays = _tokenize(rows, tokenizer, max_length)
                _write(path, arrays)
    windows = arrays.get("windows")
    if windows is not None and (several := int((windows > 1).sum())):
        log.info(
            "%d of %d sentences have more than data.max_length=%d tokens: split into windows, every word is tagged",
            several,
            len(windows),
            max_length,
        )
    pad = tokenizer.pad_token_id
    return EncodedRows(
        input_ids=arrays["input_ids"],
        ends=arrays["ends"],
        token_type_ids=arrays.get("token_type_ids"),
        rows=rows,
        pad_token_id=0 if pad is None else pad,
        pad_left=tokenizer.padding_side == "left",
        key=key,
        word_tokens=arrays.get("word_tokens"),
        windows=windows,
    )


def _tokenize(rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, NDArray[Any]]:
    """The cache file's arrays. All cores tokenise, unless TOKENIZERS_PARALLELISM=false."""
    texts: Sequence[str | tuple[str, ...]] = rows.texts
    if rows.choices is not None:
        texts = [
            (" ".join(parts), choice)
            for parts, choices in zip(rows.texts, rows.choices, strict=True)
            for choice in choices
        ]
    elif len(rows.texts[0]) == 1:
        texts = [text for (text,) in rows.texts]
    # Straight from the tokenizer's core: transformers would make lists of all that it can give, offsets included.
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(max_length, strategy="longest_first", direction=tokenizer.truncation_side)
    backend.encode_special_tokens = tokenizer.split_special_tokens
    with_types = _has_types(tokenizer)
    ids, types, lengths = [], [], []
    word_tokens: list[NDArray[np.int64]] = []
    windows: list[int] = []
    tokens = 0
    for start in range(0, len(texts), _CHUNK):
        if rows.words is None:
            encoded = backend.encode_batch_fast(texts[start : start + _CHUNK])
        else:
            split = windows_of(rows.words[start : start + _CHUNK], tokenizer, max_length)
            windows += map(len, split)
            encoded = [window.encoding for sentence in split for window in sentence]
            for window in chain.from_iterable(split):
                word_tokens.append(window.first + tokens)
                tokens += len(window.encoding)
        lengths += [len(sequence) for sequence in encoded]
        ids.append(_flat((sequence.ids for sequence in encoded), np.int32))
        if with_types:
            types.append(_flat((sequence.type_ids for sequence in encoded), np.uint8))
    arrays = {"input_ids": np.concatenate(ids), "ends": np.cumsum(lengths, dtype=np.int64)}
    if types:
        arrays["token_type_ids"] = np.concatenate(types)
    if rows.words is not None:
        arrays |= {"word_tokens": np.concatenate(word_tokens), "windows": np.array(windows, np.int64)}
    return arrays


def _flat(sequences: Iterable[list[int]], dtype: Any) -> NDArray[Any]:
    return np.fromiter(chain.from_iterable(sequences), dtype)


def _key(rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """40 hex digits that stand for the texts, the tokenizer and the length."""
    import tokenizers

    # What an earlier call left set (truncation, padding) is in the tokenizer's own description, and is not its own.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    described = hashlib.sha256(backend.to_str().encode()).hexdigest()
    parts = [
        _FORMAT,
        rows.fingerprint,
        described,
        tokenizers.__version__,
        sorted(tokenizer.model_input_names),
        tokenizer.truncation_side,
        max_length,
        *([] if rows.words is None else ["words"]),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


# --- the cache file ---------------------------------------------------------------------------------


def _checksum(arrays: dict[str, NDArray[Any]], key: str) -> str:
    value = zlib.crc32(key.encode())
    for name in sorted(arrays):
        value = zlib.crc32(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode(), value)
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8).data, value)
    return f"{value:08x}"


def _read(
    path: Path, rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int, quiet: bool = False
) -> dict[str, NDArray[Any]] | None:
    """The arrays in a cache file, None where it is missing or not the file of these rows and this tokenizer."""
    from safetensors import safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = (file.metadata() or {}).get(_SAID, "")
        fault = _fault(arrays, said, path.stem, rows, tokenizer, max_length)
    except Exception as error:  # a type that numpy lacks, bytes that are no header: each has its own
        fault = first_line(error)
    if fault is None:
        return arrays
    if not quiet:
        log.warning("token cache %s is damaged (%s): made anew", path, fault)
    return None


def _fault(
    arrays: dict[str, NDArray[Any]],
    said: str,
    key: str,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> str | None:
    """Why these cannot be the token ids of these rows, None where they can."""
    if not said.startswith(key):
        return "it is of other rows or another tokenizer"
    if said != f"{key} {_checksum(arrays, key)}":
        return "checksum"
    expected = {"input_ids", "ends"} | ({"token_type_ids"} if _has_types(tokenizer) else set())
    if rows.words is not None:
        expected |= {"word_tokens", "windows"}
    if arrays.keys() != expected:
        return f"it holds {', '.join(sorted(arrays))}"
    if any(array.ndim != 1 or array.dtype != _TYPES[name] for name, array in arrays.items()):
        return "an array of another type"
    ids, ends = arrays["input_ids"], arrays["ends"]
    sequences = len(rows) if rows.choices is None else sum(map(len, rows.choices))
    if rows.words is not None:
        windows, word_tokens = arrays["windows"], arrays["word_tokens"]
        if len(windows) != len(rows) or windows.min() < 1 or len(word_tokens) != sum(map(len, rows.words)):
            return "other sentences"
        if len(word_tokens) and (word_tokens.min() < 0 or word_tokens.max() >= len(ids)):
            return "words at other tokens"
        sequences = int(windows.sum())
    lengths = np.diff(ends, prepend=0)
    if len(ends) != sequences or ends[-1] != len(ids) or lengths.min() < 0 or lengths.max() > max_length:
        return "sequences of other lengths"
    if "token_type_ids" in arrays and len(arrays["token_type_ids"]) != len(ids):
        return "token types of another length"
    # The whole vocabulary, whose ids may have gaps, is only asked for where they are needed.
    within = not len(ids) or (ids.min() >= 0 and ids.max() < len(tokenizer))
    if not within and (ids.min() < 0 or ids.max() > max(tokenizer.get_vocab().values())):
        return "a token that the vocabulary lacks"
    return None


def _has_types(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "token_type_ids" in tokenizer.model_input_names


def _write(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    from safetensors.numpy import save

    key = path.stem
    keep(
        path,
        save(arrays, metadata={_SAID: f"{key} {_checksum(arrays, key)}"}),
        "give another folder with data.cache_dir=DIR",
    )
