"""Random transformers of a few thousand parameters, with a tokenizer of two dozen words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    ElectraConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "bert": BertConfig,
    "roberta": RobertaConfig,
    "xlm-roberta": XLMRobertaConfig,
    "electra": ElectraConfig,
}
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "film",
    "book",
    "was",
    "is",
    "not",
    "very",
    "good",
    "bad",
    "great",
    "poor",
    "it",
    "i",
    "saw",
    "liked",
    "hated",
    "did",
    "he",
    "she",
    "yes",
    "no",
]


def save_tokenizer(folder: Path, more: Sequence[str] = ()) -> int:
    """A word-level tokenizer with BERT's special tokens; returns the size of its vocabulary.

    Args:
        more: words beside the usual ones.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS, *more])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_backbone(folder: Path, model_type: str = "bert", hidden_size: int = 32, seed: int = 0, **changes: Any) -> Path:
    """A random transformer of the family with its tokenizer: 3 layers, 2 heads; `changes` to its config."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = save_tokenizer(folder)
    values: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden_size,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 80,
        "type_vocab_size": 2,
        "pad_token_id": 0,
    }
    more = {"embedding_size": 16} if model_type == "electra" else {}
    config = CONFIGS[model_type](**values | more | changes)
    torch.manual_seed(seed)
    model = AutoModel.from_config(config)
    with torch.no_grad():  # biases and norms away from 0 and 1, so that a test sees them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder
