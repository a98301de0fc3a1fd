"""What a short AdapterFusion run listens to: its mean attention to each source.

Pfeiffer et al. 2021, "AdapterFusion" (§5.2, figure 6), read what a trained fusion attends to as which sources are
useful; here the fusion has seen the target's rows only a few times.

Shapes: N sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fusion.backbones.load import Backbone
from fusion.config.commands import RankConfig
from fusion.config.compositions import CompositionConfig
from fusion.config.training import OptimConfig, TrainerConfig
from fusion.data.loaders import sampled_batches
from fusion.model.adapted import AdaptedModel
from fusion.model.build import build_composition, new_head
from fusion.model.inference import device_of
from fusion.model.source_attention import SourceAttention, measure_attention
from fusion.store.artifacts import Artifact
from fusion.store.manifest import Manifest
from fusion.training.fit import fit
from fusion.training.spec import FitSpec, Objective
from fusion.training.task_rows import TaskRows


def attention_of_short_run(
    config: RankConfig, sources: Sequence[Artifact], backbone: Backbone, rows: TaskRows, folder: Path
) -> list[float]:
    """Each source's attention after `config.epochs` over the target's rows, see `shares`.

    Args:
        backbone: is changed in place; give a copy.
        folder: of the run; nothing is left there.

    Raises:
        TrainingError: the loss was no longer finite.
    """
    assert config.task is not None
    composition = CompositionConfig()
    torch.manual_seed(config.seed)
    model = AdaptedModel(
        backbone,
        build_composition(composition, sources, backbone),
        sources[0].manifest.placement["adapter.reads"],
        new_head(config.head, config.task, config.backbone.pooling, backbone),
    )
    trainer = TrainerConfig(
        accelerator=config.accelerator,
        devices=1,
        max_epochs=config.epochs,
        check_val_every_n_epoch=config.epochs,  # the scores are not used
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    spec = FitSpec(
        tasks=[config.task],
        rows=rows,
        data=config.data,
        optim=OptimConfig(lr=config.lr, patience=None),
        trainer=trainer,
        checkpoints=folder / "no checkpoints",
        seed=config.seed,
        objective=Objective(loss_weights=composition.loss_weights()),
        resume=False,
    )
    fit(model, spec)
    batches = sampled_batches(rows.training[0], None, config.data.batch_size, config.data.tokens_per_batch)
    attention = measure_attention(model, batches, device_of(config.accelerator))
    return shares(attention, [source.manifest for source in sources])


def shares(attention: Mapping[str, SourceAttention], sources: Sequence[Manifest]) -> list[float]:
    """Of each source, the mean over its slots of its attention times the slot's number of sources.

    1 is an equal share. So a source with adapters in few layers is measured where it has them.

    Args:
        attention: by slot; the weights sum to 1.
    """
    there = [set(source.bottleneck_sizes) for source in sources]
    found = []
    for position, own in enumerate(there):
        of_slots = [
            measured.mean[position] * sum(slot in others for others in there)
            for slot, measured in attention.items()
            if slot in own
        ]
        found.append(sum(of_slots) / len(of_slots))
    return found
