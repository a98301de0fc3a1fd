"""The output of encoder–decoder models against transformers' own models for sequence classification, and LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BartForSequenceClassification,
    MBartForSequenceClassification,
    T5ForSequenceClassification,
)

from fusion.backbones.families import FAMILIES
from fusion.backbones.forward import last_hidden_states
from fusion.backbones.load import load_backbone
from fusion.backbones.tuning import lora
from fusion.errors import UserError
from fusion.layers.heads import pool
from tests.backbones import tiny_models
from tests.backbones.tiny_models import MASK, SETTINGS

IDS = torch.tensor([[2, 7, 8, 9, 3], [2, 10, 3, 0, 0], [2, 11, 12, 3, 0]])


@pytest.mark.parametrize(
    ("name", "model_class"),
    [
        ("bart", BartForSequenceClassification),
        ("mbart", MBartForSequenceClassification),
        ("t5", T5ForSequenceClassification),
    ],
)
def test_the_last_token_of_a_decoder_is_that_of_transformers(name: str, model_class: type, tmp_path: Path) -> None:
    """They pool the decoder's state at the last EOS token, whose id is 3."""
    folder = tiny_models.save(tmp_path / name, name)
    backbone = load_backbone(str(folder))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert isinstance(model, model_class)
    pooled: list[Tensor] = []
    head = cast(Any, model).classification_head
    head.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    with torch.no_grad():
        cast(Any, model)(input_ids=IDS, attention_mask=MASK)
        hidden = last_hidden_states(backbone.model, backbone.family, IDS, MASK)
    torch.testing.assert_close(pool(hidden, MASK, "last"), pooled[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart", "mbart"])
def test_an_encoder_is_that_of_the_whole_model(name: str, tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path / name, name)
    whole, encoder = load_backbone(str(folder)), load_backbone(str(folder), encoder_only=True)
    with torch.no_grad():
        expected = cast(Any, whole.model).encoder(input_ids=IDS, attention_mask=MASK).last_hidden_state
        assert torch.equal(last_hidden_states(encoder.model, encoder.family, IDS, MASK), expected)
    names = {n for n, _ in encoder.model.named_parameters()}
    assert not any(n.startswith("decoder.") for n in names) and encoder.depths == {"encoder": 3}
    assert encoder.fingerprint != whole.fingerprint and whole.depths == {"encoder": 3, "decoder": 3}


def test_padding_on_either_side_gives_the_same_state_of_the_last_token(tmp_path: Path) -> None:
    """Of models with rotary positions, which are relative."""
    left, mask = torch.tensor([[0, 0, 2, 10, 3]]), torch.tensor([[0, 0, 1, 1, 1]])
    for name in ("llama", "gemma3_text", "phi"):
        backbone = load_backbone(str(tiny_models.save(tmp_path / name, name)))
        with torch.no_grad():
            one, two = (
                pool(last_hidden_states(backbone.model, backbone.family, ids, where), where, "last")
                for ids, where in ((left, mask), (IDS[1:2], MASK[1:2]))
            )
        torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


def test_a_padding_token_is_the_end_token_if_there_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    backbone = load_backbone(str(tiny_models.save(tmp_path / "llama", "llama")))
    assert backbone.tokenizer.pad_token == "</s>" and backbone.tokenizer.padding_side == "right"
    assert "its tokenizer has no padding token; </s> is used" in caplog.text


@pytest.mark.parametrize("name", SETTINGS)
def test_lora_changes_the_output_by_the_same_when_merged(name: str) -> None:
    """Also for a matrix that is used by several layers (ALBERT), or stored transposed (GPT-2)."""
    backbone = tiny_models.tiny_backbone(name)
    before = tiny_models.run(backbone.model, name)
    tuning = lora(backbone.model, 2, 4, 0.0, backbone.family.linear_names(["query", "value"]))
    assert torch.equal(tiny_models.run(backbone.model, name), before)
    torch.manual_seed(0)
    for parameter in tuning.parameters.values():
        torch.nn.init.normal_(parameter, std=0.2)
    changed = tiny_models.run(backbone.model, name)
    assert (changed - before).abs().max() > 0.01
    tuning.merge()
    torch.testing.assert_close(tiny_models.run(backbone.model, name), changed, rtol=0, atol=1e-5)
    assert not any("lora" in n for n, _ in backbone.model.named_modules())


def test_albert_has_one_update_per_group_as_in_peft() -> None:
    for name, groups in (("albert", 1), ("albert/groups", 3)):
        backbone = tiny_models.tiny_backbone(name)
        tuning = lora(backbone.model, 2, 4, 0.0, ["query"])
        path = "encoder.albert_layer_groups.{}.albert_layers.0.attention.query.lora_{}.weight"
        assert set(tuning.state()) == {path.format(group, part) for group in range(groups) for part in "AB"}


def test_names_of_linear_layers() -> None:
    for family, targets, expected in (
        ("bert", ["query", "value"], ["query", "value"]),
        ("llama", ["query", "value"], ["q_proj", "v_proj"]),
        ("llama", ["q_proj", "down", "gate"], ["q_proj", "down_proj", "gate_proj"]),
        ("gpt2", ["query", "key", "output"], ["c_attn", "c_proj"]),
        ("t5", ["query", "wo"], ["q", "wo"]),
        ("bart", ["value"], ["v_proj"]),
        ("bert", ["nothing"], ["nothing"]),
    ):
        assert FAMILIES[family].linear_names(targets) == expected
    backbone = tiny_models.tiny_backbone("llama")
    with pytest.raises(
        UserError, match=r"method\.targets=\['nothing'\]: .* no linear layer called nothing; expected some"
    ):
        lora(backbone.model, 2, 4, 0.0, ["nothing"])
