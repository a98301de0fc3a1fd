"""Token ids, the batches made of them, and their cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fusion.data import encode as encode_module
from fusion.data.encode import encode
from fusion.data.rows import Rows
from fusion.errors import UserError
from fusion.hub.tokenizer import load_tokenizer

PAD, CLS, SEP = 7, 5, 6


def make_rows(texts, labels=None, choices=None, fingerprint="f"):
    return Rows([(text,) if isinstance(text, str) else text for text in texts], choices, labels, 0, fingerprint)


def ids(text: str) -> list[int]:
    return [ord(character) - 32 + 10 for character in text]


def test_a_batch_is_padded_to_its_longest(tokenizer, tmp_path):
    encoded = encode(make_rows(["abc", "a", "abcdefgh"], [1, 0, 1]), tokenizer, 16, tmp_path)
    assert encoded.lengths.tolist() == [5, 3, 10]
    batch = encoded.batch([1, 0], [1.0, 0.0])
    assert batch.input_ids.tolist() == [[CLS, *ids("a"), SEP, PAD, PAD], [CLS, *ids("abc"), SEP]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.token_type_ids is not None and batch.token_type_ids.tolist() == [[0] * 5, [0] * 5]
    assert batch.labels is not None and batch.labels.tolist() == [0, 1]
    assert batch.rows.tolist() == [1, 0]
    assert batch.weights.tolist() == [1.0, 0.0]
    assert batch.global_rows == 1
    assert batch.choice_counts is None
    assert encoded.batch([0], global_indices=np.arange(3)).global_rows == 3


def test_types_of_a_batch(tokenizer, tokenizer_without_types, tmp_path):
    batch = encode(make_rows(["abc"], [1]), tokenizer, 16, tmp_path).batch([0])
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    assert batch.labels is not None and batch.labels.dtype == batch.rows.dtype == torch.int64
    assert batch.weights.dtype == torch.float32
    values = encode(make_rows(["abc"], [1.5]), tokenizer, 16, tmp_path).batch([0])
    assert values.labels is not None and values.labels.dtype == torch.float32
    bare = encode(make_rows(["abc"]), tokenizer_without_types, 16, tmp_path).batch([0])
    assert bare.labels is None and bare.token_type_ids is None


def test_a_pair_is_truncated_at_its_longer_part(tokenizer, tmp_path):
    encoded = encode(make_rows([("abcdefgh", "xy")], [0]), tokenizer, 9, tmp_path)
    batch = encoded.batch([0])
    assert batch.input_ids.tolist() == [[CLS, *ids("abcd"), SEP, *ids("xy"), SEP]]
    assert batch.token_type_ids is not None and batch.token_type_ids.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 1]]


def test_choices_are_consecutive(tokenizer, tmp_path):
    rows = make_rows([("q",), ("a", "b")], [1, 2], choices=[["xx", "y"], ["1", "2", "333"]])
    encoded = encode(rows, tokenizer, 16, tmp_path)
    assert len(encoded) == 2
    assert encoded.lengths.tolist() == [6, 9]
    batch = encoded.batch([1, 0])
    assert batch.choice_counts is not None and batch.choice_counts.tolist() == [3, 2]
    assert batch.labels is not None and batch.labels.tolist() == [2, 1]
    real = [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    assert real == [
        [CLS, *ids(context), SEP, *ids(choice), SEP]
        for context, choice in [("a b", "1"), ("a b", "2"), ("a b", "333"), ("q", "xx"), ("q", "y")]
    ]


def test_left_padding_where_the_tokenizer_pads_left(tokenizer, tmp_path):
    tokenizer.padding_side = "left"
    batch = encode(make_rows(["abc", "a"], [1, 0]), tokenizer, 16, tmp_path).batch([0, 1])
    assert batch.input_ids.tolist() == [[CLS, *ids("abc"), SEP], [PAD, PAD, CLS, *ids("a"), SEP]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]


def test_encoding_equals_that_of_the_tokenizer(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "_CHUNK", 7)
    random = np.random.RandomState(0)
    pairs = [("a" * random.randint(0, 40), "b" * random.randint(0, 40)) for _ in range(50)]
    encoded = encode(make_rows(pairs, [0] * 50), tokenizer, 32, tmp_path)
    batch = encoded.batch(list(range(50)))
    plain = tokenizer(
        [a for a, _ in pairs], [b for _, b in pairs], truncation=True, max_length=32, padding=True, return_tensors="pt"
    )
    assert torch.equal(batch.input_ids, plain["input_ids"])
    assert torch.equal(batch.attention_mask, plain["attention_mask"])
    assert batch.token_type_ids is not None and torch.equal(batch.token_type_ids, plain["token_type_ids"])


def test_a_length_above_the_limit_of_the_tokenizer_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"data\.max_length=65: .* at most 64 tokens\nSet data.max_length=64 or less"):
        encode(make_rows(["a"]), tokenizer, 65, tmp_path)


# --- the tokenizer ------------------------------------------------------------------------------------


def test_a_missing_tokenizer(monkeypatch, tmp_path):
    monkeypatch.setattr("fusion.hub.access.hub_is_reachable", lambda: False)
    with pytest.raises(UserError, match=r"Hub cannot be reached.*\nUse a folder.*backbone\.name_or_path"):
        load_tokenizer("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"tokenizer .*empty"):
        load_tokenizer(str(tmp_path / "empty"))


# --- truncation and labels ----------------------------------------------------------------------------


def test_truncation_on_either_side_is_that_of_the_tokenizer(tokenizer, tmp_path):
    for side in ("right", "left"):
        tokenizer.truncation_side = side
        pairs = [("abcdefgh", "xyzuvw"), ("a", "bcdefghijklmnop")]
        batch = encode(make_rows(pairs), tokenizer, 9, tmp_path / "cache").batch([0, 1])
        plain = tokenizer(
            [a for a, _ in pairs], [b for _, b in pairs], truncation=True, max_length=9, return_tensors="pt"
        )
        assert torch.equal(batch.input_ids, plain["input_ids"])


def test_examples_without_labels_are_encoded(tokenizer, tmp_path):
    encoded = encode(Rows([("ab",)], None, None, 0, "these"), tokenizer, 16, tmp_path)
    assert encoded.labels is None and encoded.batch([0]).labels is None


def bare_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer without special tokens in a text or a pair, as those of GPT-2 and Qwen."""
    vocabulary = {token: number for number, token in enumerate(["<end>", "\n", "a", "b"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", model_max_length=64)


def test_texts_of_a_pair_without_special_tokens_are_separated_by_a_newline(tmp_path: Path) -> None:
    tokenizer = bare_tokenizer()
    encoded = encode(make_rows([("aa", "b"), ("a", "bb")], [0, 1]), tokenizer, 16, tmp_path)
    assert encoded.batch([0, 1]).input_ids.tolist() == [[2, 2, 1, 3], [2, 1, 3, 3]]
    choices = Rows([("a",)], [["b", "bb"]], [0], 0, "g")
    assert encode(choices, tokenizer, 16, tmp_path).batch([0]).input_ids.tolist() == [[2, 1, 3, 0], [2, 1, 3, 3]]


def test_a_text_without_tokens_is_the_end_token(tmp_path: Path) -> None:
    encoded = encode(make_rows(["", "ab"], [0, 1]), bare_tokenizer(), 16, tmp_path)
    batch = encoded.batch([0, 1])
    assert batch.input_ids.tolist() == [[0, 0], [2, 3]] and batch.attention_mask.tolist() == [[1, 0], [1, 1]]
