"""The command: `python -m pipelines.chaos kills=100`."""

from __future__ import annotations

import sys
from pathlib import Path

from fusion.errors import UserError
from fusion.runs.signals import Terminated, exit_code
from pipelines.chaos.config import ChaosConfig
from pipelines.chaos.journey import EQUAL, Journey, Outcome
from pipelines.chaos.table import HEADER, SUMMARY_HEADER, markdown, row, summary, verdict, write
from pipelines.chaos.victims import Forked, Fresh
from pipelines.commands import read_config, say


def main(arguments: list[str]) -> int:
    try:
        config = read_config(ChaosConfig, arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    starter = Forked() if config.fork else Fresh()
    journey = Journey(config, starter)
    outcomes: list[Outcome] = []
    files: list[Path] = []
    code = 0
    try:
        for outcome in journey.run():
            if not outcomes:
                say(f"\n{markdown(HEADER, [])}")
            outcomes.append(outcome)
            files = write(journey.folder, config, outcomes)  # each time: this one may be killed as well
            say(markdown(row(outcome), []).splitlines()[0])
    except UserError as error:
        print(error, file=sys.stderr)
        code = 1
    except (KeyboardInterrupt, Terminated) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else 143
        print("interrupted; the victims are dead", file=sys.stderr)
    finally:
        starter.close()
    if outcomes:
        say(f"\n{markdown(SUMMARY_HEADER, summary(outcomes))}\n\n{verdict(outcomes)}")
        say(f"Results: {', '.join(map(str, files))}")
    return code or int(any(outcome.outcome != EQUAL for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
