"""The table of methods: what stage 1 trains beside the head, `method=NAME`.

It is readable without torch: a method imports what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.config.fields import NamedSettings, checked, integer, number
from fusion.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fusion.backbones.tuning import Tuning

ADAPTER = "adapter"  # the kind of artifact that holds adapters


def _tune(name: str, settings: MethodConfig, model: nn.Module, keys: tuple[str, ...] = ()) -> Tuning:
    """A function of `fusion.backbones.tuning`, with the settings of these keys."""
    from fusion.backbones import tuning

    tuned: Tuning = getattr(tuning, name)(model, **{key: getattr(settings, key) for key in keys})
    return tuned


def _check_lora(settings: MethodConfig, weights: Mapping[str, Tensor], file: Path) -> None:
    """Refuse a rank that the stored weights do not have, before anything of that size is made."""
    stored = {tuple(tensor.shape[:1]) for name, tensor in weights.items() if name.endswith("lora_A.weight")}
    if stored != {(settings.rank,)}:
        raise UserError(f"{file}: has LoRA of rank {sorted(stored)}, and manifest.json has method.rank={settings.rank}")


@dataclass(frozen=True)
class Method:
    """What stage 1 trains beside the head.

    Attributes:
        kind: of the artifact that it stores.
        title: its name in reports.
        settings: fields of `MethodConfig` that apply to it.
        shaping: those that decide names, shapes or meaning of the stored weights.
        tune: from the settings and the backbone, which it may change in place, to what of the backbone trains; None:
            nothing does.
        check_stored: refuses stored weights that do not fit the settings, before anything of their size is made; None:
            no setting decides a size.
        multitask: whether it trains multiple tasks jointly, `tasks=[A,B]`.
        whole: whether all of the backbone trains, so that its own dropout acts unless `backbone.dropout` is given.
    """

    kind: str
    title: str
    settings: tuple[str, ...] = ()
    shaping: tuple[str, ...] = ()
    tune: Callable[[Any, nn.Module], Tuning] | None = None
    check_stored: Callable[[Any, Mapping[str, Tensor], Path], None] | None = None
    multitask: bool = False
    whole: bool = False


_LORA = ("rank", "alpha", "dropout", "targets")

METHODS: dict[str, Method] = {
    "adapter": Method(ADAPTER, "single adapter"),
    "head": Method("head", "head"),
    "lora": Method(
        "lora",
        "LoRA",
        settings=_LORA,
        shaping=("rank", "alpha", "targets"),
        tune=partial(_tune, "lora", keys=_LORA),
        check_stored=_check_lora,
    ),
    "bitfit": Method("bitfit", "BitFit", tune=partial(_tune, "bitfit")),
    "full": Method("full", "full fine-tuning", tune=partial(_tune, "full"), whole=True),
    "multitask_adapter": Method(ADAPTER, "multi-task adapter", ("temperature",), multitask=True),
    "multitask_full": Method(
        "full", "multi-task fine-tuning", ("temperature",), tune=partial(_tune, "full"), multitask=True, whole=True
    ),
}


@dataclass
class MethodConfig(NamedSettings, group="method"):
    """What stage 1 trains beside the head: a name of `METHODS`, and the settings of all of them."""

    name: str = "adapter"
    rank: int = integer(8, 1)  # of LoRA's update
    alpha: int = integer(8, 1)  # the update is scaled by alpha / rank
    dropout: float = number(0.0, ">= 0 and < 1")  # on the input of the update
    # Tasks are drawn with p_i ~ n_i^(1/temperature) (Stickland & Murray 2019).
    temperature: float = number(2.0, "> 0", hint="; 1 draws tasks by their size, higher values favour small tasks")
    targets: list[str] = checked(  # the linear layers with an update, by the last part of their names
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
