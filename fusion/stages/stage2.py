"""Stage 2: train a composition of frozen adapters on a target task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusion.config.stages import Stage2Config
from fusion.runs.inputs import Inputs, check_backbone_name, initial_inputs, initial_manifest, read_inputs
from fusion.runs.output import RunOutput, check_stage, find_output
from fusion.runs.run import Run, RunState


def output_of(config: Stage2Config, inputs: Inputs, run: Run) -> RunOutput:
    check_backbone_name(inputs.sources[0], config.backbone.name_or_path)
    # A retrained source changes the identity of this run even if the config is unchanged.
    initial = initial_inputs(initial_manifest(config, "fusion", inputs.sources))
    return find_output(config, run, kind="fusion", inputs=inputs.hashes | initial)


def check_stage2(config: Stage2Config, run: Run) -> RunState:
    return check_stage(config, lambda: output_of(config, read_inputs(config), run))


def run_stage2(config: Stage2Config, run: Run) -> dict[str, Any]:
    """Train and store the composition unless it is stored, and return the content of result.json."""
    inputs = read_inputs(config)
    output = output_of(config, inputs, run)
    if output.stored is not None:
        return output.result()
    with output.attempt(run, config.resume, parts=config.search):
        if config.search:
            from fusion.stages.search import search

            return search(
                config,
                run,
                output,
                lambda one, own: output_of(one, inputs, own),
                lambda one, own, place: train(one, own, inputs, place),
            )
        return train(config, run, inputs, output)


def train(config: Stage2Config, run: Run, inputs: Inputs, output: RunOutput) -> dict[str, Any]:
    # Heavy imports are deferred, so that --help and errors in the overrides are fast.
    import torch

    from fusion.analysis.cross_fitting import source_sampling
    from fusion.analysis.initialization import initialize
    from fusion.analysis.unseen import check_unseen
    from fusion.model.adapted import AdaptedModel
    from fusion.model.build import (
        build_composition,
        configured_backbone,
        initialize_from,
        initialize_heads,
        load_sources,
    )
    from fusion.store.artifacts import adopt
    from fusion.training.fit import use_deterministic_algorithms
    from fusion.training.module import Objective
    from fusion.training.stage import StageSpec, train_and_store
    from fusion.training.task_rows import load_task_rows

    assert config.task is not None
    use_deterministic_algorithms(config.trainer.deterministic)
    options = config.backbone
    backbone = configured_backbone(options, config.data.max_length)
    sources = load_sources(inputs.references, Path(config.store), backbone)
    for source in sources if run.rank_zero else ():
        adopt(source, Path(config.store))
    earlier = initial_manifest(config, "fusion", inputs.sources)
    check_unseen([*inputs.sources, inputs.fusion, earlier], config.task, config.data)
    rows = load_task_rows(config.task_list, config.data, config.loss, backbone)
    validation = next(iter(rows.validation.values()))
    folds = {
        n: load_sources([one.name for one in each], Path(config.store), backbone) for n, each in inputs.folds.items()
    }
    sampling = source_sampling(config, inputs)
    init = initialize(config, sources, backbone, rows.training[0], validation, output.checkpoints)
    torch.manual_seed(config.seed)
    slot_modules = build_composition(init.composition, sources, backbone, init.chosen, config.task.name, folds)
    head = init.new_head(config, backbone)
    reads = sources[0].manifest.reads
    dropout, checkpointing = bool(options.dropout), options.gradient_checkpointing
    model = AdaptedModel(backbone, slot_modules, reads, head, dropout, checkpointing)
    if init.fusion is None:
        initialize_heads(config.head, model.heads, rows.training, config.task_list)
    init.copy_weights(model)
    initial = initialize_from(config, model, backbone)
    objective = Objective(
        loss_weights=init.composition.loss_weights(),
        label_smoothing=config.loss.label_smoothing,
        robust_drop=init.composition.drop == "robust",
        sampling=sampling,
    )
    parts, used = {"composition": init.stored}, [source.manifest for source in sources]
    tag = config.composition.name
    return train_and_store(StageSpec(config, run, output, model, backbone, rows, tag, parts, objective, used, initial))
