"""The benchmark: python -m pipelines.benchmark suite=train.

Ours and the rival's run in turn, in processes of their own, on the same weights and batches. What comes out
is printed and kept in outputs/benchmark/SUITE.json. A figure that is not reached is a finding and no error.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fusion.cli.app import command
from fusion.errors import UserError
from fusion.runs.run import Run
from pipelines.benchmark.config import BenchmarkConfig
from pipelines.benchmark.errors import BenchmarkError

NEED_DATA = ("epoch", "startup", "ddp")


def check(config: BenchmarkConfig, run: Run) -> None:
    """What can be said before anything is measured."""
    if config.suite in NEED_DATA and not Path(config.data_dir).is_dir():
        raise UserError(
            f"data_dir={config.data_dir}: there is no such folder; expected DIR/mrpc/train.parquet and the like"
        )


@command("benchmark", BenchmarkConfig, check=check)
def main(config: BenchmarkConfig, run: Run) -> dict[str, Any]:
    from pipelines.benchmark.suites import measure

    try:
        path = measure(config)
    except BenchmarkError as error:
        if run.group != run.command:  # one suite of several: the others go on, and the end says what failed
            raise
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(str(error)) from None
    return {"suite": config.suite, "result": str(path)}


if __name__ == "__main__":
    main()
