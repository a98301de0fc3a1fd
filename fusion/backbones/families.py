"""The table of architectures. A new family of a known wiring is one entry here."""

from __future__ import annotations

from collections.abc import Mapping

from fusion.backbones.family import Family, Stack
from fusion.backbones.wirings import BeforeAttention, LinearLayer, PostNorm, PreNorm, Wiring
from fusion.errors import UserError


def _keys(names: str) -> tuple[str, ...]:
    """Config keys, separated by spaces."""
    return tuple(names.split())


def _linear(sublayer: str, **paths: str) -> dict[str, Wiring]:
    """Sites at the linear layers of a sublayer: `query` of `attention` is the site `attention.query`."""
    return {f"{sublayer}.{name}": LinearLayer(path) for name, path in paths.items()}


def _projections(sublayer: str, module: str, names: str, output: str | None = None) -> dict[str, Wiring]:
    """Sites at the projections of an attention module. names: of the query, key and value, separated by spaces."""
    query, key, value = (f"{module}.{name}" for name in names.split())
    sites = _linear(sublayer, query=query, key=key, value=value)
    return sites if output is None else sites | _linear(sublayer, output=output)


_BERT_SITES: dict[str, Wiring] = {
    "before_attention": BeforeAttention(("attention.self",)),
    "attention": PostNorm("attention.output.LayerNorm", "attention.output.dropout", "attention.self"),
    "feedforward": PostNorm("output.LayerNorm", "output.dropout", "intermediate"),
    **_projections("attention", "attention.self", "query key value", output="attention.output.dense"),
    **_linear("feedforward", up="intermediate.dense", down="output.dense"),
}
_DEBERTA_SITES = _BERT_SITES | _projections("attention", "attention.self", "query_proj key_proj value_proj")
_MPNET_SITES: dict[str, Wiring] = {
    "before_attention": BeforeAttention(("attention.attn",)),
    "attention": PostNorm("attention.LayerNorm", "attention.dropout", "attention.attn"),
    "feedforward": PostNorm("output.LayerNorm", "output.dropout", "intermediate"),
    **_projections("attention", "attention.attn", "q k v", output="attention.attn.o"),
    **_linear("feedforward", up="intermediate.dense", down="output.dense"),
}
_DISTILBERT_SITES: dict[str, Wiring] = {
    "before_attention": BeforeAttention(("attention",)),
    "attention": PostNorm("sa_layer_norm", "attention", "attention"),
    "feedforward": PostNorm("output_layer_norm", "ffn", "ffn"),
    **_projections("attention", "attention", "q_lin k_lin v_lin", output="attention.out_lin"),
    **_linear("feedforward", up="ffn.lin1", down="ffn.lin2"),
}
# ALBERT's attention adds its own residual, so what reads the input of self-attention alone is the three projections.
_ALBERT_LAYER = "albert_layers.0"
_ALBERT_PROJECTIONS = tuple(f"{_ALBERT_LAYER}.attention.{name}" for name in ("query", "key", "value"))
_ALBERT_SITES: dict[str, Wiring] = {
    "before_attention": BeforeAttention(_ALBERT_PROJECTIONS),
    "attention": PostNorm(
        f"{_ALBERT_LAYER}.attention.LayerNorm",
        f"{_ALBERT_LAYER}.attention.output_dropout",
        f"{_ALBERT_LAYER}.attention",
    ),
    "feedforward": PostNorm(
        f"{_ALBERT_LAYER}.full_layer_layer_norm", f"{_ALBERT_LAYER}.ffn_output", f"{_ALBERT_LAYER}.ffn"
    ),
    **_linear(
        "attention",
        query=_ALBERT_PROJECTIONS[0],
        key=_ALBERT_PROJECTIONS[1],
        value=_ALBERT_PROJECTIONS[2],
        output=f"{_ALBERT_LAYER}.attention.dense",
    ),
    **_linear("feedforward", up=f"{_ALBERT_LAYER}.ffn", down=f"{_ALBERT_LAYER}.ffn_output"),
}
_MODERNBERT_SITES: dict[str, Wiring] = {
    "before_attention": BeforeAttention(("attn",)),
    "attention": PreNorm("attn_norm", "attn.out_drop"),
    "feedforward": PreNorm("mlp_norm", "mlp.Wo"),
    **_linear("attention", query_key_value="attn.Wqkv", output="attn.Wo"),
    **_linear("feedforward", up_gate="mlp.Wi", down="mlp.Wo"),
}
_GPT2_SITES: dict[str, Wiring] = {
    "before_attention": BeforeAttention(("attn",)),
    "attention": PreNorm("ln_1", "attn.resid_dropout"),
    "feedforward": PreNorm("ln_2", "mlp.dropout"),
    **_linear("attention", query_key_value="attn.c_attn", output="attn.c_proj"),
    **_linear("feedforward", up="mlp.c_fc", down="mlp.c_proj"),
}
_GATED_LINEAR = _projections("attention", "self_attn", "q_proj k_proj v_proj", output="self_attn.o_proj") | _linear(
    "feedforward", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"
)
_LLAMA_SITES: dict[str, Wiring] = {
    "before_attention": BeforeAttention(("self_attn",)),
    "attention": PreNorm("input_layernorm", "self_attn.o_proj"),
    # The name is misleading: it is the norm before the feed-forward.
    "feedforward": PreNorm("post_attention_layernorm", "mlp.down_proj"),
    **_GATED_LINEAR,
}
_GEMMA_SITES: dict[str, Wiring] = {**_LLAMA_SITES, "feedforward": PreNorm("pre_feedforward_layernorm", "mlp.down_proj")}
_PHI_SITES: dict[str, Wiring] = {
    "before_attention": BeforeAttention(("self_attn",)),
    "attention": PreNorm("input_layernorm", "self_attn.dense"),
    "feedforward": PreNorm("input_layernorm", "mlp.fc2"),
    **_projections("attention", "self_attn", "q_proj k_proj v_proj", output="self_attn.dense"),
    **_linear("feedforward", up="mlp.fc1", down="mlp.fc2"),
}
_BART_SITES: dict[str, Wiring] = {
    "before_attention": BeforeAttention(("self_attn",)),
    "attention": PostNorm("self_attn_layer_norm", "self_attn", "self_attn"),
    "feedforward": PostNorm("final_layer_norm", "fc2", "fc1"),
    **_projections("attention", "self_attn", "q_proj k_proj v_proj", output="self_attn.out_proj"),
    **_linear("feedforward", up="fc1", down="fc2"),
}
_BART_DECODER_SITES: dict[str, Wiring] = {
    **_BART_SITES,
    "cross_attention": PostNorm("encoder_attn_layer_norm", "encoder_attn", "encoder_attn"),
    **_projections("cross_attention", "encoder_attn", "q_proj k_proj v_proj", output="encoder_attn.out_proj"),
}


def _t5_sites(feedforward: str) -> dict[str, Wiring]:
    """feedforward: the path of a block's last sublayer."""
    attention = "layer.0.SelfAttention"
    return {
        "before_attention": BeforeAttention((attention,)),
        "attention": PreNorm("layer.0.layer_norm", "layer.0.dropout"),
        "feedforward": PreNorm(f"{feedforward}.layer_norm", f"{feedforward}.dropout"),
        **_projections("attention", attention, "q k v", output=f"{attention}.o"),
        # wi of T5, or wi_0 and wi_1 of its gated versions
        **_linear(
            "feedforward",
            wi=f"{feedforward}.DenseReluDense.wi",
            wi_0=f"{feedforward}.DenseReluDense.wi_0",
            wi_1=f"{feedforward}.DenseReluDense.wi_1",
            wo=f"{feedforward}.DenseReluDense.wo",
        ),
    }


_T5_DECODER_SITES: dict[str, Wiring] = {
    **_t5_sites("layer.2"),
    "cross_attention": PreNorm("layer.1.layer_norm", "layer.1.dropout"),
    **_projections("cross_attention", "layer.1.EncDecAttention", "q k v", output="layer.1.EncDecAttention.o"),
}

_BERT_ARCHITECTURE = _keys(
    "model_type vocab_size hidden_size num_hidden_layers num_attention_heads "
    "intermediate_size hidden_act max_position_embeddings type_vocab_size layer_norm_eps "
    "pad_token_id"
)
_DECODER_ARCHITECTURE = _keys(
    "model_type vocab_size hidden_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim intermediate_size hidden_act hidden_activation "
    "max_position_embeddings rms_norm_eps rope_parameters pad_token_id"
)
# A cache of keys and values is of use in generation alone.
_NO_CACHE = {"use_cache": False}


def _llama_like(name: str, sites: Mapping[str, Wiring], *architecture: str) -> Family:
    return Family(
        name=name,
        stem=("embed_tokens", "norm"),
        stacks={"": Stack("layers", sites)},
        architecture=_DECODER_ARCHITECTURE + architecture,
        model_options=_NO_CACHE,
    )


_LIST = (
    *(
        Family(
            name=model_type,
            stem=("embeddings", "embeddings_project"),  # Electra projects where its embeddings are narrower
            stacks={"": Stack("encoder.layer", _BERT_SITES)},
            architecture=_BERT_ARCHITECTURE + extra,
            # The pooler is pre-trained for another purpose; heads pool for themselves.
            model_options=options,
            positions_follow_padding=model_type in ("roberta", "xlm-roberta"),
            commands=True,
        )
        for model_type, extra, options in (
            ("bert", (), {"add_pooling_layer": False}),
            ("roberta", (), {"add_pooling_layer": False}),
            ("xlm-roberta", (), {"add_pooling_layer": False}),
            ("electra", ("embedding_size",), {}),
        )
    ),
    Family(
        name="mpnet",
        stem=("embeddings",),
        stacks={"": Stack("encoder.layer", _MPNET_SITES, outputs=1)},
        architecture=_BERT_ARCHITECTURE + _keys("relative_attention_num_buckets"),
        model_options={"add_pooling_layer": False},
        positions_follow_padding=True,
    ),
    Family(
        name="deberta-v2",
        stem=("embeddings",),
        stacks={"": Stack("encoder.layer", _DEBERTA_SITES, outputs=2)},
        architecture=_BERT_ARCHITECTURE
        + _keys(
            "relative_attention max_relative_positions position_buckets pos_att_type "
            "share_att_key norm_rel_ebd position_biased_input conv_kernel_size conv_act"
        ),
    ),
    Family(
        name="distilbert",
        stem=("embeddings",),
        stacks={"": Stack("transformer.layer", _DISTILBERT_SITES)},
        architecture=_keys(
            "model_type vocab_size dim n_layers n_heads hidden_dim activation "
            "max_position_embeddings sinusoidal_pos_embds pad_token_id"
        ),
    ),
    Family(
        name="albert",
        stem=("embeddings", "encoder.embedding_hidden_mapping_in"),
        stacks={"": Stack("encoder.albert_layer_groups", _ALBERT_SITES)},
        architecture=_BERT_ARCHITECTURE + _keys("embedding_size num_hidden_groups inner_group_num"),
        model_options={"add_pooling_layer": False},
        repeated=True,
    ),
    Family(
        name="modernbert",
        stem=("embeddings", "final_norm"),
        stacks={"": Stack("layers", _MODERNBERT_SITES)},
        architecture=_keys(
            "model_type vocab_size hidden_size num_hidden_layers num_attention_heads "
            "intermediate_size hidden_activation max_position_embeddings norm_eps layer_types "
            "rope_parameters local_attention pad_token_id"
        ),
    ),
    Family(
        name="gpt2",
        stem=("wte", "wpe", "ln_f"),
        stacks={"": Stack("h", _GPT2_SITES)},
        architecture=_keys(
            "model_type vocab_size n_embd n_layer n_head n_inner n_positions activation_function "
            "layer_norm_epsilon scale_attn_weights scale_attn_by_inverse_layer_idx"
        ),
        model_options=_NO_CACHE,
    ),
    _llama_like("llama", _LLAMA_SITES),
    _llama_like("mistral", _LLAMA_SITES, "sliding_window"),
    _llama_like("qwen2", _LLAMA_SITES, "layer_types", "sliding_window"),
    _llama_like("qwen3", _LLAMA_SITES, "layer_types", "sliding_window"),
    _llama_like("gemma", _LLAMA_SITES),
    _llama_like("gemma2", _GEMMA_SITES, "layer_types", "sliding_window", "query_pre_attn_scalar"),
    _llama_like("gemma3_text", _GEMMA_SITES, "layer_types", "sliding_window", "query_pre_attn_scalar"),
    Family(
        name="phi",
        stem=("embed_tokens", "final_layernorm"),
        stacks={"": Stack("layers", _PHI_SITES)},
        architecture=_DECODER_ARCHITECTURE + _keys("layer_norm_eps partial_rotary_factor qk_layernorm"),
        model_options=_NO_CACHE,
    ),
    Family(
        name="bart",
        stem=("shared",),
        stacks={
            "encoder": Stack("encoder.layers", _BART_SITES),
            "decoder": Stack("decoder.layers", _BART_DECODER_SITES),
        },
        architecture=_keys(
            "model_type vocab_size d_model encoder_layers decoder_layers encoder_attention_heads "
            "decoder_attention_heads encoder_ffn_dim decoder_ffn_dim activation_function "
            "max_position_embeddings scale_embedding pad_token_id"
        ),
        model_options=_NO_CACHE,
    ),
    *(
        Family(
            name=model_type,
            stem=("shared",),
            stacks={
                stack: Stack(f"{stack}.block", sites, outputs=3, position_bias="layer.0.SelfAttention")
                for stack, sites in (("encoder", _t5_sites("layer.1")), ("decoder", _T5_DECODER_SITES))
            },
            architecture=_keys(
                "model_type vocab_size d_model d_kv d_ff num_layers num_decoder_layers num_heads "
                "feed_forward_proj layer_norm_epsilon relative_attention_num_buckets "
                "relative_attention_max_distance pad_token_id"
            ),
            model_options=_NO_CACHE,
        )
        for model_type in ("t5", "mt5")
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _LIST}


def family_of(model_type: str, where: str) -> Family:
    """The family of a model type.

    Raises:
        UserError: the commands do not train this type; lists those that they do.
    """
    supported = [name for name, family in FAMILIES.items() if family.commands]
    if model_type not in supported:
        raise UserError(
            f"backbone {where} is of type {model_type!r}, which is not supported; supported: {', '.join(supported)}.\n"
            "Choose one of those with backbone=… or backbone.name_or_path=…"
        )
    return FAMILIES[model_type]
