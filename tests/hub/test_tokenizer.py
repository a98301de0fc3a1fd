"""The hash of a tokenizer follows what decides token ids, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors

from fusion.hub.tokenizer import load_tokenizer, tokenizer_hash
from tests.tiny_backbone import save_tokenizer

Change = Callable[[Any], object]
DECISIVE: dict[str, Change] = {
    "normalizer": lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.NFC()),
    "pre-tokenizer": lambda t: setattr(t.backend_tokenizer, "pre_tokenizer", pre_tokenizers.WhitespaceSplit()),
    "post-processor": lambda t: setattr(
        t.backend_tokenizer,
        "post_processor",
        processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)]),
    ),
    "added token": lambda t: t.add_tokens(["newword"]),
    "added special token": lambda t: t.add_tokens(["cat"], special_tokens=True),
    "how a token matches": lambda t: t.add_tokens([AddedToken("newword", single_word=True)]),
    "truncated side": lambda t: setattr(t, "truncation_side", "left"),
    "token types": lambda t: setattr(t, "model_input_names", ["input_ids", "attention_mask"]),
    "split special tokens": lambda t: setattr(t, "split_special_tokens", True),
}
IRRELEVANT: dict[str, Change] = {
    "truncation": lambda t: t("the cat", truncation=True, max_length=2),
    "padding": lambda t: t("the cat", padding="max_length", max_length=12),
    "padding side": lambda t: setattr(t, "padding_side", "left"),
    "length": lambda t: setattr(t, "model_max_length", 7),
    "decoder": lambda t: setattr(t.backend_tokenizer, "decoder", decoders.WordPiece()),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.parametrize("change", DECISIVE)
def test_a_different_tokenization_changes_the_hash(folder: Path, change: str) -> None:
    tokenizer = load_tokenizer(str(folder))
    before = tokenizer_hash(tokenizer)
    DECISIVE[change](tokenizer)
    assert tokenizer_hash(tokenizer) != before


@pytest.mark.parametrize("change", IRRELEVANT)
def test_other_settings_do_not_change_the_hash(folder: Path, change: str) -> None:
    tokenizer = load_tokenizer(str(folder))
    before = tokenizer_hash(tokenizer)
    IRRELEVANT[change](tokenizer)
    assert tokenizer_hash(tokenizer) == before


def test_other_ids_of_the_same_vocabulary_change_the_hash(folder: Path) -> None:
    before = tokenizer_hash(load_tokenizer(str(folder)))
    values = json.loads((folder / "tokenizer.json").read_text())
    words = values["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    assert tokenizer_hash(load_tokenizer(str(folder))) != before


def test_other_bytes_and_a_new_process_give_the_same_hash(folder: Path) -> None:
    """Vocabularies are hash maps with an order of their own in each process."""
    before = tokenizer_hash(load_tokenizer(str(folder)))
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"] = dict(reversed(values["model"]["vocab"].items()))
    (folder / "tokenizer.json").write_text(json.dumps(values, indent=7))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"transformers_version": "9.9"}))
    code = "import sys; from fusion.hub.tokenizer import load_tokenizer, tokenizer_hash; print(tokenizer_hash(load_tokenizer(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert done.stdout.strip() == before, done.stderr
