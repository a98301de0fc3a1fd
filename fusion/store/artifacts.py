"""Writing and reading the weights of an artifact: whole or not at all, safetensors only, hashes checked.

Writers of one name wait for each other. Readers take no lock (a store may be read-only): a folder is put in
place by a rename, and a reader that met an overwrite half-way reads again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from fusion.errors import UserError, first_line
from fusion.store.files import MEND, read_regular
from fusion.store.json_text import short
from fusion.store.layout import HEAD, MANIFEST, OLD, REPLACED, STAGING, WEIGHTS
from fusion.store.lookup import find, find_by_hash, read_folder, read_settled
from fusion.store.manifest import Manifest
from fusion.store.names import check_name
from fusion.store.parts import File
from fusion.store.trained_data import note_ambiguous_labels
from fusion.store.writing import LOCK_SECONDS, NEW, check_free, retire, settle, sync_folder, writing
from fusion.text import printable

log = logging.getLogger(__name__)

_NOTED: set[str] = set()  # hashes of the artifacts without a checksum that this process has named
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
    with writing(store, manifest.name, wait):
        settle(store, manifest.name)
        check_free(manifest.name, manifest.kind, store, overwrite)
        final, staged = store / manifest.name, store / STAGING / f"{manifest.name}{NEW}"
        try:
            manifest = _stage(staged, manifest, weights, head)
            if final.exists():
                old = store / STAGING / f"{manifest.name}{OLD}"
                os.replace(final, old)
                os.replace(staged, final)
                sync_folder(store)
                retire(store, old, manifest)
            else:
                os.replace(staged, final)
            sync_folder(store)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return final


def load(reference: str, store: Path) -> Artifact:
    """Reads an artifact by name or path, and checks its files against the manifest.

    Raises:
        UserError: there is no such artifact, or which of its files is missing, cut short or changed.
    """
    return read_settled(lambda: find(reference, store), read)


def load_by_hash(hash: str, name: str, store: Path) -> Artifact:
    """Reads the artifact with this hash, as `find_by_hash` finds it: one source of a fusion.

    Raises:
        UserError: it is gone, or which of its files is missing, cut short or changed.
    """
    artifact = read_settled(lambda: find_by_hash(hash, name, store), read)
    # Between the two it may have been overwritten, whole; then it is kept, and found, elsewhere.
    return artifact if artifact.manifest.hash == hash else read(find_by_hash(hash, name, store))


def read(folder: Path) -> Artifact:
    """The artifact that lies in `folder`, its files checked against its manifest."""
    manifest = read_folder(folder)
    if manifest.checksum is None and manifest.hash not in _NOTED:
        _NOTED.add(manifest.hash)
        log.info(
            "%s: its manifest has no checksum (stored by version 0.1), so a change of it cannot be noticed; training it "
            "again with overwrite=true adds one",
            folder,
        )
        note_ambiguous_labels(manifest)
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
    with writing(store, kept.name, LOCK_SECONDS):
        for left in (store / STAGING).glob(f"{kept.name}~*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        staged.mkdir(parents=True)
        try:
            for file in (WEIGHTS, HEAD):  # these alone: whatever else lies there is no part of it
                _write(staged / file, read_regular(artifact.path / file, artifact.manifest.files[file].bytes))
            _write(staged / MANIFEST, artifact.manifest.to_json().encode("utf-8"))
            if read(staged).manifest.hash != artifact.manifest.hash:
                raise UserError(
                    f"{artifact.path}: was changed while it was copied to {store}; run this again"
                )
            kept.parent.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # another process has just put the same there
                os.replace(staged, kept)
            sync_folder(kept.parent)
        finally:
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


def check_numbers(values: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """Refuses stored tensors that no training gives: of another type than a float, or not finite.

    Raises:
        UserError: names `path`, the tensor and what it holds.
    """
    for name, tensor in values.items():
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{path}: {_quoted(name)} is of type {str(tensor.dtype).removeprefix('torch.')}, expected a float; {MEND}"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {_quoted(name)} holds values that are not finite; {MEND}")


def copy_stored(
    parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor], path: Path | str
) -> None:
    """As `copy_into`, of what comes from a store.

    Raises:
        UserError: as of `copy_into` and `check_numbers`.
    """
    check_numbers(values, path)
    copy_into(parameters, values, path)


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
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(map(_quoted, keys[:shown])) + more


def _quoted(name: str) -> str:
    """A tensor's name as it is, where it is one that a model may have."""
    return name if name.isprintable() and len(name) <= 200 else short(name)


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
    manifest = manifest.changed(files=files)
    text = manifest.to_json()
    Manifest.from_json(text, folder / MANIFEST)  # what could not be read again must not be stored
    _write(folder / MANIFEST, text.encode("utf-8"))
    sync_folder(folder)
    return manifest


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    # A copy of its own: safetensors refuses tensors that share memory, and would store a view's strides wrongly.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read_tensors(path: Path, entry: File) -> dict[str, torch.Tensor]:
    content = read_regular(path, expected=entry.bytes)
    found = hashlib.sha256(content).hexdigest()
    if found != entry.sha256:
        raise UserError(
            f"{path}: sha256 {found[:12]} and not {printable(entry.sha256[:12])}, so it was changed; {MEND}"
        )
    try:
        return safetensors.torch.load(content)
    except (
        Exception
    ) as error:  # its own error, or what torch and Python say of a type or size there is none of
        raise UserError(f"{path}: is not a safetensors file ({first_line(error)}); {MEND}") from None
