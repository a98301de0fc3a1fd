"""Whatever lies where a split's token ids are kept: they are made anew with one warning, and are right."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save
from transformers import PreTrainedTokenizerBase

import fusion.files as files_module
from fusion.data import cache as cache_module
from fusion.data import encode as encode_module
from fusion.data.encode import EncodedRows, encode
from fusion.data.rows import Rows
from tests.data.conftest import make_tokenizer

ROOT = Path(__file__).parents[2]
ROWS = Rows([("abc",), ("de",), ("fghij",)], None, [0, 1, 0], 0, "these")
OTHER = Rows([("xyz",), ("uv",), ("rstqp",)], None, [0, 1, 0], 0, "others")  # of the same lengths
Arrays = dict[str, Any]


class Cache:
    """The cache of one split: its file, what should come of it, and how often rows were tokenised."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, log: pytest.LogCaptureFixture
    ) -> None:
        self.folder, self.tokenizer, self.log, self.made = folder, tokenizer, log, 0
        self.expected = self.read().batch([0, 1, 2])
        (self.path,) = folder.glob("*.safetensors")
        self.content = self.path.read_bytes()

    def read(self, rows: Rows = ROWS) -> EncodedRows:
        return encode(rows, self.tokenizer, 16, self.folder)

    def check(self, warnings: int = 1, stored: bool = True) -> None:
        """It is made anew and right, and the run after that reads it."""
        made = self.made
        self.log.clear()
        for again in range(2 if stored else 1):
            batch = self.read().batch([0, 1, 2])
            assert torch.equal(batch.input_ids, self.expected.input_ids)
            assert torch.equal(batch.attention_mask, self.expected.attention_mask)
            assert batch.token_type_ids is not None and self.expected.token_type_ids is not None
            assert torch.equal(batch.token_type_ids, self.expected.token_type_ids)
            said = [record.getMessage() for record in self.log.records if record.levelno >= logging.WARNING]
            assert len(said) == warnings, said
            assert all("made anew" in message or "cannot be written" in message for message in said)
            assert self.made == made + 1, f"pass {again}"
        assert not stored or self.path.read_bytes() == self.content

    def forge(self, change: Callable[[Arrays], Arrays], said: str = "KEY CRC") -> None:
        """A file whose checksum is right and whose arrays are not."""
        with safe_open(self.path, framework="numpy") as file:
            arrays = change({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        key = self.path.stem
        said = said.replace("CRC", encode_module._checksum(arrays, key)).replace("KEY", key)
        self.path.write_bytes(save(arrays, metadata={encode_module._SAID: said}))


@pytest.fixture
def cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[Cache]:
    tokenizer, original = make_tokenizer(tmp_path / "tokenizer", types=True), encode_module._tokenize
    made = Cache(tmp_path / "cache", tokenizer, caplog)

    def counted(*values: Any) -> Any:
        made.made += 1
        return original(*values)

    monkeypatch.setattr(encode_module, "_tokenize", counted)
    yield made
    assert {file.suffix for file in made.folder.iterdir()} <= {".safetensors"}, "nothing is left"


def test_a_flipped_bit_in_any_byte(cache: Cache) -> None:
    for place in range(len(cache.content)):
        flipped = bytearray(cache.content)
        flipped[place] ^= 1 << place % 8
        cache.path.write_bytes(flipped)
        cache.log.clear()
        batch = cache.read().batch([0, 1, 2])
        assert torch.equal(batch.input_ids, cache.expected.input_ids), place
        assert cache.path.read_bytes() == cache.content or not cache.log.records, place
    # A bit in the padding of the header is all that can be passed over.
    assert cache.made >= 0.95 * len(cache.content)


def test_every_length_of_a_cut_file(cache: Cache) -> None:
    for length in range(0, len(cache.content), 5):
        cache.path.write_bytes(cache.content[:length])
        assert torch.equal(cache.read().batch([0, 1, 2]).input_ids, cache.expected.input_ids)
    assert cache.made == -(-len(cache.content) // 5)
    cache.path.write_bytes(cache.content + b"more")
    cache.check()


def test_a_file_of_other_rows_under_this_name(cache: Cache) -> None:
    cache.read(OTHER)
    (other,) = set(cache.folder.glob("*.safetensors")) - {cache.path}
    os.replace(other, cache.path)
    cache.check()


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a | {"ends": a["ends"] + 1},
        lambda a: a | {"ends": a["ends"][::-1].copy()},
        lambda a: a | {"ends": a["ends"][:-1]},
        lambda a: a | {"ends": np.array([0, 0, 0])},
        lambda a: a | {"ends": np.array([-1, 5, len(a["input_ids"])])},
        lambda a: a | {"ends": np.array([1, 1, len(a["input_ids"])]), "input_ids": np.tile(a["input_ids"], 9)[:18]},
        lambda a: a | {"ends": a["ends"].astype(np.int32)},
        lambda a: a | {"input_ids": a["input_ids"] + 1000},
        lambda a: a | {"input_ids": a["input_ids"] - 1000},
        lambda a: a | {"input_ids": a["input_ids"].astype(np.int64)},
        lambda a: a | {"input_ids": a["input_ids"].astype(np.float32)},
        lambda a: a | {"input_ids": a["input_ids"][:, None]},
        lambda a: a | {"token_type_ids": a["token_type_ids"][:-1]},
        lambda a: a | {"more": a["ends"]},
        lambda a: {name: array for name, array in a.items() if name != "token_type_ids"},
        lambda a: {name: array for name, array in a.items() if name != "input_ids"},
        lambda a: {},
    ],
)  # fmt: skip
def test_arrays_that_cannot_be_these_rows(cache: Cache, change: Callable[[Arrays], Arrays]) -> None:
    cache.forge(change)
    cache.check()


@pytest.mark.parametrize("said", ["0" * 40 + " CRC", "KEY 0", "KEY", ""])
def test_a_file_that_says_it_is_another(cache: Cache, said: str) -> None:
    cache.forge(lambda arrays: arrays)
    assert cache.path.read_bytes() == cache.content, "the forger's work is good"
    cache.forge(lambda arrays: arrays, said)
    cache.check()


@pytest.mark.parametrize(
    "content",
    [
        (2**63).to_bytes(8, "little"),
        (8).to_bytes(8, "little") + b"[[[[[[[[",
        (2).to_bytes(8, "little") + b"{}",
        b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\0" * 4096,
        json.dumps({"input_ids": [1]}).encode(),
    ],
)
def test_a_file_of_another_kind(cache: Cache, content: bytes) -> None:
    cache.path.write_bytes(content)
    cache.check()


def test_a_type_that_numpy_lacks(cache: Cache) -> None:
    from safetensors.torch import save as save_torch

    cache.path.write_bytes(save_torch({"input_ids": torch.zeros(3, dtype=torch.bfloat16)}))
    cache.check()


def test_a_folder_or_a_pipe_in_its_place(cache: Cache) -> None:
    cache.path.unlink()
    cache.path.mkdir()
    cache.check(stored=False)
    cache.path.rmdir()
    os.mkfifo(cache.path)
    cache.check(warnings=0)
    cache.path.unlink()
    cache.path.symlink_to(cache.folder / "nowhere")
    cache.check(warnings=0)


def test_a_file_that_may_not_be_read(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "safe_open", refuse)
        cache.check(stored=False)
    assert cache.path.read_bytes() == cache.content


def test_what_a_killed_writer_left_is_gone(cache: Cache) -> None:
    cache.path.unlink()
    (cache.folder / f".{cache.path.name}.{'0' * 32}.partial").write_bytes(b"half")
    (cache.folder / f"{cache.path.name}.lock").write_bytes(b"")
    cache.check(warnings=0)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")]
)
def test_a_disk_that_takes_nothing(cache: Cache, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise error

    cache.path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "replace", refuse)
        cache.check(stored=False)
    assert not cache.path.exists()


FULL = """
import resource, sys
from tests.data.test_token_cache import ROWS
from fusion.data.encode import encode
from fusion.hub.tokenizer import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
print(encode(ROWS, tokenizer, 16, sys.argv[2]).batch([0, 1, 2]).input_ids.tolist())
"""


def in_a_process(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_file_that_may_not_grow(cache: Cache, tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100
    done = in_a_process(FULL, str(tmp_path / "tokenizer"), str(tmp_path / "full"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == cache.expected.input_ids.tolist()
    assert "cannot be written (File too large)" in done.stderr
    assert [file.name for file in (tmp_path / "full").iterdir() if file.stat().st_size] == []


def test_a_process_that_is_stopped_while_it_writes_keeps_nobody(tmp_path: Path) -> None:
    """It holds the turn and gets nowhere; who waits goes on by himself after a while."""
    path = tmp_path / "file"
    code = (
        "import sys, time; from pathlib import Path; from fusion.data.cache import cache_lock\n"
        "with cache_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        holder.send_signal(signal.SIGSTOP)
        steps = iter([0, 1, 2, 2])  # it gets on twice, and then no more
        started = time.monotonic()
        with cache_module.cache_lock(path, wait=0.2, progress=lambda: next(steps)) as alone:
            assert not alone
        assert 0.5 < time.monotonic() - started < 10 and next(steps, None) is None
    finally:
        holder.kill()
        holder.wait()
