"""Settings of the backbone, the adapter and the head."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Optional

from fusion.config.fields import Settings, checked, choice, integer, layer_drop, layers, number, require, subset
from fusion.config.training import RATES

SITES = ("before_attention", "attention", "cross_attention", "feedforward")
STACKS = ("encoder", "decoder")
DTYPES = ("float32", "bfloat16", "float16")
POOLINGS = ("cls", "last", "mean")


def _are_rates(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None
    return all(key in RATES and type(rate) in (int, float) and rate > 0 for key, rate in value.items())


@dataclass
class BackboneConfig(Settings, group="backbone"):
    name_or_path: str = checked("???", bool, "a Hub id or a folder")
    revision: Optional[str] = None
    # Of the frozen weights; auto: bfloat16 on hardware with matrix units for it.
    dtype: str = choice("float32", (*DTYPES, "auto"))
    # Default of head.pooling; null: cls for an encoder, last for a decoder, mean for the encoder of T5.
    pooling: Optional[str] = choice(None, POOLINGS, null="the default of the model family")
    encoder_only: bool = False  # use only the encoder of an encoder–decoder model
    dropout: Optional[bool] = None  # its own dropout in training; null: only if the whole backbone is trained
    # Features below the lowest slot; auto: if it saves time.
    cache: str = choice("auto", ("auto", "off", *DTYPES))
    cache_gb: float = number(20.0, "> 0", infinite=True)  # disk space for all cached features
    gradient_checkpointing: bool = False  # saves memory: layers are recomputed in the backward pass
    trust_remote_code: bool = False  # run the Python code that comes with the backbone
    accept_licence: bool = False  # of a backbone that is only available under such terms (Gemma)
    # Default learning rates measured on this backbone, by what is trained; they replace those of `RATES`.
    rates: Any = checked(None, _are_rates, f"numbers > 0 by what is trained ({', '.join(RATES)}), or null for none")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.dropout or self.cache in ("auto", "off"),
            f"backbone.cache={self.cache}: with backbone.dropout=true the features are random and cannot be cached; "
            "expected backbone.cache=off, or backbone.dropout=false",
        )


@dataclass
class AdapterConfig(Settings, group="adapter"):
    """Placement (sites and adapter input) and architecture of the adapter."""

    name: str = "pfeiffer"
    sites: list[str] = subset(["feedforward"], SITES)
    stacks: Optional[list[str]] = subset(None, STACKS, null="both")  # of an encoder–decoder model
    reads: str = choice("normed", ("output", "normed", "stream", "input"))
    reduction_factor: Optional[float] = number(16.0, "> 0", null="adapter.bottleneck_size")
    bottleneck_size: Optional[int] = integer(None, 1, null="adapter.reduction_factor")  # takes precedence
    nonlinearity: str = choice("relu", ("relu", "gelu", "silu", "tanh"))
    scaling: Any = checked(
        1.0,
        lambda value: value == "learned" or (type(value) in (int, float) and abs(value) <= sys.float_info.max),
        "a finite number, or learned (starts at 1)",
    )
    init: str = choice("bert", ("bert", "houlsby", "zero_up"))
    dropout: float = number(0.0, ">= 0 and < 1")
    layers: Any = layers()
    drop: Optional[str] = layer_drop()
    shared: bool = False  # share one adapter between all layers

    first = (
        *("name", "sites", "reads", "reduction_factor", "bottleneck_size"),
        *("nonlinearity", "scaling", "init", "dropout", "layers"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            "before_attention" not in self.sites or self.reads == "input",
            f"adapter.reads={self.reads}: adapters at before_attention can only read the layer's input; "
            "expected adapter.reads=input, or different adapter.sites",
        )
        require(
            self.bottleneck_size is not None or self.reduction_factor is not None,
            "adapter.reduction_factor=null: expected a number > 0, or adapter.bottleneck_size=N",
        )

    def size_for(self, hidden_size: int) -> int:
        """Return the bottleneck size R for a hidden size D: D // reduction_factor, at least 1."""
        if self.bottleneck_size is not None:
            return self.bottleneck_size
        assert self.reduction_factor is not None
        return max(1, int(hidden_size // self.reduction_factor))


@dataclass
class HeadConfig(Settings, group="head"):
    pooling: Optional[str] = choice(None, POOLINGS, null="backbone.pooling")
    layers: int = integer(1, 1, 2)  # 1: linear; 2: dense, tanh, linear
    dropout: float = number(0.1, ">= 0 and < 1")
    # data: initially, the output is the prior of the classes, or the mean of the values, of the training labels
    init: str = choice("data", ("data", "zero"))


@dataclass
class SameBackboneConfig(Settings, group="backbone"):
    """A copy of the backbone that an artifact was trained on. If null, the value in its manifest is used."""

    name_or_path: Optional[str] = None
    revision: Optional[str] = None
    dtype: Optional[str] = choice(None, DTYPES, null="the artifact's")
    trust_remote_code: bool = False  # never read from an artifact: the user has to set it each time
    accept_licence: bool = False


def kept_layers(layers: Any, drop: str | None, count: int, group: str) -> list[int]:
    """Return the layers that `drop` keeps. Raises UserError if one does not exist, or none is left."""
    selected = range(count) if layers is None else layers
    if isinstance(layers, str):
        last = int(layers.removeprefix("last:"))
        require(
            last <= count, f"{group}.layers={layers}: the backbone has {count} layers; expected last:1 to last:{count}"
        )
        selected = range(count - last, count)
    require(
        max(selected) < count,
        f"{group}.layers={layers}: layer {max(selected)} does not exist; the backbone has layers 0 to {count - 1}",
    )
    first = int(drop.removeprefix("specialized:")) if drop not in (None, "robust") else 0
    kept = sorted(layer for layer in selected if layer >= first)
    require(
        len(kept) > 0,
        f"{group}.drop={drop}: no layer is left of {sorted(selected)}; expected specialized:1 to "
        f"specialized:{max(selected)}",
    )
    return kept
