"""What an artifact says about itself. JSON only: the commands' first checks use it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fusion.config import (
    POOLINGS,
    SITES,
    AdapterConfig,
    CompositionConfig,
    MethodConfig,
    TaskConfig,
)
from fusion.errors import UserError
from fusion.model.compositions import COMPOSITIONS, CONTINUED, KEPT
from fusion.model.methods import METHODS
from fusion.paths import check_relative
from fusion.repeats import repeated
from fusion.safe_text import quotable
from fusion.store.files import MEND
from fusion.store.json_text import finite, read_json, short
from fusion.store.layout import HEAD, WEIGHTS
from fusion.store.names import is_name
from fusion.store.settings import TYPE_NAMES, check_types, settings_of, type_name

FORMAT_VERSION = 1
FUSION = "fusion"
# What stage 1 stores, and what stage 2 stores.
KINDS = tuple(dict.fromkeys(("adapter", FUSION, *(method.kind for method in METHODS.values()))))
MOST_LAYERS = 10_000  # of a backbone; they are counted through

# What shapes training or only says how a size was chosen: it does not change what the stored weights compute.
# An adapter's `bottleneck_sizes` says in which slots it stands.
ADAPTER_TRAINING_KEYS = ("name", "init", "dropout", "reduction_factor", "bottleneck_size", "layers", "drop")
COMPOSITION_TRAINING_KEYS = tuple(
    {key for composition in COMPOSITIONS.values() for key in composition.settings.training_only}
)
TUNING_KINDS = {method.kind for method in METHODS.values() if method.tune is not None}
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
        ordered = finite({"format_version": values.pop("format_version"), **values})
        ordered["checksum"] = checksum_of(ordered)
        return json.dumps(ordered, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> Manifest:
        """Reads and checks the text of `path`.

        Raises:
            UserError: names `path` and the key that is unknown, missing or of another type.
        """
        try:
            return cls._checked(read_json(text, path), path)
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
CHOSEN: dict[str, Types] = {KEPT: (dict,), CONTINUED: (str,)}  # of a composition, beyond its settings


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
    _check_only(head, {**INNER["head"], "decision": ()}, key, path)
    decision = head.get("decision", {})
    if not isinstance(decision, dict) or not all(type(value) in (int, float) for value in decision.values()):
        raise UserError(f"{path}: {key}.decision is {short(decision)}, expected names with a number each")
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
        if method.definition.kind != kind:
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


def _without(values: Mapping[str, Any] | None, keys: tuple[str, ...]) -> dict[str, Any] | None:
    return None if values is None else {key: value for key, value in values.items() if key not in keys}


def _count(noun: str, things: list[str]) -> str:
    return f"{noun} is" if len(things) == 1 else f"{noun}s are"
