"""Methods that train parameters of the backbone instead of slot modules: the usual baselines.

full     every parameter
bitfit   the bias terms (BitFit, Ben Zaken et al. 2022)
lora     W + (alpha / rank) · B A beside chosen matrices W, which stay frozen (LoRA, Hu et al. 2022)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from fusion.errors import UserError

_ADAPTER = "default"  # peft's name for the adapter


@dataclass(frozen=True)
class Tuning:
    """The parameters of a backbone that train.

    Attributes:
        parameters: by their names in the backbone.
        dropouts: dropout modules that are active in training even if the backbone's own are not.
        merge: merges trained updates into the backbone's matrices for inference; it cannot be trained any more then.
    """

    parameters: dict[str, nn.Parameter]
    dropouts: list[nn.Module] = field(default_factory=list)
    merge: Callable[[], None] = lambda: None

    def state(self) -> dict[str, nn.Parameter]:
        """The stored parameters, named as peft stores them: `….query.lora_A.weight`."""
        return {name.replace(f".{_ADAPTER}.", "."): p for name, p in self.parameters.items()}


def full(model: nn.Module) -> Tuning:
    """Every parameter of the backbone."""
    return Tuning(dict(model.named_parameters()))


def bitfit(model: nn.Module) -> Tuning:
    """The bias terms, including those of layer norms."""
    return Tuning({n: p for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias"})


def lora(model: nn.Module, rank: int, alpha: int, dropout: float, targets: Sequence[str]) -> Tuning:
    """Low-rank updates of every linear layer whose name ends in one of `targets`, by peft.

    The model is changed in place. A (rank, in) is initialized randomly and B (out, rank) to zero, so that the model is
    initially unchanged.

    Raises:
        UserError: no linear layer has this name.
    """
    # Slow to import, and needed by this method only.
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
