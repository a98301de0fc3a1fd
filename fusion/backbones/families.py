"""Per architecture: where its layers and sublayers are. A new family is one entry here.

All that is needed of a post-norm family is that the module at the end of each sublayer has
`dense`, `dropout` and `LayerNorm` and computes `LayerNorm(dropout(dense(h)) + a)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from fusion.errors import UserError

if TYPE_CHECKING:  # a command's first checks read this table without torch
    from torch import nn


@dataclass(frozen=True)
class Family:
    """One architecture.

    stem: dotted paths of what runs before the first layer; one that a model does not have is passed over.
    layers: dotted path of the list of layers inside the model.
    sites: for each site, in the order in which they run, the dotted path inside a layer of the
        module that ends the sublayer (of `before_attention`, of the self-attention itself).
    before: for each site, the modules of its layer that run before that one, and how many values
        each of them gives: the stream comes first.
    architecture: the config keys that decide what the model computes; with the tensors they are
        the backbone's fingerprint, so no key that a new version of a library may add is in it.
    model_options: what the model's constructor is given beside the config.
    positions_follow_padding: whether positions count the tokens that are not padding, from `pad_token_id` + 1;
        otherwise they count all tokens from 0, padding included.
    """

    name: str
    stem: tuple[str, ...]
    layers: str
    sites: Mapping[str, str]
    before: Mapping[str, Mapping[str, int]]
    architecture: tuple[str, ...]
    model_options: Mapping[str, Any] = field(default_factory=dict)
    positions_follow_padding: bool = False

    def layer_list(self, model: nn.Module) -> nn.ModuleList:
        return cast("nn.ModuleList", model.get_submodule(self.layers))

    @property
    def roots(self) -> set[str]:
        """The first parts of the names of all tensors that a forward pass uses."""
        return {path.partition(".")[0] for path in (*self.stem, self.layers)}

    def positions(self, table: int, pad_token_id: int | None) -> int:
        """How many tokens a sequence may have, given the rows of the position table."""
        return table - (pad_token_id or 0) - 1 if self.positions_follow_padding else table


_BERT_ARCHITECTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "pad_token_id",
)
_BERT_SITES = {
    "before_attention": "attention.self",
    "attention": "attention.output",
    "feedforward": "output",
}
_BERT_BEFORE = {
    "before_attention": {},
    "attention": {"attention.self": 2},
    "feedforward": {"attention": 2, "intermediate": 1},
}

FAMILIES: dict[str, Family] = {
    model_type: Family(
        name=model_type,
        stem=("embeddings", "embeddings_project"),  # Electra projects where its embeddings are narrower
        layers="encoder.layer",
        sites=_BERT_SITES,
        before=_BERT_BEFORE,
        architecture=_BERT_ARCHITECTURE + extra,
        # The pooler is pre-trained for another purpose; heads pool for themselves.
        model_options=options,
        positions_follow_padding=model_type in ("roberta", "xlm-roberta"),
    )
    for model_type, extra, options in (
        ("bert", (), {"add_pooling_layer": False}),
        ("roberta", (), {"add_pooling_layer": False}),
        ("xlm-roberta", (), {"add_pooling_layer": False}),
        ("electra", ("embedding_size",), {}),
    )
}


def family_of(model_type: str, where: str) -> Family:
    """The family of a model type.

    Raises:
        UserError: the type is none of `FAMILIES`; it lists them.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"backbone {where} is of type {model_type!r}, which is not supported; supported: {', '.join(FAMILIES)}.\n"
            "Choose one of those with backbone=… or backbone.name_or_path=…"
        )
    return FAMILIES[model_type]
