"""Settings of a benchmark run. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fusion.backbones.families import FAMILIES
from fusion.config.fields import Settings, checked, choice, integer, number, subset
from fusion.config.model import BackboneConfig
from fusion.errors import TrainingError
from fusion.training.processes import cores
from pipelines.benchmark.random_backbone import HEAD_SIZE

SUITES = ("train", "infer", "scale", "memory", "families", "epoch", "startup", "ddp")
# Rounds of a suite by default: an epoch takes minutes, a step a second.
ROUNDS = {"scale": 3, "families": 3, "epoch": 2, "ddp": 3}


class BenchmarkError(TrainingError):
    """A suite failed. The message is one line that gives the log file; exit code 1."""


def _ascending(default: list[int], empty: bool = False) -> Any:
    return checked(
        default,
        lambda value: (empty or value) and value == sorted({n for n in value if n >= 1}),
        "distinct integers >= 1 in ascending order",
    )


@dataclass
class RivalConfig:
    venv: str | None = None  # a virtual environment with the baseline; null creates OUTPUT/rival-venv


@dataclass
class ScaleConfig(Settings, group="scale"):
    """Sizes of the scale suite: numbers of sources at the default bottleneck, bottlenecks at `fixed_sources`."""

    sources: list[int] = _ascending([2, 4, 8, 16, 32, 64, 128, 256])
    bottlenecks: list[int] = _ascending([8, 16, 32, 64], empty=True)
    fixed_sources: int = integer(16, 1)
    rival_sources: list[int] = _ascending([2, 4, 8, 14], empty=True)


@dataclass
class FamiliesConfig(Settings, group="families"):
    """Model types of the families suite, which builds random models of them."""

    names: list[str] = subset(list(FAMILIES), FAMILIES)
    sources: int = integer(8, 2)  # of the fusion


@dataclass
class EpochConfig(Settings, group="epoch"):
    tasks: list[str] = checked(["mrpc", "rte"], bool, "tasks of data_dir, such as [rte]")
    sources: int = integer(8, 1)  # of the fusion
    limit: int | None = integer(None, 1, null="all examples")
    max_length: int = integer(128, 1)  # tokens; the baseline's example script pads every text to this length
    later_epochs: int = integer(2, 1)  # epochs after the first, timed with and without adapters in the lower half


@dataclass
class BenchmarkConfig(Settings):
    suite: str = choice("???", SUITES)
    rounds: int | None = integer(None, 1, null="the suite's default")
    steps: int = integer(5, 1)  # timed steps per round
    warmup: int = integer(2, 0)  # untimed steps before them
    noise_limit: float | None = number(None, "> 0", null="no limit")  # no verdict if the ratios spread more
    threads: int | None = integer(None, 1, null="all cores")  # per worker process
    device: str = choice("auto", ("auto", "cpu", "cuda"))
    precision: str = choice("auto", ("auto", "float32", "bf16"))  # autocast; auto: bf16 on a GPU, else float32
    # Of the backbone's weights in additional measurements; auto: bfloat16 on hardware with matrix units for it.
    dtype: str = choice("auto", ("auto", "float32", "bfloat16"))
    batch_size: int = integer(32, 1)
    tokens: int = integer(64, 1)  # per text, without padding
    sources: int = integer(14, 2)
    seed: int = 0
    backbone: BackboneConfig = field(default_factory=BackboneConfig)  # only its weights and shape are used
    # Layers and hidden size of a backbone with random weights, and the configuration of `backbone` otherwise.
    shape: list[int] | None = checked(
        None,
        lambda value: value is None or (len(value) == 2 and min(value) > 0 and value[1] % HEAD_SIZE == 0),
        f"[LAYERS,HIDDEN], a hidden size that {HEAD_SIZE} divides",
    )
    data_dir: str = "../shared/data"
    output: str = "outputs/benchmark"
    timeout: float = number(3600.0, "> 0")  # seconds for one request to a worker, or for one command
    rival: RivalConfig = field(default_factory=RivalConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    families: FamiliesConfig = field(default_factory=FamiliesConfig)
    epoch: EpochConfig = field(default_factory=EpochConfig)

    @property
    def round_count(self) -> int:
        return self.rounds or ROUNDS.get(self.suite, 6)

    @property
    def thread_count(self) -> int:
        return self.threads or cores()
