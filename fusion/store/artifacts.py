"""Write, read and verify the weights of artifacts: safetensors files with checksums."""

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
from fusion.store.layout import FIX, HEAD, MANIFEST, NEW, OLD, REPLACED, STAGING, WEIGHTS, check_name, read_regular
from fusion.store.manifest import Manifest
from fusion.store.manifest_parts import File
from fusion.store.writing import LOCK_SECONDS, archive, check_free, recover, sync_folder, writing
from fusion.text import listed, printable, shortened

log = logging.getLogger(__name__)

_NOTED: set[str] = set()  # artifacts without a checksum, by hash, already logged by this process
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Artifact:
    """A stored artifact with its tensors on the CPU."""

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
    """Save an artifact as STORE/NAME. Raises UserError if the name is invalid, taken, or locked for `wait` seconds."""
    check_name(manifest.name)
    store.mkdir(parents=True, exist_ok=True)
    with writing(store, manifest.name, wait):
        recover(store, manifest.name)
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
                archive(store, old, manifest)
                sync_folder(store)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return final


def load(reference: str, store: Path) -> Artifact:
    """Read an artifact by name or path. Raises UserError if it is missing or does not match its manifest."""
    return lookup.read_settled(lambda: lookup.find(reference, store), read)


def load_by_hash(hash: str, name: str, store: Path) -> Artifact:
    """Read the source of a fusion by its hash. Raises UserError like `load`."""
    artifact = lookup.read_settled(lambda: lookup.find_by_hash(hash, name, store), read)
    # If it was overwritten meanwhile, it has moved to another directory.
    return artifact if artifact.manifest.hash == hash else read(lookup.find_by_hash(hash, name, store))


def read(folder: Path) -> Artifact:
    """Read the artifact in `folder` and check its files against its manifest."""
    manifest = lookup.read_folder(folder)
    if manifest.checksum is None and manifest.hash not in _NOTED:
        _NOTED.add(manifest.hash)
        log.info(
            "%s: the manifest was written by version 0.1 and has no checksum, so modifications are not detected; "
            "retrain it with overwrite=true to add one",
            folder,
        )
        note_ambiguous_labels(manifest)
    weights, head = (_read_tensors(folder / file, manifest.files[file]) for file in (WEIGHTS, HEAD))
    return Artifact(path=folder, manifest=manifest, weights=weights, head=head)


def adopt(artifact: Artifact, store: Path) -> None:
    """Copy a source of a different store to STORE/.replaced, unless this store contains it under any name."""
    manifest = artifact.manifest
    with contextlib.suppress(UserError):
        lookup.find_by_hash(manifest.hash, manifest.name, store)
        return
    kept = store / REPLACED / f"{manifest.name}-{manifest.hash[:8]}"
    staged = store / STAGING / f"{kept.name}{NEW}"
    store.mkdir(parents=True, exist_ok=True)
    with writing(store, kept.name):
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        try:
            for file in (WEIGHTS, HEAD):
                _write(staged / file, read_regular(artifact.path / file, manifest.files[file].bytes))
            _write(staged / MANIFEST, manifest.to_json().encode("utf-8"))
            if read(staged).manifest.hash != manifest.hash:
                raise UserError(f"{artifact.path} was modified while it was copied to {store}; rerun the command")
            kept.parent.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # another process has just copied the same artifact
                os.replace(staged, kept)
            sync_folder(kept.parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def match_keys(expected: Mapping[str, Sequence[int]], found: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """Raise UserError if the tensors do not have exactly the expected names and shapes."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    shapes = [
        f"{key} {tuple(found[key].shape)}, expected {tuple(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key].shape) != tuple(shape)
    ]
    problems = [
        f"{title}: {listed(keys)}" for title, keys in (("missing", missing), ("unexpected", unexpected)) if keys
    ]
    problems += [f"of a different shape: {', '.join(shapes[:5])}"] if shapes else []
    if problems:
        raise UserError(f"{path} does not match the model; {'; '.join(problems)}")


def check_numbers(values: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """Raise UserError if a stored tensor is not floating point or not finite."""
    for name, tensor in values.items():
        if tensor.dtype not in FLOATS:
            raise UserError(f"{path}: {listed([name])} is {tensor.dtype}, expected a floating-point type; {FIX}")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {listed([name])} contains NaN or infinity; {FIX}")


def copy_stored(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """Check stored values with `check_numbers`, then `copy_into`."""
    check_numbers(values, path)
    copy_into(parameters, values, path)


def copy_into(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor], path: Path | str) -> None:
    """Copy values from `path` into model parameters of exactly the same names and shapes."""
    match_keys({name: tuple(parameter.shape) for name, parameter in parameters.items()}, values, path)
    for name, parameter in parameters.items():
        parameter.data.copy_(values[name])


class Verdict(NamedTuple):
    """One line of `verify`. `problem` is empty for a valid artifact; `note` lists missing checks."""

    place: str
    problem: str
    note: str

    def __str__(self) -> str:
        text = f"problem  {self.place}: {self.problem}" if self.problem else f"ok       {self.place}{self.note}"
        return printable(text.replace("\n", " "))


Shapes = Callable[[Manifest, Sequence[Manifest], Path], Mapping[str, Mapping[str, tuple[int, ...]] | None]]
"""Maps (manifest, manifests of the sources, directory) to the expected tensor shapes of each file, None if unknown."""


def verify(store: Path, shapes: Shapes, name: str | None = None) -> Iterator[Verdict]:
    """Yield a verdict per artifact, including replaced ones, or only for `name`. Raises UserError if it is missing."""
    lookup.check_store(store)
    found = list(lookup.scan(store, only=name))
    if name is not None and not found:
        raise UserError(lookup.unknown_name(name, store))
    for one in found:
        no_checksum = one.manifest is not None and one.manifest.checksum is None
        note = " (its manifest has no checksum)" if no_checksum else ""
        problem = _problem(one, store, shapes)
        if problem:  # retry: it or a source may have been overwritten during the check
            again = next(lookup.scan(store, only=one.place), None)
            removed = "" if one.replaced else f"{one.folder}: was removed during the check"
            problem = removed if again is None else _problem(again, store, shapes)
        yield Verdict(one.place, problem, note)


def _problem(found: lookup.Found, store: Path, shapes: Shapes) -> str:
    if found.manifest is None:
        return found.problem
    try:
        artifact = read(found.folder)
        files = {entry.name for entry in found.folder.iterdir()}
        if extra := sorted(files - {MANIFEST, WEIGHTS, HEAD}):
            return f"{found.folder}: {', '.join(extra)} does not belong to an artifact; move it elsewhere"
        expected = shapes(artifact.manifest, lookup.source_manifests(artifact.manifest, store), artifact.path)
        for file, tensors in ((WEIGHTS, artifact.weights), (HEAD, artifact.head)):
            if (tensors_of := expected[file]) is not None:
                match_keys(tensors_of, tensors, artifact.path / file)
            check_numbers(tensors, artifact.path / file)
    except (UserError, FileNotFoundError) as error:  # the folder may be replaced between two reads
        return str(error)
    return ""


def _stage(
    folder: Path, manifest: Manifest, weights: Mapping[str, torch.Tensor], head: Mapping[str, torch.Tensor]
) -> Manifest:
    """Write an artifact into `folder`, flush it to disk, and return the manifest with its files."""
    folder.mkdir(parents=True)
    files = {}
    for file, tensors in ((WEIGHTS, weights), (HEAD, head)):
        # safetensors rejects tensors that share memory or are not contiguous.
        plain = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        content = safetensors.torch.save(plain)
        files[file] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        _write(folder / file, content)
    manifest = manifest.changed(files=files)
    text = manifest.to_json()
    Manifest.from_json(text, folder / MANIFEST)  # raises if the manifest cannot be read back
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
        raise UserError(f"{path} was modified: sha256 {found[:12]}, expected {printable(entry.sha256[:12])}; {FIX}")
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # a SafetensorError, or an error of torch for an unknown type or size
        raise UserError(f"{path} is not a valid safetensors file ({shortened(first_line(error))}); {FIX}") from None
