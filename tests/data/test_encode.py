"""Token ids, the batches made of them, and their cache."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fusion.data import encode as encode_module
from fusion.data.cache import cache_lock, keep
from fusion.data.encode import EncodedRows, encode
from fusion.data.rows import Rows, rows_of_records
from fusion.errors import UserError
from fusion.hub.tokenizer import load_tokenizer

PAD, CLS, SEP = 7, 5, 6


def make_rows(texts, labels=None, choices=None, fingerprint="f"):
    return Rows(
        [(text,) if isinstance(text, str) else text for text in texts], choices, labels, 0, fingerprint
    )


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
    assert encoded.batch([0], global_rows=9).global_rows == 9


def test_types_of_a_batch(tokenizer, tokenizer_without_types, tmp_path):
    batch = encode(make_rows(["abc"], [1]), tokenizer, 16, tmp_path).batch([0])
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    assert batch.labels is not None and batch.labels.dtype == batch.rows.dtype == torch.int64
    assert batch.weights.dtype == torch.float32
    values = encode(make_rows(["abc"], [1.5]), tokenizer, 16, tmp_path).batch([0])
    assert values.labels is not None and values.labels.dtype == torch.float32
    bare = encode(make_rows(["abc"]), tokenizer_without_types, 16, tmp_path).batch([0])
    assert bare.labels is None and bare.token_type_ids is None


def test_a_pair_too_long_loses_of_its_longer_part(tokenizer, tmp_path):
    encoded = encode(make_rows([("abcdefgh", "xy")], [0]), tokenizer, 9, tmp_path)
    batch = encoded.batch([0])
    assert batch.input_ids.tolist() == [[CLS, *ids("abcd"), SEP, *ids("xy"), SEP]]
    assert batch.token_type_ids is not None and batch.token_type_ids.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 1]]


def test_choices_stand_one_after_another(tokenizer, tmp_path):
    rows = make_rows([("q",), ("a", "b")], [1, 2], choices=[["xx", "y"], ["1", "2", "333"]])
    encoded = encode(rows, tokenizer, 16, tmp_path)
    assert len(encoded) == 2
    assert encoded.lengths.tolist() == [6, 9]
    batch = encoded.batch([1, 0])
    assert batch.choice_counts is not None and batch.choice_counts.tolist() == [3, 2]
    assert batch.labels is not None and batch.labels.tolist() == [2, 1]
    real = [
        row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    assert real == [
        [CLS, *ids(context), SEP, *ids(choice), SEP]
        for context, choice in [("a b", "1"), ("a b", "2"), ("a b", "333"), ("q", "xx"), ("q", "y")]
    ]


def test_left_padding_where_the_tokenizer_pads_left(tokenizer, tmp_path):
    tokenizer.padding_side = "left"
    batch = encode(make_rows(["abc", "a"], [1, 0]), tokenizer, 16, tmp_path).batch([0, 1])
    assert batch.input_ids.tolist() == [[CLS, *ids("abc"), SEP], [PAD, PAD, CLS, *ids("a"), SEP]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]


def test_many_rows_are_those_that_the_tokenizer_gives(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "_CHUNK", 7)
    random = np.random.RandomState(0)
    pairs = [("a" * random.randint(0, 40), "b" * random.randint(0, 40)) for _ in range(50)]
    encoded = encode(make_rows(pairs, [0] * 50), tokenizer, 32, tmp_path)
    batch = encoded.batch(list(range(50)))
    plain = tokenizer(
        [a for a, _ in pairs],
        [b for _, b in pairs],
        truncation=True,
        max_length=32,
        padding=True,
        return_tensors="pt",
    )
    assert torch.equal(batch.input_ids, plain["input_ids"])
    assert torch.equal(batch.attention_mask, plain["attention_mask"])
    assert batch.token_type_ids is not None and torch.equal(batch.token_type_ids, plain["token_type_ids"])


def test_a_length_beyond_the_tokenizer_is_refused(tokenizer, tmp_path):
    with pytest.raises(
        UserError, match=r"data\.max_length=65: .* at most 64 tokens\nExpected data\.max_length=64"
    ):
        encode(make_rows(["a"]), tokenizer, 65, tmp_path)


# --- the tokenizer ------------------------------------------------------------------------------------


def test_a_tokenizer_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr("fusion.hub.access.hub_is_reachable", lambda: False)
    with pytest.raises(UserError, match=r"hub cannot be reached.*\nGive a folder.*backbone\.name_or_path"):
        load_tokenizer("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"tokenizer .*empty"):
        load_tokenizer(str(tmp_path / "empty"))


# --- the cache ----------------------------------------------------------------------------------------


@pytest.fixture
def tokenised(monkeypatch) -> list[int]:
    """How many rows were tokenised, call by call."""
    calls: list[int] = []
    original = encode_module._tokenize

    def counted(rows, tokenizer, max_length):
        calls.append(len(rows))
        return original(rows, tokenizer, max_length)

    monkeypatch.setattr(encode_module, "_tokenize", counted)
    return calls


def same(one: EncodedRows, other: EncodedRows) -> bool:
    batches = [encoded.batch(list(range(len(encoded)))) for encoded in (one, other)]
    return torch.equal(batches[0].input_ids, batches[1].input_ids)


def test_rows_are_tokenised_once(tokenizer, tmp_path, tokenised):
    rows = make_rows(["abc", "d"], [0, 1])
    first = encode(rows, tokenizer, 16, tmp_path)
    tokenizer(
        "x" * 40, truncation=True, max_length=8, padding="max_length"
    )  # leaves its mark on the tokenizer
    second = encode(rows, tokenizer, 16, tmp_path)
    assert tokenised == [2]
    assert same(first, second)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_another_content_length_or_tokenizer_is_another_file(
    tokenizer, tokenizer_without_types, tmp_path, tokenised
):
    folder = tmp_path / "cache"
    rows = make_rows(["abc"])
    encode(rows, tokenizer, 16, folder)
    encode(rows, tokenizer, 17, folder)
    encode(make_rows(["abd"], fingerprint="g"), tokenizer, 16, folder)
    encode(rows, tokenizer_without_types, 16, folder)
    tokenizer.truncation_side = "left"
    encode(rows, tokenizer, 16, folder)
    tokenizer.add_tokens(["abc"])
    encode(rows, tokenizer, 16, folder)
    assert len(tokenised) == len(list(folder.iterdir())) == 6


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text"])
def test_a_damaged_file_is_made_anew(tokenizer, tmp_path, tokenised, damage, caplog):
    rows = make_rows(["abc", "defg"] * 100)
    first = encode(rows, tokenizer, 16, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-3] ^= 1
    changed = {"cut": content[:-5], "empty": b"", "flipped": content, "text": b"not a cache file"}[damage]
    path.write_bytes(bytes(changed))
    with caplog.at_level(logging.WARNING):
        assert same(encode(rows, tokenizer, 16, tmp_path / "cache"), first)
    assert "made anew" in caplog.text
    encode(rows, tokenizer, 16, tmp_path / "cache")
    assert len(tokenised) == 2


def test_a_folder_that_cannot_be_written_costs_a_warning(tokenizer, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert len(encode(make_rows(["abc"]), tokenizer, 16, tmp_path / "file" / "cache")) == 1
    assert "data.cache_dir" in caplog.text


def test_the_default_folder_is_the_users_cache(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    encode(make_rows(["abc"]), tokenizer, 16)
    assert len(list((tmp_path / "cache" / "adapter-fusion" / "tokens").glob("*.safetensors"))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    encode(make_rows(["abc"]), tokenizer, 16)
    assert (tmp_path / "home" / ".cache" / "adapter-fusion" / "tokens").is_dir()


def test_two_writers_at_once(tokenizer, tmp_path):
    rows = make_rows(["abc"] * 2000)
    start = threading.Barrier(2)

    def write_many() -> list[int]:
        own = load_tokenizer(str(tmp_path / "tokenizer"))
        start.wait(30)
        return [len(encode(rows, own, length, tmp_path / "cache")) for length in range(8, 16)]

    with ThreadPoolExecutor(2) as writers:
        written = [writers.submit(write_many) for _ in range(2)]
    assert [future.result() for future in written] == [[2000] * 8] * 2
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".safetensors"] * 8


def test_who_comes_second_waits_and_reads(tokenizer, tmp_path, tokenised, monkeypatch):
    rows, others = make_rows(["abc"]), []
    inside, counted = threading.Event(), encode_module._tokenize

    def slow(*values):
        inside.set()
        time.sleep(0.5)
        return counted(*values)

    monkeypatch.setattr(encode_module, "_tokenize", slow)
    own = load_tokenizer(str(tmp_path / "tokenizer"))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(encode, rows, tokenizer, 16, tmp_path / "cache")
        assert inside.wait(10)
        others.append(encode(rows, own, 16, tmp_path / "cache"))
    assert tokenised == [1]
    assert same(first.result(), others[0])
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


@pytest.mark.parametrize("ended", [False, True], ids=["stuck", "killed"])
def test_nobody_waits_for_ever(tmp_path, caplog, ended):
    """Another process takes the lock and sleeps; a killed one's lock is free at once."""
    path = tmp_path / "file"
    code = (
        "import sys, time; from filelock import FileLock; "
        "lock = FileLock(sys.argv[1] + '.lock'); lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        if ended:
            holder.kill()
            holder.wait()
        with caplog.at_level(logging.WARNING), cache_lock(path, wait=0.3 if not ended else 30.0):
            pass
        assert ("not waiting any longer" in caplog.text) != ended
    finally:
        holder.kill()
        holder.wait()


def test_what_comes_out_is_what_the_tokenizer_says_cut_on_either_side(tokenizer, tmp_path):
    for side in ("right", "left"):
        tokenizer.truncation_side = side
        pairs = [("abcdefgh", "xyzuvw"), ("a", "bcdefghijklmnop")]
        batch = encode(make_rows(pairs), tokenizer, 9, tmp_path / "cache").batch([0, 1])
        plain = tokenizer(
            [a for a, _ in pairs], [b for _, b in pairs], truncation=True, max_length=9, return_tensors="pt"
        )
        assert torch.equal(batch.input_ids, plain["input_ids"])


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([number]) * 3_000_000 for number in range(2)]
    keep(path, contents[0], "")
    with ThreadPoolExecutor(2) as writers:
        written = [writers.submit(keep, path, content, "") for content in contents * 10]
        while not all(future.done() for future in written):
            assert path.read_bytes() in contents
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_records_are_encoded_without_labels(task, tokenizer, tmp_path):
    encoded = encode(rows_of_records(task(), [{"text": "ab"}], "input"), tokenizer, 16, tmp_path)
    assert encoded.labels is None and encoded.batch([0]).labels is None
