"""What a benchmark run is told, with its ranges. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusion.errors import UserError
from fusion.training.processes import cores

SUITES = ("train", "infer", "scale", "memory", "epoch", "startup", "ddp")
# Rounds of a suite where none are asked for: an epoch takes minutes, a step a second.
ROUNDS = {"scale": 3, "epoch": 2, "ddp": 3}
USUAL_ROUNDS = 5


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass
class RivalConfig:
    """venv: an environment that has the rival; null: one is made in OUTPUT/rival-venv."""

    venv: str | None = None


@dataclass
class ScaleConfig:
    """What the scale suite varies: sources N at the usual bottleneck, and bottlenecks R at `fixed_sources`."""

    sources: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 32, 64, 128, 256])
    bottlenecks: list[int] = field(default_factory=lambda: [8, 16, 32, 64])
    fixed_sources: int = 16
    rival_sources: list[int] = field(default_factory=lambda: [2, 4, 8, 14])

    def __post_init__(self) -> None:
        for key in ("sources", "bottlenecks", "rival_sources"):
            values = getattr(self, key)
            _require(
                all(value >= 1 for value in values) and values == sorted(set(values)),
                f"scale.{key}={values}: expected numbers from 1 on, ascending, each once",
            )
        _require(
            len(self.sources) > 0, "scale.sources is empty: expected numbers of sources, such as [2,8,32]"
        )
        _require(self.fixed_sources >= 1, f"scale.fixed_sources={self.fixed_sources}: expected at least 1")


@dataclass
class EpochConfig:
    """Whole commands: which tasks, how many sources are fused, and how many rows (null: all)."""

    tasks: list[str] = field(default_factory=lambda: ["mrpc", "rte"])
    sources: int = 8
    limit: int | None = None
    max_length: int = 128  # tokens; ours pads to the longest row of a batch, the rival's example to this
    later_epochs: int = 2  # epochs after the first, of which the dropped lower half is timed

    def __post_init__(self) -> None:
        _require(len(self.tasks) > 0, "epoch.tasks is empty: expected tasks of data_dir, such as [rte]")
        for key in ("sources", "limit", "max_length", "later_epochs"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"epoch.{key}={value}: expected at least 1")


@dataclass
class BenchmarkConfig:
    suite: str = "???"
    rounds: int | None = None  # null: as many as the suite needs
    steps: int = 5  # timed ones, in each round
    warmup: int = 2  # steps before them, in each round
    noise_limit: float = 0.10  # spread of the rounds' ratios above which there is no verdict
    threads: int | None = None  # of each worker; null: all cores that this process may use
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "auto"  # auto: bf16 on a GPU, else float32
    batch_size: int = 32
    tokens: int = 64  # of every text; none is padding
    sources: int = 14
    seed: int = 0
    backbone: str = "sentence-transformers/all-MiniLM-L6-v2"
    data_dir: str = "../shared/data"
    output: str = "outputs/benchmark"
    timeout: float = 3600.0  # seconds that a worker or a command may take for one answer
    rival: RivalConfig = field(default_factory=RivalConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    epoch: EpochConfig = field(default_factory=EpochConfig)

    def __post_init__(self) -> None:
        _require(self.suite in SUITES, f"suite={self.suite}: expected one of {', '.join(SUITES)}")
        for key in ("rounds", "threads"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"{key}={value}: expected at least 1, or null")
        for key in ("steps", "batch_size", "tokens"):
            _require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: expected at least 1")
        _require(self.warmup >= 0, f"warmup={self.warmup}: expected 0 or more")
        _require(self.sources >= 2, f"sources={self.sources}: expected at least 2")
        _require(self.noise_limit > 0, f"noise_limit={self.noise_limit}: expected a number above 0")
        _require(self.timeout > 0, f"timeout={self.timeout}: expected seconds above 0")
        _require(self.device in ("auto", "cpu", "cuda"), f"device={self.device}: expected auto, cpu or cuda")
        _require(
            self.precision in ("auto", "float32", "bf16"),
            f"precision={self.precision}: expected auto, float32 or bf16",
        )

    def rounds_of_suite(self) -> int:
        return self.rounds or ROUNDS.get(self.suite, USUAL_ROUNDS)

    def thread_count(self) -> int:
        return self.threads or cores()
