"""Checks of a training command that run before a model is loaded, without heavy imports."""

from __future__ import annotations

from collections.abc import Callable

from fusion.backbones.files import check_files
from fusion.config.stages import StageConfig
from fusion.runs.output import RunOutput
from fusion.runs.run import RunState


def check_stage(config: StageConfig, output_of: Callable[[], RunOutput]) -> RunState:
    """Check data, backbone files and compiler, and return the state of the run.

    Args:
        output_of: returns the run's output; called after the data was checked.

    Raises:
        UserError: if data, backbone files or compiler are missing or invalid.
    """
    from fusion.data.splits import check_held_out_splits, check_source

    check_held_out_splits(config.task_list, config.data)
    for task in config.task_list:
        check_source(task, config.data)
    output = output_of()
    if output.stored is None:
        check_files(config.backbone.name_or_path, config.backbone.trust_remote_code)
    if config.compile:
        from fusion.backbones.layer_calls import check_compiler

        check_compiler()
    return output.run_state
