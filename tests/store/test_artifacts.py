"""Writing and reading artifacts: bit-equal, whole or not at all, one writer at a time."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import fusion.store.artifacts as artifacts_module
from fusion.errors import UserError
from fusion.store.artifacts import adopt, load, load_by_hash, match_keys, save
from fusion.store.layout import HEAD, MANIFEST, WEIGHTS
from fusion.store.lookup import find, find_by_hash, names, read_manifest
from fusion.store.manifest import Manifest, checksum_of
from fusion.store.writing import writing
from tests.store.conftest import exit_code, fork

Make = Callable[..., Manifest]
Tensors = dict[str, torch.Tensor]
OTHER = {"other": torch.ones(3)}


def same_bits(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
        flat = tensor.detach().contiguous().reshape(-1)
        return (tensor.dtype, tuple(tensor.shape), bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b"")

    return one.keys() == two.keys() and all(bits(one[key]) == bits(two[key]) for key in one)


def contents(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.exists() else set()


def test_round_trip_is_bit_equal(make_manifest: Make, weights: Tensors, head: Tensors, store: Path) -> None:
    path = save(store, make_manifest(), weights, head)
    assert path == store / "mnli"
    assert contents(path) == {MANIFEST, WEIGHTS, HEAD}
    artifact = load("mnli", store)
    assert artifact.path == path and artifact.manifest == read_manifest("mnli", store)
    assert same_bits(artifact.weights, weights)
    assert same_bits(artifact.head, head)
    assert not any(tensor.requires_grad for tensor in artifact.weights.values())
    artifact.weights["0.feedforward.down.weight"].zero_()  # loaded tensors are writable and not shared
    assert same_bits(load("mnli", store).weights, weights)


def test_same_tensors_make_the_same_files(make_manifest: Make, weights: Tensors, head: Tensors, store: Path) -> None:
    one = save(store, make_manifest("one"), weights, head)
    two = save(store, make_manifest("two"), dict(reversed(weights.items())), head)
    assert (one / WEIGHTS).read_bytes() == (two / WEIGHTS).read_bytes()
    assert read_manifest("one", store).hash == read_manifest("two", store).hash


def test_an_artifact_without_tensors(make_manifest: Make, head: Tensors, store: Path) -> None:
    save(store, make_manifest("rte-head", "head"), {}, head)
    artifact = load("rte-head", store)
    assert artifact.weights == {} and same_bits(artifact.head, head)


def test_bytes_and_modes(make_manifest: Make, weights: Tensors, head: Tensors, store: Path) -> None:
    umask = os.umask(0o022)
    try:
        path = save(store, make_manifest(), weights, head)
    finally:
        os.umask(umask)
    files = read_manifest("mnli", store).files
    assert {file: entry.bytes for file, entry in files.items()} == {
        file: (path / file).stat().st_size for file in (WEIGHTS, HEAD)
    }
    if os.name == "posix":  # a group that shares the store can read what one of them made
        assert path.stat().st_mode & 0o777 == 0o755
        assert (path / WEIGHTS).stat().st_mode & 0o777 == 0o644


def test_an_existing_name(make_manifest: Make, weights: Tensors, head: Tensors, store: Path) -> None:
    save(store, make_manifest(), weights, head)
    with pytest.raises(UserError, match="overwrite=true"):
        save(store, make_manifest(seed=4), OTHER, head)
    assert same_bits(load("mnli", store).weights, weights)
    with pytest.raises(UserError, match="is a stored adapter"):
        fusion = make_manifest("mnli", "fusion", sources=[{"name": "a", "hash": "b"}])
        save(store, fusion, OTHER, head, overwrite=True)
    with pytest.raises(UserError, match="letters"):
        save(store, make_manifest("../mnli"), weights, head)
    assert contents(store.parent) == {"store"}
    assert names(store) == ["mnli"]


def test_overwrite_removes_unreferenced_artifacts(
    make_manifest: Make, weights: Tensors, head: Tensors, store: Path
) -> None:
    save(store, make_manifest(), weights, head)
    save(store, make_manifest(seed=4), OTHER, head, overwrite=True)
    artifact = load("mnli", store)
    assert artifact.manifest.seed == 4 and same_bits(artifact.weights, OTHER)
    assert contents(store / ".replaced") == set()
    assert contents(store / ".staging") == set()


def test_overwrite_keeps_sources_of_a_fusion(make_manifest: Make, weights: Tensors, head: Tensors, store: Path) -> None:
    save(store, make_manifest(), weights, head)
    hash = read_manifest("mnli", store).hash
    save(store, make_manifest("f", "fusion", sources=[{"name": "mnli", "hash": hash}]), OTHER, head)
    save(store, make_manifest(seed=4), weights, head, overwrite=True)  # the same weights: nothing is lost
    assert contents(store / ".replaced") == set()
    for value in range(2):  # the second one replaces an adapter that no fusion names
        save(store, make_manifest(), {"other": torch.full((3,), float(value))}, head, overwrite=True)
    kept = store / ".replaced" / f"mnli-{hash[:8]}"
    assert contents(store / ".replaced") == {kept.name}
    assert find_by_hash(hash, "mnli", store) == kept
    artifact = load_by_hash(hash, "mnli", store)
    assert artifact.manifest.hash == hash and same_bits(artifact.weights, weights)
    assert names(store) == ["f", "mnli"]
    save(store, make_manifest(), weights, head, overwrite=True)
    assert find_by_hash(hash, "mnli", store) == store / "mnli"
    save(store, make_manifest(), OTHER, head, overwrite=True)  # it is kept already
    assert contents(store / ".replaced") == {kept.name} and contents(store / ".staging") == set()


def test_a_missing_source(make_manifest: Make, weights: Tensors, head: Tensors, store: Path) -> None:
    save(store, make_manifest(), weights, head)
    hash = read_manifest("mnli", store).hash
    os.rename(store / "mnli", store / "renamed")
    assert same_bits(load_by_hash(hash, "mnli", store).weights, weights)
    shutil.rmtree(store / "renamed")
    with pytest.raises(UserError, match=rf"source mnli \({hash[:8]}\) not found"):
        load_by_hash(hash, "mnli", store)


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[:-5])
    elif how == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "pickle":
        torch.save({"weight": torch.ones(1)}, path)
    else:
        path.unlink()


@pytest.mark.parametrize("file", [WEIGHTS, HEAD])
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut", r"has [\d,]+ bytes, expected [\d,]+; copy the artifact again or retrain it with overwrite=true"),
        ("changed", "was modified: sha256"),
        ("pickle", "bytes, expected"),
        ("gone", "is missing"),
    ],
)
def test_damaged_files_are_named(
    make_manifest: Make, weights: Tensors, head: Tensors, store: Path, file: str, how: str, says: str
) -> None:
    path = save(store, make_manifest(), weights, head) / file
    damaged(path, how)
    with pytest.raises(UserError, match=says) as error:
        load("mnli", store)
    assert str(error.value).startswith(str(path))
    save(store, make_manifest(), weights, head, overwrite=True)  # as the message proposes
    assert same_bits(load("mnli", store).weights, weights)


def test_a_manifest_that_agrees_with_a_pickle(make_manifest: Make, head: Tensors, store: Path) -> None:
    # Not even where the hashes fit is anything but safetensors read.
    import hashlib

    path = save(store, make_manifest(), OTHER, head)
    damaged(path / WEIGHTS, "pickle")
    content = (path / WEIGHTS).read_bytes()
    values = json.loads((path / MANIFEST).read_text())
    values["files"][WEIGHTS] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    values["checksum"] = checksum_of(values)
    (path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(UserError, match="is not a valid safetensors file"):
        load("mnli", store)


def test_a_damaged_manifest(make_manifest: Make, weights: Tensors, head: Tensors, store: Path) -> None:
    path = save(store, make_manifest(), weights, head) / MANIFEST
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match=r"manifest\.json is not valid JSON"):
        load("mnli", store)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not valid JSON"):
        load("mnli", store)
    save(store, make_manifest(), weights, head, overwrite=True)
    assert same_bits(load("mnli", store).weights, weights)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_save_leaves_nothing(
    make_manifest: Make, weights: Tensors, head: Tensors, store: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        save(store, make_manifest(), weights, head)

    def disk_full(path: Path, content: bytes) -> None:
        if path.name == HEAD:
            raise OSError(28, "No space left on device")
        path.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(artifacts_module, "_write", disk_full)
        with pytest.raises(OSError, match="No space"):
            save(store, make_manifest(seed=4), OTHER, head, overwrite=overwrite)
    assert contents(store / ".staging") == set()
    assert names(store) == (["mnli"] if overwrite else [])
    if overwrite:
        assert same_bits(load("mnli", store).weights, weights)
    save(store, make_manifest(seed=5), OTHER, head, overwrite=overwrite)  # the lock is free again
    assert load("mnli", store).manifest.seed == 5


def test_an_artifact_that_cannot_be_reloaded_is_not_stored(make_manifest: Make, head: Tensors, store: Path) -> None:
    with pytest.raises(UserError, match="seed: "):
        save(store, make_manifest(seed="three"), OTHER, head)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(store, make_manifest(metrics={"validation": torch.ones(1)}), OTHER, head)
    assert names(store) == [] and contents(store / ".staging") == set()


@pytest.mark.parametrize("moment", ["staged", "moved aside", "in place"])
def test_a_writer_killed_in_an_overwrite(
    make_manifest: Make, weights: Tensors, head: Tensors, store: Path, moment: str
) -> None:
    """SIGKILL at each step: the store has the old artifact or the new one, and the next writer cleans up."""
    save(store, make_manifest(), weights, head)
    save(store, make_manifest("f", "fusion", sources=[source_of("mnli", store)]), OTHER, head)
    left = ["staged", "moved aside", "in place"].index(moment)
    killed_at_rename(left, lambda: save(store, make_manifest(seed=4), OTHER, {}, overwrite=True))
    assert names(store) == ["f", "mnli"]
    stored = load("mnli", store)
    assert same_bits(stored.weights, OTHER if moment == "in place" else weights)
    source = load("f", store).manifest.sources[0]
    assert same_bits(load_by_hash(source.hash, source.name, store).weights, weights)
    with pytest.raises(UserError, match="overwrite=true"):
        save(store, make_manifest(), OTHER, head)
    save(store, make_manifest(seed=6), {"new": torch.zeros(1)}, head, overwrite=True)
    assert load("mnli", store).manifest.seed == 6 and find("mnli", store) == store / "mnli"
    assert contents(store / ".staging") == set()
    assert same_bits(load_by_hash(source.hash, source.name, store).weights, weights)


def killed_at_rename(number: int, work: Callable[[], object]) -> None:
    """Run `work` in a process that is killed before it renames a directory, counted from 0."""

    def killed() -> None:
        left, replace = iter(range(number)), os.replace

        def rename(old: Path, new: Path) -> None:
            if Path(old).is_dir() and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(old, new)

        os.replace = rename  # type: ignore[assignment]
        work()

    assert exit_code(fork(killed)) == -signal.SIGKILL


def source_of(name: str, store: Path) -> dict[str, str]:
    return {"name": name, "hash": read_manifest(name, store).hash}


def test_a_second_writer_waits_and_then_names_the_first(
    make_manifest: Make, weights: Tensors, head: Tensors, store: Path
) -> None:
    store.mkdir(parents=True)

    def hold() -> None:
        with writing(store, "mnli", 10.0):
            (store / "held").touch()
            time.sleep(60)

    holder = fork(hold)
    while not (store / "held").exists():
        time.sleep(0.01)
    started = time.monotonic()
    with pytest.raises(UserError, match=f"process {holder} on {socket.gethostname()} .*; waited 0.3 s"):
        save(store, make_manifest(), weights, head, wait=0.3)
    assert time.monotonic() - started < 5
    save(store, make_manifest("rte"), weights, head, wait=0.3)  # another name is free
    threading.Timer(0.3, os.kill, (holder, signal.SIGKILL)).start()  # the lock ends with its process
    save(store, make_manifest(), weights, head, wait=30)
    assert exit_code(holder) == -signal.SIGKILL
    assert same_bits(load("mnli", store).weights, weights)


def test_writers_and_readers_at_once(make_manifest: Make, head: Tensors, store: Path) -> None:
    """Two processes overwrite one name repeatedly; what a reader gets is one of their artifacts, whole."""
    save(store, make_manifest(seed=0), {"value": torch.full((1000,), 0.0)}, head)

    def write(writer: int) -> None:
        for seed in range(writer * 100, writer * 100 + 25):
            value = {"value": torch.full((1000,), float(seed))}
            save(store, make_manifest(seed=seed), value, {}, overwrite=True)
        (store / f".done-{writer}").touch()

    writers = [fork(functools.partial(write, number)) for number in (1, 2)]
    seen = set()
    while len(list(store.glob(".done-*"))) < 2:
        artifact = load("mnli", store)
        assert torch.equal(artifact.weights["value"], torch.full((1000,), float(artifact.manifest.seed)))
        seen.add(artifact.manifest.seed)
    assert [exit_code(writer) for writer in writers] == [0, 0]
    assert len(seen) > 2
    assert load("mnli", store).manifest.seed in (124, 224)
    assert contents(store / ".staging") == set()


def test_two_new_artifacts_of_one_name(make_manifest: Make, head: Tensors, store: Path) -> None:
    """Two jobs that end at once with one name: one is stored, the other refused."""
    outcomes: list[str] = []

    def write(seed: int) -> None:
        try:
            save(store, make_manifest(seed=seed), {"value": torch.full((10,), float(seed))}, head)
            outcomes.append("stored")
        except UserError:
            outcomes.append("refused")

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused", "refused", "refused", "stored"]
    artifact = load("mnli", store)
    assert artifact.weights["value"][0] == artifact.manifest.seed


def test_a_read_only_store_can_be_read(make_manifest: Make, weights: Tensors, head: Tensors, store: Path) -> None:
    save(store, make_manifest(), weights, head)

    def everything() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in [store, *store.rglob("*")]}

    before = everything()
    store.chmod(0o500)  # root can write anyway, hence the comparison of the files
    try:
        assert same_bits(load("mnli", store).weights, weights)
        assert everything() == before
    finally:
        store.chmod(0o700)


def test_match_keys() -> None:
    found = {"a": torch.ones(2, 3), "b": torch.ones(())}
    match_keys({"a": (2, 3), "b": ()}, found, Path("w"))
    match_keys({"b": torch.Size([]), "a": torch.Size([2, 3])}, found, Path("w"))
    with pytest.raises(UserError) as error:
        match_keys({"a": (3, 2), "c": (1,)}, found, Path("store/mnli/weights.safetensors"))
    assert str(error.value) == (
        "store/mnli/weights.safetensors does not match the model; "
        "missing: c; unexpected: b; of a different shape: a (2, 3), expected (3, 2)"
    )


def test_a_store_on_a_path_that_needs_quoting(
    make_manifest: Make, weights: Tensors, head: Tensors, tmp_path: Path
) -> None:
    store = tmp_path / "my work" / "a 'store' = [1], ü"
    save(store, make_manifest(), weights, head)
    with writing(store, "mnli", 1.0), pytest.raises(UserError, match=f"process {os.getpid()} on .*; waited 0.1 s"):
        save(store, make_manifest(), weights, head, overwrite=True, wait=0.1)
    save(store, make_manifest(seed=4), OTHER, head, overwrite=True, wait=0.1)
    assert same_bits(load("mnli", store).weights, OTHER)


def test_a_lock_that_cannot_be_created(
    make_manifest: Make, weights: Tensors, head: Tensors, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")  # as on a disk that is mounted read-only

    (store / ".locks").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr("filelock.FileLock.acquire", refuse)
        with pytest.raises(UserError, match=r"\.locks: cannot be written \(Permission denied\).*store=DIR"):
            save(store, make_manifest(), weights, head)
    (store / ".locks").rmdir()
    (store / ".locks").touch()
    with pytest.raises(UserError, match=r"\.locks: cannot be written \(File exists\)"):
        save(store, make_manifest(), weights, head)
    assert names(store) == []


def test_an_unwritable_note_does_not_stop_a_command(
    make_manifest: Make, weights: Tensors, head: Tensors, store: Path
) -> None:
    (store / ".locks" / "mnli.lock.json").mkdir(parents=True)  # where the note would go
    save(store, make_manifest(), weights, head)
    with writing(store, "mnli", 1.0), pytest.raises(UserError, match="is being written by another process"):
        save(store, make_manifest(), weights, head, overwrite=True, wait=0.1)
    assert same_bits(load("mnli", store).weights, weights)


def test_a_name_with_the_suffix_of_a_replaced_artifact(
    make_manifest: Make, weights: Tensors, head: Tensors, store: Path
) -> None:
    """`mnli.old` is a name like any other: while it is written it is no part of `mnli`."""
    save(store, make_manifest("rte"), weights, head)
    killed_at_rename(0, lambda: save(store, make_manifest("mnli.old"), {}, {}))
    assert contents(store / ".staging") == {"mnli.old~new"}
    assert names(store) == ["rte"]
    with pytest.raises(UserError, match="no artifact 'mnli'"):
        load("mnli", store)
    save(store, make_manifest("mnli"), OTHER, head)
    assert same_bits(load("mnli", store).weights, OTHER)
    save(store, make_manifest("mnli.old"), weights, head)
    assert same_bits(load("mnli.old", store).weights, weights) and contents(store / ".staging") == set()


def test_a_source_of_another_store_is_copied(
    make_manifest: Make, weights: Tensors, head: Tensors, store: Path, tmp_path: Path
) -> None:
    folder = save(store, make_manifest(), weights, head)
    (folder / "notes.txt").write_text("mine")
    os.mkfifo(folder / "pipe")  # what is no part of it is left where it is
    artifact = load("mnli", store)
    other = tmp_path / "another store"
    adopt(artifact, other)
    kept = other / ".replaced" / f"mnli-{artifact.manifest.hash[:8]}"
    assert contents(kept) == {MANIFEST, WEIGHTS, HEAD}
    assert same_bits(load_by_hash(artifact.manifest.hash, "mnli", other).weights, weights)
    before = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    adopt(artifact, other)
    assert {path: path.stat().st_mtime_ns for path in kept.iterdir()} == before
    assert contents(other / ".staging") == set()


def test_a_source_that_changes_while_it_is_copied(
    make_manifest: Make, weights: Tensors, head: Tensors, store: Path, tmp_path: Path
) -> None:
    save(store, make_manifest(), weights, head)
    artifact = load("mnli", store)
    content = (artifact.path / WEIGHTS).read_bytes()
    (artifact.path / WEIGHTS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    other = tmp_path / "another store"
    with pytest.raises(UserError, match="was modified"):
        adopt(artifact, other)
    assert contents(other / ".staging") == set() and not (other / ".replaced").exists()


def test_a_killed_copy_is_cleaned_up_by_the_next_one(
    make_manifest: Make, weights: Tensors, head: Tensors, store: Path
) -> None:
    elsewhere = store.parent / "elsewhere"
    save(elsewhere, make_manifest(), weights, head)
    artifact = load("mnli", elsewhere)
    left = store / ".staging" / f"mnli-{artifact.manifest.hash[:8]}~new"
    left.mkdir(parents=True)
    (left / WEIGHTS).write_bytes(b"half")
    another = store / ".staging" / "mnli-other~new"
    another.mkdir()
    adopt(artifact, store)
    assert contents(store / ".staging") == {another.name}
    assert load_by_hash(artifact.manifest.hash, "mnli", store).manifest == artifact.manifest
