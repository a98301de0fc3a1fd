"""The table of model families. A new family whose block layout is supported needs one entry in this table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from fusion.backbones.slots import BeforeAttention, LinearLayer, PostNorm, PreNorm, Slot
from fusion.errors import UserError

if TYPE_CHECKING:  # the first checks of a command read this table without importing torch
    from torch import nn


@dataclass(frozen=True)
class Stack:
    """One stack of layers.

    Attributes:
        layers: dotted path of the list of layers inside the model.
        sites: sites at which a layer can have slots, by name.
        outputs: length of the tuple that a layer returns, hidden states first. If `None`, it returns a tensor.
        position_bias: module of the first layer that computes the position bias of all layers (T5), which layers
            return after the hidden states, or `None`.
    """

    layers: str
    sites: Mapping[str, Slot]
    outputs: int | None = None
    position_bias: str | None = None


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: `model_type` of the config.
        stacks: stacks by name, starting with the stack that reads the input; a single stack has the empty name.
        model_options: additional arguments of the model's constructor.
        positions_follow_padding: whether position ids count non-padding tokens, from `pad_token_id` + 1, instead of all
            tokens from 0.
        repeated: whether the model uses each module of `layers` for multiple layers (ALBERT).
        architecture: config keys that determine the model's output. The backbone's fingerprint is computed from them
            and the tensors; keys that later library versions add are ignored. If empty, the commands do not support
            the family.
        stem: dotted paths of the modules before the first and after the last layer, if they exist.
    """

    name: str
    stacks: Mapping[str, Stack]
    model_options: Mapping[str, Any] = field(default_factory=dict)
    positions_follow_padding: bool = False
    repeated: bool = False
    architecture: tuple[str, ...] = ()
    stem: tuple[str, ...] = ()

    @property
    def first_stack(self) -> Stack:
        """Stack that reads the input."""
        return next(iter(self.stacks.values()))

    @property
    def sites(self) -> Mapping[str, Slot]:
        """Sites of the first stack."""
        return self.first_stack.sites

    def layer_list(self, model: nn.Module, stack: str | None = None) -> nn.ModuleList:
        """Return the layers of a stack (default: the first stack)."""
        path = (self.first_stack if stack is None else self.stacks[stack]).layers
        return cast("nn.ModuleList", model.get_submodule(path))


def _linear(sublayer: str, **paths: str) -> dict[str, Slot]:
    """Return sites at linear layers of a sublayer: `query` of `attention` is the site `attention.query`."""
    return {f"{sublayer}.{name}": LinearLayer(path) for name, path in paths.items()}


def _projections(sublayer: str, module: str, names: str, output: str | None = None) -> dict[str, Slot]:
    """Return sites at the attention projections. `names`: query, key and value modules, separated by spaces."""
    query, key, value = (f"{module}.{name}" for name in names.split())
    sites = _linear(sublayer, query=query, key=key, value=value)
    return sites if output is None else sites | _linear(sublayer, output=output)


_BERT_SITES: dict[str, Slot] = {
    "before_attention": BeforeAttention(("attention.self",)),
    "attention": PostNorm("attention.output.LayerNorm", "attention.output.dropout", "attention.self"),
    "feedforward": PostNorm("output.LayerNorm", "output.dropout", "intermediate"),
    **_projections("attention", "attention.self", "query key value", output="attention.output.dense"),
    **_linear("feedforward", up="intermediate.dense", down="output.dense"),
}
_DEBERTA_SITES = _BERT_SITES | _projections("attention", "attention.self", "query_proj key_proj value_proj")
_MPNET_SITES: dict[str, Slot] = {
    **_BERT_SITES,
    "before_attention": BeforeAttention(("attention.attn",)),
    "attention": PostNorm("attention.LayerNorm", "attention.dropout", "attention.attn"),
    **_projections("attention", "attention.attn", "q k v", output="attention.attn.o"),
}
_DISTILBERT_SITES: dict[str, Slot] = {
    "before_attention": BeforeAttention(("attention",)),
    "attention": PostNorm("sa_layer_norm", "attention", "attention"),
    "feedforward": PostNorm("output_layer_norm", "ffn", "ffn"),
    **_projections("attention", "attention", "q_lin k_lin v_lin", output="attention.out_lin"),
    **_linear("feedforward", up="ffn.lin1", down="ffn.lin2"),
}
# ALBERT's attention adds its own residual, so the readers of the self-attention input are the three projections.
_ALBERT_ATTENTION = "albert_layers.0.attention"
_ALBERT_SITES: dict[str, Slot] = {
    "before_attention": BeforeAttention(tuple(f"{_ALBERT_ATTENTION}.{name}" for name in ("query", "key", "value"))),
    "attention": PostNorm(f"{_ALBERT_ATTENTION}.LayerNorm", f"{_ALBERT_ATTENTION}.output_dropout", _ALBERT_ATTENTION),
    "feedforward": PostNorm(
        "albert_layers.0.full_layer_layer_norm", "albert_layers.0.ffn_output", "albert_layers.0.ffn"
    ),
    **_projections("attention", _ALBERT_ATTENTION, "query key value", output=f"{_ALBERT_ATTENTION}.dense"),
    **_linear("feedforward", up="albert_layers.0.ffn", down="albert_layers.0.ffn_output"),
}
_MODERNBERT_SITES: dict[str, Slot] = {
    "before_attention": BeforeAttention(("attn",)),
    "attention": PreNorm("attn_norm", "attn.out_drop"),
    "feedforward": PreNorm("mlp_norm", "mlp.Wo"),
    **_linear("attention", query_key_value="attn.Wqkv", output="attn.Wo"),
    **_linear("feedforward", up_gate="mlp.Wi", down="mlp.Wo"),
}
_GPT2_SITES: dict[str, Slot] = {
    "before_attention": BeforeAttention(("attn",)),
    "attention": PreNorm("ln_1", "attn.resid_dropout"),
    "feedforward": PreNorm("ln_2", "mlp.dropout"),
    **_linear("attention", query_key_value="attn.c_attn", output="attn.c_proj"),
    **_linear("feedforward", up="mlp.c_fc", down="mlp.c_proj"),
}
_LLAMA_SITES: dict[str, Slot] = {
    "before_attention": BeforeAttention(("self_attn",)),
    "attention": PreNorm("input_layernorm", "self_attn.o_proj"),
    # The name is misleading: this is the norm before the feed-forward sublayer.
    "feedforward": PreNorm("post_attention_layernorm", "mlp.down_proj"),
    **_projections("attention", "self_attn", "q_proj k_proj v_proj", output="self_attn.o_proj"),
    **_linear("feedforward", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),
}
_GEMMA_SITES: dict[str, Slot] = {**_LLAMA_SITES, "feedforward": PreNorm("pre_feedforward_layernorm", "mlp.down_proj")}
_PHI_SITES: dict[str, Slot] = {
    "before_attention": BeforeAttention(("self_attn",)),
    "attention": PreNorm("input_layernorm", "self_attn.dense"),
    "feedforward": PreNorm("input_layernorm", "mlp.fc2"),
    **_projections("attention", "self_attn", "q_proj k_proj v_proj", output="self_attn.dense"),
    **_linear("feedforward", up="mlp.fc1", down="mlp.fc2"),
}
_BART_SITES: dict[str, Slot] = {
    "before_attention": BeforeAttention(("self_attn",)),
    "attention": PostNorm("self_attn_layer_norm", "self_attn", "self_attn"),
    "feedforward": PostNorm("final_layer_norm", "fc2", "fc1"),
    **_projections("attention", "self_attn", "q_proj k_proj v_proj", output="self_attn.out_proj"),
    **_linear("feedforward", up="fc1", down="fc2"),
}
_BART_DECODER_SITES: dict[str, Slot] = {
    **_BART_SITES,
    "cross_attention": PostNorm("encoder_attn_layer_norm", "encoder_attn", "encoder_attn"),
    **_projections("cross_attention", "encoder_attn", "q_proj k_proj v_proj", output="encoder_attn.out_proj"),
}


def _t5_sites(feedforward: str) -> dict[str, Slot]:
    """Return the sites of a T5 block. feedforward: path of its last sublayer."""
    attention = "layer.0.SelfAttention"
    return {
        "before_attention": BeforeAttention((attention,)),
        "attention": PreNorm("layer.0.layer_norm", "layer.0.dropout"),
        "feedforward": PreNorm(f"{feedforward}.layer_norm", f"{feedforward}.dropout"),
        **_projections("attention", attention, "q k v", output=f"{attention}.o"),
        # wi of T5, or wi_0 and wi_1 of its gated versions
        **_linear("feedforward", **{n: f"{feedforward}.DenseReluDense.{n}" for n in ("wi", "wi_0", "wi_1", "wo")}),
    }


_T5_DECODER_SITES: dict[str, Slot] = {
    **_t5_sites("layer.2"),
    "cross_attention": PreNorm("layer.1.layer_norm", "layer.1.dropout"),
    **_projections("cross_attention", "layer.1.EncDecAttention", "q k v", output="layer.1.EncDecAttention.o"),
}

_BERT_ARCHITECTURE = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id"),
)
_NO_POOLER = {"add_pooling_layer": False}  # heads have their own pooling
_NO_CACHE = {"use_cache": False}  # the key-value cache is only used in generation

_LIST = (
    *(
        Family(
            name,
            {"": Stack("encoder.layer", _BERT_SITES)},
            model_options={} if name == "electra" else _NO_POOLER,
            positions_follow_padding=name in ("roberta", "xlm-roberta"),
            architecture=(*_BERT_ARCHITECTURE, "embedding_size") if name == "electra" else _BERT_ARCHITECTURE,
            stem=("embeddings", "embeddings_project"),  # ELECTRA projects embeddings smaller than the hidden size
        )
        for name in ("bert", "roberta", "xlm-roberta", "electra")
    ),
    Family(
        "mpnet",
        {"": Stack("encoder.layer", _MPNET_SITES, outputs=1)},
        model_options=_NO_POOLER,
        positions_follow_padding=True,
    ),
    Family("deberta-v2", {"": Stack("encoder.layer", _DEBERTA_SITES, outputs=2)}),
    Family("distilbert", {"": Stack("transformer.layer", _DISTILBERT_SITES)}),
    Family(
        "albert", {"": Stack("encoder.albert_layer_groups", _ALBERT_SITES)}, model_options=_NO_POOLER, repeated=True
    ),
    Family("modernbert", {"": Stack("layers", _MODERNBERT_SITES)}),
    Family("gpt2", {"": Stack("h", _GPT2_SITES)}, _NO_CACHE),
    *(
        Family(name, {"": Stack("layers", _LLAMA_SITES)}, _NO_CACHE)
        for name in ("llama", "mistral", "qwen2", "qwen3", "gemma")
    ),
    *(Family(name, {"": Stack("layers", _GEMMA_SITES)}, _NO_CACHE) for name in ("gemma2", "gemma3_text")),
    Family("phi", {"": Stack("layers", _PHI_SITES)}, _NO_CACHE),
    Family(
        "bart",
        {"encoder": Stack("encoder.layers", _BART_SITES), "decoder": Stack("decoder.layers", _BART_DECODER_SITES)},
        _NO_CACHE,
    ),
    *(
        Family(
            name,
            {
                stack: Stack(f"{stack}.block", sites, outputs=3, position_bias="layer.0.SelfAttention")
                for stack, sites in (("encoder", _t5_sites("layer.1")), ("decoder", _T5_DECODER_SITES))
            },
            _NO_CACHE,
        )
        for name in ("t5", "mt5")
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _LIST}


def family_of(model_type: str, where: str) -> Family:
    """Return the family of a model type. Raises UserError if the commands do not support this type."""
    supported = [name for name, family in FAMILIES.items() if family.architecture]
    if model_type not in supported:
        raise UserError(
            f"backbone {where} has model_type {model_type!r}, which is not supported; supported: {', '.join(supported)}.\n"
            "Set a backbone of one of these types with backbone=… or backbone.name_or_path=…"
        )
    return FAMILIES[model_type]
