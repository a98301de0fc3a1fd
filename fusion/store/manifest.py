"""The schema of `manifest.json`: all that an artifact states about itself.

Reading is strict: no key that is not listed here, no value of another type (true is no integer), no size beyond its
range. Settings are checked by the dataclasses of `fusion.config` that they come from. What was read is kept as it
is, and written, hashed and sealed with a checksum as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from fusion.config import POOLINGS, SITES, AdapterConfig, CompositionConfig, MethodConfig, TaskConfig
from fusion.errors import UserError, first_line
from fusion.model.compositions import CONTINUED, KEPT, TRAINING_ONLY
from fusion.model.methods import METHODS
from fusion.paths import check_relative
from fusion.repeats import repeated
from fusion.safe_text import quotable
from fusion.store.files import MEND
from fusion.store.json_text import finite, read_json
from fusion.store.layout import HEAD, WEIGHTS
from fusion.store.names import check_name, is_name
from fusion.store.refusals import NULL, OBJECT, mismatch, reason
from fusion.tasks.task import Task

FORMAT_VERSION = 1
FUSION = "fusion"
# What stage 1 stores, and what stage 2 stores.
KINDS = tuple(dict.fromkeys(("adapter", FUSION, *(method.kind for method in METHODS.values()))))
MOST_LAYERS = 10_000  # of a backbone; they are counted through

# What shapes training or only says how a size was chosen: it does not change what the stored weights compute.
# An adapter's `bottleneck_sizes` says in which slots it is.
ADAPTER_TRAINING_KEYS = ("name", "init", "dropout", "reduction_factor", "bottleneck_size", "layers", "drop")
TUNING_KINDS = {method.kind for method in METHODS.values() if method.tune is not None}
OPTIONAL = ("method", "multitask", "checksum")  # keys that manifests of the first release do not have


def _check_name(text: str) -> str:
    if not is_name(text):
        raise ValueError(f"which is no name for the store; {MEND}")
    return text


def _check_task_name(text: str) -> str:
    if (why := check_relative(text)) is not None:  # it is a folder of data.dir
        raise ValueError(why)
    return text


def _one_of(allowed: Sequence[str]) -> AfterValidator:
    def check(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return text

    return AfterValidator(check)


def _check_file(text: str) -> str:
    if text not in (WEIGHTS, HEAD):  # never a file of another place
        raise ValueError
    return text


Number = int | float
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, AfterValidator(_check_name)]


class Part(BaseModel):
    """An object of the manifest."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True)


class Backbone(Part):
    """The backbone that the weights were trained on, and fit alone."""

    name_or_path: str
    revision: str | None
    fingerprint: str
    family: str
    hidden_size: Count
    layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    tokenizer: str | None = None  # its hash; not in manifests of 0.1
    package: str | None = None  # in those of the first stores
    trust_remote_code: bool = False


class Head(Part):
    """A head, beside its hidden size, which is the backbone's."""

    pooling: Annotated[str, _one_of((*POOLINGS, "words"))]
    layers: Literal[1, 2]
    outputs: Count
    dropout: Annotated[Number, Field(ge=0, lt=1)]
    decision: dict[str, Number] = {}  # what predictions depend on beside the weights, see `Kind.decision`

    @property
    def shape(self) -> dict[str, Any]:
        """The arguments of `Kind.make_head`."""
        return self.model_dump(exclude={"decision"})


class Adapter(Part):
    """Settings, and the bottleneck size of each slot, `{"0.feedforward": 48, ...}`."""

    settings: AdapterConfig
    bottleneck_sizes: dict[str, Count]

    @model_validator(mode="before")
    @classmethod
    def _apart(cls, values: Any) -> Any:
        return _settings_apart(
            values, "adapter", ("sites", "reads", "nonlinearity", "scaling", "dropout"), ("bottleneck_sizes",)
        )


class Composition(Part):
    """Settings of a fusion, and what was chosen on its data.

    kept: of a pruned fusion, the positions of the sources that each slot keeps.
    continued: the name of the source that was trained further, alone.
    """

    settings: CompositionConfig
    kept: dict[str, list[int]] | None = None
    continued: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _apart(cls, values: Any) -> Any:
        return _settings_apart(values, "composition", ("name",), (KEPT, CONTINUED))

    @property
    def chosen(self) -> dict[str, Any]:
        """`kept` or `continued`, where there is one."""
        values = {KEPT: self.kept, CONTINUED: self.continued}
        return {key: value for key, value in values.items() if value is not None}


def _settings_apart(values: Any, part: str, required: Sequence[str], own: Sequence[str]) -> Any:
    """A manifest has the settings and the part's `own` keys beside each other."""
    if not isinstance(values, dict):
        return values
    for key in required:
        if key not in values:
            raise UserError(f"key {part}.{key} is missing")
    settings = {key: value for key, value in values.items() if key not in own}
    return {"settings": settings} | {key: values[key] for key in own if key in values}


@dataclass
class StoredTask(Task):
    """A task as it was when the artifact was stored. Types alone are checked: whoever only lists it need not run it."""

    name: Annotated[str, AfterValidator(_check_task_name)] = Field()
    labels: list[Any] | None = None

    def as_config(self, where: str) -> TaskConfig:
        """The task, as this version runs it.

        Raises:
            UserError: begins with `where`; the task is none of this version.
        """
        try:
            return TaskConfig(**{field.name: getattr(self, field.name) for field in fields(self)})
        except (TypeError, UserError) as error:
            raise UserError(f"{where}: its task is none that this version reads ({error})") from error


class TaskAndHead(Part):
    """One task of several, with its head."""

    task: StoredTask
    head: Head


class Source(Part):
    """An artifact that another one was made of."""

    name: Name
    hash: str


class Data(Part):
    """What it was trained on: a fingerprint of the rows of each split, and how the labels of each task were read."""

    max_length: Count
    fingerprints: dict[str, str]
    labels: dict[str, str | None] = {}  # not in manifests of 0.1


class Git(Part):
    """The state of the project's checkout. dirty: None where it is not known."""

    commit: str
    dirty: bool | None = None


class RunRecord(Part):
    """The run that trained it: flat config, command line, place and circumstances."""

    identity: str
    config: dict[str, Any]
    overrides: list[str]
    directory: str
    git: Git | None = None
    threads: int | None = None
    folder: str | None = None
    environment: dict[str, str] = {}
    backbone_stamp: str | None = None
    init_from: Source | None = None  # whose weights the training started from
    wandb: dict[str, Any] | None = None


class Result(Part):
    """What of `result.json` other commands read; the rest of it is there too."""

    model_config = ConfigDict(extra="allow")

    best_epoch: int | None = None
    epochs: int | None = None
    parameters: dict[str, int] = {}
    speed: dict[str, Number | None] = {}
    diverged: dict[str, Any] | None = None


class File(Part):
    sha256: str
    bytes: int


class Manifest(Part):
    """Everything that is needed to rebuild the artifact's model, and where it came from.

    Of an artifact of several tasks, `task` and `head` are the first one's. `files` is empty until it is saved.
    """

    format_version: Literal[1]
    kind: Annotated[str, _one_of(KINDS)]
    name: Name
    task: StoredTask
    backbone: Backbone
    adapter: Adapter | None
    composition: Composition | None
    head: Head
    sources: list[Source]
    data: Data
    metrics: dict[str, dict[str, Number | None]]
    seed: Annotated[int, Field(ge=0)]
    run: RunRecord
    versions: dict[str, str | None]
    result: Result
    files: dict[Annotated[str, AfterValidator(_check_file)], File]
    method: MethodConfig | None = None
    multitask: Annotated[dict[str, TaskAndHead], Field(min_length=1)] | None = None
    checksum: str | None = None  # that the file had; 0.1 wrote none

    _content: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, **values: Any) -> Manifest:
        """A manifest of plain values, as `manifest.json` has them. NaN and infinities become null.

        Raises:
            UserError: names the key that is missing, unknown or of another type.
        """
        check_name(str(values.get("name")))
        content = finite({"format_version": FORMAT_VERSION, "files": {}} | values)
        return cls._read(json.dumps(content), content, f"manifest of {content.get('name')}")

    def changed(self, **values: Any) -> Manifest:
        """The same, but for some keys, with plain values."""
        return self.of(**(self._content | values))

    @classmethod
    def from_json(cls, text: str, path: Path) -> Manifest:
        """Reads and checks the text of `path`.

        Raises:
            UserError: names `path` and the key that is unknown, missing or of another type.
        """
        try:
            content = read_json(text, path)
            if not isinstance(content, dict):
                raise UserError(f"{path}: {mismatch('', content, 'a JSON object')}")
            manifest = cls._read(text, content, str(path))
            if missing := [file for file in (WEIGHTS, HEAD) if file not in manifest.files]:
                raise UserError(f"{path}: key files.{missing[0]} is missing")
            if "checksum" in content and checksum_of(content) != content["checksum"]:
                raise UserError(f"{path}: its content does not match its checksum, so it was changed; {MEND}")
        except UserError as error:  # what it quotes from the file may hold anything
            raise UserError(quotable(str(error))) from None
        return manifest

    @classmethod
    def _read(cls, text: str, content: dict[str, Any], where: str) -> Manifest:
        version = content.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise UserError(
                f"{where}: format_version is {ascii(version)[:60]} and this version of fusion reads {FORMAT_VERSION}; "
                "use the version that wrote it, or train the artifact again"
            )
        try:
            manifest = cls.model_validate_json(text)
            _check_kind(manifest)
            _check_sources(manifest)
        except ValidationError as error:
            raise UserError(f"{where}: {reason(error, cls)}") from None
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except (TypeError, ValueError) as error:  # of a setting that is checked by its own dataclass
            raise UserError(
                f"{where}: has settings that this version does not read ({first_line(error)})"
            ) from None
        # In the order of the schema, without keys that the first release did not know and that hold nothing.
        known = [key for key in cls.model_fields if key not in OPTIONAL or content.get(key) is not None]
        manifest._content = {key: content[key] for key in known if key != "checksum"}
        return manifest

    def __eq__(self, other: object) -> bool:
        return self._content == other._content if isinstance(other, Manifest) else NotImplemented

    @property
    def content(self) -> dict[str, Any]:
        """The plain values of `manifest.json`, without the checksum. Not to be changed."""
        return self._content

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        sealed = self._content | {"checksum": checksum_of(self._content)}
        return json.dumps(sealed, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @property
    def hash(self) -> str:
        """sha256 (64 hex digits) over the weights file and all that decides what those weights compute.

        The head counts only where there is nothing else (kind head): a fusion uses an adapter without it.
        """
        if not self.files:
            raise ValueError("a manifest has a hash once its artifact is saved")
        parts: dict[str, Any] = {
            "kind": self.kind,
            "backbone": self.backbone.fingerprint,
            "weights": self.files[WEIGHTS].sha256,
            "adapter": _without(self._content["adapter"], ADAPTER_TRAINING_KEYS),
            "composition": _without(self._content["composition"], TRAINING_ONLY),
            "sources": [source.hash for source in self.sources],
        }
        if self.method is not None:
            parts["method"] = _without(self._content["method"], ("dropout",))
        if self.kind == "head":
            parts["head"] = self.files[HEAD].sha256
        return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def placement(self) -> dict[str, Any]:
        """Where the artifact's adapters are; sources that are fused together share it."""
        settings = None if self.adapter is None else self.adapter.settings
        return {f"adapter.{key}": getattr(settings, key, None) for key in ("sites", "reads")}

    @property
    def bottleneck_sizes(self) -> dict[str, int]:
        """Of an adapter, by slot; empty for anything else."""
        return {} if self.adapter is None else self.adapter.bottleneck_sizes

    @property
    def tasks(self) -> list[StoredTask]:
        """The task that the artifact was trained on, or each of several."""
        return [self.task] if self.multitask is None else [one.task for one in self.multitask.values()]

    @property
    def heads(self) -> list[Head]:
        """Those of `tasks`."""
        return [self.head] if self.multitask is None else [one.head for one in self.multitask.values()]

    @property
    def task_names(self) -> list[str]:
        """Those of `tasks`."""
        return [task.name for task in self.tasks]

    def labels_read_as(self, task: str | None) -> str | None:
        """The way in which training read the labels of a task; None where it is not known."""
        return None if task is None else self.data.labels.get(task)

    @property
    def made_by(self) -> str:
        """The name of the composition or method, else the kind."""
        return str(
            getattr((self.composition and self.composition.settings) or self.method, "name", self.kind)
        )


def checksum_of(content: Mapping[str, Any]) -> str:
    """sha256 (64 hex digits) over all of a manifest but its checksum, whatever the white space of the file.

    The order of keys counts: that of `multitask` is the order of the tasks.
    """
    others = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(others, separators=(",", ":")).encode()).hexdigest()


def _check_kind(manifest: Manifest) -> None:
    """Each kind has its own part, and no other's."""
    kind, adapter, method = manifest.kind, manifest.adapter, manifest.method
    part = "method" if kind in TUNING_KINDS else {"adapter": "adapter", FUSION: "composition"}.get(kind)
    for key in sorted(("adapter", "composition", "method"), key=lambda key: key != part):
        if (getattr(manifest, key) is None) == (key == part):
            raise UserError(mismatch(key, None, OBJECT) if key == part else mismatch(key, {}, NULL))
    if adapter is not None:
        _check_slots(adapter, manifest.backbone.layers)
    if method is not None and method.definition.kind != kind:
        raise UserError(f"method.name is {method.name}, and kind is {kind}")


def _check_slots(adapter: Adapter, layers: int) -> None:
    if not adapter.bottleneck_sizes:
        raise UserError("adapter.bottleneck_sizes is empty: expected one slot at least")
    sites = adapter.settings.sites
    seen: dict[str, int] = {}
    for slot, size in adapter.bottleneck_sizes.items():
        key = f"adapter.bottleneck_sizes.{slot}"
        place = re.fullmatch(rf"(0|[1-9][0-9]{{0,5}})\.({'|'.join(SITES)})", slot)
        if place is None or place[2] not in sites or int(place[1]) >= layers:
            raise UserError(
                f"{key} is no slot of {layers} layers with {', '.join(sites)}, such as 0.{sites[0]}"
            )
        if adapter.settings.shared and seen.setdefault(place[2], size) != size:
            raise UserError(f"{key} is {size}, and the layers of a shared adapter have one size")


def _check_sources(manifest: Manifest) -> None:
    sources = manifest.sources
    if manifest.kind == FUSION and not sources:
        raise UserError("sources is empty, and a fusion has at least one")
    if manifest.kind != FUSION and sources:
        raise UserError(f"sources has entries, and kind {manifest.kind} has none")
    if twice := repeated(source.name for source in sources):
        raise UserError(f"sources: duplicate {', '.join(twice)}, and a source is known by its name")


def _without(values: Mapping[str, Any] | None, keys: tuple[str, ...]) -> dict[str, Any] | None:
    return None if values is None else {key: value for key, value in values.items() if key not in keys}
