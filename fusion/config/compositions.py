"""The table of compositions: every way to combine the frozen adapters of one slot, `composition=NAME`.

It is readable without torch: a builder imports its layers when it is called. Nothing outside asks for a composition's
name; what differs between compositions is stated here.
"""

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

# What a composition may have to find out first, see `Composition.finds`.
KEPT, CONTINUED = "kept", "continued"
MEAN = "mean"  # with one source on it is that source, which the probe uses
ONE_ADAPTER = "is one adapter, which attends to nothing"


# --- builders ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlotSources:
    """The frozen adapters of one slot.

    Attributes:
        adapters: by the position of their source, in order.
        total: how many sources there are, with or without an adapter here.
    """

    adapters: Mapping[int, BottleneckAdapter]
    total: int

    def bank(self) -> AdapterBank:
        """All of them, stacked."""
        from fusion.layers.bank import AdapterBank

        return AdapterBank(list(self.adapters.values()), list(self.adapters), self.total)


def _of_bank(
    module: str, name: str, keys: tuple[str, ...], settings: CompositionConfig, sources: SlotSources, shared: None
) -> SlotModule:
    """A layer of `fusion.layers` over a bank of the sources, with the settings of these keys."""
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
            raise UserError("composition.name is average, and the sources' adapters are not of one shape") from None
    mean: BottleneckAdapter = shared[adapters]
    return mean if settings.train else FrozenAdapter(mean)


def _continued(settings: CompositionConfig, sources: SlotSources, shared: None) -> SlotModule:
    (adapter,) = sources.adapters.values()
    return adapter


# --- the table --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Composition:
    """One way to combine frozen adapters.

    Attributes:
        build: from the settings, the sources of one slot, and what `share` gave, to the slot's module. It may draw
            random numbers; slots are built layer by layer.
        settings: fields of `CompositionConfig` that apply to it, beside those that apply to all.
        loss_terms: the named terms that its modules add to the loss; the setting of that name is the weight.
        title: its name in reports; empty: as in the table.
        no_weights: why its modules report no weight for each source, so that `inspect` and attention=true have nothing to
            show: the predicate of a sentence about a stored fusion; empty: they report weights.
        share: makes what all layers of a site share, from the number of sources and the hidden size; None: no training.
        starts_from_sources: whether it starts from weights of its sources, so that it takes no init_from.
        one_shape: whether the sources' adapters must have one shape.
        can_be_pruned: whether a stored fusion of it can be pruned.
        finds: what is found out about the sources on the target's examples before the model is built. A manifest keeps
            it under this key. `kept`: which sources each slot of a stored fusion keeps, from
            `composition.fusion`; `continued`: the one source whose adapter trains further; None: no training.
    """

    build: Callable[[Any, SlotSources, Any], SlotModule]
    settings: tuple[str, ...] = ()
    loss_terms: tuple[str, ...] = ()
    title: str = ""
    no_weights: str = ""
    share: Callable[[int, int], Any] | None = None
    starts_from_sources: bool = False
    one_shape: bool = False
    can_be_pruned: bool = False
    finds: str | None = None

    @property
    def is_pruned(self) -> bool:
        """Whether it is a stored fusion, `composition.fusion`, with fewer sources."""
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
        share=lambda total, width: {},  # averages so far: layers that share adapters share their average
        starts_from_sources=True,
        one_shape=True,
    ),
    "pruned": Composition(
        _adapterfusion, (*_ATTENTION, "train", "fusion", "keep"), _PENALTY, starts_from_sources=True, finds=KEPT
    ),
    "continued": Composition(_continued, no_weights=ONE_ADAPTER, starts_from_sources=True, finds=CONTINUED),
}

# Settings that do not change what the stored weights compute.
TRAINING_ONLY = ("dropout", "value_penalty", "fusion", "keep")


@dataclass
class CompositionConfig(NamedSettings, group="composition"):
    """How stage 2 combines its sources: a name of `COMPOSITIONS`, and the settings of all of them."""

    name: str = "adapterfusion"
    value_matrix: bool = True  # whether there is a Wv
    temperature: float = number(1.0, "> 0")  # of the softmax
    dropout: float = number(0.0, ">= 0 and < 1")  # on the scores, before the softmax
    value_penalty: float = number(0.01, ">= 0")  # weight of the sum over layers of ||Wv - I||^2
    layers: Any = layers()  # those of the backbone that have a composition
    drop: Optional[str] = layer_drop()
    rank: Optional[int] = integer(None, 1, null="the hidden size")  # of query and key
    target_adapter: bool = False  # train a new adapter beside the combined sources
    train: bool = False  # train the weights that are made of stored ones further
    fusion: Optional[str] = None  # the stored fusion that is pruned
    keep: Optional[int] = integer(None, 1, null="none")  # sources of each slot that a pruned fusion keeps

    table = COMPOSITIONS
    common = ("name", "layers", "drop", "target_adapter")
    first = ("name", "value_matrix", "temperature", "dropout", "value_penalty", "layers")

    @property
    def definition(self) -> Composition:
        return COMPOSITIONS[self.name]

    def loss_weights(self) -> dict[str, float]:
        """The weight of each named term that the slot modules add to the loss."""
        return {term: getattr(self, term) for term in self.definition.loss_terms}

    def pruning_of(self, trained: CompositionConfig) -> CompositionConfig:
        """The settings of a pruned fusion: those that the fusion was trained with, except what pruning may set."""
        return replace(trained, **{key: getattr(self, key) for key in (*TRAINING_ONLY, "name", "train")})
