"""The table of model families. A new family whose block layout is supported needs one entry in this table."""

from __future__ import annotations

from collections.abc import Mapping

from fusion.backbones.family import Family, Stack
from fusion.backbones.slots import BeforeAttention, LinearLayer, PostNorm, PreNorm, Slot
from fusion.errors import UserError


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
_PHI3_SITES: dict[str, Slot] = {
    "before_attention": BeforeAttention(("self_attn",)),
    "attention": PreNorm("input_layernorm", "resid_attn_dropout"),
    "feedforward": PreNorm("post_attention_layernorm", "resid_mlp_dropout"),
    **_linear("attention", query_key_value="self_attn.qkv_proj", output="self_attn.o_proj"),
    **_linear("feedforward", up_gate="mlp.gate_up_proj", down="mlp.down_proj"),
}
_GPTJ_SITES: dict[str, Slot] = {
    "before_attention": BeforeAttention(("attn",)),
    "attention": PreNorm("ln_1", "attn.resid_dropout"),
    "feedforward": PreNorm("ln_1", "mlp.dropout"),
    **_projections("attention", "attn", "q_proj k_proj v_proj", output="attn.out_proj"),
    **_linear("feedforward", up="mlp.fc_in", down="mlp.fc_out"),
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
_MBART_SITES: dict[str, Slot] = {
    **_BART_SITES,
    "attention": PreNorm("self_attn_layer_norm", "self_attn"),
    "feedforward": PreNorm("final_layer_norm", "fc2"),
}
_MBART_DECODER_SITES: dict[str, Slot] = {
    **_BART_DECODER_SITES,
    **_MBART_SITES,
    "cross_attention": PreNorm("encoder_attn_layer_norm", "encoder_attn"),
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

# Config keys that a model's output depends on, besides its weights.
_LAYERS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_BERT_ARCHITECTURE = (
    *(*_LAYERS, "hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id"),
)
_DEBERTA_ARCHITECTURE = (
    *_BERT_ARCHITECTURE,
    *("relative_attention", "max_relative_positions", "position_buckets", "position_biased_input", "pos_att_type"),
    *("share_att_key", "norm_rel_ebd", "attention_head_size", "embedding_size"),
    *("conv_kernel_size", "conv_groups", "conv_act"),
)
_GPT2_ARCHITECTURE = (
    *("model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"),
    *("activation_function", "layer_norm_epsilon"),
)
_ROTARY = (*_LAYERS, "max_position_embeddings", "rope_parameters")
_LLAMA_ARCHITECTURE = (*_ROTARY, "num_key_value_heads", "hidden_act", "rms_norm_eps")
_SLIDING = ("sliding_window", "layer_types")  # layers with sliding attention
_GEMMA_ARCHITECTURE = (*_LLAMA_ARCHITECTURE, "head_dim", "attention_bias", "use_bidirectional_attention")
_GEMMA2_ARCHITECTURE = (
    *(key for key in _GEMMA_ARCHITECTURE if key != "hidden_act"),
    *(*_SLIDING, "hidden_activation", "query_pre_attn_scalar", "attn_logit_softcapping"),
)
_BART_ARCHITECTURE = (
    *("model_type", "vocab_size", "d_model", "max_position_embeddings", "activation_function", "scale_embedding"),
    *(f"{stack}_{key}" for stack in ("encoder", "decoder") for key in ("layers", "ffn_dim", "attention_heads")),
    *("pad_token_id", "decoder_start_token_id"),
)
_T5_ARCHITECTURE = (
    *("model_type", "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads"),
    *("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj"),
    *("dense_act_fn", "decoder_start_token_id"),
)
_NO_POOLER = {"add_pooling_layer": False}  # heads have their own pooling


def _decoder(
    name: str,
    sites: Mapping[str, Slot],
    architecture: tuple[str, ...],
    layers: str = "layers",
    outputs: int | None = None,
) -> Family:
    stacks = {"": Stack(layers, sites, outputs, pooling="last")}
    return Family(name, stacks, architecture=architecture, has_cache=True)


_LIST = (
    *(
        Family(
            name,
            {"": Stack("encoder.layer", _BERT_SITES)},
            model_options={} if name == "electra" else _NO_POOLER,
            positions_follow_padding=name in ("roberta", "xlm-roberta"),
            architecture=(*_BERT_ARCHITECTURE, "embedding_size") if name == "electra" else _BERT_ARCHITECTURE,
            # ELECTRA projects embeddings smaller than the hidden size.
            optional=("embeddings_project",) if name == "electra" else (),
        )
        for name in ("bert", "roberta", "xlm-roberta", "electra")
    ),
    Family(
        "mpnet",
        {"": Stack("encoder.layer", _MPNET_SITES, outputs=1)},
        model_options=_NO_POOLER,
        positions_follow_padding=True,
        architecture=(*_BERT_ARCHITECTURE, "relative_attention_num_buckets"),
    ),
    Family("deberta-v2", {"": Stack("encoder.layer", _DEBERTA_SITES, outputs=2)}, architecture=_DEBERTA_ARCHITECTURE),
    Family(
        "distilbert",
        {"": Stack("transformer.layer", _DISTILBERT_SITES)},
        architecture=(
            *("model_type", "vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "activation"),
            "max_position_embeddings",
        ),
    ),
    Family(
        "albert",
        {"": Stack("encoder.albert_layer_groups", _ALBERT_SITES)},
        model_options=_NO_POOLER,
        repeated=True,
        architecture=(*_BERT_ARCHITECTURE, "embedding_size", "num_hidden_groups", "inner_group_num"),
    ),
    Family(
        "modernbert",
        {"": Stack("layers", _MODERNBERT_SITES)},
        architecture=(
            *(*_ROTARY, "hidden_activation", "norm_eps", "norm_bias", "attention_bias", "mlp_bias"),
            *("layer_types", "local_attention"),
        ),
    ),
    _decoder(
        "gpt2", _GPT2_SITES, (*_GPT2_ARCHITECTURE, "scale_attn_weights", "scale_attn_by_inverse_layer_idx"), layers="h"
    ),
    _decoder("gptj", _GPTJ_SITES, (*_GPT2_ARCHITECTURE, "rotary_dim"), layers="h", outputs=2),
    _decoder("llama", _LLAMA_SITES, (*_LLAMA_ARCHITECTURE, "head_dim", "attention_bias", "mlp_bias")),
    _decoder("mistral", _LLAMA_SITES, (*_LLAMA_ARCHITECTURE, "head_dim", "sliding_window")),
    _decoder("qwen2", _LLAMA_SITES, (*_LLAMA_ARCHITECTURE, *_SLIDING)),
    _decoder("qwen3", _LLAMA_SITES, (*_LLAMA_ARCHITECTURE, *_SLIDING, "head_dim", "attention_bias")),
    _decoder("gemma", _LLAMA_SITES, _GEMMA_ARCHITECTURE),
    _decoder("gemma2", _GEMMA_SITES, _GEMMA2_ARCHITECTURE),
    _decoder("gemma3_text", _GEMMA_SITES, _GEMMA2_ARCHITECTURE),
    _decoder("phi", _PHI_SITES, (*_ROTARY, "num_key_value_heads", "hidden_act", "layer_norm_eps", "qk_layernorm")),
    _decoder("phi3", _PHI3_SITES, (*_LLAMA_ARCHITECTURE, "original_max_position_embeddings", "sliding_window")),
    *(
        Family(
            name,
            {"encoder": Stack("encoder.layers", encoder), "decoder": Stack("decoder.layers", decoder, pooling="last")},
            architecture=_BART_ARCHITECTURE,
            has_cache=True,
        )
        for name, encoder, decoder in (
            ("bart", _BART_SITES, _BART_DECODER_SITES),
            ("mbart", _MBART_SITES, _MBART_DECODER_SITES),
        )
    ),
    *(
        Family(
            name,
            {
                stack: Stack(f"{stack}.block", sites, 3, "layer.0.SelfAttention", pooling)
                for stack, sites, pooling in (
                    ("encoder", _t5_sites("layer.1"), "mean"),
                    ("decoder", _T5_DECODER_SITES, "last"),
                )
            },
            architecture=_T5_ARCHITECTURE,
            shift_right=True,
            has_cache=True,
        )
        for name in ("t5", "mt5")
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _LIST}


def family_of(model_type: str, where: str, encoder_only: bool = False) -> Family:
    """Return the family of a model type, with `encoder_only` without its decoder.

    Raises UserError if the type is not supported, or has no encoder and decoder.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"backbone {where} has model_type {model_type!r}, which is not supported; supported: {', '.join(FAMILIES)}.\n"
            "Set a backbone of one of these types with backbone=… or backbone.name_or_path=…"
        )
    family = FAMILIES[model_type]
    if not encoder_only:
        return family
    if len(family.stacks) == 1:
        raise UserError(
            f"backbone.encoder_only=true: backbone {where} ({model_type}) has a single stack; expected an "
            "encoder–decoder model such as T5, or backbone.encoder_only=false"
        )
    return family.encoder_only()
