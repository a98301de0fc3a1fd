"""The parts of a manifest: one model for each object in `manifest.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fusion.config.compositions import CONTINUED, KEPT, CompositionConfig
from fusion.config.model import POOLINGS, AdapterConfig
from fusion.config.task import TaskConfig
from fusion.errors import UserError
from fusion.files import check_relative
from fusion.store.files import MEND
from fusion.store.layout import HEAD, WEIGHTS
from fusion.store.names import is_name
from fusion.tasks.task import Task

MOST_LAYERS = 10_000  # of a backbone; they are counted through


def _check_name(text: str) -> str:
    if not is_name(text):
        raise ValueError(f"which is no name for the store; {MEND}")
    return text


def _check_task_name(text: str) -> str:
    if (why := check_relative(text)) is not None:  # it is a folder of data.dir
        raise ValueError(why)
    return text


def one_of(allowed: Sequence[str]) -> AfterValidator:
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
FileName = Annotated[str, AfterValidator(_check_file)]


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

    pooling: Annotated[str, one_of((*POOLINGS, "words"))]
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
