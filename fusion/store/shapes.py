"""The tensors that an artifact must hold, by what its manifest says: names and shapes, before anything is built.

So a size that a damaged manifest makes up is refused, and no memory is spent on it; and a store can be verified
without its backbone. What trains inside a backbone (lora, bitfit, full) has names that only the backbone knows.

Letters: D hidden size, R bottleneck size, K outputs of a head or rank of a fusion, N sources of a slot.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.config import CompositionConfig
from fusion.errors import UserError
from fusion.selection import kept_layers
from fusion.store.compatibility import check_sources
from fusion.store.layout import MANIFEST
from fusion.store.manifest import CHOSEN, Manifest

Shapes = dict[str, tuple[int, ...]]


def head_shapes(manifest: Manifest) -> Shapes:
    """Of the head file: `output.weight` and so on; of several tasks `TASK.output.weight`."""
    if manifest.multitask is None:
        return _head(manifest.head, manifest.backbone["hidden_size"])
    return {
        f"{task}.{name}": shape
        for task, entry in manifest.multitask.items()
        for name, shape in _head(entry["head"], manifest.backbone["hidden_size"]).items()
    }


def weight_shapes(manifest: Manifest, sources: Sequence[Manifest], path: Path) -> Shapes | None:
    """Of the weights file; None where only the backbone can tell.

    Args:
        sources: of a fusion, in order.
        path: the artifact's folder, for the message.

    Raises:
        UserError: a fusion's settings do not go with its sources.
    """
    if manifest.kind == "adapter":
        return adapter_shapes(manifest)
    if manifest.kind == "fusion":
        return fusion_shapes(manifest, sources, path)
    return {} if manifest.kind == "head" else None


def adapter_shapes(manifest: Manifest) -> Shapes:
    """Of a stored adapter. What layers share stands there once, by the name of the first of them."""
    shapes: Shapes = {}
    for name, adapter in _adapters(manifest).items():
        if adapter.slot == name:
            shapes |= _under(name, adapter.shapes())
    return shapes


def fusion_shapes(manifest: Manifest, sources: Sequence[Manifest], path: Path) -> Shapes:
    """Of a stored fusion. See `weight_shapes`."""
    try:
        return _fusion(manifest, sources)
    except UserError as error:
        raise UserError(f"{path / MANIFEST}: {error}") from None


@dataclass(frozen=True)
class _Adapter:
    """What stands in a slot. `slot`: where it stands first, another one's name where layers share it."""

    slot: str
    source: str
    hidden_size: int
    size: int
    nonlinearity: str
    scaling: Any

    def shapes(self) -> Shapes:
        scaling: Shapes = {"scaling": ()} if self.scaling == "learned" else {}
        return scaling | {
            "down.weight": (self.size, self.hidden_size),
            "down.bias": (self.size,),
            "up.weight": (self.hidden_size, self.size),
            "up.bias": (self.hidden_size,),
        }


def _adapters(manifest: Manifest) -> dict[str, _Adapter]:
    settings = manifest.adapter
    assert settings is not None
    adapters: dict[str, _Adapter] = {}
    first: dict[str, _Adapter] = {}
    for slot, size in settings["bottleneck_sizes"].items():
        adapter = _Adapter(
            slot,
            manifest.name,
            manifest.backbone["hidden_size"],
            size,
            settings["nonlinearity"],
            settings["scaling"],
        )
        site = slot.partition(".")[2]
        adapters[slot] = first.setdefault(site, adapter) if settings.get("shared", False) else adapter
    return adapters


def _under(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _head(head: Mapping[str, Any], hidden_size: int) -> Shapes:
    dense: Shapes = {"dense.weight": (hidden_size, hidden_size), "dense.bias": (hidden_size,)}
    output: Shapes = {"output.weight": (head["outputs"], hidden_size), "output.bias": (head["outputs"],)}
    return (dense if head["layers"] == 2 else {}) | output


def _fusion(manifest: Manifest, sources: Sequence[Manifest]) -> Shapes:
    settings = dict(manifest.composition or {})
    chosen = {key: settings.pop(key) for key in CHOSEN if key in settings}
    config = CompositionConfig(**settings)
    for key, name in (("kept", "pruned"), ("continued", "continued")):
        if (key in chosen) != (config.name == name):
            raise UserError(
                f"composition.{key} is {'missing' if config.name == name else f'not for {config.name}'}"
            )
    check_sources(list(sources))
    if config.name == "continued":
        sources = [source for source in sources if source.name == chosen["continued"]]
        if not sources:
            raise UserError("composition.continued is none of the sources")
    every = [_adapters(source) for source in sources]
    hidden_size = manifest.backbone["hidden_size"]
    shapes: Shapes = {}
    made: set[Hashable] = set()  # what several slots share stands where it is first
    for layer in kept_layers(config.layers, config.drop, manifest.backbone["layers"], "composition"):
        for site in sources[0].placement["adapter.sites"]:
            slot = f"{layer}.{site}"
            present = {n: adapters[slot] for n, adapters in enumerate(every) if slot in adapters}
            if not present:
                continue
            combined = _kept(chosen["kept"], slot, present) if config.name == "pruned" else present
            own = _composition(config, list(combined.values()), len(sources), hidden_size)
            shared = _shared(config, site, combined)
            if shared is None or shared not in made:
                shapes |= _under(f"{slot}.composition" if config.target_adapter else slot, own)
                made.add(shared)
            if config.target_adapter:
                size = max(adapter.size for adapter in present.values())
                target = _Adapter(slot, "", hidden_size, size, "", 1.0)
                shapes |= _under(f"{slot}.target", target.shapes())
    return shapes


def _kept(kept: Mapping[str, Any], slot: str, present: Mapping[int, _Adapter]) -> dict[int, _Adapter]:
    positions = kept.get(slot)
    if (
        not isinstance(positions, list)
        or not positions
        or any(type(n) is not int or n not in present for n in positions)
        or len(set(positions)) < len(positions)
    ):
        raise UserError(f"composition.kept.{slot}: expected some of the sources {list(present)}, each once")
    return {n: present[n] for n in positions}


def _composition(config: CompositionConfig, adapters: list[_Adapter], total: int, hidden_size: int) -> Shapes:
    """What trains in a slot, by its name there."""
    width = 1 if "uniform" in config.name else hidden_size
    if config.name == "continued":
        return adapters[0].shapes()
    if config.name == "average":
        if len({(adapter.size, adapter.nonlinearity, adapter.scaling) for adapter in adapters}) > 1:
            raise UserError("composition.name is average, and the sources' adapters are not of one shape")
        return adapters[0].shapes() if config.train else {}
    if config.name == "static":
        return {"weight": (len(adapters),)}
    if config.name.startswith("scalearn"):
        return {"scales": (total if config.name.endswith("_pp") else len(adapters), width)}
    if config.name == "mean":
        return {}
    rank = config.rank or hidden_size
    shapes: Shapes = {
        f"{name}.{part}": shape
        for name in ("query", "key")
        for part, shape in (("weight", (rank, hidden_size)), ("bias", (rank,)))
    }
    return shapes | ({"value.weight": (hidden_size, hidden_size)} if config.value_matrix else {})


def _shared(config: CompositionConfig, site: str, adapters: Mapping[int, _Adapter]) -> Hashable:
    """What tells a part that several slots have in common; None: each slot has its own."""
    if config.name.endswith("_pp"):
        return site
    if config.name in ("average", "continued"):
        return tuple((adapter.source, adapter.slot) for adapter in adapters.values())
    return None
