"""Train several methods on a task at equal budget, and store the best one as the model of the task."""

from __future__ import annotations

from typing import Any

from fusion.analysis.ranking.selection import settle_sources
from fusion.cli.app import command
from fusion.config.stages import SelectConfig
from fusion.runs.run import Run
from fusion.stages.selection import check_selection, run_selection


@command("select", SelectConfig, check=check_selection, settle=settle_sources)
def main(config: SelectConfig, run: Run) -> dict[str, Any]:
    return run_selection(config, run)


if __name__ == "__main__":
    main()
