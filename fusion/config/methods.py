"""The table of methods: what stage 1 trains beside the head, `method=NAME`.

It is readable without torch: a method imports what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fusion.config.checks import in_range, require
from fusion.config.own_settings import Settings
from fusion.errors import UserError
from fusion.text import override

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fusion.backbones.tuning import Tuning

ADAPTER = "adapter"  # the kind of artifact that holds adapters


@dataclass
class MethodSettings(Settings):
    """What every method has: nothing.

    Attributes:
        shaping: settings that decide names, shapes or meaning of the stored weights.
    """

    shaping: ClassVar[tuple[str, ...]] = ()


@dataclass
class LoraSettings(MethodSettings):
    """Attributes:
    rank: of the update.
    alpha: the update counts alpha / rank.
    dropout: on what the update reads.
    targets: the linear layers that have one, by the last part of their names.
    """

    rank: int = 8
    alpha: int = 8
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["query", "value"])

    shaping: ClassVar[tuple[str, ...]] = ("rank", "alpha", "targets")

    def __post_init__(self) -> None:
        in_range("method.rank", self.rank, at_least=1)
        in_range("method.alpha", self.alpha, at_least=1)
        in_range("method.dropout", self.dropout, at_least=0, below=1, whole=False)
        require(
            len(self.targets) > 0 and len(set(self.targets)) == len(self.targets),
            f"{override('method.targets', self.targets)}: expected names of linear layers such as [query,value], each once",
        )


@dataclass
class MultitaskSettings(MethodSettings):
    """Attributes:
    temperature: tasks are drawn with p_i ~ n_i^(1/temperature) (Stickland & Murray 2019).
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        hint = "; 1 draws tasks by their rows, a higher one brings small tasks up"
        in_range("method.temperature", self.temperature, above=0, whole=False, hint=hint)


def _full(settings: MethodSettings, model: nn.Module) -> Tuning:
    from fusion.backbones.tuning import full

    return full(model)


def _bitfit(settings: MethodSettings, model: nn.Module) -> Tuning:
    from fusion.backbones.tuning import bitfit

    return bitfit(model)


def _check_lora(settings: LoraSettings, weights: Mapping[str, Tensor], file: Path) -> None:
    """Refuse a rank that the stored weights do not have, before anything of that size is made."""
    stored = {tuple(tensor.shape[:1]) for name, tensor in weights.items() if name.endswith("lora_A.weight")}
    if stored != {(settings.rank,)}:
        raise UserError(
            f"{file}: holds LoRA of rank {sorted(stored)}, and manifest.json says method.rank={settings.rank}"
        )


def _lora(settings: LoraSettings, model: nn.Module) -> Tuning:
    from fusion.backbones.tuning import lora

    return lora(model, settings.rank, settings.alpha, settings.dropout, settings.targets)


@dataclass(frozen=True)
class Method:
    """What stage 1 trains beside the head.

    Attributes:
        kind: of the artifact that it stores.
        title: its name in reports.
        settings: its settings class.
        tune: from the settings and the backbone, which it may change in place, to what of the backbone trains; None:
            nothing does.
        check_stored: refuses stored weights that do not fit the settings, before anything of their size is made; None:
            no setting decides a size.
        multitask: whether it trains several tasks at once, `tasks=[A,B]`, and not one.
        whole: whether all of the backbone trains, so that its own dropout acts unless `backbone.dropout` is given.
    """

    kind: str
    title: str
    settings: type[MethodSettings] = MethodSettings
    tune: Callable[[Any, nn.Module], Tuning] | None = None
    check_stored: Callable[[Any, Mapping[str, Tensor], Path], None] | None = None
    multitask: bool = False
    whole: bool = False


METHODS: dict[str, Method] = {
    "adapter": Method(ADAPTER, "single adapter"),
    "head": Method("head", "head"),
    "lora": Method("lora", "LoRA", LoraSettings, _lora, _check_lora),
    "bitfit": Method("bitfit", "BitFit", tune=_bitfit),
    "full": Method("full", "full fine-tuning", tune=_full, whole=True),
    "multitask_adapter": Method(ADAPTER, "multi-task adapter", MultitaskSettings, multitask=True),
    "multitask_full": Method(
        "full", "multi-task fine-tuning", MultitaskSettings, _full, multitask=True, whole=True
    ),
}
