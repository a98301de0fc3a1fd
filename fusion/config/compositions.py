"""The table of compositions, `composition=NAME`: ways to combine the frozen adapters of one slot. Imports no torch."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Optional

from fusion.backbones.slots import SlotAddress
from fusion.config.fields import NamedSettings, choice, default_of, integer, layer_drop, layers, number, require
from fusion.errors import UserError
from fusion.text import override

if TYPE_CHECKING:
    from fusion.layers.bank import AdapterBank
    from fusion.layers.bottleneck import BottleneckAdapter
    from fusion.layers.gates import Gate
    from fusion.layers.slot_module import SlotModule

# Values of `Composition.finds`.
KEPT, CONTINUED = "kept", "continued"
MEAN = "mean"  # with one active source, it equals that source; used by the probe
ONE_ADAPTER = "is a single adapter without attention weights"


@dataclass(frozen=True)
class SlotSources:
    """The frozen adapters of one slot."""

    adapters: Mapping[int, BottleneckAdapter]  # by the index of their source, in ascending order, at least one
    total: int  # number of sources, including those without an adapter in this slot
    own: tuple[int, ...] = ()  # indices of the sources that were trained on the target
    folds: Mapping[int, Sequence[BottleneckAdapter]] = field(default_factory=dict)  # of `own`, see `AdapterBank`
    address: SlotAddress = SlotAddress("", 0, "feedforward")
    hidden_size: int = 0  # of the backbone

    @property
    def first(self) -> BottleneckAdapter:
        return next(iter(self.adapters.values()))

    def bank(self) -> AdapterBank:
        """Stack the adapters."""
        from fusion.layers.bank import AdapterBank

        if not self.folds:
            return AdapterBank(list(self.adapters.values()), list(self.adapters), self.total)
        entries = [
            (source, fold, adapter)
            for source, main in self.adapters.items()
            for fold, adapter in enumerate([main, *self.folds.get(source, ())], -1)
        ]
        sources, folds, adapters = zip(*entries, strict=True)
        return AdapterBank(adapters, sources, self.total, folds)


def _of_bank(
    module: str,
    name: str,
    keys: tuple[str, ...],
    settings: CompositionConfig,
    sources: SlotSources,
    shared: None,
    **options: Any,
) -> SlotModule:
    """Build a layer of `fusion.layers` over the bank of sources, with the settings listed in `keys` and `options`."""
    layer = getattr(importlib.import_module(f"fusion.layers.{module}"), name)
    built: SlotModule = layer(sources.bank(), **{key: getattr(settings, key) for key in keys}, **options)
    return built


def _attention(name: str, settings: CompositionConfig, sources: SlotSources, shared: Gate | None) -> SlotModule:
    if shared is not None:
        return _gated(settings, sources, shared)
    keys = ("value_matrix", "temperature", "dropout", "rank", "null_source")
    return _of_bank("attention", name, keys, settings, sources, None, prior=settings.prior_over(sources))


_adapterfusion, _sequence = (partial(_attention, name) for name in ("AdapterFusion", "SequenceFusion"))


def _attention_gate(settings: CompositionConfig, sources: SlotSources, per_text: bool = False) -> Gate | None:
    """Return the gate of a layer or of the model; `None` for attention in each slot."""
    if settings.gate_of == "slot":
        return None
    from fusion.layers.gates import AttentionGate

    place, size = _gate_place(settings, sources)
    options = {key: getattr(settings, key) for key in ("temperature", "dropout", "rank", "null_source")}
    return AttentionGate(place, size, sources.total, per_text=per_text, prior=settings.prior_over(sources), **options)


def _linear_gate(settings: CompositionConfig, sources: SlotSources) -> Gate:
    from fusion.layers.gates import LinearGate

    return LinearGate(*_gate_place(settings, sources), sources.total)


def _gate_place(settings: CompositionConfig, sources: SlotSources) -> tuple[tuple[str, int] | None, int]:
    """Return the place of a gate, see `Gate`, and its input size. A gate of the model reads its lowest layer's input."""
    if settings.gate_of == "slot":
        return None, sources.first.down.in_features
    return (sources.address.stack, sources.address.layer), sources.hidden_size


def _gated(settings: CompositionConfig, sources: SlotSources, shared: Gate) -> SlotModule:
    from fusion.layers.gates import GatedMixture

    return GatedMixture(
        sources.bank(), shared, settings.value_matrix and "value_matrix" in settings.definition.settings
    )


def _scalearn(settings: CompositionConfig, sources: SlotSources, shared: Any, uniform: bool = False) -> SlotModule:
    from fusion.layers.mixtures import ScaLearn, initial_scales

    bank = sources.bank()
    if shared is not None:
        return ScaLearn(bank, shared, shared=True)
    return ScaLearn(bank, initial_scales(bank.count, 1 if uniform else bank.output_size))


def _scales(settings: CompositionConfig, sources: SlotSources, uniform: bool = False) -> Any:
    from fusion.layers.mixtures import initial_scales

    return initial_scales(sources.total, 1 if uniform else sources.first.up.out_features)


def _average(settings: CompositionConfig, sources: SlotSources, shared: dict[Any, Any]) -> SlotModule:
    from fusion.layers.mixtures import FrozenAdapter, average

    adapters = tuple(sources.adapters.values())
    if adapters not in shared:
        try:
            # `dare` draws the same entries whenever the model is built.
            seed = zlib.crc32(str(sources.address).encode())
            shared[adapters] = average(adapters, settings.merge, settings.density, seed)
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
    rate: str  # key of the default learning rate, see `RATES`
    settings: tuple[str, ...] = ()  # fields of `CompositionConfig` that apply, in addition to `common`
    loss_terms: tuple[str, ...] = ()  # terms that its modules add to the loss, weighted by the setting of that name
    title: str = ""  # in reports; if empty, the key in the table
    no_weights: str = ""  # predicate of a sentence: why its modules report no weight per source; empty if they do
    # Of (settings, sources of the first slot): what the slots of `shared_by` share.
    share: Callable[[Any, SlotSources], Any] | None = None
    shared_by: str = "site"  # the same site of all layers, or `slot`, `layer` or `model`; `gate`: see the setting
    gate: str = "slot"  # what the setting `gate` is by default
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


_SAMPLED = ("source_dropout", "dropped", "cross_fit")  # of compositions whose sources can be inactive
_PRIOR = ("prior", "prior_own", "prior_penalty")
_ATTENTION = (
    *("value_matrix", "temperature", "dropout", "value_penalty", "rank", "gate", "null_source"),
    *_PRIOR,
    *_SAMPLED,
)
_PENALTY = ("value_penalty", "prior_penalty")

COMPOSITIONS: dict[str, Composition] = {
    "adapterfusion": Composition(
        _adapterfusion,
        "fusion",
        _ATTENTION,
        _PENALTY,
        title="fusion",
        can_be_pruned=True,
        share=_attention_gate,
        shared_by="gate",
    ),
    "sequence": Composition(
        _sequence, "fusion", _ATTENTION, _PENALTY, share=partial(_attention_gate, per_text=True), shared_by="gate"
    ),
    "lora_flow": Composition(_gated, "fusion", ("gate", *_SAMPLED), share=_linear_gate, shared_by="gate", gate="layer"),
    "static": Composition(partial(_of_bank, "mixtures", "StaticMixture", ()), "scales", _SAMPLED),
    MEAN: Composition(partial(_of_bank, "mixtures", "MeanMixture", ()), "head", _SAMPLED),
    "scalearn": Composition(_scalearn, "scales", _SAMPLED),
    "scalearn_uniform": Composition(partial(_scalearn, uniform=True), "scales", _SAMPLED),
    "scalearn_pp": Composition(_scalearn, "scales", _SAMPLED, share=_scales),
    "scalearn_uniform_pp": Composition(_scalearn, "scales", _SAMPLED, share=partial(_scales, uniform=True)),
    "cat": Composition(_scalearn, "scales", _SAMPLED, share=partial(_scales, uniform=True), shared_by="layer"),
    "arrow": Composition(
        partial(_of_bank, "routing", "Arrow", ("top_k", "temperature")), "head", ("top_k", "temperature")
    ),
    "average": Composition(
        _average,
        "adapter",
        ("train", "merge", "density"),
        no_weights=ONE_ADAPTER,
        share=lambda settings, sources: {},  # cached averages: layers that share adapters share their average
        starts_from_sources=True,
        one_shape=True,
    ),
    "pruned": Composition(
        _adapterfusion,
        "fusion",
        (*_ATTENTION, "train", "fusion", "keep"),
        _PENALTY,
        starts_from_sources=True,
        finds=KEPT,
    ),
    "continued": Composition(_continued, "adapter", no_weights=ONE_ADAPTER, starts_from_sources=True, finds=CONTINUED),
}

LORA_DEFAULTS = {"rank": 32, "value_matrix": False, "gate": "layer"}
"""Defaults of `CompositionConfig` for LoRA sources."""

# Settings that do not affect the output computed with stored weights.
TRAINING_ONLY = ("dropout", "value_penalty", "prior_penalty", *_SAMPLED, "fusion", "keep")


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
    # Of the query and key matrices. For LoRA sources, see `LORA_DEFAULTS`.
    rank: Optional[int] = integer(None, 1, null="the hidden size")
    target_adapter: bool = False  # train a new adapter alongside the composition
    train: bool = False  # continue training weights that are initialized from stored ones
    fusion: Optional[str] = None  # the stored fusion to prune
    keep: Optional[int] = integer(None, 1, null="none")  # number of sources per slot of a pruned fusion
    null_source: bool = False  # add a source without an update to the attention
    # The distribution that the attention is initialized to; `own`: towards the sources that were trained on the target.
    prior: Optional[str] = choice(None, ("uniform", "own"), null="none")
    prior_own: float = number(0.5, "> 0 and < 1")  # probability of these sources in the prior
    prior_penalty: float = number(0.0, ">= 0")  # weight of KL(attention || prior)
    # In each training batch, each source is inactive with this probability, but never all sources.
    source_dropout: float = number(0.0, ">= 0 and < 1")
    dropped: str = choice("all", ("all", "own"))  # the sources that `source_dropout` applies to
    # In training, an example's own adapters are those of K folds that were not trained on the example.
    cross_fit: Optional[int] = integer(None, 2, null="the own adapter itself")
    # What computes the weights of the sources: each slot, or a gate of each layer or of the model, from a layer's input.
    gate: Optional[str] = choice(None, ("slot", "layer", "model"), null="slot, or layer for LoRA sources and lora_flow")
    merge: str = choice("mean", ("mean", "ties", "dare"))  # how the weights of the sources become those of one adapter
    density: float = number(0.5, "> 0 and <= 1")  # fraction of the entries that ties and dare keep
    top_k: int = integer(3, 1)  # number of sources with a weight above 0, per token

    table = COMPOSITIONS
    common = ("name", "layers", "drop", "target_adapter")
    first = ("name", "value_matrix", "temperature", "dropout", "value_penalty", "layers")

    @property
    def definition(self) -> Composition:
        return COMPOSITIONS[self.name]

    def __post_init__(self) -> None:
        super().__post_init__()
        needs = {  # whether a setting has an effect, and the setting that it needs
            "prior_own": (self.prior == "own", "prior=own"),
            "prior_penalty": (self.prior is not None, "prior=uniform or own"),
            "density": (self.merge != "mean", "merge=ties or dare"),
            "dropped": (self.source_dropout > 0, "source_dropout=0.5"),
        }
        for setting in fields(self):
            has_effect, other = needs.get(setting.name, (True, ""))
            value = getattr(self, setting.name)
            require(
                has_effect or value == default_of(setting),
                f"{override(f'composition.{setting.name}', value)}: has no effect without composition.{other}; leave it out",
            )

    def loss_weights(self) -> dict[str, float]:
        """Return the weight of each term that the slot modules add to the loss, by name."""
        return {term: getattr(self, term) for term in self.definition.loss_terms}

    @property
    def gate_of(self) -> str:
        return self.gate or self.definition.gate

    def sharing(self, address: SlotAddress) -> tuple[str, ...]:
        """Return a key that is equal for all slots that share the result of `Composition.share`."""
        by = self.definition.shared_by
        stack, layer = address.stack, str(address.layer)
        keys = {"site": (stack, address.site), "slot": (str(address),), "layer": (stack, layer), "model": (stack,)}
        return keys[self.gate_of if by == "gate" else by]

    def prior_over(self, sources: SlotSources) -> list[float] | None:
        """Return the prior of the attention over all sources, and the null source if there is one; `None` without one."""
        entries = sources.total + self.null_source
        if self.prior is None:
            return None
        others = entries - len(sources.own)
        if self.prior == "uniform" or not sources.own or not others:
            return [1 / entries] * entries
        own, other = self.prior_own / len(sources.own), (1 - self.prior_own) / others
        return [own if n in sources.own else other for n in range(entries)]

    def pruning_of(self, trained: CompositionConfig) -> CompositionConfig:
        """Return the settings of a pruned fusion: those of the trained fusion, except the ones that pruning may change."""
        return replace(trained, **{key: getattr(self, key) for key in (*TRAINING_ONLY, "name", "train")})
