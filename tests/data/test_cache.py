"""Cache files: atomic writes, and one builder at a time."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fusion import files
from fusion.data import cache
from fusion.data.cache import read_or_build, write_cache_file
from fusion.files import user_cache


def test_the_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert user_cache() == Path("/cache/adapter-fusion")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/users/ann")
    assert user_cache() == Path("/users/ann/.cache/adapter-fusion")


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([number]) * 3_000_000 for number in range(2)]
    write_cache_file(path, contents[0])
    with ThreadPoolExecutor(2) as writers:
        written = [writers.submit(write_cache_file, path, content) for content in contents * 10]
        while not all(future.done() for future in written):
            assert path.read_bytes() in contents
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), OSError(30, "Read-only file system")])
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, error: OSError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(files.os, "replace", refuse)
    write_cache_file(tmp_path / "file", b"content")
    assert "file cannot be written" in caplog.text and "data.cache_dir=DIR" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_one_process_builds_and_the_others_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    path, building = tmp_path / "file", threading.Event()
    (tmp_path / ".file.0.partial").write_bytes(b"of a killed process")

    def read() -> bytes | None:
        return path.read_bytes() if path.is_file() else None

    def build() -> bytes:
        building.set()
        while "is being written by" not in caplog.text:
            time.sleep(0.01)
        path.write_bytes(b"built")
        return b"built"

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(read_or_build, path, read, build)
        assert building.wait(10)
        assert read_or_build(path, read, lambda: b"built twice") == first.result() == b"built"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("killed", [False, True])
def test_waiting_ends_with_the_other_process_or_a_timeout(
    tmp_path: Path, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys, time; from filelock import FileLock; "
        "lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file.lock")]
    monkeypatch.setattr(cache, "_WAIT", 30.0 if killed else 0.3)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        if killed:
            holder.kill()
            holder.wait()
        started = time.monotonic()
        assert read_or_build(tmp_path / "file", lambda: None, lambda: b"built") == b"built"
        assert time.monotonic() - started < 10
        holder.kill()
