"""Writing, reading and verifying the weights of an artifact: safetensors only, hashes checked.

Writers of one name wait for each other. Readers take no lock (a store may be read-only): a folder gets its name by a
rename, and a reader that met an overwrite reads again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from fusion.errors import UserError, first_line
from fusion.store import lookup
from fusion.store.compatibility import note_ambiguous_labels
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
from fusion.store.manifest import Manifest
from fusion.store.parts import File
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
    """Store an artifact as STORE/NAME and return that folder; `manifest.files` is set here.

    An artifact that is overwritten is kept in STORE/.replaced if a fusion of the store needs it. UserError: the name is
    not allowed or taken, or another process has been writing it for `wait` seconds.
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
    """Read an artifact by name or path; UserError if it does not exist, or a file does not fit the manifest."""
    return lookup.read_settled(lambda: lookup.find(reference, store), read)


def load_by_hash(hash: str, name: str, store: Path) -> Artifact:
    """Read the artifact with this hash, a source of a fusion; UserError as `load`."""
    artifact = lookup.read_settled(lambda: lookup.find_by_hash(hash, name, store), read)
    # It may have been overwritten between the two; then it is kept, and found, elsewhere.
    return artifact if artifact.manifest.hash == hash else read(lookup.find_by_hash(hash, name, store))


def read(folder: Path) -> Artifact:
    """The artifact in `folder`, its files checked against its manifest."""
    manifest = lookup.read_folder(folder)
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
    """Copy a source of another store to STORE/.replaced, unless this store has it, under whatever name."""
    manifest = artifact.manifest
    with contextlib.suppress(UserError):
        lookup.find_by_hash(manifest.hash, manifest.name, store)
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
    """Refuse tensors that are not exactly the expected ones, by name and shape."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    shapes = [
        f"{key} {tuple(found[key].shape)}, expected {tuple(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key].shape) != tuple(shape)
    ]
    kinds = {"missing": listed(missing), "unexpected": listed(unexpected), "of another shape": ", ".join(shapes[:5])}
    if missing or unexpected or shapes:
        problems = [f"{title}: {text}" for title, text in kinds.items() if text not in ("", "nothing")]
        raise UserError(f"{path}: does not fit the model; {'; '.join(problems)}")


def check_numbers(values: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """Refuse stored tensors that are no floats or not finite."""
    for name, tensor in values.items():
        if tensor.dtype not in FLOATS:
            raise UserError(f"{path}: {listed([name])} is {tensor.dtype}, expected a float; {FIX}")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {listed([name])} has values that are not finite; {FIX}")


def copy_stored(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """`check_numbers` of values from a store, then `copy_into`."""
    check_numbers(values, path)
    copy_into(parameters, values, path)


def copy_into(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """Copy values, which come from `path`, into a model's parameters of exactly the same names and shapes."""
    match_keys({name: tuple(parameter.shape) for name, parameter in parameters.items()}, values, path)
    for name, parameter in parameters.items():
        parameter.data.copy_(values[name])


# --- verify -----------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """One line of `verify`. problem: empty for a sound artifact. note: what could not be checked."""

    place: str
    problem: str
    note: str

    def __str__(self) -> str:
        text = f"problem  {self.place}: {self.problem}" if self.problem else f"ok       {self.place}{self.note}"
        return printable(text.replace("\n", " "))


Shapes = Callable[[Manifest, Sequence[Manifest], Path], Mapping[str, Mapping[str, tuple[int, ...]] | None]]
"""From a manifest, those of its sources and the artifact's folder to the tensors that each of its files must have.

None for a file that the manifest does not determine. It raises UserError for a manifest that describes no model.
"""


def verify(store: Path, shapes: Shapes, name: str | None = None) -> Iterator[Verdict]:
    """One verdict per artifact, replaced ones too; with `name`, of that one alone. UserError if there is none."""
    lookup.check_store(store)
    found = list(lookup.scan(store, only=name))
    if name is not None and not found:
        raise UserError(lookup.unknown_name(name, store))
    for one in found:
        no_checksum = one.manifest is not None and one.manifest.checksum is None
        note = " (its manifest has no checksum)" if no_checksum else ""
        problem = _problem(one, store, shapes)
        if problem:  # again: it or a source may have been overwritten during the check
            problem = "".join(_problem(again, store, shapes) for again in lookup.scan(store, only=one.place))
        yield Verdict(one.place, problem, note)


def _problem(found: lookup.Found, store: Path, shapes: Shapes) -> str:
    if found.manifest is None:
        return found.problem
    try:
        artifact = read(found.folder)
        files = {entry.name for entry in found.folder.iterdir()}
        if extra := sorted(files - {MANIFEST, WEIGHTS, HEAD}):
            return f"{found.folder}: {', '.join(extra)} is no part of an artifact; move it elsewhere"
        expected = shapes(artifact.manifest, lookup.source_manifests(artifact.manifest, store), artifact.path)
        for file, tensors in ((WEIGHTS, artifact.weights), (HEAD, artifact.head)):
            if (tensors_of := expected[file]) is not None:
                match_keys(tensors_of, tensors, artifact.path / file)
            check_numbers(tensors, artifact.path / file)
    except (UserError, FileNotFoundError) as error:  # the folder may be replaced between two reads
        return str(error)
    return ""


# --- files ------------------------------------------------------------------------------------------


def _stage(
    folder: Path, manifest: Manifest, weights: Mapping[str, torch.Tensor], head: Mapping[str, torch.Tensor]
) -> Manifest:
    """Write an artifact into `folder`, flushed to the disk, and return the manifest with its files."""
    folder.mkdir(parents=True)
    files = {}
    for file, tensors in ((WEIGHTS, weights), (HEAD, head)):
        # Copies: safetensors refuses tensors that share memory and tensors that are not contiguous.
        plain = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        content = safetensors.torch.save(plain)
        files[file] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        _write(folder / file, content)
    manifest = manifest.changed(files=files)
    text = manifest.to_json()
    Manifest.from_json(text, folder / MANIFEST)  # an artifact that cannot be read again must not be stored
    _write(folder / MANIFEST, text.encode("utf-8"))
    sync_folder(folder)
    return manifest


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
