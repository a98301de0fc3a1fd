"""A backbone with random weights in a given shape, for measurements of sizes whose weights are not at hand."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from fusion.backbones.load import Backbone

HEAD_SIZE = 64
VOCABULARY = 8000  # of models without a template


def save_random_backbone(template: Path, layers: int, hidden_size: int, folder: Path) -> Path:
    """Save a model with heads of size 64 and feed-forward layers four times as wide as the model.

    Everything else, such as its class and the tokenizer, is that of the template.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(template, trust_remote_code=False)
    config.num_hidden_layers, config.hidden_size = layers, hidden_size
    config.num_attention_heads, config.intermediate_size = hidden_size // HEAD_SIZE, 4 * hidden_size
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        AutoModel.from_config(config, trust_remote_code=False).save_pretrained(folder)
    for path in template.iterdir():
        if path.is_file() and path.suffix in (".json", ".txt", ".model") and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    return folder


def model_settings(model_type: str, layers: int, hidden_size: int) -> dict[str, Any]:
    """Return the config values of a model with heads of size 64 and feed-forward layers four times as wide."""
    heads, wide = hidden_size // HEAD_SIZE, 4 * hidden_size
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if model_type in ("gpt2", "gptj"):
        sizes = {"n_embd": hidden_size, "n_layer": layers, "n_head": heads, "n_inner": wide}
        return common | sizes | ({"rotary_dim": HEAD_SIZE} if model_type == "gptj" else {})
    if model_type == "distilbert":
        return common | {"dim": hidden_size, "n_layers": layers, "n_heads": heads, "hidden_dim": wide}
    if model_type in ("t5", "mt5"):
        sizes = {"d_model": hidden_size, "num_layers": layers, "num_heads": heads, "d_kv": HEAD_SIZE, "d_ff": wide}
        return common | sizes | {"decoder_start_token_id": 0}
    if model_type in ("bart", "mbart"):
        sizes = {"layers": layers, "attention_heads": heads, "ffn_dim": wide}
        both = {f"{stack}_{key}": size for stack in ("encoder", "decoder") for key, size in sizes.items()}
        return common | {"d_model": hidden_size} | both
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes["intermediate_size"] = wide
    if model_type in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"):
        sizes |= {"head_dim": HEAD_SIZE, "num_key_value_heads": max(1, heads // 4)}
    if model_type in ("gemma2", "gemma3_text"):
        sizes["query_pre_attn_scalar"] = HEAD_SIZE
    if model_type == "albert":
        sizes["embedding_size"] = 128
    return common | sizes


def random_model(model_type: str, settings: Mapping[str, Any], dtype: str) -> Backbone:
    """Return a backbone with random weights, without a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModel

    from fusion.backbones.families import FAMILIES
    from fusion.backbones.load import Backbone, separate_repeated_layers, use_half_precision

    family = FAMILIES[model_type]
    config = AutoConfig.for_model(model_type, **settings)
    config.use_cache = False
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = (
            AutoModel.from_config(config, trust_remote_code=False, **family.model_options).eval().requires_grad_(False)
        )
    if dtype != "float32":
        model.to(getattr(torch, dtype))
        use_half_precision(model, dtype)
    separate_repeated_layers(model, family)
    return Backbone(model_type, model, family, "", config.hidden_size, cast(Any, None), "")
