"""Slot modules and heads from manifests, without their weights.

Built on torch's meta device, they give the shapes of the tensors that an artifact must hold, so that wrong sizes are
refused and a store is verified without a backbone. Parameters inside a backbone (lora, bitfit, full) are not covered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from fusion.backbones.slots import SlotAddress
from fusion.config.compositions import CONTINUED, KEPT, CompositionConfig, SlotSources
from fusion.config.model import kept_layers
from fusion.errors import UserError, first_line
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead, TaskHeads
from fusion.layers.slot_module import SlotModule, parameters_of
from fusion.layers.target import WithTargetAdapter
from fusion.store.compatibility import check_sources
from fusion.store.layout import HEAD, MANIFEST, WEIGHTS
from fusion.store.manifest import Manifest
from fusion.store.parts import Head, StoredTask
from fusion.tasks.table import KINDS
from fusion.text import shortened

Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors by their names in a file."""


def described_adapters(manifest: Manifest) -> dict[str, BottleneckAdapter]:
    """The adapters of an artifact by slot; with `shared`, one for all layers of a site."""
    assert manifest.adapter is not None
    settings = manifest.adapter.settings
    adapters: dict[str, BottleneckAdapter] = {}
    shared: dict[tuple[str, str], BottleneckAdapter] = {}
    for slot, bottleneck_size in manifest.bottleneck_sizes.items():
        address = SlotAddress.parse(slot)
        site = address.stack, address.site
        adapters[slot] = shared.get(site) or BottleneckAdapter(
            hidden_size=manifest.backbone.hidden_size,
            bottleneck_size=bottleneck_size,
            nonlinearity=settings.nonlinearity,
            scaling=settings.scaling,
            dropout=settings.dropout,
        )
        if settings.shared:
            shared[site] = adapters[slot]
    return adapters


def described_head(manifest: Manifest) -> TaskHead | TaskHeads:
    """The head of an artifact; for multiple tasks, one for each."""
    hidden_size = manifest.backbone.hidden_size
    if manifest.multitask is None:
        return _head(manifest.task, manifest.head, hidden_size)
    each = manifest.multitask.items()
    return TaskHeads({name: _head(one.task, one.head, hidden_size) for name, one in each})


def _head(task: StoredTask, head: Head, hidden_size: int) -> TaskHead:
    kind = KINDS.get(task.kind)
    if kind is None:
        raise UserError(f"its task is of kind {shortened(task.kind)}, expected one of {', '.join(KINDS)}")
    return kind.make_head(hidden_size, **head.shape)


def compose(
    config: CompositionConfig,
    sources: Sequence[Manifest],
    adapters: Callable[[int], Mapping[str, BottleneckAdapter]],
    layers: int,
    chosen: Mapping[str, Any],
) -> dict[str, SlotModule]:
    """The composition of the sources for each slot where at least one of them has an adapter.

    Args:
        adapters: returns a source's adapters by slot, from its position.
        layers: the number of layers of the backbone.
        chosen: see `Composition.finds`: `{"kept": {slot: positions}}`, `{"continued": name}`, or empty.

    Raises:
        UserError: `chosen` does not fit the composition or the sources, or there is no slot.
    """
    definition = config.definition
    for key in (KEPT, CONTINUED):
        if (key in chosen) != (definition.finds == key):
            raise UserError(f"composition.{key} is {'not for' if key in chosen else 'missing for'} {config.name}")
    only = chosen.get(CONTINUED)
    if only is not None and only not in [source.name for source in sources]:
        raise UserError("composition.continued is not one of the sources")
    every = [adapters(n) if only in (None, source.name) else {} for n, source in enumerate(sources)]
    hidden_size, sites = sources[0].backbone.hidden_size, sources[0].placement["adapter.sites"]
    share = definition.share
    shared = {site: None if share is None else share(len(sources), hidden_size) for site in sites}
    modules: dict[str, SlotModule] = {}
    for layer in kept_layers(config.layers, config.drop, layers, "composition"):
        for site in sites:
            slot = f"{layer}.{site}"
            present = {n: own[slot] for n, own in enumerate(every) if slot in own}
            if not present:
                continue
            combined = _kept(chosen[KEPT], slot, present) if KEPT in chosen else present
            module = definition.build(config, SlotSources(combined, len(sources)), shared[site])
            modules[slot] = _beside(module, list(present.values())) if config.target_adapter else module
    if not modules:
        raise UserError(
            f"composition.layers={config.layers}: no source has an adapter in these layers, so nothing is combined"
        )
    return modules


def _kept(kept: Mapping[str, Any], slot: str, present: Mapping[int, BottleneckAdapter]) -> dict[int, BottleneckAdapter]:
    positions = kept.get(slot)
    if (
        not isinstance(positions, list)
        or not positions
        or any(type(n) is not int or n not in present for n in positions)
        or len(set(positions)) < len(positions)
    ):
        raise UserError(f"composition.kept.{slot}: expected some of the sources {list(present)}, each once")
    return {n: present[n] for n in positions}


def _beside(module: SlotModule, adapters: Sequence[BottleneckAdapter]) -> WithTargetAdapter:
    """With an adapter of the target beside it, as large as the largest source of the slot."""
    size = max(adapter.down.out_features for adapter in adapters)
    first = adapters[0]
    target = BottleneckAdapter(first.down.in_features, size, first.nonlinearity, init="zero_up")
    return WithTargetAdapter(module, target)


# --- shapes -----------------------------------------------------------------------------------------


def tensor_shapes(manifest: Manifest, sources: Sequence[Manifest], path: Path) -> dict[str, Shapes | None]:
    """The shapes in each file of an artifact, see `weight_shapes` and `head_shapes`."""
    return {WEIGHTS: weight_shapes(manifest, sources, path), HEAD: head_shapes(manifest, path)}


def weight_shapes(manifest: Manifest, sources: Sequence[Manifest], path: Path) -> Shapes | None:
    """The shapes in the weights file; None if they depend on the backbone. Shared parameters appear once.

    Args:
        sources: of a fusion, in order.
        path: the artifact's folder, for the message.

    Raises:
        UserError: the manifest describes no valid model, or does not match the sources.
    """

    def fusion() -> dict[str, SlotModule]:
        fused = manifest.composition
        assert fused is not None
        check_sources(list(sources))
        layers = manifest.backbone.layers
        return compose(fused.settings, sources, lambda n: described_adapters(sources[n]), layers, fused.chosen)

    if manifest.adapter is not None:
        return _shapes(lambda: parameters_of(described_adapters(manifest)), path)
    if manifest.composition is not None:
        return _shapes(lambda: parameters_of(fusion()), path)
    return {} if manifest.method is None else None


def head_shapes(manifest: Manifest, path: Path) -> Shapes:
    """The shapes in the head file: `output.weight` and so on; for multiple tasks, `TASK.output.weight`."""

    def head() -> Mapping[str, Parameter]:
        made = described_head(manifest)
        return made.state() if isinstance(made, TaskHeads) else dict(made.named_parameters())

    return _shapes(head, path)


class _WithoutValues(TorchFunctionMode):
    """Skips `normal_`, which has no effect on the meta device but takes most of the time."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") == "normal_":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _shapes(build: Callable[[], Mapping[str, Parameter]], path: Path) -> Shapes:
    try:
        with torch.device("meta"), _WithoutValues():
            return {name: tuple(parameter.shape) for name, parameter in build().items()}
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path / MANIFEST}: {text}") from None
    except (RuntimeError, ValueError) as error:  # impossible sizes
        raise UserError(f"{path / MANIFEST}: describes no model ({first_line(error)})") from None
