"""What is given as an artifact and is none: its format is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion.errors import UserError
from fusion.store.foreign import why_no_artifact
from fusion.store.lookup import find


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"adapter_config.json": {"peft_type": "LORA"}, "adapter_model.safetensors": None},
            "a peft adapter (LORA)",
        ),
        (
            {"adapter_config.json": {"config": {"mh_adapter": True}}, "pytorch_adapter.bin": None},
            "AdapterHub",
        ),
        ({"head_config.json": {}}, "a prediction head of AdapterHub's adapters"),
        ({"modules.json": [], "config.json": {"model_type": "bert"}}, "a sentence-transformers model"),
        ({"config.json": {"model_type": "gpt2"}}, "backbone.name_or_path= takes one"),
        ({"epoch=1.ckpt": None}, "Lightning checkpoints"),
        ({"weights.safetensors": None}, "has lost its manifest.json"),
        ({"adapter_config.json": None}, "an adapter of peft or AdapterHub"),
        ({}, "this folder is no artifact"),
    ],
)
def test_a_folder(tmp_path: Path, files: dict[str, object], said: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text("" if content is None else json.dumps(content))
    assert said in why_no_artifact(tmp_path)
    with pytest.raises(UserError) as refused:
        find(str(tmp_path), tmp_path)
    assert said in str(refused.value) and len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "said"), [("last.ckpt", "a Lightning checkpoint"), ("x.gguf", "a GGUF model")]
)
def test_a_file(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).touch()
    assert said in why_no_artifact(tmp_path / name)


def test_what_is_hostile(tmp_path: Path) -> None:
    """A config that is not JSON, huge or nested, and a kind with escape characters."""
    for content in ("{", "[" * 100_000, " " * 2**21, json.dumps({"peft_type": "\x1b[31m" * 20})):
        (tmp_path / "adapter_config.json").write_text(content)
        assert why_no_artifact(tmp_path).isprintable()
