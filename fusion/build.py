"""From settings and stored artifacts to a model: the only place that knows both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion.backbones.load import Backbone
from fusion.config import AdapterConfig, CompositionConfig, HeadConfig, SameBackboneConfig, TaskConfig
from fusion.errors import UserError
from fusion.layers.attention import AdapterFusion
from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.filling import Filling
from fusion.layers.heads import TaskHead, TaskHeads
from fusion.layers.mixtures import MeanMixture, StaticMixture
from fusion.model import AdaptedModel
from fusion.store.artifacts import Artifact, copy_into, load, load_by_hash
from fusion.store.manifest import Manifest, check_backbone, check_sources


def selected_layers(layers: Any, count: int, key: str) -> list[int]:
    """`null`, `last:3` or a list, as the layers of a backbone that has `count` of them.

    Raises:
        UserError: a layer that the backbone does not have; `key` names the setting.
    """
    if layers is None:
        return list(range(count))
    if isinstance(layers, str):
        last = int(layers.removeprefix("last:"))
        if last > count:
            raise UserError(
                f"{key}={layers}: the backbone has {count} layers; expected last:1 to last:{count}"
            )
        return list(range(count - last, count))
    beyond = [layer for layer in layers if layer >= count]
    if beyond:
        raise UserError(
            f"{key}={list(layers)}: layer {beyond[0]} does not exist; the backbone has layers 0 to {count - 1}"
        )
    return sorted(layers)


def adapter_fillings(config: AdapterConfig, backbone: Backbone) -> dict[str, Filling]:
    """A fresh adapter for each slot of the placement, by slot name."""
    return {
        f"{layer}.{site}": BottleneckAdapter(
            hidden_size=backbone.hidden_size,
            bottleneck_size=config.size_for(backbone.hidden_size),
            nonlinearity=config.nonlinearity,
            scaling=config.scaling,
            dropout=config.dropout,
            init=config.init,
        )
        for layer in selected_layers(config.layers, backbone.layers, "adapter.layers")
        for site in config.sites
    }


def stored_adapters(artifact: Artifact) -> dict[str, BottleneckAdapter]:
    """The adapters of a stored artifact by slot name, with their weights."""
    settings = artifact.manifest.adapter
    assert settings is not None
    adapters: dict[str, BottleneckAdapter] = {}
    for slot, bottleneck_size in settings["bottleneck_sizes"].items():
        adapters[slot] = BottleneckAdapter(
            hidden_size=artifact.manifest.backbone["hidden_size"],
            bottleneck_size=bottleneck_size,
            nonlinearity=settings["nonlinearity"],
            scaling=settings["scaling"],
            dropout=settings["dropout"],
        )
    state = {
        f"{slot}.{name}": p for slot, adapter in adapters.items() for name, p in adapter.named_parameters()
    }
    copy_into(state, artifact.weights, artifact.path / "weights.safetensors")
    return adapters


def composition_fillings(
    config: CompositionConfig, sources: Sequence[Artifact], backbone: Backbone
) -> dict[str, Filling]:
    """The composition of the sources for each slot where at least one of them has an adapter."""
    stored = [stored_adapters(source) for source in sources]
    placement = sources[0].manifest.adapter
    assert placement is not None
    fillings: dict[str, Filling] = {}
    for layer in selected_layers(config.layers, backbone.layers, "composition.layers"):
        for site in placement["sites"]:
            slot = f"{layer}.{site}"
            present = [position for position, adapters in enumerate(stored) if slot in adapters]
            if present:
                bank = AdapterBank([stored[position][slot] for position in present], present, len(sources))
                fillings[slot] = _composition(config, bank, backbone.hidden_size)
    if not fillings:
        raise UserError(
            f"composition.layers={config.layers}: no source has an adapter in these layers, so nothing is combined"
        )
    return fillings


def _composition(config: CompositionConfig, bank: AdapterBank, hidden_size: int) -> Filling:
    if config.name == "adapterfusion":
        return AdapterFusion(
            bank,
            hidden_size,
            value_matrix=config.value_matrix,
            temperature=config.temperature,
            dropout=config.dropout,
        )
    if config.name == "static":
        return StaticMixture(bank)
    return MeanMixture(bank)


def fresh_head(config: HeadConfig, task: TaskConfig, default_pooling: str, backbone: Backbone) -> TaskHead:
    """A new head for the task: one output a label, or one for a regression or a choice."""
    return TaskHead(
        hidden_size=backbone.hidden_size,
        outputs=len(task.labels or []) if task.kind == "classification" else 1,
        pooling=config.pooling or default_pooling,
        layers=config.layers,
        dropout=config.dropout,
    )


def fresh_heads(
    config: HeadConfig, tasks: Sequence[TaskConfig], default_pooling: str, backbone: Backbone
) -> TaskHead | TaskHeads:
    """A new head for each task; of a single task, that head itself."""
    heads = {str(task.name): fresh_head(config, task, default_pooling, backbone) for task in tasks}
    return TaskHeads(heads) if len(heads) > 1 else next(iter(heads.values()))


def load_sources(references: Sequence[str], store: Path, backbone: Backbone) -> list[Artifact]:
    """The source adapters, in order, all made for this very backbone and one placement.

    Raises:
        UserError: a source that is missing, damaged, or differs; it says which and how.
    """
    sources = [load(reference, store) for reference in references]
    check_sources([source.manifest for source in sources])
    for source in sources:
        check_made_for(source, backbone)
    return sources


def check_made_for(artifact: Artifact, backbone: Backbone) -> None:
    """Refuse an artifact that was made for another backbone's weights."""
    check_backbone(
        artifact.manifest,
        name_or_path=backbone.name_or_path,
        fingerprint=backbone.fingerprint,
        hidden_size=backbone.hidden_size,
    )


def backbone_of(manifest: Manifest, other: SameBackboneConfig) -> tuple[str, str | None]:
    """Name (or path) and revision of an artifact's backbone: the manifest's, or the other place of it."""
    if other.name_or_path is not None:
        return other.name_or_path, other.revision
    return manifest.backbone["name_or_path"], other.revision or manifest.backbone["revision"]


def stored_model(artifact: Artifact, store: Path, backbone: Backbone) -> AdaptedModel:
    """The model that an artifact stands for, for inference; a fusion's sources come from the store.

    Raises:
        UserError: the backbone or a source is missing or not what the artifact was made with.
    """
    manifest = artifact.manifest
    check_made_for(artifact, backbone)
    fillings: Mapping[str, Filling] = {}
    placement = manifest.placement
    if manifest.kind == "adapter":
        fillings = stored_adapters(artifact)
    elif manifest.kind == "fusion":
        sources = [load_by_hash(source["hash"], source["name"], store) for source in manifest.sources]
        assert manifest.composition is not None
        try:
            composition = CompositionConfig(**manifest.composition)
        except TypeError as error:
            raise UserError(
                f"{artifact.path / 'manifest.json'}: composition is none of this version ({error})"
            ) from error
        fillings = composition_fillings(composition, sources, backbone)
        placement = sources[0].manifest.placement
    head: TaskHead | TaskHeads = TaskHead(hidden_size=backbone.hidden_size, **manifest.head)
    if manifest.multitask is not None:
        described = {task: entry["head"] for task, entry in manifest.multitask.items()}
        head = TaskHeads({task: TaskHead(backbone.hidden_size, **how) for task, how in described.items()})
    model = AdaptedModel(backbone, fillings, placement["adapter.reads"] or "normed", head)
    if manifest.kind == "fusion":
        copy_into(model.filling_state(), artifact.weights, artifact.path / "weights.safetensors")
    copy_into(model.head_state(), artifact.head, artifact.path / "head.safetensors")
    return model.merged()
