"""Stage 1: train an adapter, or the parameters of another method, on one or more tasks."""

from __future__ import annotations

from typing import Any

from fusion.config.stages import Stage1Config
from fusion.runs.inputs import initial_inputs, initial_manifest
from fusion.runs.output import RunOutput, check_stage, find_output
from fusion.runs.run import Run, RunState


def output_of(config: Stage1Config, run: Run) -> RunOutput:
    return find_output(config, run, config.kind, initial_inputs(initial_manifest(config, config.kind)))


def check_stage1(config: Stage1Config, run: Run) -> RunState:
    return check_stage(config, lambda: output_of(config, run))


def run_stage1(config: Stage1Config, run: Run) -> dict[str, Any]:
    """Train and store the artifact unless it is stored, and return the content of result.json."""
    output = output_of(config, run)
    if output.stored is not None:
        return output.result()
    with output.attempt(run, config.resume, parts=config.search):
        if config.search:
            from fusion.stages.search import search

            return search(config, run, output, output_of, train)
        return train(config, run, output)


def train(config: Stage1Config, run: Run, output: RunOutput) -> dict[str, Any]:
    # Heavy imports are deferred, so that --help and errors in the overrides are fast.
    import torch

    from fusion.analysis.unseen import check_unseen
    from fusion.model.adapted import AdaptedModel
    from fusion.model.build import (
        configured_backbone,
        describe_lora,
        initialize_from,
        initialize_heads,
        new_adapters,
        new_heads,
        tuning_of,
    )
    from fusion.training.fit import use_deterministic_algorithms
    from fusion.training.module import Objective
    from fusion.training.stage import StageSpec, train_and_store
    from fusion.training.task_rows import load_task_rows

    use_deterministic_algorithms(config.trainer.deterministic)
    options = config.backbone
    backbone = configured_backbone(options, config.data.max_length)
    earlier = initial_manifest(config, config.kind)
    for task in config.task_list:
        check_unseen([earlier], task, config.data)
    rows = load_task_rows(config.task_list, config.data, config.loss, backbone)
    torch.manual_seed(config.seed)
    slot_modules = new_adapters(config.adapter, backbone) if output.kind == "adapter" else {}
    tuning = tuning_of(config.method, backbone)
    head = new_heads(config.head, config.task_list, options.pooling, backbone)
    dropout, checkpointing = bool(options.dropout), options.gradient_checkpointing
    model = AdaptedModel(backbone, slot_modules, config.adapter.reads, head, dropout, checkpointing, tuning)
    initialize_heads(config.head, model.heads, rows.training, config.task_list)
    initial = initialize_from(config, model, backbone)
    sizes = {slot: config.adapter.size_for(backbone.hidden_size) for slot in slot_modules}
    adapter = config.adapter.as_stored() | {"bottleneck_sizes": sizes} if slot_modules else None
    objective = Objective(
        label_smoothing=config.loss.label_smoothing,
        robust_drop=config.adapter.drop == "robust",
        temperature=config.method.temperature,
    )
    method = None if tuning is None else config.method.of_family(backbone.family).as_stored()
    parts = {"adapter": adapter, "method": method}
    if output.kind == "lora":
        assert tuning is not None
        parts["lora"] = describe_lora(config.method, tuning, backbone)
    return train_and_store(
        StageSpec(config, run, output, model, backbone, rows, config.method.name, parts, objective, initial=initial)
    )
