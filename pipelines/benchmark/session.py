"""One suite's workers and the rounds in which they take turns."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from pipelines.benchmark import rival_env, verdicts
from pipelines.benchmark.cases import Case, Setup
from pipelines.benchmark.config import BenchmarkConfig
from pipelines.benchmark.errors import BenchmarkError
from pipelines.benchmark.workers import WorkerProcess
from pipelines.commands import say

OURS, RIVAL = "ours", "rival"
MODULES = {OURS: "pipelines.benchmark.ours", RIVAL: "pipelines.benchmark.rival"}
LOGITS_LIMIT = 1e-4  # above this the two do not compute the same, and a comparison would mean nothing

Measured = tuple[str, Case]
"""Who does what."""


@dataclass
class Timings:
    """Seconds of every step, by what was measured and by round."""

    rounds: dict[Measured, list[list[float]]] = field(default_factory=dict)

    def add(self, measured: Measured, seconds: list[float]) -> None:
        self.rounds.setdefault(measured, []).append(seconds)

    def medians(self, who: str, case: Case) -> list[float]:
        """One number a round."""
        return [statistics.median(seconds) for seconds in self.rounds[who, case]]

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {
                "who": who,
                "case": case.as_json(),
                "what": f"{who}: {case}",
                "median": statistics.median(self.medians(who, case)),
                "spread": verdicts.spread(self.medians(who, case)),
                "rounds": rounds,
            }
            for (who, case), rounds in self.rounds.items()
        ]


class Session:
    """Starts a worker when it is first needed; ends all of them, and removes the work folder, at the end."""

    def __init__(self, config: BenchmarkConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        self.work = (self.output / "work" / config.suite).absolute()
        self.threads = config.thread_count()
        self.versions: dict[str, Any] = {}
        self._workers: dict[str, WorkerProcess] = {}
        self._setup: Setup | None = None

    def __enter__(self) -> Session:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers.values():
            worker.close()
        shutil.rmtree(self.work, ignore_errors=True)
        with contextlib.suppress(OSError):  # another suite may be at work beside this one
            self.work.parent.rmdir()

    @property
    def setup(self) -> Setup:
        if self._setup is None:
            from fusion.backbones.files import locate
            from fusion.model.inference import device_of

            device = device_of(self.config.device).type
            usual = "bf16" if device == "cuda" else "float32"
            folder = Path(locate(self.config.backbone))
            if not folder.is_dir():
                raise BenchmarkError(
                    f"backbone={self.config.backbone}: expected a folder, or the packaged MiniLM, which both can load"
                )
            self._setup = Setup(
                backbone=str(folder.absolute()),
                weights=str(self.work),
                batch_size=self.config.batch_size,
                tokens=self.config.tokens,
                threads=self.threads,
                seed=self.config.seed,
                device=device,
                precision=usual if self.config.precision == "auto" else self.config.precision,
            )
        return self._setup

    def worker(self, name: str) -> WorkerProcess:
        if name not in self._workers:
            worker = WorkerProcess(
                name,
                self.command(name),
                self.output / f"{self.config.suite}-{name}.log",
                self.threads,
                self.config.timeout,
            )
            self._workers[name] = worker
            self.versions[name] = worker.ask("setup", setup=self.setup.as_json())
        return self._workers[name]

    def command(self, name: str) -> list[str]:
        """What starts a worker."""
        python = (
            str(rival_env.interpreter(self.config.rival.venv, self.output))
            if name == RIVAL
            else sys.executable
        )
        return [python, "-m", MODULES[name]]

    @property
    def sizes(self) -> dict[str, int]:
        """The backbone's: layers, hidden_size, intermediate_size, heads, vocabulary."""
        self.worker(OURS)
        return self.versions[OURS]["sizes"]

    @property
    def bottleneck(self) -> int:
        """R of the usual placement, D / 16."""
        return max(1, self.sizes["hidden_size"] // 16)

    def make_weights(self, sources: int, bottleneck: int | None = None) -> None:
        self.worker(OURS).ask("weights", sources=sources, bottleneck=bottleneck or self.bottleneck)

    def agreement(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """How far the two are apart on the same padded batch, with dropout off.

        Raises:
            BenchmarkError: so far that they do not compute the same.
        """
        found = []
        for case in cases:
            ours, theirs = (self.worker(name).ask("check", case=case.as_json()) for name in (OURS, RIVAL))
            apart = {
                "logits": max(
                    abs(a - b)
                    for row, other in zip(ours["logits"], theirs["logits"], strict=True)
                    for a, b in zip(row, other, strict=True)
                ),
                "loss": abs(ours["loss"] - theirs["loss"]),
                "penalty": abs(ours["penalty"] - theirs["penalty"]) / max(1.0, abs(ours["penalty"])),
            }
            shown = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
            say(f"same weights, same batch, {case}: largest difference of {shown}")
            if not max(apart.values()) <= LOGITS_LIMIT:  # a NaN is no agreement either
                raise BenchmarkError(
                    f"{case}: ours and the rival's differ by more than {LOGITS_LIMIT:g} ({shown}): nothing to compare "
                    f"(log: {self.output}/{self.config.suite}-{OURS}.log)"
                )
            found.append({"case": case.as_json(), **apart})
        return found

    def time(
        self,
        measured: Sequence[Measured],
        forget: bool = False,
        timings: Timings | None = None,
    ) -> Timings:
        """Rounds in which each is measured in turn, every second round in reverse; never two at a time.

        Args:
            forget: drop each model once it was measured, where all together would not fit in memory.
        """
        timings = timings or Timings()
        for name in dict.fromkeys(who for who, _ in measured):
            self.worker(name)  # starting one takes time that belongs to no round
        rounds = self.config.rounds_of_suite()
        for number in range(rounds):
            for who, case in measured if number % 2 == 0 else reversed(measured):
                steps, warmup = self.config.steps, self.config.warmup
                answer = self.worker(who).ask("time", case=case.as_json(), warmup=warmup, steps=steps)
                timings.add((who, case), answer["seconds"])
                if forget:
                    self.worker(who).ask("forget")
            say(f"round {number + 1} of {rounds} done")
        return timings

    def peak(self, who: str, case: Case) -> int:
        """Most bytes of tensors in a step, above those after loading."""
        return int(self.worker(who).ask("peak", case=case.as_json())["bytes"])
