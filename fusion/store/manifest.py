"""What an artifact says about itself, and how one is found. JSON only: the commands' first checks use it.

An artifact is a folder STORE/NAME with `manifest.json`, `weights.safetensors` and `head.safetensors`.
Names that begin with a dot are the store's own: `.runs` (checkpoints), `.replaced` (artifacts that were
overwritten while a fusion still needs them), `.staging` (artifacts being written), `.locks`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fusion.config import (
    POOLINGS,
    SITES,
    AdapterConfig,
    CompositionConfig,
    MethodConfig,
    TaskConfig,
)
from fusion.errors import UserError
from fusion.paths import check_relative, resolve_path
from fusion.repeats import repeated
from fusion.safe_text import quotable
from fusion.store.files import MEND, read_regular
from fusion.store.foreign import why_no_artifact
from fusion.store.settings import TYPE_NAMES, check_types, settings_of, type_name

FORMAT_VERSION = 1
KINDS = ("adapter", "fusion", "head", "lora", "bitfit", "full")
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
HEAD = "head.safetensors"
REPLACED = ".replaced"
STAGING = ".staging"
OLD = ".old"  # ending of an artifact that is just being replaced, in STAGING

MANIFEST_BYTES = 32 * 2**20  # more is no manifest
LARGEST = 2**63 - 1  # of whole numbers: what a tensor can hold
MOST_LAYERS = 10_000  # of a backbone; they are counted through
DEEPEST = 32  # how far objects and lists stand inside each other

READS = 50  # attempts to read an artifact that is overwritten meanwhile
NAME_LENGTH = 100
# Names that Windows keeps for devices, with or without an ending.
RESERVED = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10)}
NAMES_SHOWN = 20

# What shapes training or only says how a size was chosen: it does not change what the stored weights compute.
# An adapter's `bottleneck_sizes` says in which slots it stands.
ADAPTER_TRAINING_KEYS = ("name", "init", "dropout", "reduction_factor", "bottleneck_size", "layers", "drop")
# `fusion` is a name; of what it was, `kept` and the weights remain.
COMPOSITION_TRAINING_KEYS = ("dropout", "value_penalty", "fusion", "keep")
TUNING_KINDS = ("lora", "bitfit", "full")  # whose weights are the backbone's own
OPTIONAL = ("method", "multitask", "checksum")  # keys that manifests of the first release do not have


@dataclass(frozen=True)
class Manifest:
    """Everything that is needed to rebuild the artifact's model, and where it came from.

    `adapter` holds the adapter's settings and its `bottleneck_sizes` by slot, `{"0.feedforward": 48, ...}`;
    `composition` the settings of a fusion; `sources` its adapters in order, `{"name", "hash"}`. `multitask` holds
    the tasks of an artifact that was trained on several at once, by name, `{"task", "head"}`; `task` and `head` are
    the first one's then. `method` holds the settings of what trained inside the backbone itself, where something
    did. `files` is filled in when it is saved. `checksum` is what the file had (None: it had none, as in version 0.1);
    `to_json` always computes it from the content.
    """

    kind: str
    name: str
    task: dict[str, Any]
    backbone: dict[str, Any]
    adapter: dict[str, Any] | None
    composition: dict[str, Any] | None
    head: dict[str, Any]
    sources: list[dict[str, Any]]
    data: dict[str, Any]
    metrics: dict[str, Any]
    seed: int
    run: dict[str, Any]
    versions: dict[str, Any]
    result: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    method: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION
    multitask: dict[str, dict[str, Any]] | None = None
    checksum: str | None = field(default=None, compare=False)

    @property
    def hash(self) -> str:
        """sha256 (64 hex digits) over the weights file and all that decides what those weights compute.

        The head counts only where there is nothing else (kind head): a fusion uses an adapter without it.
        """
        if not self.files:
            raise ValueError("a manifest has a hash once its artifact is saved")
        parts: dict[str, Any] = {
            "kind": self.kind,
            "backbone": self.backbone["fingerprint"],
            "weights": self.files[WEIGHTS]["sha256"],
            "adapter": _without(self.adapter, ADAPTER_TRAINING_KEYS),
            "composition": _without(self.composition, COMPOSITION_TRAINING_KEYS),
            "sources": [source["hash"] for source in self.sources],
        }
        if self.method is not None:
            parts["method"] = _without(self.method, ("dropout",))
        if self.kind == "head":
            parts["head"] = self.files[HEAD]["sha256"]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def placement(self) -> dict[str, Any]:
        """Where the artifact's adapters stand; sources that are fused together share it."""
        adapter = self.adapter or {}
        return {"adapter.sites": adapter.get("sites"), "adapter.reads": adapter.get("reads")}

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """The task that the artifact was trained on, or each of several, as `TaskConfig` has them."""
        return [entry["task"] for entry in (self.multitask or {"": {"task": self.task}}).values()]

    @property
    def task_names(self) -> list[str]:
        """Those of `tasks`."""
        return [str(task["name"]) for task in self.tasks]

    @property
    def origin(self) -> dict[str, str] | None:
        """`{"name", "hash"}` of the artifact whose weights the training started from, `init_from`."""
        origin = self.run.get("init_from")
        if isinstance(origin, dict) and all(isinstance(origin.get(key), str) for key in ("name", "hash")):
            return origin
        return None

    def labels_read_as(self, task: str | None) -> str | None:
        """The way in which training read the labels of a task; None where it is not known."""
        way = self.data.get("labels", {}).get(task)
        return way if isinstance(way, str) else None

    def to_json(self) -> str:
        """The text of `manifest.json`. NaN and infinities, which JSON has no word for, become null."""
        values = {f.name: getattr(self, f.name) for f in fields(self)} | {"checksum": None}
        for key in OPTIONAL:
            if values[key] is None:
                del values[key]  # as in the stores that did not know it
        ordered = _finite({"format_version": values.pop("format_version"), **values})
        ordered["checksum"] = checksum_of(ordered)
        return json.dumps(ordered, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> Manifest:
        """Reads and checks the text of `path`.

        Raises:
            UserError: names `path` and the key that is unknown, missing or of another type.
        """
        try:
            return cls._checked(_read_json(text, path), path)
        except UserError as error:  # what it quotes from the file may hold anything
            raise UserError(quotable(str(error))) from None

    @classmethod
    def _checked(cls, values: Any, path: Path) -> Manifest:
        if not isinstance(values, dict):
            raise UserError(f"{path}: expected a JSON object, found {type_name(values)}")
        version = values.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version is {ascii(version)[:60]} and this version of fusion reads {FORMAT_VERSION}; "
                "use the version that wrote it, or train the artifact again"
            )
        content, values = values, {**dict.fromkeys(OPTIONAL), **values}
        _check_keys(values, {f.name for f in fields(cls)}, path)
        for key, allowed in TOP_LEVEL.items():
            _check_type(values[key], allowed, key, path)
        if values["kind"] not in KINDS:
            raise UserError(f"{path}: kind is {short(values['kind'])}, expected one of {', '.join(KINDS)}")
        for group, inner in INNER.items():
            for key, allowed in inner.items():
                if key not in values[group]:
                    raise UserError(f"{path}: key {group}.{key} is missing")
                _check_type(values[group][key], allowed, f"{group}.{key}", path)
        _check_parts(values, path)
        if "checksum" in content and checksum_of(content) != content["checksum"]:
            raise UserError(f"{path}: its content does not match its checksum, so it was changed; {MEND}")
        return cls(**values)


def checksum_of(content: Mapping[str, Any]) -> str:
    """sha256 (64 hex digits) over all of a manifest but its checksum, whatever the white space of the file.

    The order of keys counts: that of `multitask` is the order of the tasks.
    """
    others = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(others, separators=(",", ":")).encode()).hexdigest()


Types = tuple[type, ...]
NoneType = type(None)
TOP_LEVEL: dict[str, Types] = {
    "kind": (str,),
    "name": (str,),
    "task": (dict,),
    "backbone": (dict,),
    "adapter": (dict, NoneType),
    "composition": (dict, NoneType),
    "head": (dict,),
    "sources": (list,),
    "data": (dict,),
    "metrics": (dict,),
    "seed": (int,),
    "run": (dict,),
    "versions": (dict,),
    "result": (dict,),
    "files": (dict,),
    "method": (dict, NoneType),
    "multitask": (dict, NoneType),
    "checksum": (str, NoneType),
}
INNER: dict[str, dict[str, Types]] = {
    "backbone": {
        "name_or_path": (str,),
        "revision": (str, NoneType),
        "fingerprint": (str,),
        "family": (str,),
        "hidden_size": (int,),
        "layers": (int,),
    },
    "head": {"pooling": (str,), "layers": (int,), "outputs": (int,), "dropout": (int, float)},
    "data": {"max_length": (int,), "fingerprints": (dict,)},
    "run": {"identity": (str,), "config": (dict,), "overrides": (list,), "directory": (str,)},
}
# Not in all manifests: `package` is in those of the first stores, `trust_remote_code` where it is true,
# and `tokenizer` (its hash) since 0.2.
BACKBONE_SOMETIMES: dict[str, Types] = {
    "package": (str, NoneType),
    "trust_remote_code": (bool,),
    "tokenizer": (str,),
}
ADAPTER: dict[str, Types] = {
    "sites": (list,),
    "reads": (str,),
    "nonlinearity": (str,),
    "scaling": (int, float, str),
    "dropout": (int, float),
    "bottleneck_sizes": (dict,),
}
CHOSEN: dict[str, Types] = {"kept": (dict,), "continued": (str,)}  # of a composition, beyond its settings


def _check_type(value: Any, allowed: Types, key: str, path: Path) -> None:
    if type(value) not in allowed:  # not isinstance: true is no whole number here
        expected = " or ".join(TYPE_NAMES[kind] for kind in allowed)
        raise UserError(f"{path}: {key} is {type_name(value)}, expected {expected}")


def _check_keys(values: Mapping[str, Any], expected: set[str], path: Path) -> None:
    missing, unknown = sorted(expected - values.keys()), sorted(values.keys() - expected)
    if missing:
        raise UserError(f"{path}: {_count('key', missing)} missing: {', '.join(missing)}")
    if unknown:
        raise UserError(f"{path}: {_count('key', unknown)} unknown to this version: {', '.join(unknown)}")


def _check_only(values: Mapping[str, Any], known: Mapping[str, Any], key: str, path: Path) -> None:
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise UserError(f"{path}: {key}.{unknown[0]} is unknown to this version")


def _check_least(value: int, least: int, key: str, path: Path) -> None:
    if value < least:
        raise UserError(f"{path}: {key} is {value}, expected at least {least}")


def _check_parts(values: dict[str, Any], path: Path) -> None:
    """What the loader relies on, part by part; `values` has the right keys and types at the top."""
    _check_stored_name(values["name"], "name", path)
    _check_least(values["seed"], 0, "seed", path)
    _check_least(values["data"]["max_length"], 1, "data.max_length", path)
    _check_type(values["data"].get("labels", {}), (dict,), "data.labels", path)  # not in those of version 0.1
    backbone = values["backbone"]
    _check_only(backbone, INNER["backbone"] | BACKBONE_SOMETIMES, "backbone", path)
    for key in ("hidden_size", "layers"):
        _check_least(backbone[key], 1, f"backbone.{key}", path)
    if backbone["layers"] > MOST_LAYERS:
        raise UserError(f"{path}: backbone.layers is {backbone['layers']}, expected at most {MOST_LAYERS}")
    for key, allowed in BACKBONE_SOMETIMES.items():
        if key in backbone:
            _check_type(backbone[key], allowed, f"backbone.{key}", path)
    _check_type(values["result"].get("parameters", {}), (dict,), "result.parameters", path)
    _check_task(values["task"], "task", path)
    _check_head(values["head"], "head", path)
    _check_kind(values, path)
    _check_sources(values, path)
    if values["multitask"] == {}:
        raise UserError(f"{path}: multitask is empty: expected null, or an entry for each task")
    for name, entry in (values["multitask"] or {}).items():
        key = f"multitask.{name}"
        _check_type(entry, (dict,), key, path)
        _check_only(entry, {"task": 0, "head": 0}, key, path)
        for part in ("task", "head"):
            _check_type(entry.get(part), (dict,), f"{key}.{part}", path)
        for part, allowed in INNER["head"].items():
            _check_type(entry["head"].get(part), allowed, f"{key}.head.{part}", path)
        _check_head(entry["head"], f"{key}.head", path)
        _check_task(entry["task"], f"{key}.task", path)
    _check_files(values["files"], path)


def _check_stored_name(name: str, key: str, path: Path) -> None:
    if not is_name(name):
        raise UserError(f"{path}: {key} is {short(name)}, which is no name for the store; {MEND}")


def _check_task(task: dict[str, Any], key: str, path: Path) -> None:
    _check_type(task.get("name"), (str,), f"{key}.name", path)
    if (why := check_relative(task["name"])) is not None:  # it is a folder of data.dir
        raise UserError(f"{path}: {key}.name is {short(task['name'])}: {why}")
    _check_type(task.get("labels"), (list, NoneType), f"{key}.labels", path)
    check_types(TaskConfig, task, f"{path}: {key}")


def _check_head(head: dict[str, Any], key: str, path: Path) -> None:
    _check_only(head, INNER["head"], key, path)
    if head["pooling"] not in POOLINGS:
        expected = ", ".join(POOLINGS)
        raise UserError(f"{path}: {key}.pooling is {short(head['pooling'])}, expected one of {expected}")
    if head["layers"] not in (1, 2):
        raise UserError(f"{path}: {key}.layers is {head['layers']}, expected 1 or 2")
    if not 0 <= head["dropout"] < 1:
        raise UserError(f"{path}: {key}.dropout is {head['dropout']}, expected 0 <= dropout < 1")
    _check_least(head["outputs"], 1, f"{key}.outputs", path)


def _check_kind(values: dict[str, Any], path: Path) -> None:
    """Each kind has its own part, and no other's."""
    kind = values["kind"]
    part = "method" if kind in TUNING_KINDS else {"adapter": "adapter", "fusion": "composition"}.get(kind)
    for key in sorted(("adapter", "composition", "method"), key=lambda key: key != part):
        _check_type(values[key], (dict,) if key == part else (NoneType,), key, path)
    if kind == "adapter":
        _check_adapter(values["adapter"], values["backbone"]["layers"], path)
    if kind == "fusion":
        settings = {key: value for key, value in values["composition"].items() if key not in CHOSEN}
        _check_type(settings.get("name"), (str,), "composition.name", path)
        settings_of(CompositionConfig, settings, f"{path}: composition")
        for key, allowed in CHOSEN.items():
            if key in values["composition"]:
                _check_type(values["composition"][key], allowed, f"composition.{key}", path)
    if part == "method":
        _check_type(values["method"].get("name"), (str,), "method.name", path)
        method = settings_of(MethodConfig, values["method"], f"{path}: method")
        if method.name.removeprefix("multitask_") != kind:
            raise UserError(f"{path}: method.name is {method.name}, and kind is {kind}")


def _check_adapter(adapter: dict[str, Any], layers: int, path: Path) -> None:
    for key, allowed in ADAPTER.items():
        _check_type(adapter.get(key), allowed, f"adapter.{key}", path)
    sizes: dict[str, Any] = adapter["bottleneck_sizes"]
    settings = settings_of(AdapterConfig, _without(adapter, ("bottleneck_sizes",)) or {}, f"{path}: adapter")
    if not sizes:
        raise UserError(
            f"{path}: adapter.bottleneck_sizes is empty, and an adapter stands in one slot at least"
        )
    seen: dict[str, int] = {}
    for slot, size in sizes.items():
        key = f"adapter.bottleneck_sizes.{slot}"
        _check_type(size, (int,), key, path)
        _check_least(size, 1, key, path)
        place = re.fullmatch(rf"(0|[1-9][0-9]{{0,5}})\.({'|'.join(SITES)})", slot)
        if place is None or place[2] not in settings.sites or int(place[1]) >= layers:
            raise UserError(
                f"{path}: {key} is no slot of {layers} layers with {', '.join(settings.sites)}, such as "
                f"0.{settings.sites[0]}"
            )
        if settings.shared and seen.setdefault(place[2], size) != size:
            raise UserError(f"{path}: {key} is {size}, and the layers of a shared adapter have one size")


def _check_sources(values: dict[str, Any], path: Path) -> None:
    sources = values["sources"]
    if values["kind"] == "fusion" and not sources:
        raise UserError(f"{path}: sources is empty, and a fusion has at least one")
    for position, source in enumerate(sources):
        key = f"sources[{position}]"
        _check_type(source, (dict,), key, path)
        _check_only(source, {"name": 0, "hash": 0}, key, path)
        for part in ("name", "hash"):
            _check_type(source.get(part), (str,), f"{key}.{part}", path)
        _check_stored_name(source["name"], f"{key}.name", path)
    if values["kind"] != "fusion" and sources:
        raise UserError(f"{path}: sources has entries, and kind {values['kind']} has none")
    if twice := repeated(source["name"] for source in sources):
        raise UserError(
            f"{path}: sources: {', '.join(twice)} stands twice, and a source is known by its name"
        )


def _check_files(files: dict[str, Any], path: Path) -> None:
    _check_only(files, {WEIGHTS: 0, HEAD: 0}, "files", path)  # never a file of another place
    for file in (WEIGHTS, HEAD):
        entry = files.get(file)
        _check_type(entry, (dict,), f"files.{file}", path)
        assert isinstance(entry, dict)
        _check_only(entry, {"bytes": 0, "sha256": 0}, f"files.{file}", path)
        _check_type(entry.get("bytes"), (int,), f"files.{file}.bytes", path)
        _check_type(entry.get("sha256"), (str,), f"files.{file}.sha256", path)


def _read_json(text: str, path: Path) -> Any:
    """JSON in the narrow sense: each key once, finite numbers, text that UTF-8 can say, of a bounded depth.

    Raises:
        UserError: names `path` and what is wrong.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = repeated(key for key, _ in pairs)
            raise ValueError(f"key {short(twice[0])} stands twice")
        return values

    def constant(word: str) -> float:
        raise ValueError(f"{word} is no number")

    try:
        values = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
        _check_plain(values)
    except RecursionError:
        reason = "objects inside each other without end"
    except ValueError as error:
        reason = str(error)
    else:
        return values
    raise UserError(f"{path}: is not JSON ({reason}); copy the artifact again, or train it again")


def _check_plain(value: Any, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise ValueError(f"objects stand more than {DEEPEST} deep inside each other")
    if isinstance(value, str):
        if not value.isprintable() and re.search("[\ud800-\udfff\0]", value):
            raise ValueError(f"{short(value)} is no text")
    elif isinstance(value, int):
        if abs(value) > LARGEST:
            raise ValueError("a whole number is too large")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a number is too large")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_plain(key, depth)
            _check_plain(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_plain(inner, depth + 1)


def short(text: str, most: int = 60) -> str:
    """Text from a file as a message may show it: on one line, and not too long."""
    return ascii(text if len(text) <= most else text[:most] + "…")


def _without(values: Mapping[str, Any] | None, keys: tuple[str, ...]) -> dict[str, Any] | None:
    return None if values is None else {key: value for key, value in values.items() if key not in keys}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


def _count(noun: str, things: list[str]) -> str:
    return f"{noun} is" if len(things) == 1 else f"{noun}s are"


def check_name(name: str) -> None:
    """Refuses a name that would leave the store, or that some file system cannot hold.

    Raises:
        UserError: says what a name may be.
    """
    allowed = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None and not name.endswith(".")
    reserved = name.split(".")[0].lower() in RESERVED
    if not allowed or reserved or len(name) > NAME_LENGTH:
        shown = name if len(name) <= NAME_LENGTH else name[:NAME_LENGTH] + "…"
        why = " (the name of a device on Windows)" if reserved else ""
        raise UserError(
            f"name={shown!r}: not a name for the store{why}. Letters, digits, '.', '_' and '-' are allowed, "
            f"a letter or digit first, no '.' last, at most {NAME_LENGTH} characters"
        )


def is_name(reference: str) -> bool:
    """Whether `reference` could be a name in the store (and not only a path)."""
    try:
        check_name(reference)
    except UserError:
        return False
    return True


def names(store: Path) -> list[str]:
    """What the store has, sorted by name."""
    return sorted(folders(store))


def folders(store: Path) -> dict[str, Path]:
    """Where each artifact of the store lies."""
    if not store.is_dir():
        return {}
    # An overwrite takes the old folder to STAGING, the new one in, and the old one away: looked at in this
    # order, none is missed. What a killed writer left in STAGING is still the artifact of that name.
    standing = _standing(store)
    aside = {
        entry.name.removesuffix(OLD): entry
        for entry in (store / STAGING).glob(f"*{OLD}")
        if (entry / MANIFEST).is_file()
    }
    return aside | standing | _standing(store)


def _standing(store: Path) -> dict[str, Path]:
    entries = [entry for entry in store.iterdir() if not entry.name.startswith(".")]
    return {entry.name: entry for entry in entries if (entry / MANIFEST).is_file()}


def find(reference: str, store: Path) -> Path:
    """The folder of an artifact: a name in the store first, then a path.

    Raises:
        UserError: the nearest names, and what the store has.
    """
    if is_name(reference):
        if (store / reference / MANIFEST).is_file():
            return store / reference
        if (unsettled := _being_replaced(reference, store)) is not None:
            return unsettled
    path = Path(reference)
    try:
        path = path.expanduser()
        is_artifact, is_there = (path / MANIFEST).is_file(), path.exists()
    except (OSError, RuntimeError) as error:  # no permission, too long for a path, ~ of an unknown user
        raise UserError(f"{reference}: cannot be read as a folder ({error})") from None
    if reference and is_artifact:
        return path
    if reference and is_there:
        raise UserError(f"{reference}: {why_no_artifact(path)}")
    raise UserError(unknown_name(reference, store))


def _being_replaced(name: str, store: Path) -> Path | None:
    # An overwrite moves the old folder aside and the new one in: two renames, and a reader can come between.
    # If the writer died just there, the old artifact is whole, and is read from where it lies.
    old = store / STAGING / f"{name}{OLD}"
    for _ in range(20):
        if not (old / MANIFEST).is_file():
            break
        time.sleep(0.05)
        if (store / name / MANIFEST).is_file():
            return store / name
    if (store / name / MANIFEST).is_file():
        return store / name
    return old if (old / MANIFEST).is_file() else None


def unknown_name(reference: str, store: Path) -> str:
    """What to say of a name that the store does not have: near ones, and what there is."""
    there = names(store)
    near = difflib.get_close_matches(reference, there, n=3, cutoff=0.6)
    text = f"no artifact {reference!r} in the store {store}"
    text += f": did you mean {' or '.join(near)}? " if near else ". "
    if there:
        more = f" and {len(there) - NAMES_SHOWN} more" if len(there) > NAMES_SHOWN else ""
        text += f"It has {', '.join(there[:NAMES_SHOWN])}{more}"
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
    """`read(look())`, again where the folder was overwritten between the two: readers take no lock."""
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
    try:
        state = (folder / MANIFEST).stat()
    except OSError:
        return None
    return state.st_ino, state.st_mtime_ns


def read_folder(folder: Path) -> Manifest:
    """The manifest of the artifact that lies in `folder`."""
    path = folder / MANIFEST
    try:
        text = read_regular(path, most=MANIFEST_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not text in UTF-8; copy the artifact again, or train it again") from None
    return Manifest.from_json(text, path)


def find_by_hash(hash: str, name: str, store: Path) -> Path:
    """The folder of the artifact with this hash: `name` first, then any other of the store, also replaced ones.

    Raises:
        UserError: names the source, and says what stands in its place.
    """
    problem = f"nothing in the store {store} has that name or that hash"
    try:
        folder = find(name, store)
    except UserError:
        pass  # not there under its name; it may be under another
    else:
        try:
            found = read_folder(folder).hash
        except UserError as error:
            problem = str(error)
        else:
            if found == hash:
                return folder
            problem = (
                f"{folder} is another artifact now ({found[:8]}), and nothing else in the store has that hash"
            )
    for folder, manifest in artifacts(store, replaced=True):
        if manifest.hash == hash:
            return folder
    raise UserError(
        f"source {name} ({hash[:8]}) is gone: {problem}. "
        f"Copy its folder back into {store} (any name will do), or train the fusion again with the sources there are"
    )


def source_manifests(manifest: Manifest, store: Path) -> list[Manifest]:
    """Those of a fusion's sources, in order; empty for anything else.

    Raises:
        UserError: a source is missing or damaged.
    """
    return [read_folder(find_by_hash(source["hash"], source["name"], store)) for source in manifest.sources]


def artifacts(store: Path, replaced: bool = False) -> Iterator[tuple[Path, Manifest]]:
    """All artifacts of the store that can be read, by name; `replaced` adds those that were overwritten."""
    standing = names(store)
    more = [*(store / REPLACED).glob("*"), *(store / STAGING).glob(f"*{OLD}")] if replaced else []
    looks = [partial(find, name, store) for name in standing] + [
        partial(Path, folder) for folder in sorted(more)
    ]
    for look in looks:
        try:
            yield read_settled(look, lambda folder: (folder, read_folder(folder)))
        except UserError:
            continue  # one damaged artifact must not hide the others; it is reported when it is asked for


def check_free(name: str, kind: str, store: Path, overwrite: bool) -> None:
    """Refuses to write `name` where something stands that must not be replaced.

    Raises:
        UserError: the name is taken: by something else than an artifact, by another kind (a fusion never takes
            an adapter's name, even with overwrite), or by an artifact without `overwrite`.
    """
    check_name(name)
    folder = store / name
    if not folder.exists():
        folder = folders(store).get(name, folder)
    if not folder.exists():
        return
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is there and is no artifact: choose another name=, or move it away")
    try:
        stored = read_folder(folder).kind
    except UserError:
        stored = kind  # damaged: training it again with overwrite=true is the mend
    if stored != kind:
        raise UserError(f"{store / name} is kept for a stored {stored}: choose another name= for this {kind}")
    if not overwrite:
        raise UserError(f"{store / name} is there already: overwrite=true replaces it, name=NAME keeps both")


def check_writable(store: Path) -> None:
    """Refuses a store that cannot be written, before hours are spent on what should go there.

    Raises:
        UserError: the store is a file, or it or the folder it would be made in is not writable.
    """
    resolve_path(str(store), "store")
    if store.exists() and not store.is_dir():
        raise UserError(f"store={store}: this is a file, expected a folder")
    nearest = store.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    try:
        os.rmdir(tempfile.mkdtemp(dir=nearest))  # tried, since permissions do not tell of read-only disks
    except OSError as error:
        raise UserError(
            f"store={store}: {nearest} cannot be written ({error.strerror}); store=DIR names another folder"
        ) from None


def check_sources(manifests: list[Manifest]) -> None:
    """Refuses sources that cannot be fused together.

    All are adapters of one backbone (fingerprint, hidden size) in one placement (sites, reads). Bottleneck
    sizes, non-linearities, scalings and layers may differ.

    Raises:
        UserError: which source, and how it differs from the first.
    """
    for manifest in manifests:
        if manifest.kind != "adapter":
            raise UserError(
                f"sources: {manifest.name} is a stored {manifest.kind}, and only adapters can be combined; "
                f"train one with python -m fusion.stage1 +task={manifest.task['name']} method=adapter"
            )
    if twice := repeated(manifest.name for manifest in manifests):
        raise UserError(
            f"sources: two of them are named {', '.join(twice)}, and a source is known by its name"
        )
    for other in manifests[1:]:
        differences = _differences(manifests[0], other)
        if differences:
            raise UserError(
                f"sources: {other.name} cannot be fused with {manifests[0].name}: {'; '.join(differences)}. "
                "Leave it out of sources=, or train it again on the same backbone and placement"
            )


def _differences(first: Manifest, other: Manifest) -> list[str]:
    one, two = first.backbone, other.backbone
    found = []
    if one["name_or_path"] != two["name_or_path"] and one["fingerprint"] != two["fingerprint"]:
        found.append(f"backbone {two['name_or_path']} and not {one['name_or_path']}")
    elif one["fingerprint"] != two["fingerprint"]:
        found.append(
            f"backbone {two['name_or_path']} has other weights "
            f"(fingerprint {two['fingerprint'][:8]} and not {one['fingerprint'][:8]})"
        )
    if None not in (one.get("tokenizer"), two.get("tokenizer")) and one["tokenizer"] != two["tokenizer"]:
        found.append(
            f"backbone {two['name_or_path']} has another tokenizer "
            f"(hash {two['tokenizer'][:8]} and not {one['tokenizer'][:8]})"
        )
    if one["hidden_size"] != two["hidden_size"]:
        found.append(f"hidden size {two['hidden_size']} and not {one['hidden_size']}")
    here, there = first.placement, other.placement
    found += [
        f"{key} {_shown(there[key])} and not {_shown(here[key])}" for key in here if here[key] != there[key]
    ]
    return found


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def check_drop(manifest: Manifest, drop: int) -> None:
    """Refuses to leave layers out of an artifact that has none to leave out.

    Raises:
        UserError: it is no adapter and no fusion, or has fewer layers.
    """
    if drop and manifest.kind not in ("adapter", "fusion"):
        raise UserError(
            f"drop={drop}: {manifest.name} is a stored {manifest.kind}; only adapters and fusions can be dropped layer "
            "by layer, so leave drop= out"
        )
    if drop > manifest.backbone["layers"]:
        raise UserError(
            f"drop={drop}: {manifest.name} has {manifest.backbone['layers']} layers; expected no more"
        )


def check_attends(manifest: Manifest, asked: str, cure: str) -> None:
    """Refuses to show whom an artifact attends to that attends to nothing.

    Args:
        asked, cure: how it was asked for, and what to do without it.

    Raises:
        UserError: it is no fusion, or one that is a single adapter in the end.
    """
    if manifest.kind != "fusion":
        raise UserError(
            f"{asked}: {manifest.name} is a stored {manifest.kind}; only a fusion has attention to show"
        )
    if (composition := (manifest.composition or {}).get("name")) in ("average", "continued"):
        raise UserError(
            f"{asked}: {manifest.name} (composition={composition}) is one adapter, which attends to nothing; {cure}"
        )


def check_trust(manifest: Manifest, trusted: bool) -> None:
    """Refuses to go without code that an artifact's backbone was run with, and to run it on the artifact's word.

    Raises:
        UserError: names the key that the user has to say again.
    """
    if manifest.backbone.get("trust_remote_code") and not trusted:
        raise UserError(
            f"{manifest.name}: its backbone {manifest.backbone['name_or_path']} runs code of its own; say "
            "backbone.trust_remote_code=true if you have read it and trust it"
        )


def check_backbone(
    manifest: Manifest, *, name_or_path: str, fingerprint: str, hidden_size: int, tokenizer: str | None = None
) -> None:
    """Refuses to put an artifact's weights on a backbone that they were not trained on.

    Args:
        tokenizer: the hash of the backbone's; manifests of 0.1 have none to compare it with.

    Raises:
        UserError: which artifact, and how the backbone differs.
    """
    stored = manifest.backbone
    if stored["fingerprint"] == fingerprint and stored["hidden_size"] == hidden_size:
        trained_with = stored.get("tokenizer")
        if None not in (trained_with, tokenizer) and trained_with != tokenizer:
            raise UserError(
                f"{manifest.name} was trained with another tokenizer than {name_or_path} has (hash "
                f"{str(trained_with)[:8]} in its manifest, {str(tokenizer)[:8]} here): text would become other tokens\n"
                "Restore the tokenizer's files, or use another copy of the backbone: backbone.name_or_path=FOLDER"
            )
        return
    how = f"{name_or_path} has fingerprint {fingerprint[:8]}"
    if stored["hidden_size"] != hidden_size:
        how += f" and hidden size {hidden_size} (not {stored['hidden_size']})"
    revision = f" revision {stored['revision']}" if stored["revision"] else ""
    raise UserError(
        f"{manifest.name} was trained on {stored['name_or_path']}{revision} with fingerprint "
        f"{stored['fingerprint'][:8]}, and {how}: it needs the very same backbone"
    )
