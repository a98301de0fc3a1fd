"""Writing and reading the weights of an artifact: safetensors only, hashes checked.

Writers of one name wait for each other. Readers take no lock (a store may be read-only): a folder gets its name by a
rename, and a reader that met an overwrite reads again.
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
from fusion.store.layout import (
    COPY,
    FIX,
    HEAD,
    MANIFEST,
    NEW,
    OLD,
    REPLACED,
    STAGING,
    WEIGHTS,
    check_name,
    read_regular,
)
from fusion.store.lookup import find, find_by_hash, read_folder, read_settled
from fusion.store.manifest import Manifest
from fusion.store.parts import File
from fusion.store.trained_data import note_ambiguous_labels
from fusion.store.writing import LOCK_SECONDS, check_free, retire, settle, sync_folder, writing
from fusion.text import listed, printable, shortened

log = logging.getLogger(__name__)

_NOTED: set[str] = set()  # hashes of artifacts without a checksum that this process has logged
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
    """Store an artifact as STORE/NAME and return that folder. `manifest.files` is set here.

    An artifact that is overwritten is kept in STORE/.replaced if a fusion of the store needs it.

    Raises:
        UserError: the name is not allowed or taken, or another process has been writing it for `wait` seconds.
    """
    check_name(manifest.name)
    store.mkdir(parents=True, exist_ok=True)
    with writing(store, manifest.name, wait):
        settle(store, manifest.name)
        check_free(manifest.name, manifest.kind, store, overwrite)
        final, staged = store / manifest.name, store / STAGING / f"{manifest.name}{NEW}"
        try:
            manifest = _stage(staged, manifest, weights, head)
            old = store / STAGING / f"{manifest.name}{OLD}"
            if final.exists():
                os.replace(final, old)
            os.replace(staged, final)
            sync_folder(store)
            if old.exists():
                retire(store, old, manifest)
                sync_folder(store)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return final


def load(reference: str, store: Path) -> Artifact:
    """Read an artifact by name or path, and check its files against the manifest.

    Raises:
        UserError: the artifact does not exist, or one of its files is missing, truncated or changed.
    """
    return read_settled(lambda: find(reference, store), read)


def load_by_hash(hash: str, name: str, store: Path) -> Artifact:
    """Read the artifact with this hash, a source of a fusion.

    Raises:
        UserError: it was removed, or one of its files is missing, truncated or changed.
    """
    artifact = read_settled(lambda: find_by_hash(hash, name, store), read)
    # It may have been overwritten between the two; then it is kept, and found, elsewhere.
    return artifact if artifact.manifest.hash == hash else read(find_by_hash(hash, name, store))


def read(folder: Path) -> Artifact:
    """The artifact in `folder`, its files checked against its manifest."""
    manifest = read_folder(folder)
    if manifest.checksum is None and manifest.hash not in _NOTED:
        _NOTED.add(manifest.hash)
        log.info(
            "%s: its manifest has no checksum (stored by version 0.1), so changes of it are not detected; training it "
            "again with overwrite=true adds one",
            folder,
        )
        note_ambiguous_labels(manifest)
    weights, head = (_read_tensors(folder / file, manifest.files[file]) for file in (WEIGHTS, HEAD))
    return Artifact(path=folder, manifest=manifest, weights=weights, head=head)


def adopt(artifact: Artifact, store: Path) -> None:
    """Copy a source of another store to STORE/.replaced, unless this store has it, under whatever name.

    Raises:
        UserError: it was changed meanwhile.
    """
    manifest = artifact.manifest
    with contextlib.suppress(UserError):
        find_by_hash(manifest.hash, manifest.name, store)
        return
    kept = store / REPLACED / f"{manifest.name}-{manifest.hash[:8]}"
    staged = store / STAGING / f"{kept.name}{COPY}"
    store.mkdir(parents=True, exist_ok=True)
    with writing(store, kept.name):
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        try:
            for file in (WEIGHTS, HEAD):
                _write(staged / file, read_regular(artifact.path / file, manifest.files[file].bytes))
            _write(staged / MANIFEST, manifest.to_json().encode("utf-8"))
            if read(staged).manifest.hash != manifest.hash:
                raise UserError(f"{artifact.path}: was changed while it was copied to {store}; run this again")
            kept.parent.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # another process has just copied the same there
                os.replace(staged, kept)
            sync_folder(kept.parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def match_keys(expected: Mapping[str, Sequence[int]], found: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """Refuse tensors that are not exactly the expected ones, by name and shape.

    Raises:
        UserError: names `path` and lists what is missing, unexpected, or of another shape.
    """
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    shapes = [
        f"{key} {tuple(found[key].shape)}, expected {tuple(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key].shape) != tuple(shape)
    ]
    kinds = (("missing", missing), ("unexpected", unexpected))
    problems = [f"{title}: {listed(keys)}" for title, keys in kinds if keys]
    problems += [f"of another shape: {', '.join(shapes[:5])}"] if shapes else []
    if problems:
        raise UserError(f"{path}: does not fit the model; {'; '.join(problems)}")


def check_numbers(values: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """Refuse stored tensors that are no floats or not finite.

    Raises:
        UserError: names `path` and the tensor.
    """
    for name, tensor in values.items():
        if tensor.dtype not in FLOATS:
            raise UserError(f"{path}: {listed([name])} is {tensor.dtype}, expected a float; {FIX}")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {listed([name])} has values that are not finite; {FIX}")


def copy_stored(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """`copy_into` and `check_numbers` of values from a store."""
    check_numbers(values, path)
    copy_into(parameters, values, path)


def copy_into(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """Copy values into a model's parameters of exactly the same names and shapes.

    Raises:
        UserError: names `path`, where the values come from, and what differs.
    """
    match_keys({name: tuple(parameter.shape) for name, parameter in parameters.items()}, values, path)
    for name, parameter in parameters.items():
        parameter.data.copy_(values[name])


def _stage(
    folder: Path, manifest: Manifest, weights: Mapping[str, torch.Tensor], head: Mapping[str, torch.Tensor]
) -> Manifest:
    """Write an artifact into `folder`, flushed to the disk, and return the manifest with its files."""
    folder.mkdir(parents=True)
    files = {}
    for file, tensors in ((WEIGHTS, weights), (HEAD, head)):
        content = safetensors.torch.save({key: _plain(tensor) for key, tensor in tensors.items()})
        files[file] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        _write(folder / file, content)
    manifest = manifest.changed(files=files)
    text = manifest.to_json()
    Manifest.from_json(text, folder / MANIFEST)  # an artifact that cannot be read again must not be stored
    _write(folder / MANIFEST, text.encode("utf-8"))
    sync_folder(folder)
    return manifest


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    # A copy: safetensors refuses tensors that share memory and tensors that are not contiguous.
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
            f"{path}: was changed, its sha256 is {found[:12]}, expected {printable(entry.sha256[:12])}; {FIX}"
        )
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # its own, or of torch for an unknown type or size
        raise UserError(f"{path}: is not a safetensors file ({shortened(first_line(error))}); {FIX}") from None
