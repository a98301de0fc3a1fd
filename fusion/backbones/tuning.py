"""Methods that train a part of the backbone itself in place of slot module its slots: the baselines of the field.

full     every parameter
bitfit   the bias terms (BitFit, Ben Zaken et al. 2022)
lora     W + (alpha / rank) · B A beside chosen matrices W, which stay frozen (LoRA, Hu et al. 2022)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from fusion.errors import UserError

_ADAPTER = "default"  # what peft calls the only LoRA that there is


@dataclass(frozen=True)
class Tuning:
    """What of a backbone trains.

    parameters: by their name in the backbone.
    dropouts: modules inside the backbone that drop out in training, though the backbone's own do not.
    merge: puts what trained into the backbone's matrices, for inference; it cannot be trained any more then.
    """

    parameters: dict[str, nn.Parameter]
    dropouts: list[nn.Module] = field(default_factory=list)
    merge: Callable[[], None] = lambda: None

    def state(self) -> dict[str, nn.Parameter]:
        """What is stored: names as peft stores them, without the adapter's, `….query.lora_A.weight`."""
        return {name.replace(f".{_ADAPTER}.", "."): p for name, p in self.parameters.items()}


def full(model: nn.Module) -> Tuning:
    """Every parameter of the backbone."""
    return Tuning(dict(model.named_parameters()))


def bitfit(model: nn.Module) -> Tuning:
    """The bias terms, those of the layer norms included."""
    return Tuning({n: p for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias"})


def lora(model: nn.Module, rank: int, alpha: int, dropout: float, targets: Sequence[str]) -> Tuning:
    """Low-rank changes beside every linear layer whose name ends in one of `targets`, by peft.

    The model is changed in place. A (rank, in) starts random and B (out, rank) at zero, so that the
    model starts as it was.

    Raises:
        UserError: a target that no linear layer has.
    """
    # Heavy, and needed by this method alone.
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    linear = {n.rpartition(".")[2] for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = [target for target in targets if target not in linear]
    if unknown:
        raise UserError(
            f"method.targets={list(targets)}: the backbone has no linear layer called {unknown[0]}; "
            f"it has {', '.join(sorted(linear))}"
        )
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets))
    inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    parameters = {n: p for n, p in model.named_parameters() if ".lora_" in n}

    def merge() -> None:
        for name, layer in layers.items():
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())

    return Tuning(parameters, [layer.lora_dropout for layer in layers.values()], merge)
