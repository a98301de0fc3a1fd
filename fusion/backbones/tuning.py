"""Baseline methods that train parameters of the backbone instead of slot modules.

full     every parameter
bitfit   the bias terms (BitFit, Ben Zaken et al. 2022)
lora     W + (alpha / rank) · B A for selected frozen matrices W (LoRA, Hu et al. 2022)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from fusion.errors import UserError

_ADAPTER = "default"  # adapter name in peft


@dataclass(frozen=True)
class Tuning:
    """Trainable parameters of a backbone.

    Attributes:
        parameters: trainable parameters, by their names in the backbone.
        dropouts: dropout modules that are active in training even if the backbone's own dropout is not.
        merge: merges trained updates into the backbone's matrices for inference, after which training is impossible.
    """

    parameters: dict[str, nn.Parameter]
    dropouts: list[nn.Module] = field(default_factory=list)
    merge: Callable[[], None] = lambda: None

    def state(self) -> dict[str, nn.Parameter]:
        """Return the stored parameters, with the names that peft uses in files: `….query.lora_A.weight`."""
        return {name.replace(f".{_ADAPTER}.", "."): p for name, p in self.parameters.items()}


def full(model: nn.Module) -> Tuning:
    """Train every parameter of the backbone."""
    return Tuning(dict(model.named_parameters()))


def bitfit(model: nn.Module) -> Tuning:
    """Train the bias terms, including those of layer norms. Raises UserError if the model has none (Llama, T5)."""
    biases = {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias"}
    if not biases:
        raise UserError(
            "method=bitfit: the backbone has no bias terms; expected a different method, such as method=lora"
        )
    return Tuning(biases)


def lora(model: nn.Module, rank: int, alpha: int, dropout: float, targets: Sequence[str]) -> Tuning:
    """Train low-rank updates of every linear layer whose name ends in one of `targets`, with peft.

    The model is changed in place. A (rank, in) is initialized randomly and B (out, rank) to zero, so the model output
    is initially unchanged. Layers with the same matrix share the update (ALBERT). Raises UserError if no linear layer
    has one of these names.
    """
    # Slow import that only this method needs.
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    matrices = {n: module for n, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    linear = {name.rpartition(".")[2] for name in matrices}
    unknown = [target for target in targets if target not in linear]
    if unknown:
        raise UserError(
            f"method.targets={list(targets)}: the backbone has no linear layer called {unknown[0]}; "
            f"expected some of {', '.join(sorted(linear))}"
        )
    transposed = any(isinstance(m, Conv1D) for n, m in matrices.items() if n.rpartition(".")[2] in targets)
    settings = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), fan_in_fan_out=transposed
    )
    inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    first_with: dict[int, LoraLayer] = {}
    for layer in layers.values():
        first = first_with.setdefault(id(layer.get_base_layer().weight), layer)
        layer.lora_A, layer.lora_B = first.lora_A, first.lora_B
    parameters = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    for parameter in parameters.values():  # peft creates them in the dtype of the frozen matrix
        parameter.data = parameter.data.float()

    def merge() -> None:
        for layer in first_with.values():
            layer.merge()
        for name, layer in layers.items():
            model.set_submodule(name, layer.get_base_layer())

    return Tuning(parameters, [layer.lora_dropout for layer in layers.values()], merge)
