"""The table of compositions, `composition=NAME`: ways to combine the frozen adapters of one slot. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Optional

from fusion.config.fields import NamedSettings, integer, layer_drop, layers, number
from fusion.errors import UserError

if TYPE_CHECKING:
    from fusion.layers.bank import AdapterBank
    from fusion.layers.bottleneck import BottleneckAdapter
    from fusion.layers.slot_module import SlotModule

# Values of `Composition.finds`.
KEPT, CONTINUED = "kept", "continued"
MEAN = "mean"  # with one active source, it equals that source; used by the probe
ONE_ADAPTER = "is a single adapter without attention weights"


@dataclass(frozen=True)
class SlotSources:
    """The frozen adapters of one slot."""

    adapters: Mapping[int, BottleneckAdapter]  # by the index of their source, in ascending order
    total: int  # number of sources, including those without an adapter in this slot

    def bank(self) -> AdapterBank:
        """Stack the adapters."""
        from fusion.layers.bank import AdapterBank

        return AdapterBank(list(self.adapters.values()), list(self.adapters), self.total)


def _of_bank(
    module: str, name: str, keys: tuple[str, ...], settings: CompositionConfig, sources: SlotSources, shared: None
) -> SlotModule:
    """Build a layer of `fusion.layers` over the bank of sources, with the settings listed in `keys`."""
    layer = getattr(importlib.import_module(f"fusion.layers.{module}"), name)
    built: SlotModule = layer(sources.bank(), **{key: getattr(settings, key) for key in keys})
    return built


_adapterfusion, _sequence = (
    partial(_of_bank, "attention", name, ("value_matrix", "temperature", "dropout", "rank"))
    for name in ("AdapterFusion", "SequenceFusion")
)


def _scalearn(settings: CompositionConfig, sources: SlotSources, shared: Any, uniform: bool = False) -> SlotModule:
    from fusion.layers.mixtures import ScaLearn, initial_scales

    bank = sources.bank()
    if shared is not None:
        return ScaLearn(bank, shared, shared=True)
    return ScaLearn(bank, initial_scales(len(bank), 1 if uniform else bank.output_size))


def _scales(total: int, width: int) -> Any:
    from fusion.layers.mixtures import initial_scales

    return initial_scales(total, width)


def _average(settings: CompositionConfig, sources: SlotSources, shared: dict[Any, Any]) -> SlotModule:
    from fusion.layers.mixtures import FrozenAdapter, average

    adapters = tuple(sources.adapters.values())
    if adapters not in shared:
        try:
            shared[adapters] = average(adapters)
        except ValueError:
            raise UserError("composition.name=average: all source adapters must have the same shape") from None
    mean: BottleneckAdapter = shared[adapters]
    return mean if settings.train else FrozenAdapter(mean)


def _continued(settings: CompositionConfig, sources: SlotSources, shared: None) -> SlotModule:
    (adapter,) = sources.adapters.values()
    return adapter


@dataclass(frozen=True)
class Composition:
    """One way to combine frozen adapters. Other modules do not compare names of compositions."""

    # Of (settings, sources of a slot, result of `share`). It may draw random numbers; slots are built layer by layer.
    build: Callable[[Any, SlotSources, Any], SlotModule]
    settings: tuple[str, ...] = ()  # fields of `CompositionConfig` that apply, in addition to `common`
    loss_terms: tuple[str, ...] = ()  # terms that its modules add to the loss, weighted by the setting of that name
    title: str = ""  # in reports; if empty, the key in the table
    no_weights: str = ""  # predicate of a sentence: why its modules report no weight per source; empty if they do
    share: Callable[[int, int], Any] | None = None  # of (sources, hidden size); all layers of a site share the result
    starts_from_sources: bool = False  # is initialized from its sources, so `init_from` is not allowed
    one_shape: bool = False  # all source adapters must have the same shape
    can_be_pruned: bool = False
    # What is computed on the target's examples before the model is built, and stored in the manifest under this key:
    # the sources that each slot of the pruned fusion keeps, or the source adapter whose training is continued.
    finds: str | None = None

    @property
    def is_pruned(self) -> bool:
        """`True` for a stored fusion, `composition.fusion`, with fewer sources."""
        return self.finds == KEPT


_ATTENTION = ("value_matrix", "temperature", "dropout", "value_penalty", "rank")
_PENALTY = ("value_penalty",)

COMPOSITIONS: dict[str, Composition] = {
    "adapterfusion": Composition(_adapterfusion, _ATTENTION, _PENALTY, title="fusion", can_be_pruned=True),
    "sequence": Composition(_sequence, _ATTENTION, _PENALTY),
    "static": Composition(partial(_of_bank, "mixtures", "StaticMixture", ())),
    MEAN: Composition(partial(_of_bank, "mixtures", "MeanMixture", ())),
    "scalearn": Composition(_scalearn),
    "scalearn_uniform": Composition(partial(_scalearn, uniform=True)),
    "scalearn_pp": Composition(_scalearn, share=_scales),
    "scalearn_uniform_pp": Composition(_scalearn, share=lambda total, width: _scales(total, 1)),
    "average": Composition(
        _average,
        ("train",),
        no_weights=ONE_ADAPTER,
        share=lambda total, width: {},  # cached averages: layers that share adapters share their average
        starts_from_sources=True,
        one_shape=True,
    ),
    "pruned": Composition(
        _adapterfusion, (*_ATTENTION, "train", "fusion", "keep"), _PENALTY, starts_from_sources=True, finds=KEPT
    ),
    "continued": Composition(_continued, no_weights=ONE_ADAPTER, starts_from_sources=True, finds=CONTINUED),
}

# Settings that do not affect the output computed with stored weights.
TRAINING_ONLY = ("dropout", "value_penalty", "fusion", "keep")


@dataclass
class CompositionConfig(NamedSettings, group="composition"):
    """How stage 2 combines its sources: a key of `COMPOSITIONS`, and the settings of all compositions."""

    name: str = "adapterfusion"
    value_matrix: bool = True  # use a value matrix Wv
    temperature: float = number(1.0, "> 0")  # of the softmax
    dropout: float = number(0.0, ">= 0 and < 1")  # on the attention scores, before the softmax
    value_penalty: float = number(0.01, ">= 0")  # weight of the sum over layers of ||Wv - I||^2
    layers: Any = layers()  # layers of the backbone with a composition
    drop: Optional[str] = layer_drop()
    rank: Optional[int] = integer(None, 1, null="the hidden size")  # rank of the query and key matrices
    target_adapter: bool = False  # train a new adapter alongside the composition
    train: bool = False  # continue training weights that are initialized from stored ones
    fusion: Optional[str] = None  # the stored fusion to prune
    keep: Optional[int] = integer(None, 1, null="none")  # number of sources per slot of a pruned fusion

    table = COMPOSITIONS
    common = ("name", "layers", "drop", "target_adapter")
    first = ("name", "value_matrix", "temperature", "dropout", "value_penalty", "layers")

    @property
    def definition(self) -> Composition:
        return COMPOSITIONS[self.name]

    def loss_weights(self) -> dict[str, float]:
        """Return the weight of each term that the slot modules add to the loss, by name."""
        return {term: getattr(self, term) for term in self.definition.loss_terms}

    def pruning_of(self, trained: CompositionConfig) -> CompositionConfig:
        """Return the settings of a pruned fusion: those of the trained fusion, except the ones that pruning may change."""
        return replace(trained, **{key: getattr(self, key) for key in (*TRAINING_ONLY, "name", "train")})
