"""Words and their tokens: the same as transformers' own alignment, and long sentences in windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fusion.data.alignment import windows_of
from fusion.data.encode import EncodedRows, encode
from fusion.data.rows import Rows
from fusion.errors import UserError

TWO = {"[CLS]": 2, "[SEP]": 3}
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ann", "##a", "##s", "saw", "new", "york", "u", ".", "n", "é"]
SENTENCES = [
    ["Anna", "saw", "New", "York"],
    ["U.N.", "annas", "xyz", "\u200b", "é"],
    ["saw"],
    ["New York", "\u00a0", "saw\u200b", "[SEP]", "\U0001f600"],
]


def special() -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=list(TWO.items()))


def wrapped(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerBase:
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", model_input_names=names, model_max_length=512, **options
    )


def bert() -> PreTrainedTokenizerBase:
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = special()
    return wrapped(backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def bytes_of_gpt2() -> PreTrainedTokenizerBase:
    """Every byte is a token, a space included, as in GPT-2 and Llama 3; there is no unknown token."""
    alphabet = ["[PAD]", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({piece: number for number, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend)


def metaspace() -> PreTrainedTokenizerBase:
    """Spaces are part of the tokens, as in T5 and Gemma; "▁" may be a separate token."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁", "▁saw", "▁New", "▁Yor", "k", "A", "n", "a"]
    backend = Tokenizer(models.Unigram([(piece, -1.0 * (len(piece) < 3)) for piece in pieces], unk_id=1))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = special()
    return wrapped(backend, unk_token="[UNK]")


def tagged(sentences: Sequence[Sequence[str]]) -> Rows:
    words = [list(sentence) for sentence in sentences]
    return Rows([(" ".join(sentence),) for sentence in words], None, None, 0, "f", words=words)


def padded(labels: list[list[int]]) -> np.ndarray:
    longest = max(map(len, labels))
    return np.array([[*row, *[-100] * (longest - len(row))] for row in labels])


def scored_tokens(encoded: EncodedRows, indices: list[int]) -> list[list[int]]:
    """The token ids that the words of each row are scored by."""
    batch = encoded.batch(indices)
    assert batch.words is not None
    return [batch.input_ids.flatten()[row[row >= 0]].tolist() for row in batch.words]


def test_alignment_equals_that_of_transformers(tmp_path: Path) -> None:
    tokenizer = bert()
    encoded = encode(tagged(SENTENCES), tokenizer, 64, tmp_path)
    batch = encoded.batch([0, 1, 2, 3])
    assert batch.words is not None and batch.words.shape == (4, 5) and batch.words.dtype == torch.int64
    for number, sentence in enumerate(SENTENCES):
        # Words of which nothing is left have no token there, hence the unknown token in their place.
        given = [word if word.strip("\u200b\u00a0") else "[UNK]" for word in sentence]
        expected = tokenizer(given, is_split_into_words=True)
        real = batch.attention_mask[number].bool()
        assert batch.input_ids[number][real].tolist() == expected["input_ids"]
        word_ids = expected.word_ids()
        first = [word_ids.index(word) for word in range(len(sentence))]
        row = batch.words[number]
        assert (row[row >= 0] - number * batch.input_ids.shape[1]).tolist() == first


@pytest.mark.parametrize("make", [bert, bytes_of_gpt2, metaspace])
@pytest.mark.parametrize("length", [64, 8])
def test_the_last_token_of_a_word_is_before_the_first_of_the_next(
    make: Callable[[], PreTrainedTokenizerBase], length: int
) -> None:
    """For all words but the last of a window, with at most a space between their tokens."""
    tokenizer = make()
    spaces = {number for text, number in tokenizer.get_vocab().items() if text in ("\N{LOWER ONE EIGHTH BLOCK}", "Ġ")}
    for last, first in zip(
        windows_of(SENTENCES, tokenizer, length, last_subwords=True),
        windows_of(SENTENCES, tokenizer, length),
        strict=True,
    ):
        for window, other in zip(last, first, strict=True):
            ids = window.encoding.ids
            assert ids == other.encoding.ids and (window.tokens >= other.tokens).all()
            for end, start in zip(window.tokens, other.tokens[1:], strict=False):
                assert end < start and set(ids[end + 1 : start]) <= spaces
            assert all(token in spaces or token < 4 for token in ids[window.tokens[-1] + 1 :])


@pytest.mark.parametrize("make", [bert, bytes_of_gpt2, metaspace])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_word_has_a_token_of_its_text(
    make: Callable[[], PreTrainedTokenizerBase], side: str, tmp_path: Path
) -> None:
    """Whatever the tokenizer, the padding, the windows and the rows of the batch."""
    tokenizer = make()
    tokenizer.padding_side = side
    whole = encode(tagged(SENTENCES), tokenizer, 64, tmp_path)
    windows = encode(tagged(SENTENCES), tokenizer, 8, tmp_path)
    assert windows.choice_counts is not None and windows.choice_counts.max() > 1
    assert windows.lengths.max() <= 8
    for encoded in (whole, windows):
        tokens = scored_tokens(encoded, [3, 0, 1])
        assert [len(row) for row in tokens] == [5, 4, 5]
        for row, sentence in zip(tokens, (SENTENCES[number] for number in (3, 0, 1)), strict=True):
            for token, word in zip(row, sentence, strict=True):
                piece = str(tokenizer.convert_ids_to_tokens(token))
                text = piece.replace("##", "").replace("▁", "").replace("Ġ", "")
                if piece not in ("[UNK]", "▁", "Ġ") and text.isascii():
                    assert word.lower().startswith(text.lower()), (piece, word)


def test_windows_hold_all_words_in_order() -> None:
    tokenizer = bert()
    words = ["saw", "anna", "u.n.", "new"] * 150
    (windows,) = windows_of([words], tokenizer, 20)
    assert sum(len(window.tokens) for window in windows) == 600
    assert max(len(window.encoding) for window in windows) <= 20
    first = [int(window.encoding.ids[token]) for window in windows for token in window.tokens]
    assert first == [PIECES.index(piece) for piece in ("saw", "ann", "u", "new")] * 150
    # As many words as fit: with the first word of the next one, a window would be too long.
    sizes = [1, 2, 4, 1] * 150
    start = 0
    for window in windows[:-1]:
        end = start + len(window.tokens)
        assert sum(sizes[start:end]) == len(window.encoding) - 2 <= 18 < sum(sizes[start : end + 1])
        start = end


def test_a_word_longer_than_a_sequence_is_truncated(tmp_path: Path) -> None:
    tokenizer = bert()
    encoded = encode(tagged([["saw", "u" + "." * 30, "new"]]), tokenizer, 8, tmp_path)
    assert encoded.choice_counts is not None and encoded.choice_counts.tolist() == [3]
    assert scored_tokens(encoded, [0]) == [[PIECES.index(piece) for piece in ("saw", "u", "new")]]
    assert encoded.batch([0]).input_ids.shape == (3, 8)


def test_labels_are_cut_to_the_words_of_the_batch(tmp_path: Path) -> None:
    encoded = encode(tagged(SENTENCES), bert(), 64, tmp_path)
    encoded.labels = padded([[1, 0, 2, 3], [1, 1, 0, 0, 1], [2], [0, 0, 0, 0, 1]])
    batch = encoded.batch([2, 0])
    assert batch.labels is not None and batch.words is not None
    assert batch.labels.tolist() == [[2, -100, -100, -100], [1, 0, 2, 3]]
    assert ((batch.words >= 0) == (batch.labels >= 0)).all()


def test_a_sentence_without_words(tmp_path: Path) -> None:
    encoded = encode(tagged([[], ["saw"]]), bert(), 16, tmp_path)
    batch = encoded.batch([0, 1])
    assert batch.words is not None and batch.words.tolist() == [[-1], [4]]
    only = encoded.batch([0])
    assert only.words is not None and only.words.shape == (1, 0) and only.input_ids.tolist() == [[2, 3]]


def test_a_sentence_without_tokens_is_refused() -> None:
    tokenizer = bert()
    tokenizer.unk_token = None
    with pytest.raises(UserError, match=r"has no token for the word '\\u200b' .*; remove the word"):
        windows_of([["saw", "\u200b"]], tokenizer, 16)


def test_the_cache_distinguishes_words_from_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = bert()
    rows = tagged([["new york", "saw"], ["u"]])
    plain = encode(replace(rows, words=None), tokenizer, 64, tmp_path)
    encoded = encode(rows, tokenizer, 64, tmp_path)
    assert encoded.key != plain.key and plain.batch([0]).words is None
    monkeypatch.setattr("fusion.data.encode._tokenize", None)
    again = encode(rows, tokenizer, 64, tmp_path)
    one, other = encoded.batch([0, 1]).words, again.batch([0, 1]).words
    assert one is not None and other is not None and torch.equal(one, other)
