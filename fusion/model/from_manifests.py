"""Slot modules and heads built from manifests without their weights; on the meta device, to verify a store's shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from fusion.backbones.families import FAMILIES
from fusion.backbones.slots import SlotAddress
from fusion.config.compositions import CONTINUED, KEPT, CompositionConfig, SlotSources
from fusion.config.model import AdapterConfig, kept_layers
from fusion.errors import UserError, first_line
from fusion.layers.bottleneck import BottleneckAdapter, WithTargetAdapter
from fusion.layers.heads import TaskHead, TaskHeads
from fusion.layers.slot_module import SlotModule, parameters_of
from fusion.store.compatibility import check_sources, own_adapters
from fusion.store.layout import HEAD, MANIFEST, WEIGHTS
from fusion.store.manifest import Manifest
from fusion.tasks.table import KINDS
from fusion.text import shortened

Shapes = dict[str, tuple[int, ...]]  # of tensors, by name in the file


def described_adapters(manifest: Manifest) -> dict[str, BottleneckAdapter]:
    """Return new adapters with the sizes given in a manifest, by slot; LoRAs are adapters without σ and biases."""
    if manifest.lora is not None:
        return {
            slot: BottleneckAdapter(
                one.input_size,
                one.rank,
                "identity",
                one.scaling,
                init="zero_up",
                output_size=one.output_size,
                bias=False,
                up_bias=one.bias,
            )
            for slot, one in manifest.lora.items()
        }
    assert manifest.adapter is not None
    sizes, hidden_size = manifest.bottleneck_sizes, manifest.backbone.hidden_size
    return make_adapters(manifest.adapter.settings, sizes, hidden_size, "bert")


def lora_names(manifest: Manifest, parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Return parameters with the names that peft uses in files: `….query.lora_A.weight` for `0.attention.query.down`."""
    slots = FAMILIES[manifest.backbone.family].linear_slots(manifest.backbone.depths)
    modules = {slot: path for path, slot in slots.items()}
    endings = {"down.weight": "lora_A.weight", "up.weight": "lora_B.weight", "up.bias": "lora_B.bias"}
    return {
        f"{modules[slot]}.{endings[ending]}": parameters[f"{slot}.{ending}"]
        for slot in manifest.bottleneck_sizes
        for ending in endings
        if f"{slot}.{ending}" in parameters
    }


def make_adapters(
    settings: AdapterConfig, sizes: Mapping[str, int], hidden_size: int, init: str
) -> dict[str, BottleneckAdapter]:
    """Return new adapters by slot, given their bottleneck sizes. If `shared`, all layers share one adapter per site."""
    adapters: dict[str, BottleneckAdapter] = {}
    shared: dict[tuple[str, str], BottleneckAdapter] = {}
    for slot, size in sizes.items():
        address = SlotAddress.parse(slot)
        site = address.stack, address.site
        adapters[slot] = shared.get(site) or BottleneckAdapter(
            hidden_size, size, settings.nonlinearity, settings.scaling, settings.dropout, init
        )
        if settings.shared:
            shared[site] = adapters[slot]
    return adapters


def described_head(manifest: Manifest) -> TaskHead | TaskHeads:
    """Return a new head with the shape given in a manifest; for multiple tasks, one head per task."""
    heads = []
    for task, head in zip(manifest.tasks, manifest.heads, strict=True):
        if task.kind not in KINDS:
            raise UserError(f"task.kind is {shortened(task.kind)}, expected one of {', '.join(KINDS)}")
        heads.append(KINDS[task.kind].make_head(manifest.backbone.hidden_size, **head.shape))
    return heads[0] if manifest.multitask is None else TaskHeads(dict(zip(manifest.multitask, heads, strict=True)))


def compose(
    config: CompositionConfig,
    sources: Sequence[Manifest],
    adapters: Callable[[int], Mapping[str, BottleneckAdapter]],
    depths: Mapping[str, int],
    chosen: Mapping[str, Any],
    target: str | None = None,
    folds: Mapping[int, Sequence[Mapping[str, BottleneckAdapter]]] | None = None,
) -> dict[str, SlotModule]:
    """Return the composition of the sources for each slot in which at least one source has an adapter or LoRA.

    Raises UserError if `chosen` does not match the composition or the sources, or there is no slot.

    Args:
        adapters: returns a source's adapters by slot, given the index of the source.
        depths: number of layers of the backbone by stack.
        chosen: see `Composition.finds`: `{"kept": {slot: indices}}`, `{"continued": name}`, or empty.
        target: name of the target task; sources that were trained on it alone are its own adapters.
        folds: in training with `cross_fit`, the adapters by slot of each fold, by the index of their source.
    """
    definition = config.definition
    for key in (KEPT, CONTINUED):
        if (key in chosen) != (definition.finds == key):
            raise UserError(f"composition.{key} is {'not allowed' if key in chosen else 'missing'} for {config.name}")
    only = chosen.get(CONTINUED)
    if only is not None and only not in [source.name for source in sources]:
        raise UserError("composition.continued is not one of the sources")
    every = [adapters(n) if only in (None, source.name) else {} for n, source in enumerate(sources)]
    sites = list(dict.fromkeys(site for source in sources for site in source.sites))
    own = own_adapters(sources, target)
    shared: dict[Any, Any] = {}
    modules: dict[str, SlotModule] = {}
    addresses = (
        SlotAddress(stack, layer, site)
        for stack, depth in depths.items()
        for layer in kept_layers(config.layers, config.drop, depth, "composition")
        for site in sites
    )
    for address in addresses:
        slot = str(address)
        present = {n: own[slot] for n, own in enumerate(every) if slot in own}
        if not present:
            continue
        combined = _kept(chosen[KEPT], slot, present) if KEPT in chosen else present
        of_folds = {n: [one[slot] for one in each] for n, each in (folds or {}).items() if n in combined}
        hidden_size = sources[0].backbone.hidden_size
        here = SlotSources(combined, len(sources), own, of_folds, address, hidden_size)
        group = config.sharing(address)
        if group not in shared:
            shared[group] = None if definition.share is None else definition.share(config, here)
        module = definition.build(config, here, shared[group])
        if config.target_adapter:  # with the bottleneck size of the largest source in the slot
            size, first = max(adapter.down.out_features for adapter in present.values()), here.first
            sizes = first.down.in_features, size, first.nonlinearity
            output_size, bias = first.up.out_features, first.up.bias is not None
            new = BottleneckAdapter(*sizes, init="zero_up", output_size=output_size, bias=bias)
            module = WithTargetAdapter(module, new)
        modules[slot] = module
    if not modules:
        raise UserError(
            f"composition.layers={config.layers}: no source has an adapter in these layers; select layers with adapters"
        )
    return modules


def _kept(kept: Mapping[str, Any], slot: str, present: Mapping[int, BottleneckAdapter]) -> dict[int, BottleneckAdapter]:
    indices = kept.get(slot)
    if not indices or not present.keys() >= set(indices) or len(set(indices)) < len(indices):
        raise UserError(f"composition.kept.{slot}: expected distinct source indices among {list(present)}")
    return {n: present[n] for n in indices}


def tensor_shapes(manifest: Manifest, sources: Sequence[Manifest], path: Path) -> dict[str, Shapes | None]:
    """Return the tensor shapes in each file of an artifact, see `weight_shapes` and `head_shapes`."""
    return {WEIGHTS: weight_shapes(manifest, sources, path), HEAD: head_shapes(manifest, path)}


def weight_shapes(manifest: Manifest, sources: Sequence[Manifest], path: Path) -> Shapes | None:
    """Return the shapes in the weights file, or `None` if they depend on the backbone.

    Raises UserError if the manifest does not describe a valid model or does not match the sources.

    Args:
        sources: sources of a fusion, in order.
        path: directory of the artifact, for error messages.
    """

    def slot_modules() -> Mapping[str, SlotModule]:
        fused, depths = manifest.composition, manifest.backbone.depths
        if fused is None:
            return {} if manifest.adapter is None else described_adapters(manifest)
        check_sources(list(sources))
        own = manifest.task.name
        return compose(fused.settings, sources, lambda n: described_adapters(sources[n]), depths, fused.chosen, own)

    if manifest.lora is not None:
        return _shapes(lambda: lora_names(manifest, parameters_of(described_adapters(manifest))), path)
    return None if manifest.method is not None else _shapes(lambda: parameters_of(slot_modules()), path)


def head_shapes(manifest: Manifest, path: Path) -> Shapes:
    """Return the shapes in the head file: `output.weight`, or `TASK.output.weight` for multiple tasks."""
    return {} if not manifest.heads else _shapes(lambda: described_head(manifest).state(), path)


class _WithoutValues(TorchFunctionMode):
    """Mode that skips `normal_`, which has no effect on the meta device but takes most of the time."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "normal_":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def _shapes(build: Callable[[], Mapping[str, Parameter]], path: Path) -> Shapes:
    try:
        with torch.device("meta"), _WithoutValues():
            return {name: tuple(parameter.shape) for name, parameter in build().items()}
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path / MANIFEST}: {text}") from None
    except (RuntimeError, ValueError) as error:  # impossible sizes
        raise UserError(f"{path / MANIFEST}: does not describe a valid model ({first_line(error)})") from None
