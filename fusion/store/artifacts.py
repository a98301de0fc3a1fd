"""Writing and reading the weights of an artifact: whole or not at all, safetensors only, hashes checked.

Writers of one name wait for each other. Readers take no lock (a store may be read-only): a folder is put in
place by a rename, and a reader that met an overwrite half-way reads again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout

from fusion.errors import UserError
from fusion.store.manifest import (
    HEAD,
    MANIFEST,
    OLD,
    REPLACED,
    STAGING,
    WEIGHTS,
    Manifest,
    artifacts,
    check_free,
    check_name,
    find,
    find_by_hash,
    read_folder,
    read_settled,
)

LOCKS = ".locks"
LOCK_SECONDS = 60.0


@dataclass(frozen=True)
class Artifact:
    """A stored artifact with its tensors, on the CPU."""

    path: Path
    manifest: Manifest
    weights: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]


def save(
    store: Path,
    manifest: Manifest,
    weights: Mapping[str, torch.Tensor],
    head: Mapping[str, torch.Tensor],
    overwrite: bool = False,
    wait: float = LOCK_SECONDS,
) -> Path:
    """Stores an artifact as STORE/NAME and returns that folder. `manifest.files` is filled in here.

    An artifact that is overwritten stays under STORE/.replaced while a fusion of the store names its hash.

    Raises:
        UserError: the name is refused or taken, or another process has been writing it for `wait` seconds.
    """
    check_name(manifest.name)
    store.mkdir(parents=True, exist_ok=True)
    with _writing(store, manifest.name, wait):
        _settle(store, manifest.name)
        check_free(manifest.name, manifest.kind, store, overwrite)
        final, staged = store / manifest.name, store / STAGING / manifest.name
        try:
            manifest = _stage(staged, manifest, weights, head)
            if final.exists():
                old = store / STAGING / f"{manifest.name}{OLD}"
                os.replace(final, old)
                os.replace(staged, final)
                _sync_folder(store)
                _retire(store, old, manifest)
            else:
                os.replace(staged, final)
            _sync_folder(store)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return final


def load(reference: str, store: Path) -> Artifact:
    """Reads an artifact by name or path, and checks its files against the manifest.

    Raises:
        UserError: there is no such artifact, or which of its files is missing, cut short or changed.
    """
    return read_settled(lambda: find(reference, store), _read)


def load_by_hash(hash: str, name: str, store: Path) -> Artifact:
    """Reads the artifact with this hash, as `find_by_hash` finds it: one source of a fusion.

    Raises:
        UserError: it is gone, or which of its files is missing, cut short or changed.
    """
    artifact = read_settled(lambda: find_by_hash(hash, name, store), _read)
    # Between the two it may have been overwritten, whole; then it is kept, and found, elsewhere.
    return artifact if artifact.manifest.hash == hash else _read(find_by_hash(hash, name, store))


def _read(folder: Path) -> Artifact:
    manifest = read_folder(folder)
    weights, head = (_read_tensors(folder / file, manifest.files[file]) for file in (WEIGHTS, HEAD))
    return Artifact(path=folder, manifest=manifest, weights=weights, head=head)


def adopt(artifact: Artifact, store: Path) -> None:
    """Copies an artifact of another store to STORE/.replaced, so that a fusion has its sources beside it.

    Nothing is done where this store has it, under whatever name.
    """
    with contextlib.suppress(UserError):
        find_by_hash(artifact.manifest.hash, artifact.manifest.name, store)
        return
    kept = store / REPLACED / f"{artifact.manifest.name}-{artifact.manifest.hash[:8]}"
    staged = store / STAGING / f"{kept.name}~{os.getpid()}"
    store.mkdir(parents=True, exist_ok=True)
    with _writing(store, kept.name, LOCK_SECONDS):
        for left in (store / STAGING).glob(f"{kept.name}~*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(artifact.path, staged)
        kept.parent.mkdir(exist_ok=True)
        try:
            os.replace(staged, kept)
        except OSError:  # another process has just put the same there
            shutil.rmtree(staged, ignore_errors=True)


def match_keys(
    expected: Mapping[str, Sequence[int]], found: Mapping[str, torch.Tensor], path: Path | str
) -> None:
    """Refuses tensors that are not exactly the expected ones, by name and shape.

    Raises:
        UserError: names `path` and lists what is missing, unexpected, or of another shape.
    """
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    shapes = [
        f"{key} {tuple(found[key].shape)} and not {tuple(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key].shape) != tuple(shape)
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    problems = [f"{title}: {_listed(keys)}" for title, keys in kinds if keys]
    if problems:
        raise UserError(f"{path}: does not fit the model it should fill; {'; '.join(problems)}")


def copy_into(
    parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor], path: Path | str
) -> None:
    """Copies stored values into a model's parameters, whose names and shapes must be exactly theirs.

    Raises:
        UserError: they are not; it names `path`, where the values come from, and what differs.
    """
    match_keys({name: tuple(parameter.shape) for name, parameter in parameters.items()}, values, path)
    for name, parameter in parameters.items():
        parameter.data.copy_(values[name])


def _listed(keys: list[str], shown: int = 5) -> str:
    return ", ".join(keys[:shown]) + (f" and {len(keys) - shown} more" if len(keys) > shown else "")


@contextlib.contextmanager
def _writing(store: Path, name: str, wait: float) -> Iterator[None]:
    """Holds the name against other writers. Beside the lock a note says who holds it."""
    locks = store / LOCKS
    locks.mkdir(exist_ok=True)
    holder = locks / f"{name}.json"
    lock = FileLock(locks / f"{name}.lock", timeout=wait)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{store / name} is being written by {_holder(holder)}: waited {wait:g} s. "
            "Run this again when that is done, or choose another name="
        ) from None
    try:
        holder.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}), encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return f"process {note['pid']} on {note['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _stage(
    folder: Path, manifest: Manifest, weights: Mapping[str, torch.Tensor], head: Mapping[str, torch.Tensor]
) -> Manifest:
    """Writes the whole artifact into `folder`, on the disk for sure, and gives the manifest with its files."""
    folder.mkdir(parents=True)
    files = {}
    for file, tensors in ((WEIGHTS, weights), (HEAD, head)):
        content = safetensors.torch.save({key: _plain(tensor) for key, tensor in tensors.items()})
        files[file] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        _write(folder / file, content)
    manifest = replace(manifest, files=files)
    text = manifest.to_json()
    Manifest.from_json(text, folder / MANIFEST)  # what could not be read again must not be stored
    _write(folder / MANIFEST, text.encode("utf-8"))
    _sync_folder(folder)
    return manifest


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    # A copy of its own: safetensors refuses tensors that share memory, and would store a view's strides wrongly.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some systems cannot sync a folder; the rename is atomic all the same
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _settle(store: Path, name: str) -> None:
    """Ends what a killed writer left half-way. Called under the lock, so nobody is at work there."""
    staging = store / STAGING
    staging.mkdir(exist_ok=True)
    shutil.rmtree(staging / name, ignore_errors=True)
    old, final = staging / f"{name}{OLD}", store / name
    if not (old / MANIFEST).is_file():
        shutil.rmtree(old, ignore_errors=True)
    elif final.exists():
        _retire(store, old, read_folder(final))
    else:
        os.replace(old, final)


def _retire(store: Path, old: Path, new: Manifest) -> None:
    """Keeps a replaced artifact where a fusion of the store still needs it, and removes it otherwise."""
    try:
        manifest = read_folder(old)
    except UserError:
        shutil.rmtree(old, ignore_errors=True)
        return
    needed = {source["hash"] for _, fusion in artifacts(store) for source in fusion.sources}
    kept = store / REPLACED / f"{manifest.name}-{manifest.hash[:8]}"
    if manifest.hash in needed and manifest.hash != new.hash and not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        os.replace(old, kept)
        _sync_folder(kept.parent)
    else:
        shutil.rmtree(old, ignore_errors=True)


def _read_tensors(path: Path, entry: Mapping[str, object]) -> dict[str, torch.Tensor]:
    mend = "copy the artifact again, or train it again with overwrite=true"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {mend}") from None
    if len(content) != entry["bytes"]:
        raise UserError(f"{path}: is {len(content):,} bytes of {entry['bytes']:,}; {mend}")
    found = hashlib.sha256(content).hexdigest()
    if found != entry["sha256"]:
        raise UserError(
            f"{path}: sha256 {found[:12]} and not {str(entry['sha256'])[:12]}, so it was changed; {mend}"
        )
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: is not a safetensors file ({error}); {mend}") from None
