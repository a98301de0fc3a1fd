"""Run the study, see `config.py`."""

from __future__ import annotations

import sys

from pipelines.commands import run_workflow
from pipelines.study.config import StudyConfig
from pipelines.study.table import report
from pipelines.study.trainings import Study


def work(config: StudyConfig) -> None:
    study = Study(config)
    if not config.report:
        study.run()
    report(config, study.results)


def main(arguments: list[str] | None = None) -> int:
    return run_workflow(StudyConfig, arguments, work)


if __name__ == "__main__":
    sys.exit(main())
