"""A backbone that is damaged, incomplete or not a pair with its tokenizer is refused, with the true cause."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusion.backbones.load import load_backbone
from fusion.errors import UserError
from tests.tiny_backbone import save_backbone

Damage = Callable[[Path], object]
WEIGHTS = "model.safetensors"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
DEEP = "[" * 100_000 + "]" * 100_000


def put(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def remove(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def cut(name: str, size: int) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def as_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return damage


def config(**values: Any) -> Damage:
    return edit("config.json", lambda known: known.update(values))


def weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Damage:
    def damage(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def without(name: str) -> Damage:
    return weights(lambda tensors: {key: value for key, value in tensors.items() if key != name})


def with_value(name: str, value: float) -> Damage:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name].view(-1)[3] = value
        return tensors

    return weights(change)


def renamed(prefix: str) -> Damage:
    return weights(lambda tensors: {prefix + key: value for key, value in tensors.items()})


def sharded(change: Callable[[dict[str, str]], object], index: Any = None) -> Damage:
    """Two shards and their index, then changed."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(tensors)
        files = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
        for file, own in files.items():
            save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
        where = {name: file for file, own in files.items() for name in own}
        change(where)
        written = {"metadata": {}, "weight_map": where} if index is None else index
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(written))

    return damage


def pickled(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        change(tensors)
        torch.save(tensors, folder / "pytorch_model.bin")

    return damage


def add_token(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["newword"])
    tokenizer.save_pretrained(folder)


def special_id(values: dict[str, Any]) -> None:
    values["post_processor"]["special_tokens"]["[CLS]"]["ids"] = [77]


def third_type(values: dict[str, Any]) -> None:
    values["post_processor"]["pair"][3]["Sequence"]["type_id"] = 2


def no_unknown(values: dict[str, Any]) -> None:
    values["model"]["unk_token"] = "[GONE]"


BIAS = "encoder.layer.1.output.dense.bias"
NO_JSON = r"config\.json: cannot be read"
FAULTS: dict[str, tuple[Damage, str]] = {
    # config.json
    "config null": (put("config.json", "null"), rf"{NO_JSON} \(expected a JSON object"),
    "config empty": (put("config.json", ""), NO_JSON),
    "config deep": (put("config.json", DEEP), NO_JSON),
    "config not UTF-8": (put("config.json", b'{"a": "\xff"}'), NO_JSON),
    "config truncated": (cut("config.json", 50), NO_JSON),
    "config folder": (as_folder("config.json"), r"the folder has no config\.json"),
    "no type": (put("config.json", "{}"), r"config\.json: model_type is None, expected a string"),
    "type unknown": (config(model_type="nope"), r"has model_type 'nope', which is not supported; supported: bert"),
    "7 heads": (config(num_attention_heads=7), r"hidden size \(32\) is not a multiple of .* heads \(7\)"),
    "size text": (config(hidden_size="abc"), r"'hidden_size' expected int, got str"),
    "size huge": (config(hidden_size=10**12), r"cannot be loaded \(RuntimeError: "),
    "size other": (config(hidden_size=64), r"has shape \[[\d, ]+\], but config\.json expects \["),
    "layers none": (config(num_hidden_layers=0), r"num_hidden_layers is 0, expected 1 to 1000"),
    "layers fewer": (
        config(num_hidden_layers=2),
        r"unexpected keys in the checkpoint: encoder\.layer\.2\.\S+ and 15 more tensors",
    ),
    "layers more": (
        config(num_hidden_layers=4),
        r"missing keys in the checkpoint: encoder\.layer\.3\.\S+ and 15 more tensors",
    ),
    "vocabulary": (config(vocab_size=500), r"word_embeddings\.weight has shape \[29, 32\], .* \[500, 32\]"),
    "types": (
        config(type_vocab_size=0),
        r"token_type_embeddings\.weight has shape \[2, 32\], but config\.json expects \[0, 32\]",
    ),
    "activation": (config(hidden_act="nope"), r"cannot be loaded \(KeyError: 'nope'\)"),
    "eps": (config(layer_norm_eps="x"), r"'layer_norm_eps' expected float"),
    "eps negative": (config(layer_norm_eps=-1.0), r"the forward pass fails \(ValueError: its output is not finite\)"),
    "pad beyond": (config(pad_token_id=500), r"cannot be loaded \(AssertionError: Padding_idx"),
    "decoder": (config(is_decoder=True), r"is_decoder is true, expected false"),
    "quantized": (config(quantization_config={"quant_method": "x"}), r"quantization_config is set"),
    "labels": (config(id2label={"a": "b"}), r"cannot be loaded \(ValueError: invalid literal"),
    # weights
    "no weights": (remove(WEIGHTS), r"has no weights: expected model\.safetensors or pytorch_model\.bin"),
    "weights empty": (put(WEIGHTS, b""), r"model\.safetensors: cannot be read"),
    "weights truncated": (cut(WEIGHTS, 20_000), r"model\.safetensors: cannot be read"),
    "a tensor missing": (without(BIAS), rf"missing keys in the checkpoint: {BIAS}"),
    "foreign prefix": (
        renamed("foo."),
        r"missing keys in the checkpoint: embeddings\.\S+ and 52 more tensors; unexpected keys: foo\.embeddings",
    ),
    "extra tensor": (
        weights(lambda t: t | {"encoder.layer.0.attention.self.distance_embedding.weight": torch.ones(2)}),
        r"unexpected keys in the checkpoint: encoder\.layer\.0\.attention\.self\.distance_embedding\.weight",
    ),
    "a shape": (
        weights(lambda tensors: tensors | {BIAS: torch.zeros(31)}),
        rf"{BIAS} has shape \[31\], but config\.json expects \[32\]",
    ),
    "NaN": (with_value(BIAS, float("nan")), rf"{BIAS} contains NaN or infinite values"),
    "infinite": (with_value(BIAS, float("-inf")), rf"{BIAS} contains NaN or infinite values"),
    "integers": (
        weights(lambda tensors: {name: value.to(torch.int8) for name, value in tensors.items()}),
        r"has dtype I8, expected a float of 16 bits or more",
    ),
    "shard missing": (
        sharded(lambda where: where.update(more="model-00003-of-00003.safetensors")),
        r"cannot be loaded \(.*No such file or directory: .*model-00003-of-00003\.safetensors",
    ),
    "index empty": (sharded(len, index={}), r"cannot be loaded \(KeyError: 'weight_map'"),
    "pickle misses a tensor": (pickled(lambda tensors: tensors.pop(BIAS)), rf"missing keys in the checkpoint: {BIAS}"),
    # the tokenizer
    "no tokenizer": (remove(TOKENIZER, TOKENIZER_CONFIG), r"has no tokenizer: expected tokenizer\.json"),
    "tokenizer null": (put(TOKENIZER, "null"), r"tokenizer \S.* cannot be loaded"),
    "tokenizer {}": (put(TOKENIZER, "{}"), r"tokenizer \S.* cannot be loaded"),
    "tokenizer truncated": (cut(TOKENIZER, 300), r"tokenizer \S.* cannot be loaded"),
    "its config truncated": (cut(TOKENIZER_CONFIG, 30), r"tokenizer \S.* cannot be loaded"),
    "no unknown token": (
        edit(TOKENIZER, no_unknown),
        r"tokenizer .* cannot be loaded \(WordLevel error: Missing \[UNK\] token",
    ),
    # both
    "added token": (add_token, r"tokenizer has 30 tokens, .* embeddings for 29: 'newword' has id 29"),
    "special id": (edit(TOKENIZER, special_id), r"adds a special token with id 77, .* embeddings for 29"),
    "third type": (edit(TOKENIZER, third_type), r"returns token type 2, but the model has type_vocab_size=2"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("whole") / "bert")


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_refused_with_its_cause(whole: Path, tmp_path: Path, fault: str) -> None:
    damage, cause = FAULTS[fault]
    folder = tmp_path / "a füll copy"  # with a space and a letter beyond ASCII
    shutil.copytree(whole, folder)
    damage(folder)
    with pytest.raises(UserError, match=cause) as error:
        load_backbone(str(folder), max_length=16)
    message = str(error.value)
    assert 1 <= len(message.splitlines()) <= 2 and len(message) < 700
    assert "Hub cannot be reached" not in message and "optim.lr" not in message
    assert "backbone" in message and (str(folder) in message)


ACCEPTED: dict[str, Damage] = {
    "as it is": lambda folder: None,
    "with the prefix of a head": renamed("bert."),
    "float16": weights(lambda tensors: {name: value.half() for name, value in tensors.items()}),
    "bfloat16": weights(lambda tensors: {name: value.bfloat16() for name, value in tensors.items()}),
    "no pooler": weights(
        lambda tensors: {name: value for name, value in tensors.items() if not name.startswith("pooler")}
    ),
    "a head": weights(lambda tensors: tensors | {"cls.predictions.bias": torch.zeros(29)}),
    "position ids": weights(lambda tensors: tensors | {"embeddings.position_ids": torch.arange(80)[None]}),
    "old names": weights(
        lambda tensors: {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
            for name, value in tensors.items()
        }
    ),
    "shards": sharded(len),
    "a pickle": pickled(len),
    "unused keys": config(new_key=1, hidden_dropout_prob=0.5),
}


@pytest.mark.parametrize("change", ACCEPTED)
def test_sound_files_are_loaded(whole: Path, tmp_path: Path, change: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    ACCEPTED[change](folder)
    backbone, expected = load_backbone(str(folder), max_length=64), load_backbone(str(whole))
    assert backbone.tokenizer_hash == expected.tokenizer_hash
    if "float16" not in change:
        assert backbone.fingerprint == expected.fingerprint
    else:
        for name, parameter in backbone.model.named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.allclose(parameter, expected.model.get_parameter(name), atol=2e-2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
@pytest.mark.parametrize("name", ["config.json", WEIGHTS, TOKENIZER])
def test_files_without_permission(whole: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    (folder / name).chmod(0)
    with pytest.raises(UserError, match=r"cannot be (read|loaded) .*Permission denied"):
        load_backbone(str(folder))
