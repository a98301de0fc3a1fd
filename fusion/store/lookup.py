"""Finding artifacts by name, path or hash, also while another process overwrites them: readers take no lock."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fusion.errors import UserError
from fusion.store.layout import FIX, HEAD, MANIFEST, OLD, REPLACED, STAGING, WEIGHTS, is_name, read_regular
from fusion.text import listed, shortened

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

READS = 50  # attempts to read an artifact that is overwritten meanwhile
MANIFEST_BYTES = 32 * 2**20
# What a folder without a manifest is, by a file that only this format has. The first that is there decides.
FORMATS = {
    "adapter_fusion_config.json": "is a fusion of AdapterHub's adapters",
    "head_config.json": "is a prediction head of AdapterHub's adapters",
    "pytorch_adapter.bin": "is an adapter of AdapterHub's adapters",
    "adapter_model.safetensors": "is a peft adapter",
    "adapter_config.json": "is an adapter of peft or AdapterHub",
    "modules.json": "is a sentence-transformers model",
    "config.json": "is a transformers model, which backbone.name_or_path= takes",
    "result.json": "is the output folder of a run, whose result.json names the artifact",
    "last.ckpt": "has the checkpoints of an unfinished run, which its own command resumes",
    WEIGHTS: f"has lost its {MANIFEST}: copy it again, or train it again",
    HEAD: f"has lost its {MANIFEST}: copy it again, or train it again",
}


@dataclass(frozen=True)
class Found:
    """A folder that is or should be an artifact, with its manifest or what is wrong with it.

    Attributes:
        place: below the store, `mnli` or `.replaced/mnli-0123abcd`.
    """

    place: str
    folder: Path
    manifest: Manifest | None
    problem: str = ""

    @property
    def replaced(self) -> bool:
        return self.place.startswith(".")


def names(store: Path) -> list[str]:
    """The artifacts of the store, sorted by name."""
    return sorted(folders(store))


def folders(store: Path) -> dict[str, Path]:
    """The folder of each artifact of the store, by name."""
    # An overwrite moves the old folder to STAGING, then the new one in: read in this order, none is missed. An old
    # folder that a killed writer left in STAGING is still the artifact of that name.
    current = _current(store)
    old = [
        folder for folder in entries(store / STAGING) if folder.name.endswith(OLD) and _is_artifact(folder)
    ]
    return {folder.name.removesuffix(OLD): folder for folder in old} | current | _current(store)


def _current(store: Path) -> dict[str, Path]:
    return {f.name: f for f in entries(store) if not f.name.startswith(".") and _is_artifact(f)}


def _is_artifact(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def entries(folder: Path) -> list[Path]:
    """What is in a folder, by name; nothing where it cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def find(reference: str, store: Path) -> Path:
    """The folder of an artifact: a name in the store first, then a path.

    Raises:
        UserError: the nearest names, and what the store has.
    """
    if is_name(reference) and (folder := _named(reference, store)) is not None:
        return folder
    try:
        path = Path(reference).expanduser()
        if reference and _is_artifact(path):
            return path
        is_there = reference and path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{shortened(reference, 300)}: cannot be read as a folder ({error})") from None
    raise UserError(why_no_artifact(path) if is_there else unknown_name(reference, store))


def _named(name: str, store: Path) -> Path | None:
    """The folder of a name; while it is being replaced, wait for the new one.

    Where the writer was killed between its two renames, the old artifact is whole, and is read from STAGING.
    """
    folder, old = store / name, store / STAGING / f"{name}{OLD}"
    for _ in range(20):
        if _is_artifact(folder):
            return folder
        if not _is_artifact(old):
            return folder if _is_artifact(folder) else None
        time.sleep(0.05)
    return old


def why_no_artifact(path: Path) -> str:
    """What is at a path without a manifest, and what was expected."""
    if path.is_file():
        return f"{path}: is a file; expected the folder of an artifact, which has a {MANIFEST}"
    if any(_is_artifact(folder) for folder in entries(path)):
        return f"{path}: is a store, not an artifact; expected store={path} artifact=NAME"
    there = {entry.name for entry in entries(path)}
    what = next((what for file, what in FORMATS.items() if file in there), "is no artifact")
    return f"{path}: this folder {what}; expected the folder of an artifact, which has a {MANIFEST}"


def unknown_name(reference: str, store: Path) -> str:
    """The message about a name that the store does not have: near ones, and what there is."""
    there = names(store)
    near = difflib.get_close_matches(reference, there, n=3, cutoff=0.6)
    text = f"no artifact {reference!r} in the store {store}"
    text += f": did you mean {' or '.join(near)}? " if near else ". "
    if there:
        text += f"It has {listed(there)}"
    else:
        text += "It is empty" if store.is_dir() else "There is no such folder (store=DIR names another)"
    return text + "; stage 1 makes an adapter: python -m fusion.stage1 +task=NAME"


def read_manifest(reference: str, store: Path) -> Manifest:
    """The manifest of an artifact, by name or path.

    Raises:
        UserError: there is no such artifact, or its manifest is damaged.
    """
    return read_settled(lambda: find(reference, store), read_folder)


Read = TypeVar("Read")


def read_settled(look: Callable[[], Path], read: Callable[[Path], Read]) -> Read:
    """`read(look())`, again if the folder was overwritten between the two."""
    for _ in range(READS - 1):
        folder = look()
        before = stamp(folder)
        try:
            return read(folder)
        except UserError:
            if before is not None and before == stamp(folder):
                raise
        time.sleep(0.01)
    return read(look())


def stamp(folder: Path) -> tuple[int, int] | None:
    """What changes when the artifact in a folder is overwritten; None: there is none."""
    try:
        state = (folder / MANIFEST).stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns


def read_folder(folder: Path) -> Manifest:
    """The manifest of the artifact in `folder`."""
    from fusion.store.manifest import Manifest  # imports pydantic, which most commands do not need

    path = folder / MANIFEST
    try:
        text = read_regular(path, most=MANIFEST_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text in UTF-8; {FIX}") from None
    return Manifest.from_json(text, path)


def scan(store: Path, only: str | None = None) -> Iterator[Found]:
    """All artifacts by name, then those that were replaced; damaged ones too. `only`: just that place."""
    places = {f.name: f for f in entries(store) if f.is_dir() and not f.name.startswith(".")}
    places = dict(sorted((places | folders(store)).items()))
    places |= {f"{REPLACED}/{f.name}": f for f in entries(store / REPLACED)}
    for place, folder in places.items():
        if only in (None, place):
            yield _read(place, folder, store)


def _read(place: str, folder: Path, store: Path) -> Found:
    def current() -> Path:
        there = folder if _is_artifact(folder) else folders(store).get(place)
        if there is None:
            read_folder(folder)  # raises: it is missing, or no regular file
        return there or folder

    try:
        there, manifest = read_settled(current, lambda there: (there, read_folder(there)))
    except UserError as error:
        return Found(place, folder, None, str(error))
    if not is_name(folder.name.removesuffix(OLD)):
        return Found(place, folder, None, f"{folder}: is no name for the store; rename the folder")
    return Found(place, there, manifest)


def artifacts(store: Path, replaced: bool = False) -> Iterator[tuple[Path, Manifest]]:
    """All artifacts of the store that can be read, by name; `replaced` adds those that were overwritten."""
    # In this order: an overwritten artifact moves from STAGING to REPLACED.
    old = [folder for folder in entries(store / STAGING) if folder.name.endswith(OLD)] if replaced else []
    for folder in old:
        try:
            yield folder, read_folder(folder)
        except UserError:
            continue
    for found in scan(store):
        if found.manifest is not None and (replaced or not found.replaced):
            yield found.folder, found.manifest


def find_by_hash(hash: str, name: str, store: Path) -> Path:
    """The folder of the artifact with this hash: `name` first, then any other of the store, also replaced ones.

    Raises:
        UserError: names the source, and what has its name now.
    """
    problem = f"nothing in the store {store} has that name or that hash"
    try:
        folder = find(name, store)
        found = read_folder(folder).hash
        if found == hash:
            return folder
        problem = f"{folder} is another artifact now ({found[:8]}), and no other in the store has that hash"
    except UserError as error:
        if name in names(store):
            problem = str(error)
    for folder, manifest in artifacts(store, replaced=True):
        if manifest.hash == hash:
            return folder
    raise UserError(
        f"source {name} ({hash[:8]}) is gone: {problem}. Copy its folder back into {store} (any name will do), or train "
        "the fusion again with the sources there are"
    )


def source_manifests(manifest: Manifest, store: Path) -> list[Manifest]:
    """The manifests of a fusion's sources, in order; empty for anything else.

    Raises:
        UserError: a source is missing or damaged.
    """
    return [read_folder(find_by_hash(source.hash, source.name, store)) for source in manifest.sources]
