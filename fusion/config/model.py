"""The backbone, the adapter, the method, the head and the composition."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Optional

from fusion.config.checks import as_stored, check_drop, check_layers, in_range, one_of, require
from fusion.config.compositions import COMPOSITIONS, Composition
from fusion.config.methods import METHODS, Method
from fusion.config.own_settings import flat_group
from fusion.text import override

NONLINEARITIES = ("relu", "gelu", "silu", "tanh")
INITIAL_VALUES = ("bert", "houlsby", "zero_up")
SITES = ("before_attention", "attention", "feedforward")
READS = ("output", "normed", "stream", "input")
POOLINGS = ("cls", "mean")
CACHES = ("auto", "off", "float32", "float16")


@dataclass
class BackboneConfig:
    name_or_path: str = "???"
    revision: Optional[str] = None
    pooling: str = "cls"  # what head.pooling is where it is not said
    dropout: Optional[bool] = (
        None  # whether the backbone's own dropout acts in training; null: only where all of it trains
    )
    cache: str = (
        "auto"  # what lies below the lowest slot is computed once a row and kept; auto: where it pays
    )
    cache_gb: float = 20.0  # what all that is kept may take on the disk
    gradient_checkpointing: bool = False  # less memory: each layer is computed again in backward
    trust_remote_code: bool = False  # runs the Python code that the backbone brings along, if it does

    def __post_init__(self) -> None:
        one_of("backbone.pooling", self.pooling, POOLINGS)
        one_of("backbone.cache", self.cache, CACHES)
        in_range("backbone.cache_gb", self.cache_gb, above=0, whole=False, infinite=True)
        require(
            not self.dropout or self.cache in ("auto", "off"),
            f"backbone.cache={self.cache}: with backbone.dropout=true a row is another one each time; "
            "expected backbone.cache=off, or backbone.dropout=false",
        )
        require(bool(self.name_or_path), "backbone.name_or_path is empty: expected a hub id or a folder")


@dataclass
class AdapterConfig:
    """A placement (sites and what the adapter reads there) and the adapter's own shape."""

    name: str = "pfeiffer"
    sites: list[str] = field(default_factory=lambda: ["feedforward"])
    reads: str = "normed"
    reduction_factor: Optional[float] = 16.0
    bottleneck_size: Optional[int] = None  # wins over reduction_factor where both are given
    nonlinearity: str = "relu"
    scaling: Any = 1.0  # a number, or learned
    init: str = "bert"
    dropout: float = 0.0
    layers: Any = None
    drop: Optional[str] = None  # AdapterDrop: specialized:N or robust
    shared: bool = False  # one adapter's weights for all layers

    def __post_init__(self) -> None:
        require(
            len(self.sites) > 0 and len(set(self.sites)) == len(self.sites) and set(self.sites) <= set(SITES),
            f"{override('adapter.sites', self.sites)}: expected some of {', '.join(SITES)}, each once",
        )
        require(
            "before_attention" not in self.sites or self.reads == "input",
            f"adapter.reads={self.reads}: before_attention has the layer's input alone to read; "
            "expected adapter.reads=input, or other adapter.sites",
        )
        require(
            self.scaling == "learned" or (type(self.scaling) in (int, float) and math.isfinite(self.scaling)),
            f"{override('adapter.scaling', self.scaling)}: expected a finite number, or learned (starts at 1)",
        )
        check_drop("adapter.drop", self.drop)
        one_of("adapter.reads", self.reads, READS)
        one_of("adapter.nonlinearity", self.nonlinearity, NONLINEARITIES)
        one_of("adapter.init", self.init, INITIAL_VALUES)
        in_range("adapter.dropout", self.dropout, at_least=0, below=1, whole=False)
        check_layers("adapter.layers", self.layers)
        if self.bottleneck_size is not None:
            in_range(
                "adapter.bottleneck_size", self.bottleneck_size, at_least=1, null="adapter.reduction_factor"
            )
        else:
            hint = ", or adapter.bottleneck_size=N"
            in_range("adapter.reduction_factor", self.reduction_factor, above=0, whole=False, hint=hint)

    def as_stored(self) -> dict[str, Any]:
        """As a manifest keeps it, see `CompositionConfig.as_stored`."""
        return as_stored(self, ("drop", "shared"))

    def size_for(self, hidden_size: int) -> int:
        """The bottleneck size R for a hidden size D: D // reduction_factor, at least 1."""
        if self.bottleneck_size is not None:
            return self.bottleneck_size
        assert self.reduction_factor is not None
        return max(1, int(hidden_size // self.reduction_factor))


_Method: Any = flat_group(
    "method",
    {name: method.settings for name, method in METHODS.items()},
    first=("name", "rank", "alpha", "dropout", "temperature", "targets"),
)


@dataclass
class MethodConfig(_Method):
    """What stage 1 trains beside the head: a name of `METHODS`, and the settings of all of them."""

    def __post_init__(self) -> None:
        for cls in self.classes.values():  # a value out of its range is named first, whatever the method
            self.values_for(cls)
        super().__post_init__()

    @property
    def definition(self) -> Method:
        return METHODS[self.name]


@dataclass
class HeadConfig:
    pooling: Optional[str] = None  # cls or mean; null: what the backbone's YAML says
    layers: int = 1  # 1: linear; 2: dense, tanh, linear
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.pooling is not None:
            one_of("head.pooling", self.pooling, POOLINGS)
        require(self.layers in (1, 2), f"head.layers={self.layers}: expected 1 or 2")
        in_range("head.dropout", self.dropout, at_least=0, below=1, whole=False)


_Composition: Any = flat_group(
    "composition",
    {name: composition.settings for name, composition in COMPOSITIONS.items()},
    first=("name", "value_matrix", "temperature", "dropout", "value_penalty", "layers"),
    later=("drop", "rank", "target_adapter", "train", "fusion", "keep"),
)


@dataclass
class CompositionConfig(_Composition):
    """How stage 2 combines its sources: a name of `COMPOSITIONS`, and the settings of all of them."""

    @property
    def definition(self) -> Composition:
        return COMPOSITIONS[self.name]

    def pruning_of(self, trained: CompositionConfig) -> CompositionConfig:
        """The settings of a pruned fusion: those that the fusion was trained with, but for what its pruning may set."""
        own = (*self.settings.training_only, "name", "train")
        return replace(trained, **{key: getattr(self, key) for key in own})


@dataclass
class SameBackboneConfig:
    """Another place of the very weights that an artifact was made for; null: what its manifest says."""

    name_or_path: Optional[str] = None
    revision: Optional[str] = None
    trust_remote_code: bool = False  # said again each time: an artifact cannot say it for its user
