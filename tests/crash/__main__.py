"""Kill real training runs at random places, start them again, and compare what they end with.

    python -m tests.crash kills=100
    python -m tests.crash kills=10 kinds=[adapter,fusion] fork=true

Tiny runs of both stages, in one process and in two, are killed by SIGKILL up to four times each: within a batch, in
a validation, while a checkpoint, a cache or an artifact is half written, between renames, and at any moment; the
command itself, one rank, or all processes. After each death the same command is started again. It must end with the
weights of an undisturbed run, bit for bit, and a reader of the store must never find half an artifact.

In OUTPUT: results.json, and the folders of the runs that did not end as they should.
Exit codes: 0 all were equal, 1 one was not, 2 a wrong command, 130 interrupted, 143 terminated.
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
    kills: int = 100  # deaths that have to happen
    seed: int = 0  # of what is killed where
    output: str = "outputs/crash"
    jobs: int = 2  # runs at a time
    kinds: list[str] = field(default_factory=list)  # of runs; empty: all
    fork: bool = False  # fork the commands from a process that has imported all: faster, but no death in an import

    def __post_init__(self) -> None:
        for key in ("kills", "jobs"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: expected at least 1")
        if unknown := [name for name in self.kinds if name not in KINDS]:
            raise UserError(f"kinds=[{','.join(unknown)}]: expected some of {', '.join(KINDS)}")


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
            print("interrupted; no process of it is left", file=sys.stderr)
    if outcomes:
        say(f"\n{summary(outcomes)}\nResults: {output / 'results.json'}")
    return code or int(any(outcome.outcome != EQUAL for outcome in outcomes))


def main(arguments: list[str] | None = None) -> int:
    return run_workflow(CrashConfig, arguments, work)


if __name__ == "__main__":
    sys.exit(main())
