"""The schema of `manifest.json`, everything that an artifact states about itself.

Reading is strict: unknown keys, values of another type (true is no integer) and sizes out of range are refused.
Settings are checked by the dataclasses of `fusion.config` that they come from. The content of the file is kept,
written, hashed and checksummed as it was read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError

from fusion.config.compositions import TRAINING_ONLY
from fusion.config.methods import METHODS, MethodConfig
from fusion.errors import UserError, first_line
from fusion.files import finite
from fusion.store import parts
from fusion.store.layout import FIX, HEAD, WEIGHTS, check_name
from fusion.text import listed, repeated, shortened, shown

FORMAT_VERSION = 1
FUSION = "fusion"
# What stage 1 stores, and what stage 2 stores.
KINDS = tuple(dict.fromkeys(("adapter", FUSION, *(method.kind for method in METHODS.values()))))

# Settings that do not change what the stored weights compute; `bottleneck_sizes` has the slots with an adapter.
ADAPTER_TRAINING_KEYS = ("name", "init", "dropout", "reduction_factor", "bottleneck_size", "layers", "drop")
TUNING_KINDS = {method.kind for method in METHODS.values() if method.tune is not None}
OPTIONAL = ("method", "multitask", "checksum")  # keys that manifests of version 0.1 may lack


class Manifest(parts.Part):
    """Everything that is needed to rebuild the artifact's model, and where it came from.

    `task` and `head` of a multi-task artifact are those of its first task. `files` is empty until it is saved.
    """

    format_version: Literal[1]
    kind: Annotated[str, parts.one_of(KINDS)]
    name: parts.Name
    task: parts.StoredTask
    backbone: parts.Backbone
    adapter: parts.Adapter | None
    composition: parts.Composition | None
    head: parts.Head
    sources: list[parts.Source]
    data: parts.Data
    metrics: dict[str, dict[str, float | None]]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    run: parts.RunRecord
    versions: dict[str, str | None]
    result: parts.Result
    files: dict[Annotated[str, parts.one_of((WEIGHTS, HEAD))], parts.File]  # never a file outside of the artifact
    method: MethodConfig | None = None
    multitask: Annotated[dict[str, parts.TaskAndHead], Field(min_length=1)] | None = None
    checksum: str | None = None  # version 0.1 wrote none

    _content: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, **values: Any) -> Manifest:
        """A manifest of plain values; UserError names a wrong key. NaN and infinities become null."""
        check_name(str(values.get("name")))
        content = finite({"format_version": FORMAT_VERSION, "files": {}} | values)
        return cls._read(json.dumps(content), content, f"manifest of {content.get('name')}")

    def changed(self, **values: Any) -> Manifest:
        """A copy with other plain values for some keys."""
        return self.of(**(self._content | values))

    @classmethod
    def from_json(cls, text: str, path: Path) -> Manifest:
        """Reads and checks the text of `path`; errors as `of`."""
        try:
            content = json.loads(text)
            # Refuses infinities and lone surrogates.
            json.dumps(content, allow_nan=False, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: is not JSON ({first_line(error)[:100]}); {FIX}") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected a JSON object; {FIX}")
        try:
            manifest = cls._read(text, content, str(path))
            if missing := [file for file in (WEIGHTS, HEAD) if file not in manifest.files]:
                raise UserError(f"{path}: key files.{missing[0]} is missing; {FIX}")
            if "checksum" in content and checksum_of(content) != content["checksum"]:
                raise UserError(f"{path}: was changed, its content does not match its checksum; {FIX}")
        except UserError as error:  # it may quote any text of the file
            raise UserError(shortened(str(error), 600)) from None
        return manifest

    @classmethod
    def _read(cls, text: str, content: dict[str, Any], where: str) -> Manifest:
        version = content.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise UserError(
                f"{where}: format_version is {shown(version)}, expected {FORMAT_VERSION}: use the version that wrote it, or train it again"
            )
        try:
            manifest = cls.model_validate_json(text)
            _check_kind(manifest)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(str(step) for step in first["loc"] if step != "settings")
            given = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
            raise UserError(f"{where}: {key or 'content'}: {first['msg']}{given}") from None
        except (UserError, TypeError, ValueError) as error:  # also of a setting that its own dataclass checks
            raise UserError(f"{where}: {first_line(error)}") from None
        # In the order of the schema, without keys that version 0.1 may lack and that hold nothing.
        known = [key for key in cls.model_fields if key not in OPTIONAL or content.get(key) is not None]
        manifest._content = {key: content[key] for key in known if key != "checksum"}
        return manifest

    def __eq__(self, other: object) -> bool:
        return self._content == other._content if isinstance(other, Manifest) else NotImplemented

    @property
    def content(self) -> dict[str, Any]:
        """The plain values of `manifest.json`, without the checksum. Do not change them."""
        return self._content

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        sealed = self._content | {"checksum": checksum_of(self._content)}
        return json.dumps(sealed, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @property
    def hash(self) -> str:
        """sha256 (64 hex digits) of the weights file and all settings that change what the weights compute.

        The head counts only in artifacts of kind head: a fusion uses an adapter without its head.
        """
        if not self.files:
            raise ValueError("a manifest has a hash once its artifact is saved")
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
        if self.kind == "head":
            settings["head"] = self.files[HEAD].sha256
        return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def placement(self) -> dict[str, Any]:
        """Where the adapters are; all sources of a fusion have the same placement."""
        settings = None if self.adapter is None else self.adapter.settings
        return {f"adapter.{key}": getattr(settings, key, None) for key in ("sites", "reads")}

    @property
    def bottleneck_sizes(self) -> dict[str, int]:
        """The bottleneck size of each slot of an adapter; empty for anything else."""
        return {} if self.adapter is None else self.adapter.bottleneck_sizes

    @property
    def tasks(self) -> list[parts.StoredTask]:
        return [self.task] if self.multitask is None else [one.task for one in self.multitask.values()]

    @property
    def heads(self) -> list[parts.Head]:
        return [self.head] if self.multitask is None else [one.head for one in self.multitask.values()]

    @property
    def task_names(self) -> list[str]:
        return [task.name for task in self.tasks]

    @property
    def made_by(self) -> str:
        """The name of the composition or method, else the kind."""
        settings = self.method if self.composition is None else self.composition.settings
        return self.kind if settings is None else settings.name


def checksum_of(content: Mapping[str, Any]) -> str:
    """sha256 (64 hex digits) of a manifest without its checksum, in the order of its keys, whatever the white space."""
    others = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(others, separators=(",", ":")).encode()).hexdigest()


def _check_kind(manifest: Manifest) -> None:
    """Each kind has its own part, and no other's; only a fusion has sources."""
    kind, adapter, method = manifest.kind, manifest.adapter, manifest.method
    part = "method" if kind in TUNING_KINDS else {"adapter": "adapter", FUSION: "composition"}.get(kind)
    for key in ("adapter", "composition", "method"):
        if (getattr(manifest, key) is None) == (key == part):
            raise UserError(f"{key} is {'null' if key == part else 'set'} in an artifact of kind {kind}")
    if (kind == FUSION) != bool(manifest.sources):
        raise UserError(f"sources has {len(manifest.sources)} entries in an artifact of kind {kind}")
    if duplicates := repeated(source.name for source in manifest.sources):
        raise UserError(f"sources: duplicate {', '.join(duplicates)}")
    if method is not None and method.definition.kind != kind:
        raise UserError(f"method.name is {method.name}, and kind is {kind}")
    if adapter is None:
        return
    sites, sizes, layers = adapter.settings.sites, adapter.bottleneck_sizes, manifest.backbone.layers
    slots = {f"{layer}.{site}" for layer in range(layers) for site in sites}
    if not sizes or not slots >= sizes.keys():
        raise UserError(
            f"adapter.bottleneck_sizes has {listed(sizes.keys() - slots)}, expected slots of {layers} layers with "
            f"{', '.join(sites)}, such as 0.{sites[0]}"
        )
    for site in sites if adapter.settings.shared else ():
        if len({size for slot, size in sizes.items() if slot.endswith(f".{site}")}) > 1:
            raise UserError(f"adapter.bottleneck_sizes: expected one size of {site} in a shared adapter")


def _without(values: Mapping[str, Any] | None, keys: tuple[str, ...]) -> dict[str, Any] | None:
    return None if values is None else {key: value for key, value in values.items() if key not in keys}
