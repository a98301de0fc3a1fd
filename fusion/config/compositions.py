"""The table of compositions: every way to combine the frozen adapters of one slot, `composition=NAME`.

It is readable without torch: a builder imports its layers when it is called. Nothing outside asks for a composition's
name; what differs between compositions is said here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from fusion.config.checks import check_drop, check_layers, in_range
from fusion.config.own_settings import Settings
from fusion.errors import UserError

if TYPE_CHECKING:
    from fusion.layers.bank import AdapterBank
    from fusion.layers.bottleneck import BottleneckAdapter
    from fusion.layers.slot_module import SlotModule

# What a composition may have to find out first, see `Composition.finds`.
KEPT, CONTINUED = "kept", "continued"
MEAN = "mean"  # with one source on it is that source, which the probe uses
ONE_ADAPTER = "is one adapter, which attends to nothing"


# --- settings ---------------------------------------------------------------------------------------


@dataclass
class CompositionSettings(Settings):
    """What every composition has.

    Attributes:
        layers: which of the backbone's layers have a composition: null (all), `last:N`, or a list.
        drop: AdapterDrop, `specialized:N` or `robust`.
        target_adapter: whether a new adapter trains beside what the sources give.
    """

    layers: Any = None
    drop: str | None = None
    target_adapter: bool = False

    training_only: ClassVar[tuple[str, ...]] = ()  # do not change what the stored weights compute

    def __post_init__(self) -> None:
        check_layers("composition.layers", self.layers)
        check_drop("composition.drop", self.drop)

    def loss_weights(self) -> dict[str, float]:
        """The weight of each named term that the slot modules add to the loss."""
        return {}


@dataclass
class AttentionSettings(CompositionSettings):
    """Attributes:
    value_matrix: whether there is a Wv.
    temperature: of the softmax.
    dropout: on the scores, before the softmax.
    value_penalty: weight of the sum over layers of ||Wv - I||^2.
    rank: of query and key; null: the hidden size.
    """

    value_matrix: bool = True
    temperature: float = 1.0
    dropout: float = 0.0
    value_penalty: float = 0.01
    rank: int | None = None

    refusal: ClassVar[str] = (
        "{setting}: {name} has no attention; leave it out, or say composition=adapterfusion or sequence"
    )
    training_only: ClassVar[tuple[str, ...]] = ("dropout", "value_penalty")

    def __post_init__(self) -> None:
        in_range("composition.rank", self.rank, at_least=1, null="the hidden size")
        in_range("composition.temperature", self.temperature, above=0, whole=False)
        in_range("composition.dropout", self.dropout, at_least=0, below=1, whole=False)
        in_range("composition.value_penalty", self.value_penalty, at_least=0, whole=False)
        super().__post_init__()

    def loss_weights(self) -> dict[str, float]:
        return {"value_penalty": self.value_penalty}


@dataclass
class TrainableSettings(CompositionSettings):
    """Attributes:
    train: whether what is made of stored weights trains further.
    """

    train: bool = False

    refusal: ClassVar[str] = (
        "{setting}: says whether average or pruned trains further, and {name} has no such choice; leave it out"
    )


@dataclass
class PrunedSettings(AttentionSettings, TrainableSettings):
    """Attributes:
    fusion: the stored fusion that is pruned.
    keep: how many sources each slot keeps.
    """

    fusion: str | None = None
    keep: int | None = None

    refusal: ClassVar[str] = (
        "composition.fusion and composition.keep are for composition=pruned, not {name}: say that, or leave them out"
    )
    training_only: ClassVar[tuple[str, ...]] = (*AttentionSettings.training_only, "fusion", "keep")

    def __post_init__(self) -> None:
        hint = " source of each layer, fewer than the fusion has"
        in_range("composition.keep", self.keep, at_least=1, hint=hint)
        super().__post_init__()


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


def _adapterfusion(settings: AttentionSettings, sources: SlotSources, shared: None) -> SlotModule:
    from fusion.layers.attention import AdapterFusion

    return AdapterFusion(sources.bank(), **_of_attention(settings))


def _sequence(settings: AttentionSettings, sources: SlotSources, shared: None) -> SlotModule:
    from fusion.layers.sequence import SequenceFusion

    return SequenceFusion(sources.bank(), **_of_attention(settings))


def _of_attention(settings: AttentionSettings) -> dict[str, Any]:
    return {key: getattr(settings, key) for key in ("value_matrix", "temperature", "dropout", "rank")}


def _static(settings: CompositionSettings, sources: SlotSources, shared: None) -> SlotModule:
    from fusion.layers.mixtures import StaticMixture

    return StaticMixture(sources.bank())


def _mean(settings: CompositionSettings, sources: SlotSources, shared: None) -> SlotModule:
    from fusion.layers.mixtures import MeanMixture

    return MeanMixture(sources.bank())


def _scalearn(
    settings: CompositionSettings, sources: SlotSources, shared: None, uniform: bool = False
) -> SlotModule:
    from fusion.layers.scalearn import ScaLearn, initial_scales

    bank = sources.bank()
    return ScaLearn(bank, initial_scales(len(bank), 1 if uniform else bank.output_size))


def _scalearn_pp(settings: CompositionSettings, sources: SlotSources, shared: Any) -> SlotModule:
    from fusion.layers.scalearn import ScaLearn

    return ScaLearn(sources.bank(), shared, shared=True)


def _scales(total: int, width: int) -> Any:
    from fusion.layers.scalearn import initial_scales

    return initial_scales(total, width)


def _average(settings: TrainableSettings, sources: SlotSources, shared: dict[Any, Any]) -> SlotModule:
    from fusion.layers.average import FrozenAdapter, average

    adapters = tuple(sources.adapters.values())
    if adapters not in shared:
        try:
            shared[adapters] = average(adapters)
        except ValueError:
            raise UserError(
                "composition.name is average, and the sources' adapters are not of one shape"
            ) from None
    mean: BottleneckAdapter = shared[adapters]
    return mean if settings.train else FrozenAdapter(mean)


def _continued(settings: CompositionSettings, sources: SlotSources, shared: None) -> SlotModule:
    (adapter,) = sources.adapters.values()
    return adapter


# --- the table --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Composition:
    """One way to combine frozen adapters.

    Attributes:
        build: from the settings, the sources of one slot, and what `share` gave, to the slot's module. It may draw
            random numbers; slots are built layer by layer.
        settings: its settings class.
        title: its name in reports; empty: as in the table.
        no_weights: why its modules report no weight for each source, so that `inspect` and attention=true have nothing to
            show: the predicate of a sentence about a stored fusion; empty: they report weights.
        share: makes what all layers of a site share, from the number of sources and the hidden size; None: nothing.
        starts_from_sources: whether it starts from weights of its sources, so that it takes no init_from.
        one_shape: whether the sources' adapters must have one shape.
        can_be_pruned: whether a stored fusion of it can be pruned.
        finds: what is found out about the sources on the target's examples before the model is built. A manifest keeps
            it under this key. `kept`: which sources each slot of a stored fusion keeps, from
            `composition.fusion`; `continued`: the one source whose adapter trains further; None: nothing.
    """

    build: Callable[[Any, SlotSources, Any], SlotModule]
    settings: type[CompositionSettings] = CompositionSettings
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


COMPOSITIONS: dict[str, Composition] = {
    "adapterfusion": Composition(_adapterfusion, AttentionSettings, title="fusion", can_be_pruned=True),
    "sequence": Composition(_sequence, AttentionSettings),
    "static": Composition(_static),
    MEAN: Composition(_mean),
    "scalearn": Composition(_scalearn),
    "scalearn_uniform": Composition(partial(_scalearn, uniform=True)),
    "scalearn_pp": Composition(_scalearn_pp, share=_scales),
    "scalearn_uniform_pp": Composition(_scalearn_pp, share=lambda total, width: _scales(total, 1)),
    "average": Composition(
        _average,
        TrainableSettings,
        no_weights=ONE_ADAPTER,
        share=lambda total, width: {},  # averages that exist: layers that share adapters share their average
        starts_from_sources=True,
        one_shape=True,
    ),
    "pruned": Composition(_adapterfusion, PrunedSettings, starts_from_sources=True, finds=KEPT),
    "continued": Composition(_continued, no_weights=ONE_ADAPTER, starts_from_sources=True, finds=CONTINUED),
}

# Settings of any of them that do not change what the stored weights compute.
TRAINING_ONLY = tuple({key for one in COMPOSITIONS.values() for key in one.settings.training_only})
