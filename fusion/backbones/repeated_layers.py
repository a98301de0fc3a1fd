"""One module per layer for backbones that share layers (ALBERT).

Slots, the feature cache and gradient checkpointing address a layer by its module. The parameters stay shared.
"""

from __future__ import annotations

import copy

from torch import nn
from transformers import PreTrainedModel

from fusion.backbones.family import Family
from fusion.errors import UserError


def separate_repeated_layers(model: PreTrainedModel, family: Family) -> None:
    """Give the model a layer group for each layer; groups of the same layer share their parameters.

    Raises:
        UserError: a group of more than one layer, which no released ALBERT has.
    """
    if not family.repeated:
        return
    config, groups = model.config, family.layer_list(model)
    if config.inner_group_num != 1:
        raise UserError(
            f"the backbone's config.json has inner_group_num={config.inner_group_num}; expected 1, a layer for each group"
        )
    uses = config.num_hidden_layers / len(groups)
    separate = [_sharing(groups[int(layer / uses)]) for layer in range(config.num_hidden_layers)]
    model.set_submodule(family.layers, nn.ModuleList(separate))
    # The model derives the group of a layer from this number.
    config.num_hidden_groups = config.num_hidden_layers


def _sharing(module: nn.Module) -> nn.Module:
    """A copy with the same parameters."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
