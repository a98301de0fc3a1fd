"""States on disk: built once, checked, whole or not at all, within their limit."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fusion.data.cache import cached_states

SHAPE = (6, 4)
BYTES = 6 * 4 * 4


class Builder:
    def __init__(self, fault: BaseException | None = None, shape: tuple[int, int] = SHAPE) -> None:
        self.calls = 0
        self.fault, self.shape = fault, shape

    def __call__(self, states: NDArray[Any]) -> None:
        self.calls += 1
        states[:] = np.arange(24).reshape(self.shape)
        if self.fault:
            raise self.fault


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if not file.name.endswith(".lock")}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_built_once_and_read_again(tmp_path: Path, dtype: str) -> None:
    build = Builder()
    for _ in range(2):
        states = cached_states(tmp_path / "new" / "a", SHAPE, dtype, 10**6, build)
        assert states.dtype == dtype and states.tolist() == np.arange(24).reshape(SHAPE).tolist()
    assert build.calls == 1 and files(tmp_path / "new") == {"a.states"}
    with pytest.raises(ValueError, match="read-only"):
        states[0, 0] = 1.0


@pytest.mark.parametrize("place", [0, 50, BYTES, BYTES + 3])
def test_a_changed_byte_is_seen(tmp_path: Path, place: int, caplog: pytest.LogCaptureFixture) -> None:
    build = Builder()
    cached_states(tmp_path / "a", SHAPE, "float32", 10**6, build)
    content = bytearray((tmp_path / "a.states").read_bytes())
    content[place] ^= 0x10
    (tmp_path / "a.states").write_bytes(content)
    assert cached_states(tmp_path / "a", SHAPE, "float32", 10**6, build).ravel()[23] == 23
    assert build.calls == 2 and "damaged" in caplog.text


@pytest.mark.parametrize("size", [0, 3, BYTES, BYTES + 5])
def test_a_file_of_another_length_is_rebuilt(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.states").write_bytes(b"x" * size)
    build = Builder()
    assert cached_states(tmp_path / "a", SHAPE, "float32", 10**6, build)[0, 1] == 1
    assert build.calls == 1


@pytest.mark.parametrize("fault", [OSError("no space"), KeyboardInterrupt()])
def test_a_failed_build_leaves_no_files(tmp_path: Path, fault: Exception) -> None:
    with pytest.raises(type(fault)):
        cached_states(tmp_path / "a", SHAPE, "float32", 10**6, Builder(fault))
    assert files(tmp_path) == set()


def test_the_least_recently_used_files_are_removed(tmp_path: Path) -> None:
    limit = 2 * (BYTES + 4) + 10
    mapped = cached_states(tmp_path / "a", SHAPE, "float32", limit, Builder())
    cached_states(tmp_path / "b", SHAPE, "float32", limit, Builder())
    os.utime(tmp_path / "a.states", (1, 1))
    os.utime(tmp_path / "b.states", (2, 2))
    cached_states(tmp_path / "a", SHAPE, "float32", limit, Builder())  # used: now b is the longest unused
    cached_states(tmp_path / "c", SHAPE, "float32", limit, Builder())
    assert files(tmp_path) == {"a.states", "c.states"}
    cached_states(tmp_path / "d", SHAPE, "float32", limit, Builder())
    assert files(tmp_path) == {"c.states", "d.states"}
    assert mapped[5, 3] == 23  # a mapped file stays readable


def test_one_of_multiple_processes_builds(tmp_path: Path) -> None:
    build = Builder()
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(cached_states, tmp_path / "a", SHAPE, "float32", 10**6, build) for _ in range(4)]
        assert all(job.result()[5, 3] == 23 for job in jobs)
    assert build.calls == 1


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        cached_states(tmp_path / "file" / "a", SHAPE, "float32", 10**6, Builder())


def test_files_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.states.0.partial").write_bytes(b"half")
    assert cached_states(tmp_path / "a", SHAPE, "float32", 10**6, Builder())[5, 3] == 23
    assert files(tmp_path) == {"a.states"}


def test_unfinished_builds_count_towards_the_limit_and_old_ones_are_removed(tmp_path: Path) -> None:
    limit = 3 * (BYTES + 4) + 10
    cached_states(tmp_path / "a", SHAPE, "float32", limit, Builder())
    for name in (".b.states.1.partial", ".c.states.2.partial"):
        (tmp_path / name).write_bytes(b"x" * (BYTES + 4))
    cached_states(tmp_path / "d", SHAPE, "float32", limit, Builder())  # a has to go
    assert files(tmp_path) == {"d.states", ".b.states.1.partial", ".c.states.2.partial"}
    os.utime(tmp_path / ".b.states.1.partial", (1, 1))
    cached_states(tmp_path / "e", SHAPE, "float32", limit, Builder())
    assert files(tmp_path) == {"d.states", "e.states", ".c.states.2.partial"}


def test_a_file_of_another_user_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    build = Builder()
    cached_states(tmp_path / "a", SHAPE, "float32", 10**6, build)
    monkeypatch.setattr(os, "utime", refuse)
    assert cached_states(tmp_path / "a", SHAPE, "float32", 10**6, build)[5, 3] == 23
    assert build.calls == 1


def test_the_states_of_another_key_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build, other = Builder(), Builder()
    cached_states(tmp_path / "a", SHAPE, "float32", 10**6, other)
    (tmp_path / "b.states").write_bytes((tmp_path / "a.states").read_bytes())
    cached_states(tmp_path / "b", SHAPE, "float32", 10**6, build)
    cached_states(tmp_path / "b", SHAPE, "float32", 10**6, build)
    assert build.calls == 1 and caplog.text.count("rebuilt") == 1
    # Nor those of another form, where the bytes are as many.
    assert (
        cached_states(tmp_path / "b", (SHAPE[1], SHAPE[0]), "float32", 10**6, turned := Builder(shape=(4, 6)))[3, 5]
        == 23
    )
    assert turned.calls == 1


def test_another_file_at_the_path_of_the_states(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "a.states")
    assert cached_states(tmp_path / "a", SHAPE, "float32", 10**6, Builder())[5, 3] == 23


def test_states_without_read_permission_are_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    cached_states(tmp_path / "a", SHAPE, "float32", 10**6, Builder())
    build, original = Builder(), Path.open
    with monkeypatch.context() as patch:
        patch.setattr(
            Path,
            "open",
            lambda path, mode="r", **options: refuse() if mode == "rb" else original(path, mode, **options),
        )
        assert cached_states(tmp_path / "a", SHAPE, "float32", 10**6, build)[5, 3] == 23
    assert build.calls == 1 and caplog.text.count("rebuilt") == 1
