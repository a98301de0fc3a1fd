"""Parts of a manifest: one pydantic model for each object in `manifest.json`."""

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

MOST_LAYERS = 10_000  # of a backbone


def checked(problem: Callable[[str], str | None]) -> AfterValidator:
    """Build a validator that rejects a string if `problem` returns a message."""

    def check(text: str) -> str:
        if (why := problem(text)) is not None:
            raise ValueError(why)
        return text

    return AfterValidator(check)


def one_of(allowed: Sequence[str]) -> AfterValidator:
    return checked(lambda text: None if text in allowed else f"expected one of {', '.join(allowed)}")


Count = Annotated[int, Field(ge=1, lt=2**63)]
Name = Annotated[str, checked(lambda text: None if is_name(text) else f"expected an artifact name; {FIX}")]


class Part(BaseModel):
    """Base class of the objects in a manifest."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True)


class Backbone(Part):
    """The backbone that the artifact was trained on."""

    name_or_path: str
    revision: str | None
    fingerprint: str
    family: str
    hidden_size: Count
    layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    tokenizer: str | None = None  # hash; missing in version 0.1
    package: str | None = None  # only in early manifests
    trust_remote_code: bool = False


class Head(Part):
    """A prediction head. Its input size is the hidden size of the backbone."""

    pooling: Annotated[str, one_of((*POOLINGS, "words"))]
    layers: Literal[1, 2]
    outputs: Count
    dropout: Annotated[float, Field(ge=0, lt=1)]
    decision: dict[str, float] = {}  # see `Kind.decision`

    @property
    def shape(self) -> dict[str, Any]:
        """Keyword arguments for `Kind.make_head`."""
        return self.model_dump(exclude={"decision"})


class WithSettings(Part):
    """A part that is stored as one object with its settings and its own keys."""

    required: ClassVar[Sequence[str]]  # settings that must be present

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
    """Settings and bottleneck sizes by slot: `{"0.feedforward": 48, ...}`."""

    required = ("sites", "reads", "nonlinearity", "scaling", "dropout")

    settings: AdapterConfig
    bottleneck_sizes: dict[str, Count]


class Composition(WithSettings):
    """Settings of a fusion, and choices derived from its training data."""

    required = ("name",)

    settings: CompositionConfig
    kept: dict[str, list[int]] | None = None  # indices of the remaining sources by slot, if pruned
    continued: str | None = None  # name of the source whose training was continued

    @property
    def chosen(self) -> dict[str, Any]:
        """`kept` or `continued`, if set."""
        return self.model_dump(exclude={"settings"}, exclude_none=True)


@dataclass
class StoredTask(Task):
    """A stored task. Only types are validated, so that unsupported tasks can be listed."""

    name: Annotated[str, checked(check_relative)] = Field()  # a subdirectory of data.dir
    labels: list[Any] | None = None

    def as_config(self, where: str) -> TaskConfig:
        """Return the task config. Raises UserError starting with `where` if this version does not support it."""
        try:
            return TaskConfig(**{field.name: getattr(self, field.name) for field in fields(self)})
        except (TypeError, UserError) as error:
            raise UserError(f"{where}: this version cannot run its task ({error})") from error


class TaskAndHead(Part):
    """One task of a multi-task artifact, with its head."""

    task: StoredTask
    head: Head


class Source(Part):
    """An artifact that this artifact was trained from."""

    name: Name
    hash: str


class Data(Part):
    """Fingerprints of the examples by split, and the format of the labels by task, if known."""

    max_length: Count
    fingerprints: dict[str, str]
    labels: dict[str, str | None] = {}  # missing in version 0.1


class Git(Part):
    """The git state of the project. `dirty` is None if unknown."""

    commit: str
    dirty: bool | None = None


class RunRecord(Part):
    """The training run: flat config, command line, directory and environment."""

    identity: str
    config: dict[str, Any]
    overrides: list[str]
    directory: str
    git: Git | None = None
    threads: int | None = None
    folder: str | None = None
    environment: dict[str, str] = {}
    backbone_stamp: str | None = None
    init_from: Source | None = None  # artifact with the initial weights
    wandb: dict[str, Any] | None = None


class Result(Part):
    """The values of `result.json` that other commands read; other keys are preserved."""

    model_config = ConfigDict(extra="allow")

    best_epoch: int | None = None
    epochs: int | None = None
    parameters: dict[str, int] = {}
    speed: dict[str, float | None] = {}
    diverged: dict[str, Any] | None = None


class File(Part):
    sha256: str
    bytes: int
