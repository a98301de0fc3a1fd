"""What a stage-2 run is made of, by manifests alone: its sources, and the fusion that it prunes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.config.compositions import COMPOSITIONS, TRAINING_ONLY
from fusion.config.stages import Stage1Config, Stage2Config, StageConfig
from fusion.errors import UserError
from fusion.store.compatibility import check_sources
from fusion.store.lookup import find_by_hash, read_folder, read_manifest
from fusion.text import hydra_value, override

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest


@dataclass(frozen=True)
class Inputs:
    """The artifacts that a run reads.

    references: of the sources, by name or path, in order. fusion: what a pruned fusion is made of.
    """

    references: list[str]
    sources: list[Manifest]
    fusion: Manifest | None = None

    @property
    def hashes(self) -> dict[str, Any]:
        """What the config only names and the result depends on."""
        sources: dict[str, Any] = {"sources": [manifest.hash for manifest in self.sources]}
        if self.fusion is None:
            return sources
        # With the head, which a fusion's own hash leaves out, and the pruned one goes on with.
        return sources | {
            "fusion": [self.fusion.hash, *sorted(file.sha256 for file in self.fusion.files.values())]
        }


def read_inputs(config: Stage2Config) -> Inputs:
    """Look up what the config names, and refuse what cannot be combined as it asks.

    Raises:
        UserError: an artifact is missing or damaged, is of another kind, or does not go with the others.
    """
    store = Path(config.store)
    if config.composition.definition.is_pruned:
        return _of_fusion(config, store)
    sources = [read_manifest(source, store) for source in config.sources]
    check_sources(sources)
    if config.composition.definition.one_shape:
        check_one_shape(config.composition.name, sources)
    return Inputs(config.sources, sources)


def check_backbone_name(source: Manifest, asked: str) -> None:
    """Refuse a backbone that cannot be the sources' before it is fetched; a folder may hold the same weights."""
    made_on = source.backbone.name_or_path
    if asked != made_on and not Path(asked).is_dir() and not Path(made_on).is_dir():
        raise UserError(
            f"source {source.name} was trained on {made_on}, and the backbone here is {asked}.\n"
            f"Say backbone=… as in stage 1, or backbone.name_or_path={made_on}"
        )


def _of_fusion(config: Stage2Config, store: Path) -> Inputs:
    reference, keep = config.composition.fusion, config.composition.keep
    assert reference is not None and keep is not None and config.task is not None
    fusion = read_manifest(reference, store)
    composition = fusion.made_by
    prunable = [name for name, one in COMPOSITIONS.items() if one.can_be_pruned]
    if composition not in prunable:
        what = f"fusion of composition {composition}" if fusion.composition is not None else fusion.kind
        raise UserError(
            f"composition.fusion={reference}: is a stored {what}, expected one of composition={' or '.join(prunable)}"
        )
    names = [source.name for source in fusion.sources]
    if keep >= len(names):
        raise UserError(
            f"composition.keep={keep}: {fusion.name} has {len(names)} sources; expected fewer, at least 1"
            + ("" if len(names) > 1 else ", so there is nothing to prune")
        )
    if config.sources and config.sources != names:
        raise UserError(
            f"sources={config.sources}: {fusion.name} has its own, {', '.join(names)}; leave sources= out"
        )
    answers, task = (fusion.task.kind, fusion.task.labels), config.task
    if answers != (task.kind, task.labels):
        raise UserError(
            f"composition.fusion={reference}: its head answers {answers[0]} with labels {answers[1]}, and task "
            f"{task.name} asks for {task.kind} with labels {task.labels}; say +task={fusion.task.name}"
        )
    folders = [find_by_hash(source.hash, source.name, store) for source in fusion.sources]
    return Inputs([str(folder) for folder in folders], [read_folder(folder) for folder in folders], fusion)


def check_one_shape(composition: str, sources: Sequence[Manifest]) -> None:
    """Refuse sources whose weights have no mean.

    Raises:
        UserError: which source, how it differs from the first, and what is possible.
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
            found.append(f"adapters in {_listed(other_sizes)} and not in {_listed(sizes)}")
        elif sizes != other_sizes:
            slot = next(slot for slot in sizes if sizes[slot] != other_sizes[slot])
            found.append(f"bottleneck size {other_sizes[slot]} and not {sizes[slot]}")
        if found:
            raise UserError(
                f"composition={composition}: {other.name} differs from {first.name}: {'; '.join(found)}.\n"
                "Weights have a mean only where all have one shape: leave it out of sources=, or say composition=mean"
            )


def _listed(slots: dict[str, int]) -> str:
    return f"[{', '.join(slots)}]"


# --- init_from ----------------------------------------------------------------------------------------


def initial_manifest(config: StageConfig, kind: str, sources: Sequence[Manifest] = ()) -> Manifest | None:
    """The artifact that `init_from` names; None: it names none. No model is loaded for it.

    Args:
        kind: what the run stores.
        sources: of a fusion, in order.

    Raises:
        UserError: there is none, or its weights are not of the shape that the run trains; says what differs.
    """
    if config.init_from is None:
        return None
    manifest = read_manifest(config.init_from, Path(config.store))
    check_backbone_name(manifest, config.backbone.name_or_path)
    if manifest.kind != kind:
        raise UserError(
            f"init_from={config.init_from}: is a stored {manifest.kind}, and this run trains a {kind}; expected a "
            f"stored {kind}"
        )
    if isinstance(config, Stage2Config) and config.composition.definition.starts_from_sources:
        raise UserError(
            f"init_from={config.init_from}: composition={config.composition.name} starts from its sources; leave "
            "init_from out"
        )
    differing = [
        f"{override(key, theirs)} there, {hydra_value(ours)} here"
        for key, (theirs, ours) in _shape(config, manifest, sources).items()
        if ours != theirs
    ]
    if differing:
        some = "; ".join(differing[:4]) + (f"; and {len(differing) - 4} more" if len(differing) > 4 else "")
        raise UserError(
            f"init_from={config.init_from}: its weights are of another shape than this run's: {some}\n"
            "Set the same here, or leave init_from out"
        )
    return manifest


def initial_inputs(manifest: Manifest | None) -> dict[str, Any]:
    """What a run depends on beyond the name in `init_from`: the weights and the head of that artifact."""
    if manifest is None:
        return {}
    return {"init_from": [manifest.hash, *sorted(file.sha256 for file in manifest.files.values())]}


def _shape(
    config: StageConfig, manifest: Manifest, sources: Sequence[Manifest]
) -> dict[str, tuple[Any, Any]]:
    """What decides names, shapes and meaning of the weights: what the artifact has, and what is asked for."""
    found: dict[str, tuple[Any, Any]] = {}
    if isinstance(config, Stage1Config) and manifest.adapter is not None:
        stored, asked = manifest.adapter.settings, config.adapter
        for key in ("sites", "reads", "nonlinearity", "scaling", "shared"):
            found[f"adapter.{key}"] = getattr(stored, key), getattr(asked, key)
        if type(asked.scaling) in (int, float) and type(stored.scaling) in (int, float):
            found["adapter.scaling"] = float(stored.scaling), float(asked.scaling)
        sizes = sorted(set(manifest.bottleneck_sizes.values()))
        size = asked.size_for(manifest.backbone.hidden_size)
        found["adapter.bottleneck_size"] = sizes[0] if len(sizes) == 1 else sizes, size
        found["adapter.layers"] = stored.layers, asked.layers
        found["adapter.drop"] = _specialized(stored.drop), _specialized(asked.drop)
    elif isinstance(config, Stage1Config) and manifest.method is not None:
        for key in config.method.settings.shaping:
            found[f"method.{key}"] = getattr(manifest.method, key), getattr(config.method, key)
    elif isinstance(config, Stage2Config) and manifest.composition is not None:
        fused, given = manifest.composition.settings, config.composition
        for key in (f.name for f in fields(given)):
            if key not in (*TRAINING_ONLY, "drop"):
                found[f"composition.{key}"] = getattr(fused, key), getattr(given, key)
        found["composition.drop"] = _specialized(fused.drop), _specialized(given.drop)
        theirs = [(source.name, source.hash[:8]) for source in manifest.sources]
        ours = [(source.name, source.hash[:8]) for source in sources]
        # Of equal names one may have been trained again since: the hashes tell.
        parts = 2 if [name for name, _ in theirs] == [name for name, _ in ours] else 1
        found["sources"] = [" ".join(one[:parts]) for one in theirs], [" ".join(one[:parts]) for one in ours]
    return found


def _specialized(drop: Any) -> Any:
    """`robust` leaves no layer out of what is stored."""
    return None if drop == "robust" else drop
