"""Tiny random models of transformers' own classes, one for each wiring and each way of a family to differ."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from fusion.backbones.families import FAMILIES
from fusion.backbones.load import Backbone, separate_repeated_layers
from tests.tiny_backbone import WORDS

HIDDEN, LAYERS, VOCABULARY = 32, 3, 40
IDS = torch.tensor([[2, 7, 8, 9, 3], [2, 10, 3, 0, 0], [2, 11, 12, 3, 0]])
MASK = (IDS != 0).long()
DECODER_IDS = torch.tensor([[2, 5, 6, 4], [2, 14, 15, 9], [2, 11, 6, 5]])

_BERT = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48}
_LLAMA = _BERT | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
_SEQ2SEQ = {"d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_ffn_dim": 48}
_SEQ2SEQ |= {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
_T5 = {"d_model": HIDDEN, "num_layers": LAYERS, "num_heads": 4, "d_kv": 8, "d_ff": 48, "decoder_start_token_id": 0}

# A family of a known wiring needs a line here; what follows `/` is a version of the same family.
SETTINGS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT | {"pad_token_id": 0},
    "xlm-roberta": _BERT | {"pad_token_id": 0},
    "electra": _BERT | {"embedding_size": 16},
    "mpnet": _BERT | {"pad_token_id": 0},
    "deberta-v2": _BERT
    | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4, "share_att_key": True}
    | {"conv_kernel_size": 3, "conv_act": "gelu", "position_biased_input": False, "norm_rel_ebd": "layer_norm"},
    "distilbert": {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 48},
    "albert": _BERT | {"embedding_size": 16},
    "albert/groups": _BERT | {"embedding_size": 16, "num_hidden_groups": 3},
    "modernbert": _BERT | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_inner": 48, "n_positions": 64},
    "gptj": {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_inner": 48, "n_positions": 64, "rotary_dim": 4},
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA | {"query_pre_attn_scalar": 8},
    "gemma3_text": _LLAMA | {"query_pre_attn_scalar": 8},
    "phi": _BERT | {"max_position_embeddings": 64},
    "phi3": _LLAMA,
    "bart": _SEQ2SEQ,
    "mbart": _SEQ2SEQ,
    "t5": _T5,
    "t5/gated": _T5 | {"feed_forward_proj": "gated-gelu"},
    "mt5": _T5,
}


def tiny_backbone(name: str) -> Backbone:
    """A backbone of `SETTINGS` in float64, with parameters that are not near their initial zeros and ones."""
    return made(name).copy()


@functools.cache
def made(name: str, separate: bool = True) -> Backbone:
    """The model that `tiny_backbone` copies; with `separate=False`, layers that are used repeatedly are one module."""
    family = FAMILIES[name.partition("/")[0]]
    torch.manual_seed(0)
    given = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = AutoConfig.for_model(family.name, **given | SETTINGS[name])
    config.use_cache = False
    model = AutoModel.from_config(config, **family.model_options).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    if separate:
        separate_repeated_layers(model, family)
    model.requires_grad_(False)
    return Backbone(name, model, family, "none", HIDDEN, cast(Any, None), "none")


def linear_widths(module: nn.Module) -> tuple[int, int]:
    """D_in and D_out of a linear layer, or of a `Conv1D`, whose weight is (in, out)."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]


def run(model: nn.Module, name: str) -> Tensor:
    """The last hidden states of the model for `IDS`; of an encoder-decoder those of the decoder for `DECODER_IDS`."""
    decoder = {"decoder_input_ids": DECODER_IDS} if len(FAMILIES[name.partition("/")[0]].stacks) > 1 else {}
    states: Tensor = model(input_ids=IDS, attention_mask=MASK, **decoder).last_hidden_state
    return states


SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
# Templates of a text and a pair; the token types are dropped by models without them.
_BERT_LIKE = ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1")
_LLAMA_LIKE = ("<s> $A", "<s> $A <s> $B")
_T5_LIKE = ("$A </s>", "$A </s> $B </s>")
_BARE = ("$A", "$A $B")
TEMPLATES = {
    **dict.fromkeys(("gpt2", "gptj", "qwen2", "qwen3", "phi"), _BARE),
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2", "gemma3_text", "phi3"), _LLAMA_LIKE),
    **dict.fromkeys(("t5", "mt5"), _T5_LIKE),
    "mbart": ("$A </s> <mask>", "$A $B </s> <mask>"),  # the last token is the language
}
WITHOUT_PADDING = ("gpt2", "gptj", "llama", "mistral", "phi")


def save(folder: Path, name: str) -> Path:
    """Save a model of `SETTINGS` in float32, with a tokenizer like that of its family. Returns the folder."""
    family = FAMILIES[name.partition("/")[0]]
    folder.mkdir(parents=True)
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single, pair = TEMPLATES.get(family.name, _BERT_LIKE)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, number) for number, token in enumerate(SPECIAL)]
    )
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    if family.name not in WITHOUT_PADDING:
        named["pad_token"] = "<pad>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **named).save_pretrained(folder)
    model = copy.deepcopy(made(name, separate=False).model).float()
    model.save_pretrained(folder)
    return folder
