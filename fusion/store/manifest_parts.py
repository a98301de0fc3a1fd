"""The schema of the objects in `manifest.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fusion.config.compositions import CompositionConfig
from fusion.config.model import DTYPES, POOLINGS, AdapterConfig
from fusion.config.task import TaskConfig
from fusion.errors import UserError
from fusion.files import check_relative
from fusion.store.layout import FIX, is_name
from fusion.tasks.task import Task


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
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True)


class Backbone(Part):
    name_or_path: str
    revision: str | None
    fingerprint: str
    family: str
    hidden_size: Count
    layers: Annotated[int, Field(ge=1, le=10_000)]  # of the deepest stack
    stacks: dict[str, Annotated[int, Field(ge=1, le=10_000)]] = {}  # layers by stack of an encoder–decoder model
    tokenizer: str | None = None  # hash; missing in version 0.1
    package: str | None = None  # only in early manifests
    dtype: Annotated[str, one_of(DTYPES)] = "float32"  # missing before version 0.2
    trust_remote_code: bool = False

    @property
    def depths(self) -> dict[str, int]:
        """Number of layers by stack; a single stack has the empty name."""
        return self.stacks or {"": self.layers}

    @property
    def encoder_only(self) -> bool:
        """Whether it is the encoder of an encoder–decoder model."""
        return list(self.stacks) == ["encoder"]


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


class LowRankUpdate(Part):
    """A LoRA at one linear layer: scaling · (B A x + b), with A (rank, input_size) and B (output_size, rank)."""

    rank: Count
    scaling: float
    input_size: Count
    output_size: Count
    bias: bool = False  # whether there is b


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
    task: StoredTask
    head: Head


class Source(Part):
    name: Name
    hash: str


class Data(Part):
    """Fingerprints of the examples by split, and the format of the labels by task, if known."""

    max_length: Count
    fingerprints: dict[str, str]
    labels: dict[str, str | None] = {}  # missing in version 0.1


class Git(Part):
    commit: str
    dirty: bool | None = None  # None: unknown


class RunRecord(Part):
    identity: str
    config: dict[str, Any]  # flat
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
