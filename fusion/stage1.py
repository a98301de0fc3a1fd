"""Stage 1: train one adapter on one or more source tasks, inside a frozen backbone."""

from __future__ import annotations

from typing import Any

from fusion.cli.app import command
from fusion.config.stages import Stage1Config
from fusion.runs.run import Run
from fusion.stages.stage1 import check_stage1, run_stage1


@command("stage1", Stage1Config, check=check_stage1)
def main(config: Stage1Config, run: Run) -> dict[str, Any]:
    return run_stage1(config, run)


if __name__ == "__main__":
    main()
