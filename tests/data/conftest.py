"""Small data folders and tokenizers, made in a temporary folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fusion.config.data import DataConfig
from fusion.config.task import TaskConfig
from fusion.tasks.task import HubConfig

Records = list[dict[str, Any]]


def make_task(**changes: Any) -> TaskConfig:
    """A task `pets` of one text column and two labels; `changes` replaces fields."""
    fields: dict[str, Any] = {
        "name": "pets",
        "kind": "classification",
        "text": "text",
        "labels": ["cat", "dog"],
        "metrics": ["accuracy"],
        **changes,
    }
    if isinstance(fields.get("hub"), dict):
        fields["hub"] = HubConfig(**fields["hub"])
    if fields["kind"] == "regression":
        fields["labels"], fields["metrics"] = None, ["pearson"]
    if fields["kind"] == "choice":
        fields["labels"] = None
    return TaskConfig(**fields)


@pytest.fixture
def task() -> Callable[..., TaskConfig]:
    return make_task


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., DataConfig]:
    """`write("train.jsonl", records)` puts a file into the folder of `pets`; gives the settings that read it."""

    def put(name: str, content: Records | str | bytes, folder: str = "pets") -> DataConfig:
        path = tmp_path / "data" / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
        else:
            path.write_text("".join(json.dumps(record) + "\n" for record in content), encoding="utf-8")
        return DataConfig(dir=str(tmp_path / "data"))

    return put


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    return make_tokenizer(tmp_path / "tokenizer", types=True)


@pytest.fixture
def tokenizer_without_types(tmp_path: Path) -> PreTrainedTokenizerBase:
    return make_tokenizer(tmp_path / "tokenizer without types", types=False)


def make_tokenizer(folder: Path, types: bool, model_max_length: int = 64) -> PreTrainedTokenizerBase:
    """One token a character; pads with 7, so that no test takes padding for zeros. Saved in `folder`."""
    from fusion.hub.tokenizer import load_tokenizer

    characters = {character: number for number, character in enumerate(map(chr, range(32, 127)), start=10)}
    backend = Tokenizer(models.WordLevel({"[CLS]": 5, "[SEP]": 6, "[PAD]": 7, "[UNK]": 8, **characters}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 5), ("[SEP]", 6)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=model_max_length,
        model_input_names=names,
    ).save_pretrained(folder)
    return load_tokenizer(str(folder))
