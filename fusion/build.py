"""From settings and stored artifacts to a model: the only place that knows both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.nn import Parameter

from fusion.backbones.load import Backbone
from fusion.backbones.slots import layer_and_site
from fusion.backbones.tuning import Tuning, bitfit, full, lora
from fusion.config import (
    AdapterConfig,
    CompositionConfig,
    HeadConfig,
    MethodConfig,
    SameBackboneConfig,
    TaskConfig,
)
from fusion.errors import UserError
from fusion.layers.attention import AdapterFusion
from fusion.layers.average import FrozenAdapter, average
from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead, TaskHeads
from fusion.layers.mixtures import MeanMixture, StaticMixture
from fusion.layers.scalearn import ScaLearn, initial_scales
from fusion.layers.sequence import SequenceFusion
from fusion.layers.slot_module import SlotModule, parameters_of
from fusion.layers.target import WithTargetAdapter
from fusion.model.adapted import AdaptedModel
from fusion.selection import kept_layers
from fusion.store.artifacts import Artifact, copy_stored, load, load_by_hash, match_keys
from fusion.store.compatibility import check_backbone, check_sources
from fusion.store.layout import HEAD, MANIFEST, WEIGHTS
from fusion.store.manifest import Manifest
from fusion.store.settings import settings_of
from fusion.store.shapes import adapter_shapes, fusion_shapes, head_shapes
from fusion.tasks.table import kind_of


def adapter_fillings(config: AdapterConfig, backbone: Backbone) -> dict[str, SlotModule]:
    """A fresh adapter for each slot of the placement, by slot name; `shared` puts one into all layers.

    Raises:
        UserError: the backbone's family has no such site.
    """
    there = backbone.family.sites
    missing = [site for site in config.sites if site not in there]
    if missing:
        raise UserError(
            f"adapter={config.name}: backbone {backbone.name_or_path} ({backbone.family.name}) has no place "
            f"{missing[0]}; expected adapter.sites among {', '.join(there)}"
        )

    def fresh() -> BottleneckAdapter:
        return BottleneckAdapter(
            hidden_size=backbone.hidden_size,
            bottleneck_size=config.size_for(backbone.hidden_size),
            nonlinearity=config.nonlinearity,
            scaling=config.scaling,
            dropout=config.dropout,
            init=config.init,
        )

    fillings: dict[str, SlotModule] = {}
    shared = {site: fresh() for site in config.sites} if config.shared else {}
    for layer in kept_layers(config.layers, config.drop, backbone.layers, "adapter"):
        for site in config.sites:
            fillings[f"{layer}.{site}"] = shared.get(site) or fresh()
    return fillings


def tuning_of(config: MethodConfig, backbone: Backbone) -> Tuning | None:
    """What of the backbone itself a method trains; None: nothing. LoRA changes the backbone in place."""
    if config.name in ("full", "multitask_full"):
        return full(backbone.model)
    if config.name == "bitfit":
        return bitfit(backbone.model)
    if config.name == "lora":
        return lora(backbone.model, config.rank, config.alpha, config.dropout, config.targets)
    return None


def stored_adapters(artifact: Artifact) -> dict[str, BottleneckAdapter]:
    """The adapters of a stored artifact by slot name, with their weights.

    Raises:
        UserError: the weights are not what the manifest says.
    """
    settings = artifact.manifest.adapter
    assert settings is not None
    match_keys(adapter_shapes(artifact.manifest), artifact.weights, artifact.path / WEIGHTS)
    adapters: dict[str, BottleneckAdapter] = {}
    shared: dict[str, BottleneckAdapter] = {}
    for slot, bottleneck_size in settings["bottleneck_sizes"].items():
        site = layer_and_site(slot)[1]
        adapters[slot] = shared.get(site) or BottleneckAdapter(
            hidden_size=artifact.manifest.backbone["hidden_size"],
            bottleneck_size=bottleneck_size,
            nonlinearity=settings["nonlinearity"],
            scaling=settings["scaling"],
            dropout=settings["dropout"],
        )
        if settings.get("shared", False):
            shared[site] = adapters[slot]
    copy_stored(parameters_of(adapters), artifact.weights, artifact.path / WEIGHTS)
    return adapters


def composition_fillings(
    config: CompositionConfig,
    sources: Sequence[Artifact],
    backbone: Backbone,
    kept: Mapping[str, Sequence[int]] | None = None,
    continued: str | None = None,
) -> dict[str, SlotModule]:
    """The composition of the sources for each slot where at least one of them has an adapter.

    Args:
        kept: of a pruned fusion, the positions of the sources that each slot keeps; None: all.
        continued: the name of the source whose adapter goes on training, alone.
    """
    stored = [
        stored_adapters(source) if continued in (None, source.manifest.name) else {} for source in sources
    ]
    placement = sources[0].manifest.adapter
    assert placement is not None
    scales = {site: _shared_scales(config, len(sources), backbone.hidden_size) for site in placement["sites"]}
    averages: dict[tuple[int, ...], BottleneckAdapter] = {}
    fillings: dict[str, SlotModule] = {}
    for layer in kept_layers(config.layers, config.drop, backbone.layers, "composition"):
        for site in placement["sites"]:
            slot = f"{layer}.{site}"
            present = {n: adapters[slot] for n, adapters in enumerate(stored) if slot in adapters}
            if present:
                chosen = present if kept is None else {n: present[n] for n in kept[slot]}
                filling = _composition(config, chosen, len(sources), scales[site], averages)
                fillings[slot] = (
                    _beside(filling, list(present.values())) if config.target_adapter else filling
                )
    if not fillings:
        raise UserError(
            f"composition.layers={config.layers}: no source has an adapter in these layers, so nothing is combined"
        )
    return fillings


def _composition(
    config: CompositionConfig,
    adapters: Mapping[int, BottleneckAdapter],
    total: int,
    shared: Parameter | None,
    averages: dict[tuple[int, ...], BottleneckAdapter],
) -> SlotModule:
    """Of the adapters of one slot, by the position of their source.

    Args:
        shared: the scales that all layers share, where they do.
        averages: those that were made already: of adapters that layers share, layers share the average.
    """
    several = list(adapters.values())
    if config.name == "continued":
        return several[0]
    if config.name == "average":
        ids = tuple(map(id, several))
        averages.setdefault(ids, average(several))
        return averages[ids] if config.train else FrozenAdapter(averages[ids])
    bank = AdapterBank(several, list(adapters), total)
    hidden_size = several[0].down.in_features
    if config.name in ("adapterfusion", "sequence", "pruned"):
        attention = SequenceFusion if config.name == "sequence" else AdapterFusion
        return attention(
            bank,
            value_matrix=config.value_matrix,
            temperature=config.temperature,
            dropout=config.dropout,
            rank=config.rank,
        )
    if config.name.startswith("scalearn"):
        if shared is not None:
            return ScaLearn(bank, shared, shared=True)
        return ScaLearn(bank, initial_scales(len(bank), _width(config, hidden_size)))
    if config.name == "static":
        return StaticMixture(bank)
    return MeanMixture(bank)


def _shared_scales(config: CompositionConfig, total: int, hidden_size: int) -> Parameter | None:
    """The one ω of ScaLearn++, which a site has in all layers."""
    return initial_scales(total, _width(config, hidden_size)) if config.name.endswith("_pp") else None


def _width(config: CompositionConfig, hidden_size: int) -> int:
    return 1 if "uniform" in config.name else hidden_size


def _beside(filling: SlotModule, adapters: Sequence[BottleneckAdapter]) -> WithTargetAdapter:
    """With an adapter of the target's own, as large as the largest source of the slot."""
    size = max(adapter.down.out_features for adapter in adapters)
    first = adapters[0]
    target = BottleneckAdapter(first.down.in_features, size, first.nonlinearity, init="zero_up")
    return WithTargetAdapter(filling, target)


def fresh_head(config: HeadConfig, task: TaskConfig, default_pooling: str, backbone: Backbone) -> TaskHead:
    """A new head for the task."""
    kind = kind_of(task)
    return kind.make_head(
        hidden_size=backbone.hidden_size,
        outputs=kind.head_outputs(task),
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
        tokenizer=backbone.tokenizer_hash,
    )
    if artifact.manifest.backbone["layers"] != backbone.layers:
        raise UserError(
            f"{artifact.path / MANIFEST}: backbone.layers is {artifact.manifest.backbone['layers']}, and that "
            f"backbone has {backbone.layers}; copy the artifact again, or train it again with overwrite=true"
        )


def backbone_of(manifest: Manifest, other: SameBackboneConfig) -> tuple[str, str | None]:
    """Name (or path) and revision of an artifact's backbone: the manifest's, or the other place of it."""
    if other.name_or_path is not None:
        return other.name_or_path, other.revision
    return manifest.backbone["name_or_path"], other.revision or manifest.backbone["revision"]


def stored_composition(manifest: Manifest, path: Path) -> tuple[CompositionConfig, dict[str, Any]]:
    """The settings of a stored fusion, and what was chosen for it: `kept` or `continued`.

    Raises:
        UserError: they are none of this version.
    """
    settings = dict(manifest.composition or {})
    chosen: dict[str, Any] = {key: settings.pop(key) for key in ("kept", "continued") if key in settings}
    return settings_of(CompositionConfig, settings, f"{path / MANIFEST}: composition"), chosen


def _check_rank(method: MethodConfig, artifact: Artifact) -> None:
    """Refuse a rank that the stored weights do not have, before anything of that size is made."""
    stored = {
        tuple(tensor.shape[:1]) for name, tensor in artifact.weights.items() if name.endswith("lora_A.weight")
    }
    if method.name == "lora" and stored != {(method.rank,)}:
        raise UserError(
            f"{artifact.path / WEIGHTS}: holds LoRA of rank {sorted(stored)}, and {MANIFEST} says method.rank={method.rank}"
        )


def _sources_of(manifest: Manifest, store: Path) -> list[Artifact]:
    try:
        return [load_by_hash(source["hash"], source["name"], store) for source in manifest.sources]
    except UserError as error:
        raise UserError(f"{manifest.name}: {error}") from None


def _stored_head(task: dict[str, Any], head: dict[str, Any], backbone: Backbone) -> TaskHead:
    kind = kind_of(TaskConfig.from_dict(task, where="manifest"))
    shape = {key: value for key, value in head.items() if key != "decision"}
    return kind.make_head(backbone.hidden_size, **shape)


def stored_model(artifact: Artifact, store: Path, backbone: Backbone, drop: int = 0) -> AdaptedModel:
    """The model that an artifact stands for, for inference; a fusion's sources come from the store.

    Args:
        drop: how many of the first layers go without what their slots hold (AdapterDrop, Rücklé et al. 2021).

    Raises:
        UserError: the backbone or a source is missing or not what the artifact was made with.
    """
    manifest = artifact.manifest
    check_made_for(artifact, backbone)
    match_keys(head_shapes(manifest), artifact.head, artifact.path / HEAD)
    fillings: Mapping[str, SlotModule] = {}
    tuning = None
    placement = manifest.placement
    if manifest.kind == "adapter":
        fillings = stored_adapters(artifact)
    elif manifest.kind == "fusion":
        sources = _sources_of(manifest, store)
        described = [source.manifest for source in sources]
        match_keys(
            fusion_shapes(manifest, described, artifact.path), artifact.weights, artifact.path / WEIGHTS
        )
        composition, chosen = stored_composition(manifest, artifact.path)
        for source in sources:
            check_made_for(source, backbone)
        fillings = composition_fillings(composition, sources, backbone, **chosen)
        placement = sources[0].manifest.placement
        copy_stored(parameters_of(fillings), artifact.weights, artifact.path / WEIGHTS)
    elif manifest.method is not None:
        method = settings_of(MethodConfig, manifest.method, f"{artifact.path / MANIFEST}: method")
        _check_rank(method, artifact)
        tuning = tuning_of(method, backbone)
        assert tuning is not None
        copy_stored(tuning.state(), artifact.weights, artifact.path / WEIGHTS)
    elif artifact.weights:
        match_keys({}, artifact.weights, artifact.path / WEIGHTS)
    kept = {slot: filling for slot, filling in fillings.items() if layer_and_site(slot)[0] >= drop}
    head: TaskHead | TaskHeads = _stored_head(manifest.task, manifest.head, backbone)
    if manifest.multitask is not None:
        head = TaskHeads(
            {
                name: _stored_head(entry["task"], entry["head"], backbone)
                for name, entry in manifest.multitask.items()
            }
        )
    reads = placement["adapter.reads"] or "normed"
    model = AdaptedModel(backbone, kept, reads, head, tuning=tuning)
    copy_stored(model.head_state(), artifact.head, artifact.path / HEAD)
    return model.merged()
