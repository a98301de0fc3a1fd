"""The cache of token ids: used when valid, rebuilt with one warning otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from fusion.data import encode as encode_module
from fusion.data.encode import EncodedRows, encode
from fusion.data.rows import Rows

ROWS = Rows([("abc",), ("de",), ("fghij",)], None, [0, 1, 0], 0, "these")
OTHER = Rows([("xyz",), ("uv",), ("rstqp",)], None, [0, 1, 0], 0, "others")  # of the same lengths


class Cache:
    """The cache file of one split, and how many times rows were tokenised."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder, self.tokenizer, self.built = folder, tokenizer, 0
        self.expected = self.read().batch([0, 1, 2])
        (self.path,) = folder.glob("*.safetensors")
        self.content = self.path.read_bytes()

    def read(self, rows: Rows = ROWS, max_length: int = 16) -> EncodedRows:
        return encode(rows, self.tokenizer, max_length, self.folder)

    def is_right(self) -> bool:
        batch = self.read().batch([0, 1, 2])
        assert batch.token_type_ids is not None and self.expected.token_type_ids is not None
        return torch.equal(batch.input_ids, self.expected.input_ids) and torch.equal(
            batch.token_type_ids, self.expected.token_type_ids
        )


@pytest.fixture
def cache(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Cache:
    made, original = Cache(tmp_path / "cache", tokenizer), encode_module._tokenize

    def counted(*values: Any) -> Any:
        made.built += 1
        return original(*values)

    monkeypatch.setattr(encode_module, "_tokenize", counted)
    return made


def test_examples_are_tokenized_once(cache: Cache) -> None:
    cache.tokenizer("x" * 40, truncation=True, max_length=8, padding="max_length")  # changes the tokenizer's state
    assert cache.is_right() and cache.built == 0


def test_another_content_length_or_tokenizer_is_another_file(cache: Cache) -> None:
    cache.read(OTHER)
    cache.read(max_length=15)
    cache.tokenizer.truncation_side = "left"
    cache.read()
    cache.tokenizer.add_tokens(["abc"])
    cache.read()
    assert cache.built == 4 and len(list(cache.folder.iterdir())) == 5


def test_a_flipped_bit_in_any_byte(cache: Cache) -> None:
    for place in range(0, len(cache.content), 3):
        flipped = bytearray(cache.content)
        flipped[place] ^= 1 << place % 8
        cache.path.write_bytes(flipped)
        assert cache.is_right(), place
    assert cache.built >= 0.95 * len(cache.content) / 3  # all but bits in the padding of the header


def of_other_rows(cache: Cache) -> None:
    cache.read(OTHER)
    (other,) = set(cache.folder.glob("*.safetensors")) - {cache.path}
    os.replace(other, cache.path)
    cache.built = 0


def without_metadata(cache: Cache) -> None:
    save_file(load_file(cache.path), cache.path)


def writes(content: bytes) -> Callable[[Cache], None]:
    def damage(cache: Cache) -> None:
        cache.path.write_bytes(content)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda cache: cache.path.write_bytes(cache.content[:-5]),
        lambda cache: cache.path.write_bytes(cache.content + b"more"),
        lambda cache: cache.path.chmod(0) if os.geteuid() else cache.path.write_bytes(b""),
        *map(writes, (b"", b"text", (2**63).to_bytes(8, "little"), (8).to_bytes(8, "little") + b"[[[[[[[[")),
        of_other_rows,
        without_metadata,
    ],
)
def test_a_damaged_file_is_rebuilt(
    cache: Cache, damage: Callable[[Cache], None], caplog: pytest.LogCaptureFixture
) -> None:
    damage(cache)
    assert cache.is_right() and cache.is_right() and cache.built == 1
    assert caplog.text.count("is damaged") == 1
    assert cache.path.read_bytes() == cache.content
    assert {file.suffix for file in cache.folder.iterdir()} == {".safetensors"}


@pytest.mark.parametrize("place", [os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_a_path_that_is_not_a_file_is_replaced(cache: Cache, place: Callable[[Path], None]) -> None:
    cache.path.unlink()
    place(cache.path)
    assert cache.is_right() and cache.is_right() and cache.built == 1


def test_a_folder_that_cannot_be_written(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    cache.path.unlink()
    cache.path.mkdir()
    assert cache.is_right() and "data.cache_dir=DIR" in caplog.text
    (cache.folder / "file").write_text("")
    cache.folder = cache.folder / "file" / "cache"
    assert cache.is_right() and cache.built == 2
