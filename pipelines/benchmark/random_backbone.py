"""A backbone with random weights in a given shape, for measurements of sizes whose weights are not at hand."""

from __future__ import annotations

import shutil
from pathlib import Path

HEAD_SIZE = 64


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
