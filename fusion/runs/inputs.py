"""The stored artifacts that a run reads: sources, the fusion that is pruned, and `init_from`. Manifests only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.backbones.files import check_files
from fusion.config.commands import UseConfig
from fusion.config.compositions import COMPOSITIONS, TRAINING_ONLY
from fusion.config.stages import Stage1Config, Stage2Config, StageConfig
from fusion.errors import UserError
from fusion.store.compatibility import check_drop, check_sources, check_trust
from fusion.store.lookup import find_by_hash, read_folder, read_manifest
from fusion.text import hydra_value, override

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest


@dataclass(frozen=True)
class Inputs:
    """The artifacts that a stage-2 run reads.

    Attributes:
        references: the sources by name or path, in order.
        fusion: the stored fusion that a pruned one is derived from.
    """

    references: list[str]
    sources: list[Manifest]
    fusion: Manifest | None = None

    @property
    def hashes(self) -> dict[str, Any]:
        """What the config refers to by name only and the result depends on."""
        found: dict[str, Any] = {"sources": [manifest.hash for manifest in self.sources]}
        return found if self.fusion is None else found | {"fusion": _hashes(self.fusion)}


def _hashes(manifest: Manifest) -> list[str]:
    """The hash of a manifest and those of its files: a fusion's own hash does not cover its head."""
    return [manifest.hash, *sorted(file.sha256 for file in manifest.files.values())]


def read_inputs(config: Stage2Config) -> Inputs:
    """Look up the artifacts that the config names.

    Raises:
        UserError: one is missing, damaged or of another kind, or they cannot be combined as configured.
    """
    store = Path(config.store)
    if config.composition.definition.is_pruned:
        return _of_fusion(config, store)
    sources = [read_manifest(source, store) for source in config.sources]
    check_sources(sources)
    if config.composition.definition.one_shape:
        check_one_shape(config.composition.name, sources)
    return Inputs(config.sources, sources)


def read_used(config: UseConfig) -> Manifest:
    """The manifest of the artifact that a command uses, `config.artifact`.

    Raises:
        UserError: there is no such artifact, it has fewer layers than `drop`, its backbone has code that is not
            trusted, or files of its backbone are missing.
    """
    manifest = read_manifest(config.artifact, Path(config.store))
    trusted = config.backbone.trust_remote_code
    check_drop(manifest, config.drop)
    check_trust(manifest, trusted)
    check_files(config.backbone.name_or_path or manifest.backbone.name_or_path, trusted)
    return manifest


def check_backbone_name(source: Manifest, asked: str) -> None:
    """Refuse a backbone other than the source's before it is downloaded; a folder may hold the same weights."""
    made_on = source.backbone.name_or_path
    if asked != made_on and not Path(asked).is_dir() and not Path(made_on).is_dir():
        raise UserError(
            f"source {source.name} was trained on {made_on}, and the backbone here is {asked}.\n"
            f"Set backbone=... as in stage 1, or backbone.name_or_path={made_on}"
        )


def _of_fusion(config: Stage2Config, store: Path) -> Inputs:
    """The inputs of composition=pruned."""
    reference, keep = config.composition.fusion, config.composition.keep
    assert reference is not None and keep is not None and config.task is not None
    fusion = read_manifest(reference, store)
    prunable = [name for name, one in COMPOSITIONS.items() if one.can_be_pruned]
    if fusion.made_by not in prunable:
        what = f"fusion of composition {fusion.made_by}" if fusion.composition is not None else fusion.kind
        raise UserError(
            f"composition.fusion={reference}: is a stored {what}, expected one of composition={' or '.join(prunable)}"
        )
    names = [source.name for source in fusion.sources]
    if keep >= len(names):
        raise UserError(
            f"composition.keep={keep}: {fusion.name} has {len(names)} sources; expected 1 to {len(names) - 1}"
            if len(names) > 1
            else f"composition.keep={keep}: {fusion.name} has a single source, so there is nothing to prune"
        )
    if config.sources and config.sources != names:
        raise UserError(
            f"sources={config.sources}: {fusion.name} has the sources {', '.join(names)}; leave sources= out"
        )
    head, task = fusion.task, config.task
    if (head.kind, head.labels) != (task.kind, task.labels):
        raise UserError(
            f"composition.fusion={reference}: its head predicts {head.kind} with labels {head.labels}, and task "
            f"{task.name} is {task.kind} with labels {task.labels}; set +task={head.name}"
        )
    folders = [find_by_hash(source.hash, source.name, store) for source in fusion.sources]
    return Inputs([str(folder) for folder in folders], [read_folder(folder) for folder in folders], fusion)


def check_one_shape(composition: str, sources: Sequence[Manifest]) -> None:
    """Refuse sources whose weights cannot be averaged because their shapes or activations differ.

    Raises:
        UserError: which source, and how it differs from the first.
    """
    first = sources[0]
    for other in sources[1:]:
        assert first.adapter is not None and other.adapter is not None
        here, there = first.adapter.settings, other.adapter.settings
        found = [
            f"adapter.{key} {getattr(there, key)} and not {getattr(here, key)}"
            for key in ("nonlinearity", "scaling")
            if getattr(here, key) != getattr(there, key)
        ]
        sizes, other_sizes = first.bottleneck_sizes, other.bottleneck_sizes
        if sizes.keys() != other_sizes.keys():
            found.append(f"adapters in [{', '.join(other_sizes)}] and not in [{', '.join(sizes)}]")
        elif sizes != other_sizes:
            slot = next(slot for slot in sizes if sizes[slot] != other_sizes[slot])
            found.append(f"bottleneck size {other_sizes[slot]} and not {sizes[slot]}")
        if found:
            raise UserError(
                f"composition={composition}: {other.name} differs from {first.name}: {'; '.join(found)}.\n"
                "Weights can be averaged only if all have one shape: leave it out of sources=, or set composition=mean"
            )


def initial_manifest(config: StageConfig, kind: str, sources: Sequence[Manifest] = ()) -> Manifest | None:
    """The artifact that `init_from` names; None: it is not set. No model is loaded.

    Args:
        kind: what the run stores.
        sources: of a fusion, in order.

    Raises:
        UserError: there is no such artifact, or its weights do not have the shape that the run trains.
    """
    if config.init_from is None:
        return None
    manifest = read_manifest(config.init_from, Path(config.store))
    check_backbone_name(manifest, config.backbone.name_or_path)
    where = f"init_from={config.init_from}"
    if manifest.kind != kind:
        raise UserError(
            f"{where}: is a stored {manifest.kind}; this run trains a {kind}, expected a stored {kind}"
        )
    if isinstance(config, Stage2Config) and config.composition.definition.starts_from_sources:
        raise UserError(
            f"{where}: composition={config.composition.name} starts from its sources; leave init_from out"
        )
    differing = [
        f"{override(key, stored)} there, {hydra_value(asked)} here"
        for key, (stored, asked) in _shape(config, manifest, sources).items()
        if asked != stored
    ]
    if differing:
        some = "; ".join(differing[:4]) + (f"; and {len(differing) - 4} more" if len(differing) > 4 else "")
        raise UserError(
            f"{where}: its weights are of another shape than this run's: {some}\n"
            "Set the same values here, or leave init_from out"
        )
    return manifest


def initial_inputs(manifest: Manifest | None) -> dict[str, Any]:
    """What a run depends on beyond the name in `init_from`: the weights and the head of that artifact."""
    return {} if manifest is None else {"init_from": _hashes(manifest)}


def _shape(
    config: StageConfig, manifest: Manifest, sources: Sequence[Manifest]
) -> dict[str, tuple[Any, Any]]:
    """What determines names, shapes and meaning of the weights: for each key the stored and the asked value."""
    found: dict[str, tuple[Any, Any]] = {}
    if isinstance(config, Stage1Config) and manifest.adapter is not None:
        stored, asked = manifest.adapter.settings, config.adapter
        for key in ("sites", "reads", "nonlinearity", "scaling", "shared", "layers"):
            found[f"adapter.{key}"] = getattr(stored, key), getattr(asked, key)
        sizes = sorted(set(manifest.bottleneck_sizes.values()))
        size = asked.size_for(manifest.backbone.hidden_size)
        found["adapter.bottleneck_size"] = sizes[0] if len(sizes) == 1 else sizes, size
        found["adapter.drop"] = _specialized(stored.drop), _specialized(asked.drop)
    elif isinstance(config, Stage1Config) and manifest.method is not None:
        for key in config.method.definition.shaping:
            found[f"method.{key}"] = getattr(manifest.method, key), getattr(config.method, key)
    elif isinstance(config, Stage2Config) and manifest.composition is not None:
        fused, given = manifest.composition.settings, config.composition
        for key in (f.name for f in fields(given) if f.name not in TRAINING_ONLY):
            found[f"composition.{key}"] = getattr(fused, key), getattr(given, key)
        found["composition.drop"] = _specialized(fused.drop), _specialized(given.drop)
        stored_sources = [(source.name, source.hash[:8]) for source in manifest.sources]
        asked_sources = [(source.name, source.hash[:8]) for source in sources]
        # Of equal names, one may have been trained again since: then the hashes are shown too.
        parts = 2 if [name for name, _ in stored_sources] == [name for name, _ in asked_sources] else 1
        found["sources"] = (
            [" ".join(one[:parts]) for one in stored_sources],
            [" ".join(one[:parts]) for one in asked_sources],
        )
    return found


def _specialized(drop: Any) -> Any:
    """`robust` AdapterDrop stores all layers, as no AdapterDrop does."""
    return None if drop == "robust" else drop
