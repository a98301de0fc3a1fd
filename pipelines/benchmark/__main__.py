"""Benchmark this project against AdapterHub's `adapters`: python -m pipelines.benchmark suite=train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusion.backbones.files import locate
from fusion.cli.app import command
from fusion.errors import UserError
from fusion.runs.run import Run
from pipelines.benchmark.config import BenchmarkConfig


def check(config: BenchmarkConfig, run: Run) -> None:
    if not Path(locate(name := config.backbone.name_or_path)).is_dir():
        raise UserError(f"backbone.name_or_path={name}: expected a folder, or set backbone=minilm")
    if config.suite in ("epoch", "startup", "ddp") and not Path(config.data_dir).is_dir():
        raise UserError(f"data_dir={config.data_dir}: expected a folder that contains TASK/train.parquet, such as mrpc")


@command("benchmark", BenchmarkConfig, check=check)
def main(config: BenchmarkConfig, run: Run) -> dict[str, Any]:
    from pipelines.benchmark.suites import measure

    return {"suite": config.suite, "result": str(measure(config))}


if __name__ == "__main__":
    main()
