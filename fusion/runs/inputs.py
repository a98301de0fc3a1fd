"""Stored artifacts that a run depends on. Only manifests are read; no weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.backbones.families import FAMILIES
from fusion.backbones.files import check_files
from fusion.config.commands import UseConfig
from fusion.config.compositions import COMPOSITIONS, TRAINING_ONLY
from fusion.config.data import Fold
from fusion.config.fields import require
from fusion.config.stages import Stage1Config, Stage2Config, StageConfig
from fusion.errors import UserError
from fusion.store.compatibility import check_sources, differences, own_adapters
from fusion.store.lookup import find_by_hash, names, read_folder, read_manifest
from fusion.text import key_of, listed, override, shell_line

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest


@dataclass(frozen=True)
class Inputs:
    """The artifacts that a stage-2 run depends on."""

    references: list[str]  # names or paths of the sources, in order
    sources: list[Manifest]
    fusion: Manifest | None = None  # the fusion to prune
    # With cross-fitting, the artifacts of each fold by the index of their source.
    folds: Mapping[int, Sequence[Manifest]] = field(default_factory=dict)

    @property
    def hashes(self) -> dict[str, Any]:
        """Hashes of the artifacts, which the config only refers to by name."""
        found: dict[str, Any] = {"sources": [manifest.hash for manifest in self.sources]}
        if self.folds:
            found["folds"] = [manifest.hash for each in self.folds.values() for manifest in each]
        return found if self.fusion is None else found | {"fusion": _hashes(self.fusion)}


def _hashes(manifest: Manifest) -> list[str]:
    """Return the hash of an artifact and its files. The hash of a fusion does not cover its head."""
    return [manifest.hash, *sorted(file.sha256 for file in manifest.files.values())]


def read_inputs(config: Stage2Config) -> Inputs:
    """Read the manifests of the inputs. Raises UserError if one is missing or they are incompatible."""
    store = Path(config.store)
    if config.composition.definition.is_pruned:
        inputs = _of_fusion(config, store)
    else:
        sources = [read_manifest(source, store) for source in config.sources]
        check_sources(sources)
        if config.composition.definition.one_shape:
            check_one_shape(config.composition.name, sources)
        inputs = Inputs(config.sources, sources)
    return replace(inputs, folds=_folds(config, inputs.sources, store))


def _folds(config: Stage2Config, sources: Sequence[Manifest], store: Path) -> dict[int, list[Manifest]]:
    """Return the artifacts for cross-fitting, see `Inputs.folds`; empty without it.

    Raises UserError if a setting requires an own adapter of the target but no source is one, or an artifact is missing
    or was trained with other settings than its source.
    """
    asked, task = config.composition, config.task
    assert task is not None
    own = own_adapters(sources, task.name)
    needs = {"cross_fit": asked.cross_fit is not None, "prior": asked.prior == "own", "dropped": asked.dropped == "own"}
    for key, needed in needs.items():
        require(
            bool(own) or not needed,
            f"{override(f'composition.{key}', getattr(asked, key))}: no source was trained on {task.name}; add its "
            "adapter to sources=, or leave it out",
        )
    if asked.cross_fit is None:
        return {}
    return {n: _folds_of(sources[n], asked.cross_fit, store) for n in own}


def _folds_of(source: Manifest, count: int, store: Path) -> list[Manifest]:
    every = Fold.each(count)
    wanted, there = [f"{source.name}{one.suffix}" for one in every], names(store)
    if missing := [name for name in wanted if name not in there]:
        others = ("name", "data.leave_out", "seed")
        kept = [word for word in source.run.overrides if key_of(word) not in others]
        swept = ",".join(map(str, every))
        words = [*kept, f"seed={source.seed}", f"name={source.name}", f"data.leave_out={swept}"]
        raise UserError(
            f"composition.cross_fit={count}: no {listed(missing)} in the store {store}, trained without a fold of the "
            f"examples of {source.name}\nTrain with: {shell_line('stage1', ['-m', *words])}"
        )
    found = [read_manifest(name, store) for name in wanted]
    for manifest, left_out in zip(found, every, strict=True):
        expected = source.run.config | {"data.leave_out": str(left_out)}
        keys = sorted({*expected, *manifest.run.config})
        pairs = {key: (expected.get(key), manifest.run.config.get(key)) for key in keys}
        if differs := differences(pairs):
            raise UserError(
                f"composition.cross_fit={count}: {manifest.name} was not trained with the settings of {source.name}: "
                f"{differs}; retrain one of them with overwrite=true"
            )
    return found


def read_used(config: UseConfig) -> Manifest:
    """Read the manifest of `config.artifact`. Raises UserError if it is missing or incompatible."""
    manifest = read_manifest(config.artifact, Path(config.store))
    stored, trusted, drop = manifest.backbone, config.backbone.trust_remote_code, config.drop
    if drop and manifest.kind not in ("adapter", "fusion"):
        raise UserError(f"drop={drop}: {manifest.name} is a stored {manifest.kind}, expected an adapter or a fusion")
    if drop > stored.layers:
        raise UserError(f"drop={drop}: the backbone of {manifest.name} has {stored.layers} layers; expected fewer")
    if stored.trust_remote_code and not trusted:
        raise UserError(
            f"{manifest.name}: the backbone {stored.name_or_path} runs custom code; set "
            "backbone.trust_remote_code=true if you trust it"
        )
    name = config.backbone.name_or_path or stored.name_or_path
    check_files(name, trusted, stored.encoder_only, config.backbone.accept_licence)
    return manifest


def check_backbone_name(source: Manifest, asked: str) -> None:
    """Raise UserError if the Hub name of the backbone is different, before it is downloaded."""
    made_on = source.backbone.name_or_path
    if asked != made_on and not Path(asked).is_dir() and not Path(made_on).is_dir():
        raise UserError(
            f"source {source.name} was trained on {made_on}, but the backbone of this run is {asked}; set backbone=... "
            f"as in stage 1, or backbone.name_or_path={made_on}"
        )


def _of_fusion(config: Stage2Config, store: Path) -> Inputs:
    """Return the inputs of composition=pruned."""
    reference, keep, task = config.composition.fusion, config.composition.keep, config.task
    assert reference is not None and keep is not None and task is not None
    fusion = read_manifest(reference, store)
    where = f"composition.fusion={reference}"
    prunable = [name for name, one in COMPOSITIONS.items() if one.can_be_pruned]
    if fusion.made_by not in prunable:
        raise UserError(
            f"{where} is a stored {fusion.kind} ({fusion.made_by}), expected a fusion of composition="
            f"{' or '.join(prunable)}"
        )
    assert fusion.composition is not None
    gate = fusion.composition.settings.gate_of
    if gate != "slot":
        raise UserError(
            f"{where} has composition.gate={gate}, so its slots share weights and cannot keep different sources; expected "
            "a fusion with composition.gate=slot"
        )
    names = [source.name for source in fusion.sources]
    if keep >= len(names):
        raise UserError(f"composition.keep={keep}: {fusion.name} has {len(names)} sources, expected fewer")
    if config.sources and config.sources != names:
        raise UserError(f"sources={config.sources}: {fusion.name} has the sources {', '.join(names)}; remove sources=")
    stored = fusion.task
    pairs = {"task.kind": (stored.kind, task.kind), "task.labels": (stored.labels, task.labels)}
    if found := differences(pairs):
        raise UserError(f"{where} was trained on a different task: {found}; set +task={stored.name}")
    folders = [find_by_hash(source.hash, source.name, store) for source in fusion.sources]
    return Inputs([str(folder) for folder in folders], [read_folder(folder) for folder in folders], fusion)


def check_one_shape(composition: str, sources: Sequence[Manifest]) -> None:
    """Raise UserError if weights cannot be averaged since shapes or activations differ."""

    def shape(source: Manifest) -> dict[str, Any]:
        if source.adapter is None:
            return {"lora": source.content["lora"]}
        settings = {f"adapter.{key}": getattr(source.adapter.settings, key) for key in ("nonlinearity", "scaling")}
        return settings | {"adapter.bottleneck_sizes": source.bottleneck_sizes}

    first = shape(sources[0])
    for other in sources[1:]:
        if found := differences({key: (first[key], value) for key, value in shape(other).items()}):
            raise UserError(
                f"composition={composition} requires equal shapes, but {other.name} differs from {sources[0].name}: "
                f"{found}; remove it from sources= or set composition=mean"
            )


def initial_manifest(config: StageConfig, kind: str, sources: Sequence[Manifest] = ()) -> Manifest | None:
    """Return the manifest of the artifact given by `init_from`, if any. Raises UserError if it does not fit the run."""
    if config.init_from is None:
        return None
    manifest = read_manifest(config.init_from, Path(config.store))
    check_backbone_name(manifest, config.backbone.name_or_path)
    where = f"init_from={config.init_from}"
    if manifest.kind != kind:
        raise UserError(f"{where} is a stored {manifest.kind}, but this run trains a {kind}")
    if isinstance(config, Stage2Config) and config.composition.definition.starts_from_sources:
        raise UserError(f"{where}: composition={config.composition.name} starts from its sources; remove init_from")
    if found := differences(_shape(config, manifest, sources)):
        raise UserError(
            f"{where} does not match the settings of this run: {found}; set the expected values or remove init_from"
        )
    return manifest


def initial_inputs(manifest: Manifest | None) -> dict[str, Any]:
    """Return the hashes of the artifact given by `init_from`, if any."""
    return {} if manifest is None else {"init_from": _hashes(manifest)}


def _shape(config: StageConfig, manifest: Manifest, sources: Sequence[Manifest]) -> dict[str, tuple[Any, Any]]:
    """Return the stored and the requested value of each setting that determines the shapes of the weights."""
    found: dict[str, tuple[Any, Any]] = {}

    def compare(part: str, stored: Any, asked: Any, keys: Iterable[str]) -> None:
        for key in keys:
            values = getattr(stored, key), getattr(asked, key)
            # Robust AdapterDrop stores all layers, like training without AdapterDrop.
            here, there = (None if (key, value) == ("drop", "robust") else value for value in values)
            found[f"{part}.{key}"] = here, there

    if isinstance(config, Stage1Config) and manifest.adapter is not None:
        stored, asked = manifest.adapter.settings, config.adapter
        compare("adapter", stored, asked, ("sites", "reads", "nonlinearity", "scaling", "shared", "layers", "drop"))
        sizes = sorted(set(manifest.bottleneck_sizes.values()))
        size = asked.size_for(manifest.backbone.hidden_size)
        found["adapter.bottleneck_size"] = sizes[0] if len(sizes) == 1 else sizes, size
    elif isinstance(config, Stage1Config) and manifest.method is not None:
        family = FAMILIES.get(manifest.backbone.family)
        method = config.method if family is None else config.method.of_family(family)
        compare("method", manifest.method, method, method.definition.shaping)
    elif isinstance(config, Stage2Config) and manifest.composition is not None:
        fused, given = manifest.composition.settings, config.composition
        compare("composition", fused, given, [f.name for f in fields(given) if f.name not in TRAINING_ONLY])
        stored_sources = [f"{source.name} {source.hash}" for source in manifest.sources]
        found["sources"] = stored_sources, [f"{source.name} {source.hash}" for source in sources]
    return found
