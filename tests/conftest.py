"""Small stand-ins of real backbones, made in a temporary folder: no network, no stored weights."""

from __future__ import annotations

import gc
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # refuses at once: no test asks the hub itself

import datasets  # noqa: F401
import hypothesis  # noqa: F401
import pytest
import pytorch_lightning  # noqa: F401
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

if TYPE_CHECKING:
    from tests.bench import Bench

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


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported by now stays, and is not traversed after each job of a sweep


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
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
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


def save_backbone(
    folder: Path, model_type: str = "bert", hidden_size: int = 32, seed: int = 0, **changes: Any
) -> Path:
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


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 3 layers and hidden size 32."""
    return save_backbone(tmp_path_factory.mktemp("backbones") / "tiny bert")


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A program to start in place of `sys.executable`, whose heavy imports are done: see tests/fork_server.py."""
    program = Path(__file__).with_name("fork_server.py")
    with tempfile.TemporaryDirectory(prefix="fork-") as folder:  # a socket's path is short
        socket, script = f"{folder}/socket", Path(folder, "python")
        client = shlex.join([sys.executable, "-IS", str(program), "client", socket])
        script.write_text(f'#!/bin/sh\nWARM_PYTHON={shlex.quote(str(script))} exec {client} "$@"\n')
        script.chmod(0o755)
        with subprocess.Popen(
            [sys.executable, str(program), "server", socket],
            cwd=program.parents[1],
            env=os.environ | {"PYTHONPATH": str(program.parents[1]), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        ) as server:
            assert server.stdout is not None and server.stdin is not None
            assert server.stdout.readline() == b"ready\n"
            yield str(script)
            server.stdin.close()


@pytest.fixture
def warm(warm_python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that a test starts with `sys.executable` have done their imports, and so have their ranks."""
    monkeypatch.setattr(sys, "executable", warm_python)


@pytest.fixture
def make_backbone(tmp_path: Path) -> Callable[..., Path]:
    """`make_backbone("roberta", hidden_size=48, seed=1)` gives the folder of another one."""
    return lambda model_type="bert", **options: save_backbone(
        tmp_path / f"{model_type}", model_type, **options
    )


@pytest.fixture
def bench(tmp_path: Path, tiny_backbone: Path) -> Bench:
    """The commands on a tiny backbone and tiny tasks."""
    from tests.bench import Bench

    return Bench(tmp_path / "a folder", tiny_backbone)
