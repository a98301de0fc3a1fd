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


def as_pipe(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def as_broken_link(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("nowhere")

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
FAULTS: dict[str, tuple[Damage, str]] = {
    # config.json
    "config null": (put("config.json", "null"), r"config\.json: expected a JSON object, found null"),
    "config list": (put("config.json", "[]"), r"config\.json: expected a JSON object, found a list"),
    "config number": (put("config.json", "3"), r"config\.json: expected a JSON object, found a number"),
    "config empty": (put("config.json", ""), r"config\.json: is not valid JSON \(the file is empty\)"),
    "config deep": (put("config.json", DEEP), r"config\.json: is not valid JSON \(nested too deeply\)"),
    "config NUL": (put("config.json", "\0{}"), r"config\.json: is not valid JSON"),
    "config no text": (put("config.json", b'{"a": "\xff"}'), r"config\.json: is not valid JSON"),
    "config cut": (cut("config.json", 50), r"config\.json: is not valid JSON"),
    "config long number": (put("config.json", f'{{"a": {"9" * 5000}}}'), r"config\.json: is not valid JSON"),
    "config folder": (as_folder("config.json"), r"config\.json: expected a regular file"),
    "config pipe": (as_pipe("config.json"), r"config\.json: expected a regular file"),
    "config link": (as_broken_link("config.json"), r"config\.json: cannot be read \(No such file"),
    "no type": (put("config.json", "{}"), r"config\.json: model_type is null, expected a string"),
    "type number": (config(model_type=3), r"config\.json: model_type is 3, expected a string"),
    "type unknown": (config(model_type="nope"), r"of type 'nope', which is not supported; supported: bert"),
    "type unsupported": (config(model_type="gpt2"), r"of type 'gpt2', which is not supported"),
    "7 heads": (
        config(num_attention_heads=7),
        r"num_attention_heads is 7, expected a divisor of hidden_size=32",
    ),
    "size text": (config(hidden_size="abc"), r'hidden_size is "abc", expected a whole number'),
    "size float": (config(hidden_size=32.0), r"hidden_size is 32\.0, expected a whole number"),
    "size huge": (
        config(hidden_size=10**12),
        r"hidden_size is 1000000000000, expected a whole number from 1",
    ),
    "size other": (config(hidden_size=64), r"has shape \[32\], and config\.json asks for \[64\]"),
    "size large": (
        config(hidden_size=10**7),
        r"has shape \[32\], and config\.json asks for \[10000000\]",
    ),
    "layers negative": (config(num_hidden_layers=-1), r"num_hidden_layers is -1, expected a whole number"),
    "layers true": (config(num_hidden_layers=True), r"num_hidden_layers is true, expected a whole number"),
    "layers none": (config(num_hidden_layers=0), r"num_hidden_layers is 0, expected a whole number from 1"),
    "layers many": (config(num_hidden_layers=900), r"num_hidden_layers=900, and the weights have 3 layers"),
    "layers huge": (config(num_hidden_layers=10**9), r"num_hidden_layers is 1000000000, expected"),
    "layers fewer": (config(num_hidden_layers=2), r"num_hidden_layers=2, and the weights have 3 layers"),
    "vocabulary": (config(vocab_size=500), r"word_embeddings\.weight has shape \[29, 32\], .* \[500, 32\]"),
    "positions": (
        config(max_position_embeddings=10**7),
        r"has shape \[80, 32\], .* asks for \[10000000, 32\]",
    ),
    "types": (config(type_vocab_size=0), r"type_vocab_size is 0, expected a whole number"),
    "activation": (config(hidden_act="nope"), r"hidden_act is \"nope\", expected one of"),
    "eps": (config(layer_norm_eps="x"), r'layer_norm_eps is "x", expected a number'),
    "eps negative": (config(layer_norm_eps=-1.0), r"layer_norm_eps is -1\.0, expected a number"),
    "pad beyond": (config(pad_token_id=500), r"pad_token_id is 500, expected a token id below vocab_size=29"),
    "decoder": (config(is_decoder=True), r"is_decoder is true, expected false"),
    "quantized": (config(quantization_config={"quant_method": "x"}), r"quantization_config is set"),
    "labels": (config(id2label={"a": "b"}), r"config\.json: cannot be loaded \(invalid literal"),
    # weights
    "no weights": (remove(WEIGHTS), r"has no weights: expected model\.safetensors or pytorch_model\.bin"),
    "weights empty": (put(WEIGHTS, b""), r"model\.safetensors: cannot be read"),
    "weights cut": (cut(WEIGHTS, 20_000), r"model\.safetensors: cannot be read"),
    "header cut": (cut(WEIGHTS, 100), r"model\.safetensors: cannot be read"),
    "weights text": (
        put(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"),
        r"model\.safetensors: cannot be",
    ),
    "weights folder": (as_folder(WEIGHTS), r"model\.safetensors: expected a regular file"),
    "weights link": (as_broken_link(WEIGHTS), r"model\.safetensors: cannot be read \(No such file"),
    "a tensor missing": (without(BIAS), rf"its weights lack {BIAS}"),
    "embeddings missing": (
        without("embeddings.word_embeddings.weight"),
        r"lack embeddings\.word_embeddings\.weight",
    ),
    "foreign prefix": (renamed("foo."), r"named foo\.embeddings\.\S+ where embeddings\.\S+ was expected"),
    "more prefix": (
        renamed("model.bert."),
        r"named model\.bert\.embeddings\.\S+ where embeddings\.\S+ was expected",
    ),
    "extra tensor": (
        weights(
            lambda tensors: (
                tensors | {"encoder.layer.0.attention.self.distance_embedding.weight": torch.ones(2)}
            )
        ),
        r"its weights hold encoder\.layer\.0\.attention\.self\.distance_embedding\.weight, which the model",
    ),
    "a shape": (
        weights(lambda tensors: tensors | {BIAS: torch.zeros(31)}),
        rf"{BIAS} has shape \[31\], and config\.json asks for \[32\]",
    ),
    "NaN": (with_value(BIAS, float("nan")), rf"{BIAS} holds NaN or infinite values"),
    "infinite": (with_value(BIAS, float("-inf")), rf"{BIAS} holds NaN or infinite values"),
    "float64 overflow": (
        weights(lambda tensors: tensors | {BIAS: torch.full((32,), 1e300, dtype=torch.float64)}),
        rf"{BIAS} holds NaN or infinite values",
    ),
    "whole numbers": (
        weights(lambda tensors: {name: value.to(torch.int8) for name, value in tensors.items()}),
        r"is of type I8, expected a float of 16 bits or more",
    ),
    "shard missing": (
        sharded(lambda where: where.update(more="model-00003-of-00003.safetensors")),
        r"index\.json: names model-00003-of-00003\.safetensors, which is missing \(1 of 3 files",
    ),
    "index empty": (sharded(len, index={}), r"index\.json: weight_map is no object"),
    "index list": (sharded(len, index=[]), r"index\.json: expected a JSON object, found a list"),
    "pickle misses a tensor": (pickled(lambda tensors: tensors.pop(BIAS)), rf"its weights lack {BIAS}"),
    "pickle with a shape": (
        pickled(lambda tensors: tensors.update({BIAS: torch.zeros(31)})),
        r"cannot be read",
    ),
    # the tokenizer
    "no tokenizer": (remove(TOKENIZER, TOKENIZER_CONFIG), r"has no tokenizer: expected tokenizer\.json"),
    "no vocabulary": (remove(TOKENIZER), r"has no tokenizer: expected tokenizer\.json"),
    "tokenizer null": (put(TOKENIZER, "null"), r"tokenizer\.json: expected a JSON object, found null"),
    "tokenizer {}": (put(TOKENIZER, "{}"), r"tokenizer \S.* cannot be loaded"),
    "tokenizer empty": (put(TOKENIZER, ""), r"tokenizer\.json: is not valid JSON \(the file is empty\)"),
    "tokenizer NUL": (put(TOKENIZER, "\0{}"), r"tokenizer\.json: is not valid JSON"),
    "tokenizer deep": (put(TOKENIZER, DEEP), r"tokenizer\.json: is not valid JSON \(nested too deeply\)"),
    "tokenizer cut": (cut(TOKENIZER, 300), r"tokenizer\.json: is not valid JSON"),
    "tokenizer folder": (as_folder(TOKENIZER), r"tokenizer\.json: expected a regular file"),
    "its config null": (put(TOKENIZER_CONFIG, "null"), r"tokenizer_config\.json: expected a JSON object"),
    "its config cut": (cut(TOKENIZER_CONFIG, 30), r"tokenizer_config\.json: is not valid JSON"),
    "its config deep": (put(TOKENIZER_CONFIG, DEEP), r"tokenizer_config\.json: is not valid JSON"),
    "no unknown token": (edit(TOKENIZER, no_unknown), r"cannot tokenize text outside its vocabulary"),
    # both
    "added token": (add_token, r"tokenizer has 30 tokens, .* embeddings for 29: 'newword' has id 29"),
    "special id": (edit(TOKENIZER, special_id), r"adds a special token with id 77, .* embeddings for 29"),
    "third type": (edit(TOKENIZER, third_type), r"gives token type 2, and the model has type_vocab_size=2"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("whole") / "bert")


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_refused_by_its_own_name(whole: Path, tmp_path: Path, fault: str) -> None:
    damage, cause = FAULTS[fault]
    folder = tmp_path / "a füll copy"  # names with blanks and letters beyond ASCII are fine
    shutil.copytree(whole, folder)
    damage(folder)
    with pytest.raises(UserError, match=cause) as error:
        load_backbone(str(folder), max_length=16)
    message = str(error.value)
    assert 1 <= len(message.splitlines()) <= 2 and len(message) < 700
    assert "hub cannot be reached" not in message and "optim.lr" not in message
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
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): value
            for name, value in tensors.items()
        }
    ),
    "shards": sharded(len),
    "a pickle": pickled(len),
    "unused keys": config(new_key=1, hidden_dropout_prob=0.5),
}


@pytest.mark.parametrize("change", ACCEPTED)
def test_what_is_whole_is_loaded(whole: Path, tmp_path: Path, change: str) -> None:
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
    with pytest.raises(UserError, match=rf"{name}: cannot be read \(Permission denied\)"):
        load_backbone(str(folder))
