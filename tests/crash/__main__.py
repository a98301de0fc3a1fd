"""Kill training runs at random fault points, rerun them, and compare the results with uninterrupted runs.

    python -m tests.crash kills=100
    python -m tests.crash kills=10 kinds=[adapter,fusion] fork=true

Small runs of both stages, with one and with two processes, are killed with SIGKILL up to four times each: during a
batch or a validation, while a checkpoint, a cache or an artifact is partially written, between renames, and at random
times; the command itself, one rank, or all processes. After each kill the same command is run again. The final weights
must be bitwise identical to those of an uninterrupted run, and the store must never contain an incomplete artifact.

OUTPUT contains results.json and the directories of failed runs.
Exit codes: 0 all results are identical, 1 a result differs, 2 invalid command, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

from fusion.errors import UserError
from fusion.runs.signals import Terminated
from pipelines.commands import run_workflow, say
from tests.crash.trial import EQUAL, Outcome, Trial, summary, write_results
from tests.crash.workload import KINDS
from tests.fork_server import warm_python


@dataclass
class CrashConfig:
    kills: int = 100  # minimum number of kills in total
    seed: int = 0  # seed of the choice of fault points
    output: str = "outputs/crash"
    jobs: int = 2  # concurrent runs
    kinds: list[str] = field(default_factory=list)  # kinds of runs; empty: all
    fork: bool = False  # fork commands from a process with all modules imported: faster, but no kills during imports

    def __post_init__(self) -> None:
        for key in ("kills", "jobs"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: expected at least 1")
        if unknown := [name for name in self.kinds if name not in KINDS]:
            raise UserError(f"kinds=[{','.join(unknown)}]: expected one or more of {', '.join(KINDS)}")


def work(config: CrashConfig) -> int:
    output = Path(config.output).absolute()
    outcomes: list[Outcome] = []
    code = 0
    with warm_python() if config.fork else contextlib.nullcontext(sys.executable) as python:
        trial = Trial(output, python, config.kinds or list(KINDS), config.kills, config.jobs, config.seed)
        try:
            for outcome in trial.run():
                outcomes.append(outcome)
                say(str(outcome))
                write_results(output / "results.json", outcomes)
        except UserError as error:
            print(error, file=sys.stderr)
            code = 1
        except (KeyboardInterrupt, Terminated) as error:
            code = 130 if isinstance(error, KeyboardInterrupt) else 143
            print("interrupted; all processes were terminated", file=sys.stderr)
    if outcomes:
        say(f"\n{summary(outcomes)}\nResults: {output / 'results.json'}")
    return code or int(any(outcome.outcome != EQUAL for outcome in outcomes))


def main(arguments: list[str] | None = None) -> int:
    return run_workflow(CrashConfig, arguments, work)


if __name__ == "__main__":
    sys.exit(main())
