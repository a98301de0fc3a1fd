"""The table of methods, `method=NAME`: what stage 1 trains in addition to the head. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.config.fields import NamedSettings, checked, integer, number
from fusion.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fusion.backbones.family import Family
    from fusion.backbones.tuning import Tuning

ADAPTER = "adapter"  # the kind of artifact that contains adapters


def _tune(name: str, settings: MethodConfig, model: nn.Module, keys: tuple[str, ...] = ()) -> Tuning:
    """Call a function of `fusion.backbones.tuning` with the settings listed in `keys`."""
    from fusion.backbones import tuning

    tuned: Tuning = getattr(tuning, name)(model, **{key: getattr(settings, key) for key in keys})
    return tuned


def _check_lora(settings: MethodConfig, weights: Mapping[str, Tensor], file: Path) -> None:
    """Raise UserError if the stored weights have a different rank, before any tensor of that size is allocated."""
    stored = {tuple(tensor.shape[:1]) for name, tensor in weights.items() if name.endswith("lora_A.weight")}
    if stored != {(settings.rank,)}:
        raise UserError(
            f"{file}: the LoRA weights have rank {sorted(stored)}, but manifest.json has method.rank={settings.rank}"
        )


@dataclass(frozen=True)
class Method:
    """A training method of stage 1."""

    kind: str  # of the stored artifact
    title: str  # in reports
    rate: str  # key of the default learning rate, see `RATES`
    settings: tuple[str, ...] = ()  # fields of `MethodConfig` that apply to it
    shaping: tuple[str, ...] = ()  # settings that determine names, shapes or meaning of the stored weights
    # Of (settings, backbone); may modify the backbone in place. None if no backbone parameter is trained.
    tune: Callable[[Any, nn.Module], Tuning] | None = None
    # Raises if stored weights do not match the settings, before tensors of their size are allocated.
    check_stored: Callable[[Any, Mapping[str, Tensor], Path], None] | None = None
    multitask: bool = False  # trains multiple tasks jointly, `tasks=[A,B]`
    dtype: str | None = None  # dtype of the backbone that it requires; None: any
    whole: bool = False  # trains the whole backbone, whose dropout is then active unless `backbone.dropout` is set


_LORA = ("rank", "alpha", "dropout", "targets")

METHODS: dict[str, Method] = {
    "adapter": Method(ADAPTER, "single adapter", "adapter"),
    "head": Method("head", "head", "head"),
    "lora": Method(
        "lora", "LoRA", "lora", _LORA, ("rank", "alpha", "targets"), partial(_tune, "lora", keys=_LORA), _check_lora
    ),
    "bitfit": Method("bitfit", "BitFit", "bitfit", tune=partial(_tune, "bitfit"), dtype="float32"),
    "full": Method("full", "full fine-tuning", "full", tune=partial(_tune, "full"), dtype="float32", whole=True),
    "multitask_adapter": Method(ADAPTER, "multi-task adapter", "adapter", ("temperature",), multitask=True),
    "multitask_full": Method(
        "full",
        "multi-task fine-tuning",
        "full",
        ("temperature",),
        tune=partial(_tune, "full"),
        multitask=True,
        dtype="float32",
        whole=True,
    ),
}


@dataclass
class MethodConfig(NamedSettings, group="method"):
    """The training method of stage 1: a key of `METHODS`, and the settings of all methods."""

    name: str = "adapter"
    rank: int = integer(8, 1)  # rank of LoRA's update
    alpha: int = integer(8, 1)  # the update is scaled by alpha / rank
    dropout: float = number(0.0, ">= 0 and < 1")  # on the input of LoRA's update
    # Tasks are sampled with p_i ~ n_i^(1/temperature) (Stickland & Murray 2019).
    temperature: float = number(2.0, "> 0", hint="; 1 samples tasks by their size, higher values favor small tasks")
    # Linear layers with an update: `query`, `value` and other parts of sites, or the last part of a layer's name.
    targets: list[str] = checked(
        ["query", "value"],
        lambda value: 0 < len(value) == len(set(value)),
        "names of linear layers such as [query,value], each once",
    )

    table = METHODS
    common = ("name",)
    first = ("name", "rank", "alpha", "dropout", "temperature", "targets")

    @property
    def definition(self) -> Method:
        return METHODS[self.name]

    def of_family(self, family: Family) -> MethodConfig:
        """Return the settings with the names that the family's linear layers have."""
        applies = "targets" in self.definition.settings
        return replace(self, targets=family.linear_names(self.targets)) if applies else self
