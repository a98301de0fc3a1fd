"""A tokenizer and a model that do not belong together are refused before any text is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion.backbones.load import Backbone, load_backbone
from fusion.data.encode import encode
from fusion.data.rows import Rows
from fusion.errors import UserError
from tests.tiny_backbone import save_backbone, save_tokenizer


def edit(path: Path, **values: Any) -> None:
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | values))


@pytest.fixture
def roberta(tmp_path: Path) -> Path:
    return save_backbone(tmp_path / "roberta", "roberta")


def hidden(backbone: Backbone, text: str, length: int, cache: Path) -> torch.Tensor:
    rows = Rows([(text,)], None, None, 0, "f")
    batch = encode(rows, backbone.tokenizer, length, cache).batch([0])
    types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
    output: torch.Tensor = backbone.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, **types
    ).last_hidden_state
    return output


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "electra"])
@pytest.mark.parametrize("limit", ["tokenizer", "model"])
def test_the_longest_sequence_runs_and_one_more_token_is_refused(
    make_backbone: Callable[..., Path], tmp_path: Path, model_type: str, limit: str
) -> None:
    folder = make_backbone(model_type)
    # 80 positions; RoBERTa's first is pad_token_id + 1.
    most = 64 if limit == "tokenizer" else 79 if "roberta" in model_type else 80
    if limit == "model":
        edit(folder / "tokenizer_config.json", model_max_length=10**30)
    backbone = load_backbone(str(folder), max_length=most)
    assert hidden(backbone, "cat " * 200, most, tmp_path / "cache").shape == (1, most, 32)
    with pytest.raises(UserError, match=rf"data\.max_length={most + 1}: [\s\S]*Set data\.max_length={most}"):
        load_backbone(str(folder), max_length=most + 1)


def test_more_padding_ids_leave_fewer_positions(roberta: Path) -> None:
    edit(roberta / "tokenizer_config.json", model_max_length=10**30, pad_token="book")
    edit(roberta / "config.json", pad_token_id=10)
    load_backbone(str(roberta), max_length=69)
    with pytest.raises(UserError, match=r"has only 69 positions \(max_position_embeddings=80, minus padding\)"):
        load_backbone(str(roberta), max_length=70)


def test_roberta_counts_positions_from_the_padding_token(roberta: Path, tmp_path: Path) -> None:
    edit(roberta / "config.json", pad_token_id=1)
    with pytest.raises(UserError, match=r"tokenizer pads with id 0, but the model has pad_token_id=1"):
        load_backbone(str(roberta))
    edit(roberta / "config.json", pad_token_id=None)
    with pytest.raises(UserError, match=r"pad_token_id is null, expected a token id"):
        load_backbone(str(roberta))
    edit(roberta / "config.json", pad_token_id=0)
    config = json.loads((roberta / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (roberta / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"tokenizer pads with id None, but the model has pad_token_id=0"):
        load_backbone(str(roberta))


def test_one_token_type_accepts_a_tokenizer_with_two(tmp_path: Path) -> None:
    """BERT's tokenizer with RoBERTa's weights: its second segment has no embedding."""
    folder = save_backbone(tmp_path / "roberta", "roberta", type_vocab_size=1)
    backbone = load_backbone(str(folder))
    rows = Rows([("the cat", "a dog")], None, None, 0, "f")
    batch = encode(rows, backbone.tokenizer, 16, tmp_path / "cache").batch([0])
    assert batch.token_type_ids is None and batch.input_ids.shape == (1, 7)
    backbone.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    two = load_backbone(str(save_backbone(tmp_path / "two", "roberta")))
    assert encode(rows, two.tokenizer, 16, tmp_path / "cache").batch([0]).token_type_ids is not None


def test_a_token_type_beyond_the_embeddings_is_refused(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "bert")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"]["pair"][-1]["SpecialToken"]["type_id"] = 2
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"returns token type 2, but the model has type_vocab_size=2"):
        load_backbone(str(folder))


def test_a_smaller_vocabulary_is_fine(tmp_path: Path) -> None:
    load_backbone(str(save_backbone(tmp_path / "bert", vocab_size=40)))


def test_a_larger_vocabulary_is_refused_with_the_numbers(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "bert", vocab_size=20)
    with pytest.raises(UserError, match=r"has 29 tokens, .* embeddings for 20: 'no' has id 28, and 8 more ids are too"):
        load_backbone(str(folder))


def test_padding_is_on_the_side_where_it_changes_nothing(tiny_backbone: Path, roberta: Path, tmp_path: Path) -> None:
    """On BERT's left, padding would move the positions of the text, and so its scores, with each batch."""
    folder = tmp_path / "bert"
    shutil.copytree(tiny_backbone, folder)
    for place in (folder, roberta):
        edit(place / "tokenizer_config.json", padding_side="left")
    rows = Rows([("the cat",), ("the very good cat was a book",)], None, None, 0, "f")
    for place, left in ((folder, False), (roberta, True)):
        backbone = load_backbone(str(place))
        encoded = encode(rows, backbone.tokenizer, 16, tmp_path / "cache")
        assert encoded.pads_left == left
        outputs = []
        for indices in ([0], [0, 1]):
            batch = encoded.batch(indices)
            states = backbone.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids
            ).last_hidden_state
            outputs.append(states[0][batch.attention_mask[0].bool()])
        alone, together = outputs
        assert torch.allclose(alone, together, atol=1e-5)


def test_the_pair_is_refused_before_the_weights_are_read(tiny_backbone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(tiny_backbone, folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"data\.max_length=100"):
        load_backbone(str(folder), max_length=100)


def test_a_tokenizer_of_another_model_is_refused(tiny_backbone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(tiny_backbone, folder)
    save_tokenizer(folder, more=["extra"])
    with pytest.raises(UserError, match=r"tokenizer has 30 tokens, but the model has embeddings for 29"):
        load_backbone(str(folder))
