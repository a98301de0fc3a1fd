"""The parts of a manifest: one model for each object in `manifest.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fusion.config.compositions import CompositionConfig
from fusion.config.model import POOLINGS, AdapterConfig
from fusion.config.task import TaskConfig
from fusion.errors import UserError
from fusion.files import check_relative
from fusion.store.layout import FIX, is_name
from fusion.tasks.task import Task

MOST_LAYERS = 10_000  # of a backbone; some checks count through them


def checked(problem: Callable[[str], str | None]) -> AfterValidator:
    """Refuse a text of which `problem` names one."""

    def check(text: str) -> str:
        if (why := problem(text)) is not None:
            raise ValueError(why)
        return text

    return AfterValidator(check)


def one_of(allowed: Sequence[str]) -> AfterValidator:
    return checked(lambda text: None if text in allowed else f"expected one of {', '.join(allowed)}")


Count = Annotated[int, Field(ge=1, lt=2**63)]
Name = Annotated[str, checked(lambda text: None if is_name(text) else f"expected a name of the store; {FIX}")]


class Part(BaseModel):
    """An object of the manifest."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True)


class Backbone(Part):
    """The backbone that the weights were trained on, the only one that they fit."""

    name_or_path: str
    revision: str | None
    fingerprint: str
    family: str
    hidden_size: Count
    layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    tokenizer: str | None = None  # its hash; not in manifests of version 0.1
    package: str | None = None  # only in the first manifests
    trust_remote_code: bool = False


class Head(Part):
    """A head; its hidden size is the backbone's."""

    pooling: Annotated[str, one_of((*POOLINGS, "words"))]
    layers: Literal[1, 2]
    outputs: Count
    dropout: Annotated[float, Field(ge=0, lt=1)]
    decision: dict[str, float] = {}  # what predictions depend on besides the weights, see `Kind.decision`

    @property
    def shape(self) -> dict[str, Any]:
        """The arguments of `Kind.make_head`."""
        return self.model_dump(exclude={"decision"})


class WithSettings(Part):
    """A part whose settings and own keys are in one object in the file."""

    required: ClassVar[Sequence[str]]  # settings

    @model_validator(mode="before")
    @classmethod
    def _apart(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key in cls.required:
            if key not in values:
                raise UserError(f"key {cls.__name__.lower()}.{key} is missing")
        own = {key: values[key] for key in cls.model_fields if key in values and key != "settings"}
        return {"settings": {key: value for key, value in values.items() if key not in own}} | own


class Adapter(WithSettings):
    """Settings, and the bottleneck size of each slot, `{"0.feedforward": 48, ...}`."""

    required = ("sites", "reads", "nonlinearity", "scaling", "dropout")

    settings: AdapterConfig
    bottleneck_sizes: dict[str, Count]


class Composition(WithSettings):
    """Settings of a fusion, and what was chosen on its data."""

    required = ("name",)

    settings: CompositionConfig
    kept: dict[str, list[int]] | None = None  # the positions of the sources that each slot of a pruned fusion keeps
    continued: str | None = None  # the name of the one source that was trained further

    @property
    def chosen(self) -> dict[str, Any]:
        """`kept` or `continued`, where there is one."""
        return self.model_dump(exclude={"settings"}, exclude_none=True)


@dataclass
class StoredTask(Task):
    """A task as it was when the artifact was stored. Only types are checked: a task that is listed need not run."""

    name: Annotated[str, checked(check_relative)] = Field()  # a folder of data.dir
    labels: list[Any] | None = None

    def as_config(self, where: str) -> TaskConfig:
        """The task, as this version runs it. `where` is for the message if it does not support the task."""
        try:
            return TaskConfig(**{field.name: getattr(self, field.name) for field in fields(self)})
        except (TypeError, UserError) as error:
            raise UserError(f"{where}: this version cannot run its task ({error})") from error


class TaskAndHead(Part):
    """One task of a multi-task artifact, with its head."""

    task: StoredTask
    head: Head


class Source(Part):
    """An artifact that another one was made from."""

    name: Name
    hash: str


class Data(Part):
    """A fingerprint of the examples of each split, and how the labels of each task were read (None: not known)."""

    max_length: Count
    fingerprints: dict[str, str]
    labels: dict[str, str | None] = {}  # not in manifests of version 0.1


class Git(Part):
    """The state of the project's checkout. dirty: None where it is not known."""

    commit: str
    dirty: bool | None = None


class RunRecord(Part):
    """The run that trained it: flat config, command line, folder and environment."""

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
    """The values of `result.json` that other commands read; the rest of it is kept as it is."""

    model_config = ConfigDict(extra="allow")

    best_epoch: int | None = None
    epochs: int | None = None
    parameters: dict[str, int] = {}
    speed: dict[str, float | None] = {}
    diverged: dict[str, Any] | None = None


class File(Part):
    sha256: str
    bytes: int
