"""Build models from settings and from stored artifacts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fusion.backbones import load
from fusion.backbones.load import Backbone
from fusion.backbones.slots import SlotAddress
from fusion.backbones.tuning import Tuning
from fusion.config.compositions import CompositionConfig
from fusion.config.methods import MethodConfig
from fusion.config.model import SITES, AdapterConfig, BackboneConfig, HeadConfig, SameBackboneConfig, kept_layers
from fusion.config.stages import StageConfig
from fusion.config.task import TaskConfig
from fusion.data.encode import EncodedRows
from fusion.errors import UserError
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead, TaskHeads
from fusion.layers.slot_module import SlotModule, parameters_of
from fusion.model.adapted import AdaptedModel
from fusion.model.from_manifests import (
    compose,
    described_adapters,
    described_head,
    head_shapes,
    lora_names,
    make_adapters,
    weight_shapes,
)
from fusion.store.artifacts import Artifact, copy_stored, load_by_hash, match_keys
from fusion.store.artifacts import load as load_artifact
from fusion.store.compatibility import check_backbone, check_sources
from fusion.store.layout import HEAD, MANIFEST, WEIGHTS
from fusion.store.manifest import Manifest
from fusion.tasks.table import kind_of

log = logging.getLogger(__name__)


def configured_backbone(config: BackboneConfig, max_length: int | None) -> Backbone:
    """Load the backbone of a training run. See `load_backbone`."""
    return load.load_backbone(
        config.name_or_path,
        config.revision,
        config.trust_remote_code,
        max_length,
        config.dtype,
        config.encoder_only,
        config.accept_licence,
    )


def backbone_of(
    manifest: Manifest, config: SameBackboneConfig | None = None, max_length: int | None = None
) -> Backbone:
    """Load an artifact's backbone. Settings in `config` override the manifest."""
    config, stored = config or SameBackboneConfig(), manifest.backbone
    name, revision = config.name_or_path, config.revision
    if name is None:
        name, revision = stored.name_or_path, revision or stored.revision
    trust, accept, dtype = config.trust_remote_code, config.accept_licence, config.dtype or stored.dtype
    return load.load_backbone(name, revision, trust, max_length, dtype, stored.encoder_only, accept)


def describe_backbone(config: BackboneConfig, backbone: Backbone) -> dict[str, Any]:
    """Return the entry `backbone` of the manifest."""
    return {
        "name_or_path": config.name_or_path,
        "revision": config.revision,
        "fingerprint": backbone.fingerprint,
        "dtype": config.dtype,
        "family": backbone.family.name,
        "hidden_size": backbone.hidden_size,
        "layers": backbone.layers,
        **({} if "" in backbone.depths else {"stacks": backbone.depths}),
        "tokenizer": backbone.tokenizer_hash,
        **({"trust_remote_code": True} if config.trust_remote_code else {}),
    }


def new_adapters(config: AdapterConfig, backbone: Backbone) -> dict[str, BottleneckAdapter]:
    """Return a new adapter for each slot of the placement, by slot name; with `shared`, one per site for all layers.

    Raises UserError if the backbone's family does not have the stack or site, or the site does not support
    `adapter.reads`.
    """
    family, depths = backbone.family, backbone.depths
    what = f"backbone {backbone.name_or_path} ({family.name})"
    if unknown := [stack for stack in config.stacks or () if stack not in depths]:
        expected = "a single stack" if "" in depths else f"only the stacks {', '.join(depths)}"
        raise UserError(f"adapter.stacks={config.stacks}: {what} has no {unknown[0]}, but {expected}")
    stacks = config.stacks or list(depths)
    for site in config.sites:
        slots = [family.stacks[stack].sites[site] for stack in stacks if site in family.stacks[stack].sites]
        if not slots:
            existing = {name for stack in stacks for name in family.stacks[stack].sites}
            expected = ", ".join(name for name in SITES if name in existing)
            raise UserError(f"adapter.sites={config.sites}: {what} has no site {site}; expected some of {expected}")
        for slot in slots:
            if config.reads not in slot.reads:
                expected = f"{', '.join(slot.reads[:-1])} or {slot.reads[-1]}" if slot.reads[1:] else slot.reads[0]
                raise UserError(f"{what} does not support adapter.reads={config.reads} at {site}; expected {expected}")
    size = config.size_for(backbone.hidden_size)
    sizes = {
        str(SlotAddress(stack, layer, site)): size
        for stack in stacks
        for layer in kept_layers(config.layers, config.drop, depths[stack], "adapter")
        for site in config.sites
        if site in family.stacks[stack].sites
    }
    return make_adapters(config, sizes, backbone.hidden_size, config.init)


def describe_lora(config: MethodConfig, tuning: Tuning, backbone: Backbone) -> dict[str, dict[str, Any]] | None:
    """Return the entry `lora` of the manifest; `None` if an update is not at a linear layer of a slot."""
    shapes = {name: tuple(parameter.shape) for name, parameter in tuning.state().items()}
    slots = backbone.family.linear_slots(backbone.depths)
    found = {}
    for name, (rank, input_size) in shapes.items():
        path, _, matrix = name.partition(".lora_")
        if matrix != "A.weight":
            continue
        if path not in slots:
            return None
        output_size = shapes[f"{path}.lora_B.weight"][0]
        sizes = {"rank": rank, "scaling": config.alpha / rank, "input_size": input_size, "output_size": output_size}
        found[slots[path]] = sizes
    return found


def tuning_of(config: MethodConfig, backbone: Backbone) -> Tuning | None:
    """Return the backbone parameters that a method trains, if any. LoRA changes the backbone in place."""
    tune = config.definition.tune
    return None if tune is None else tune(config.of_family(backbone.family), backbone.model)


def stored_adapters(artifact: Artifact) -> dict[str, BottleneckAdapter]:
    """Return the adapters of an artifact with their weights, by slot name. Raises UserError if they do not match."""
    _check_weights(artifact)
    adapters = described_adapters(artifact.manifest)
    parameters: Mapping[str, torch.nn.Parameter] = parameters_of(adapters)
    if artifact.manifest.lora is not None:
        parameters = lora_names(artifact.manifest, parameters)
    copy_stored(parameters, artifact.weights, artifact.path / WEIGHTS)
    return adapters


def _check_weights(artifact: Artifact, sources: Sequence[Manifest] = ()) -> None:
    """Raise UserError if the weights do not match the manifest, before a model of that size is built."""
    expected = weight_shapes(artifact.manifest, sources, artifact.path)
    if expected is not None:
        match_keys(expected, artifact.weights, artifact.path / WEIGHTS)


def build_composition(
    config: CompositionConfig,
    sources: Sequence[Artifact],
    backbone: Backbone,
    chosen: Mapping[str, Any] | None = None,
    target: str | None = None,
    folds: Mapping[int, Sequence[Artifact]] | None = None,
) -> dict[str, SlotModule]:
    """Call `compose` with stored sources."""
    manifests = [source.manifest for source in sources]
    of_folds = {n: [stored_adapters(one) for one in each] for n, each in (folds or {}).items()}
    return compose(
        config, manifests, lambda n: stored_adapters(sources[n]), backbone.depths, chosen or {}, target, of_folds
    )


def pooling_of(config: HeadConfig, default: str | None, backbone: Backbone) -> str:
    """Return the pooling of new heads. Raises UserError for `cls` if the backbone has no such token.

    Args:
        default: `backbone.pooling`.
    """
    family, pooling = backbone.family, config.pooling or default or backbone.family.pooling
    if pooling == "cls" and family.pooling != "cls":
        key = "head" if config.pooling else "backbone"
        raise UserError(
            f"{key}.pooling=cls: the first token of backbone {backbone.name_or_path} ({family.name}) does not represent "
            f"the text; expected last or mean (default: {family.pooling})"
        )
    return pooling


def new_head(config: HeadConfig, task: TaskConfig, default_pooling: str | None, backbone: Backbone) -> TaskHead:
    """Return a new head for the task. `default_pooling` is `backbone.pooling`."""
    kind = kind_of(task)
    return kind.make_head(
        hidden_size=backbone.hidden_size,
        outputs=kind.head_outputs(task),
        pooling=pooling_of(config, default_pooling, backbone),
        layers=config.layers,
        dropout=config.dropout,
    )


def new_heads(
    config: HeadConfig, tasks: Sequence[TaskConfig], default_pooling: str | None, backbone: Backbone
) -> TaskHead | TaskHeads:
    """Return a new head for a single task, or a `TaskHeads` for multiple tasks."""
    heads = {str(task.name): new_head(config, task, default_pooling, backbone) for task in tasks}
    return TaskHeads(heads) if len(heads) > 1 else next(iter(heads.values()))


def initialize_heads(
    config: HeadConfig, heads: Sequence[TaskHead], rows: Sequence[EncodedRows], tasks: Sequence[TaskConfig]
) -> None:
    """Let new heads initially output the prior of the training labels, unless `head.init=zero`."""
    if config.init == "zero":
        return
    for head, encoded, task in zip(heads, rows, tasks, strict=True):
        assert encoded.labels is not None
        kind = kind_of(task)
        head.scale, head.shift = kind.affine(encoded.labels)
        bias = kind.initial_bias(task, encoded.labels, encoded.class_weights)
        if bias is not None:
            with torch.no_grad():
                head.output.bias.copy_(torch.from_numpy(bias))


def load_sources(references: Sequence[str], store: Path, backbone: Backbone) -> list[Artifact]:
    """Load the source adapters, in order. Raises UserError if one is missing, damaged or incompatible."""
    sources = [load_artifact(reference, store) for reference in references]
    check_sources([source.manifest for source in sources])
    for source in sources:
        check_trained_on(source, backbone)
    return sources


def check_trained_on(artifact: Artifact, backbone: Backbone) -> None:
    """Raise UserError if an artifact was trained on a different backbone."""
    check_backbone(
        artifact.manifest,
        name_or_path=backbone.name_or_path,
        fingerprint=backbone.fingerprint,
        hidden_size=backbone.hidden_size,
        tokenizer=backbone.tokenizer_hash,
    )
    stored = artifact.manifest.backbone
    if stored.depths != backbone.depths:
        key, found = ("stacks", backbone.depths) if stored.stacks else ("layers", backbone.layers)
        raise UserError(
            f"{artifact.path / MANIFEST}: backbone.{key} is {getattr(stored, key)}, but the backbone has {found}; "
            "copy the artifact again, or retrain it with overwrite=true"
        )


def stored_model(
    artifact: Artifact, store: Path, backbone: Backbone, drop: int = 0, fold: bool = False
) -> AdaptedModel:
    """Return the model of an artifact for inference; the sources of a fusion are read from the store.

    Raises UserError if a source is missing, or the artifact was trained with a different backbone or source.

    Args:
        drop: number of first layers without slot modules (AdapterDrop, Rücklé et al. 2021).
        fold: see `AdaptedModel.merged`; a single LoRA is always folded.
    """
    manifest = artifact.manifest
    check_trained_on(artifact, backbone)
    match_keys(head_shapes(manifest, artifact.path), artifact.head, artifact.path / HEAD)
    try:
        sources = [load_by_hash(source.hash, source.name, store) for source in manifest.sources]
    except UserError as error:
        raise UserError(f"{manifest.name}: {error}") from None
    for source in sources:
        check_trained_on(source, backbone)
    slot_modules: Mapping[str, SlotModule] = {}
    tuning = None
    if manifest.adapter is not None or manifest.lora is not None:
        slot_modules = stored_adapters(artifact)
    else:
        _check_weights(artifact, [source.manifest for source in sources])
    if manifest.composition is not None:
        fused = manifest.composition
        slot_modules = build_composition(fused.settings, sources, backbone, fused.chosen, manifest.task.name)
        copy_stored(parameters_of(slot_modules), artifact.weights, artifact.path / WEIGHTS)
    elif manifest.method is not None and manifest.lora is None:
        method = manifest.method
        if method.definition.check_stored is not None:
            method.definition.check_stored(method, artifact.weights, artifact.path / WEIGHTS)
        tuning = tuning_of(method, backbone)
        assert tuning is not None
        copy_stored(tuning.state(), artifact.weights, artifact.path / WEIGHTS)
    kept = {slot: slot_module for slot, slot_module in slot_modules.items() if SlotAddress.parse(slot).layer >= drop}
    reads = sources[0].manifest.reads if sources else manifest.reads
    model = AdaptedModel(backbone, kept, reads, described_head(manifest), tuning=tuning)
    copy_stored(model.head.state(), artifact.head, artifact.path / HEAD)
    return model.merged(fold or manifest.lora is not None)


def initialize_from(config: StageConfig, model: AdaptedModel, backbone: Backbone) -> Manifest | None:
    """Initialize the model from the artifact `init_from`, if set, including the head if shape and labels match.

    Returns the artifact's manifest. Raises UserError if it is damaged or was trained on a different backbone.
    """
    if config.init_from is None:
        return None
    artifact = load_artifact(config.init_from, Path(config.store))
    manifest = artifact.manifest
    check_trained_on(artifact, backbone)
    copy_stored(model.weight_state(), artifact.weights, artifact.path / WEIGHTS)
    if _heads_match(config.task_list, manifest, model):
        copy_stored(model.head.state(), artifact.head, artifact.path / HEAD)
        for head in model.heads:  # stored heads are not standardized
            head.scale, head.shift = 1.0, 0.0
        log.info("initialized weights and head from %s", manifest.name)
    else:
        log.info("initialized weights from %s; the head is new, since its task or shape differs", manifest.name)
    return manifest


def _heads_match(tasks: Sequence[TaskConfig], manifest: Manifest, model: AdaptedModel) -> bool:
    """Return whether the stored heads have the shapes of the model's heads and tasks of the same kinds and labels."""
    multitask = len(tasks) > 1 or manifest.multitask is not None
    if multitask and [task.name for task in manifest.tasks] != [task.name for task in tasks]:
        return False
    return len(manifest.heads) == len(tasks) and all(
        (before.kind, before.labels) == (task.kind, task.labels)
        and stored.shape | {"dropout": head.dropout.p} == head.shape
        for before, stored, task, head in zip(manifest.tasks, manifest.heads, tasks, model.heads, strict=True)
    )
