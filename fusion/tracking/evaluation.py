"""An evaluation as a run of its own: its scores, and the artifact that they are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion.config.commands import EvaluateConfig
from fusion.tracking.labels import LENGTH, flat
from fusion.tracking.tracking import SafeCsvLogger, build_loggers, finish, log_result, log_use


def tracked(
    config: EvaluateConfig,
    directory: Path,
    group: str,
    config_values: dict[str, Any],
    artifact: Mapping[str, Any],
    tags: Sequence[str],
    tasks: Sequence[str],
    evaluate: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """What `evaluate` gives, shown in a run of job type `evaluate` that uses the artifact.

    Args:
        artifact: `{"kind", "name", "hash", "run"}`, with the W&B run that made it, or None.
        tags: tasks, backbone, and the method or composition.
        tasks: what it is evaluated on.
    """
    loggers = build_loggers(
        config.logger,
        directory=directory,
        name=f"{artifact['name']} on {'+'.join(tasks)} {config.split}"[:LENGTH],
        group=group,
        job_type="evaluate",
        tags=list(tags),
        config_values=config_values,
    )
    exit_code = 1
    try:
        result = evaluate()
        log_result(loggers, result)
        log_use(loggers, **artifact)
        for logger in loggers:
            if isinstance(logger, SafeCsvLogger):  # which has no summary: a row of scores
                logger.log_metrics(dict(flat(result["metrics"])), 0)
        exit_code = 0
        return result
    finally:
        finish(loggers, exit_code)
