"""The manifest of an artifact, `manifest.json`, whose content is written, hashed and checksummed as it was read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError

from fusion.backbones.families import FAMILIES
from fusion.backbones.slots import SlotAddress
from fusion.config.compositions import TRAINING_ONLY
from fusion.config.methods import METHODS, MethodConfig
from fusion.errors import UserError, first_line
from fusion.files import finite
from fusion.store.layout import FIX, HEAD, WEIGHTS, check_name
from fusion.store.manifest_parts import (
    Adapter,
    Backbone,
    Composition,
    Data,
    File,
    Head,
    LowRankUpdate,
    Name,
    Part,
    Result,
    RunRecord,
    Source,
    StoredTask,
    TaskAndHead,
    one_of,
)
from fusion.text import listed, repeated, shortened, shown

FORMAT_VERSION = 1
KINDS = tuple(dict.fromkeys(("adapter", "fusion", *(method.kind for method in METHODS.values()))))

# Settings that do not change the output of the stored weights; `bottleneck_sizes` contains the adapted slots.
ADAPTER_TRAINING_KEYS = ("name", "init", "dropout", "reduction_factor", "bottleneck_size", "layers", "drop")
TUNING_KINDS = {method.kind for method in METHODS.values() if method.tune is not None}
OPTIONAL = ("method", "multitask", "checksum", "lora")  # keys that may be missing in version 0.1


class Manifest(Part):
    """Everything needed to rebuild the model of an artifact, and its provenance.

    `task` and `head` of a multi-task artifact are those of its first task; an imported LoRA has neither. `files` is empty
    until it is saved.
    """

    format_version: Literal[1]
    kind: Annotated[str, one_of(KINDS)]
    name: Name
    own_task: StoredTask | None = Field(alias="task")
    backbone: Backbone
    adapter: Adapter | None
    composition: Composition | None
    own_head: Head | None = Field(alias="head")
    sources: list[Source]
    data: Data
    metrics: dict[str, dict[str, float | None]]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    run: RunRecord
    versions: dict[str, str | None]
    result: Result
    files: dict[Annotated[str, one_of((WEIGHTS, HEAD))], File]
    method: MethodConfig | None = None
    multitask: Annotated[dict[str, TaskAndHead], Field(min_length=1)] | None = None
    lora: Annotated[dict[str, LowRankUpdate], Field(min_length=1)] | None = None  # by slot, if all are at known sites
    checksum: str | None = None  # None in version 0.1

    _content: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, **values: Any) -> Manifest:
        """Build a manifest from plain values; NaN and infinity become null. Raises UserError for an invalid value."""
        check_name(str(values.get("name")))
        content = finite({"format_version": FORMAT_VERSION, "files": {}} | values)
        return cls._read(json.dumps(content), content, f"manifest of {content.get('name')}")

    def changed(self, **values: Any) -> Manifest:
        """Return a copy with some plain values replaced."""
        return self.of(**(self._content | values))

    @classmethod
    def from_json(cls, text: str | bytes, path: Path) -> Manifest:
        """Parse and validate the content of `path`. Raises UserError like `of`."""
        try:
            content = json.loads(text)
            # Raises for infinities and lone surrogates.
            json.dumps(content, allow_nan=False, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON ({first_line(error)[:100]}); {FIX}") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected a JSON object; {FIX}")
        try:
            manifest = cls._read(text, content, str(path))
            for file in {WEIGHTS, HEAD} - manifest.files.keys():
                raise UserError(f"{path}: key files.{file} is missing; {FIX}")
            if "checksum" in content and checksum_of(content) != content["checksum"]:
                raise UserError(f"{path} was modified and does not match its checksum; {FIX}")
        except UserError as error:  # it may quote long values of the file
            raise UserError(shortened(str(error), 600)) from None
        return manifest

    @classmethod
    def _read(cls, text: str | bytes, content: dict[str, Any], where: str) -> Manifest:
        version = content.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            problem = f"format_version is {shown(version)}, expected {FORMAT_VERSION}"
            raise UserError(f"{where}: {problem}; use the version that wrote it or retrain it")
        try:
            manifest = cls.model_validate_json(text)
            _check_kind(manifest)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(step) for step in first["loc"] if step != "settings")
            given = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
            raise UserError(f"{where}: {key or 'content'}: {first['msg']}{given}") from None
        except (UserError, TypeError, ValueError) as error:  # from the dataclasses of fusion.config
            raise UserError(f"{where}: {first_line(error)}") from None
        # In the order of the schema, omitting optional keys that are null.
        keys = [field.alias or name for name, field in cls.model_fields.items()]
        known = [key for key in keys if key not in OPTIONAL or content.get(key) is not None]
        manifest._content = {key: content[key] for key in known if key != "checksum"}
        return manifest

    def __eq__(self, other: object) -> bool:
        return self._content == other._content if isinstance(other, Manifest) else NotImplemented

    @property
    def content(self) -> dict[str, Any]:
        """Plain values of `manifest.json`, without the checksum. Must not be modified."""
        return self._content

    def to_json(self) -> str:
        sealed = self._content | {"checksum": checksum_of(self._content)}
        return json.dumps(sealed, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @property
    def hash(self) -> str:
        """sha256 (64 hex digits) of the weights file and all settings that change the output of the weights.

        The head is only included for kind head, since a fusion uses an adapter without its head.
        """
        settings: dict[str, Any] = {
            "kind": self.kind,
            "backbone": self.backbone.fingerprint,
            "weights": self.files[WEIGHTS].sha256,
            "adapter": _without(self._content["adapter"], ADAPTER_TRAINING_KEYS),
            "composition": _without(self._content["composition"], TRAINING_ONLY),
            "sources": [source.hash for source in self.sources],
        }
        if self.method is not None:
            settings["method"] = _without(self._content["method"], ("dropout",))
        if self.lora is not None:
            settings["lora"] = self._content["lora"]
        if self.kind == "head":
            settings["head"] = self.files[HEAD].sha256
        return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def placement(self) -> dict[str, Any]:
        """What has to be equal for all sources of a fusion: the kind and, for adapters, their sites and input."""
        if self.adapter is None:
            return {"kind": self.kind}
        settings = self.adapter.settings
        return {"kind": self.kind, "adapter.sites": settings.sites, "adapter.reads": settings.reads}

    @property
    def reads(self) -> str:
        """Input of the slots, see `fusion.backbones.slots`."""
        return "input" if self.adapter is None else self.adapter.settings.reads

    @property
    def sites(self) -> list[str]:
        """Sites of the slots, in order."""
        if self.adapter is not None:
            return self.adapter.settings.sites
        return list(dict.fromkeys(SlotAddress.parse(slot).site for slot in self.bottleneck_sizes))

    @property
    def bottleneck_sizes(self) -> dict[str, int]:
        """Bottleneck size or rank in each slot of a source; empty for other kinds."""
        if self.lora is not None:
            return {slot: one.rank for slot, one in self.lora.items()}
        return {} if self.adapter is None else self.adapter.bottleneck_sizes

    @property
    def task(self) -> StoredTask:
        """The task that the artifact was trained on. Raises UserError like `check_head`."""
        self.check_head()
        assert self.own_task is not None
        return self.own_task

    @property
    def head(self) -> Head:
        """The head. Raises UserError like `check_head`."""
        self.check_head()
        assert self.own_head is not None
        return self.own_head

    def check_head(self) -> None:
        """Raise UserError if the artifact was imported without a task and a head."""
        if self.own_head is None:
            raise UserError(
                f"{self.name} was imported without a task and a head: use it as a source of python -m fusion.stage2"
            )

    @property
    def tasks(self) -> list[StoredTask]:
        if self.multitask is not None:
            return [one.task for one in self.multitask.values()]
        return [] if self.own_task is None else [self.own_task]

    @property
    def heads(self) -> list[Head]:
        if self.multitask is not None:
            return [one.head for one in self.multitask.values()]
        return [] if self.own_head is None else [self.own_head]

    @property
    def task_names(self) -> list[str]:
        return [task.name for task in self.tasks]

    @property
    def made_by(self) -> str:
        """Name of the composition or method, or the kind if there is neither."""
        settings = self.method if self.composition is None else self.composition.settings
        return self.kind if settings is None else settings.name


def checksum_of(content: Mapping[str, Any]) -> str:
    """Return the sha256 (64 hex digits) of a manifest without its checksum, independent of white space."""
    others = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(others, separators=(",", ":")).encode()).hexdigest()


def _check_kind(manifest: Manifest) -> None:
    kind, adapter, method = manifest.kind, manifest.adapter, manifest.method
    part = "method" if kind in TUNING_KINDS else {"adapter": "adapter", "fusion": "composition"}.get(kind)
    for key in ("adapter", "composition", "method"):
        if (getattr(manifest, key) is None) == (key == part):
            raise UserError(f"{key} is {'null' if key == part else 'set'} in an artifact of kind {kind}")
    without_task = manifest.own_task is None
    if without_task != (manifest.own_head is None) or (without_task and manifest.lora is None):
        raise UserError("task and head: expected both, or neither for an imported LoRA")
    if (kind == "fusion") != bool(manifest.sources):
        raise UserError(f"sources has {len(manifest.sources)} entries in an artifact of kind {kind}")
    if duplicates := repeated(source.name for source in manifest.sources):
        raise UserError(f"sources: duplicate {', '.join(duplicates)}")
    if method is not None and method.definition.kind != kind:
        raise UserError(f"method.name is {method.name}, but kind is {kind}")
    if manifest.lora is not None:
        _check_lora(manifest)
    if adapter is None:
        return
    sites, sizes, depths = adapter.settings.sites, adapter.bottleneck_sizes, manifest.backbone.depths
    addresses = [
        SlotAddress(stack, layer, site) for stack, depth in depths.items() for layer in range(depth) for site in sites
    ]
    slots = {str(address) for address in addresses}
    if not sizes or not slots >= sizes.keys():
        layers = " and ".join(
            f"{depth} {stack} layers" if stack else f"{depth} layers" for stack, depth in depths.items()
        )
        raise UserError(
            f"adapter.bottleneck_sizes has {listed(sizes.keys() - slots)}, expected slots of {layers} with "
            f"{', '.join(sites)}, such as {addresses[0]}"
        )
    for site in sites if adapter.settings.shared else ():
        if len({size for slot, size in sizes.items() if slot.endswith(f".{site}")}) > 1:
            raise UserError(f"adapter.bottleneck_sizes: expected a single size for {site} in a shared adapter")


def _check_lora(manifest: Manifest) -> None:
    family = FAMILIES.get(manifest.backbone.family)
    if manifest.kind != "lora":
        raise UserError(f"lora is set in an artifact of kind {manifest.kind}")
    slots = set(family.linear_slots(manifest.backbone.depths).values()) if family is not None else set()
    assert manifest.lora is not None
    if unknown := manifest.lora.keys() - slots:
        raise UserError(f"lora has {listed(unknown)}, expected slots at linear layers, such as 0.attention.query")


def _without(values: Mapping[str, Any] | None, keys: tuple[str, ...]) -> dict[str, Any] | None:
    return None if values is None else {key: value for key, value in values.items() if key not in keys}
