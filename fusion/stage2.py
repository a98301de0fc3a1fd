"""Stage 2: load frozen adapters from the store and train their composition on a target task."""

from __future__ import annotations

from typing import Any

from fusion.analysis.ranking.selection import settle_sources
from fusion.cli.app import command
from fusion.config.stages import Stage2Config
from fusion.runs.run import Run
from fusion.stages.stage2 import check_stage2, run_stage2


@command("stage2", Stage2Config, check=check_stage2, settle=settle_sources)
def main(config: Stage2Config, run: Run) -> dict[str, Any]:
    return run_stage2(config, run)


if __name__ == "__main__":
    main()
