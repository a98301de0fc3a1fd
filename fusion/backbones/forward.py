"""Forward pass of a backbone, whichever stacks it has.

Shapes: S texts, T tokens, D hidden size.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusion.backbones.family import Family


def last_hidden_states(
    model: nn.Module, family: Family, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
) -> Tensor:
    """Return the last hidden states (S, T, D) of the last stack, given input_ids, attention_mask, token_type_ids (S, T).

    The decoder of an encoder–decoder model reads the encoder's input shifted by one token to the right, so that its
    last token has read the whole text, as in transformers' models for sequence classification.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if token_type_ids is not None:
        inputs["token_type_ids"] = token_type_ids
    called = model.get_submodule("encoder") if list(family.stacks) == ["encoder"] else model
    if family.shift_right and called is model:
        config = cast(PreTrainedModel, model).config
        start = getattr(config, "decoder_start_token_id", None)
        start = config.pad_token_id if start is None else start
        inputs["decoder_input_ids"] = torch.cat([torch.full_like(input_ids[:, :1], start), input_ids[:, :-1]], dim=1)
    hidden: Tensor = called(**inputs).last_hidden_state
    return hidden
