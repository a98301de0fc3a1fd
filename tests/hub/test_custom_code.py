"""No code of a backbone runs by default: neither its Python files nor a pickle among its weights."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils
import transformers.utils.hub

from fusion.backbones.load import load_backbone
from fusion.config.commands import EvaluateConfig, PredictConfig
from fusion.config.model import BackboneConfig, SameBackboneConfig
from fusion.errors import UserError
from fusion.hub.tokenizer import load_tokenizer
from fusion.runs.identity import identity
from fusion.runs.inputs import read_used
from fusion.store.lookup import read_manifest
from tests.bench import Bench
from tests.store.conftest import build as make_manifest
from tests.store.conftest import put

CODE = """
from pathlib import Path
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
Path({marker!r}).touch()
class OwnConfig(BertConfig):
    pass
class OwnModel(BertModel):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies such code to a cache before it imports it: not to the user's."""
    for module in (transformers.dynamic_module_utils, transformers.utils.hub):
        if hasattr(module, "HF_MODULES_CACHE"):
            monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


Make = Callable[..., tuple[Path, Path]]


@pytest.fixture
def own_code(tmp_path: Path, tiny_backbone: Path) -> Make:
    """A copy of the tiny backbone with custom code, and the file that this code writes when it runs."""

    def make(model_type: str = "bert", file: str = "config.json", **auto_map: Any) -> tuple[Path, Path]:
        folder, marker = tmp_path / f"own_{model_type}", tmp_path / "ran"
        shutil.copytree(tiny_backbone, folder)
        (folder / "own.py").write_text(CODE.format(marker=str(marker)))
        values = json.loads((folder / file).read_text()) | {"auto_map": auto_map}
        if file == "config.json":
            values |= {"model_type": model_type}
        else:
            values |= {"tokenizer_class": "OwnTokenizer"}
        (folder / file).write_text(json.dumps(values))
        return folder, marker

    return make


def test_a_custom_model_type_is_refused(own_code: Make) -> None:
    folder, marker = own_code("own", AutoConfig="own.OwnConfig", AutoModel="own.OwnModel")
    with pytest.raises(UserError) as error:
        load_backbone(str(folder))
    assert str(error.value) == (
        f"backbone {folder} comes with its own code, which is not run: "
        "set backbone.trust_remote_code=true if you have read it and trust it"
    )
    assert not marker.exists()


def test_a_known_type_is_loaded_without_its_code(
    own_code: Make, caplog: pytest.LogCaptureFixture, tiny_backbone: Path
) -> None:
    folder, marker = own_code(AutoConfig="own.OwnConfig", AutoModel="own.OwnModel")
    with caplog.at_level(logging.WARNING, "fusion"):
        backbone = load_backbone(str(folder))
    assert not marker.exists()
    assert "backbone.trust_remote_code=true would run it" in caplog.text
    plain = load_backbone(str(tiny_backbone)).fingerprint
    assert backbone.fingerprint == plain
    trusted = load_backbone(str(folder), trust_remote_code=True)
    assert marker.exists()
    assert type(trusted.model).__name__ == "OwnModel"
    assert trusted.fingerprint != plain  # the same weights in other hands are another backbone


def test_a_custom_tokenizer(own_code: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder, marker = own_code(file="tokenizer_config.json", AutoTokenizer=["own.OwnTokenizer", "own.OwnTokenizer"])
    with caplog.at_level(logging.WARNING, "fusion"):
        assert load_tokenizer(str(folder)).is_fast
    assert not marker.exists() and "backbone.trust_remote_code=true would run it" in caplog.text
    load_tokenizer(str(folder), trust_remote_code=True)
    assert marker.exists()


def test_a_tokenizer_of_an_unknown_type_is_refused(own_code: Make) -> None:
    folder, marker = own_code("own", AutoConfig="own.OwnConfig", AutoModel="own.OwnModel")
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text()) | {"tokenizer_class": "OwnTokenizer"}
    values["auto_map"] = {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"tokenizer .* set backbone\.trust_remote_code=true"):
        load_tokenizer(str(folder))
    assert not marker.exists()
    load_tokenizer(str(folder), trust_remote_code=True)
    assert marker.exists()


def test_the_key_is_part_of_a_run_only_where_it_is_set(bench: Bench) -> None:
    settings: dict[str, Any] = {"backbone": {"name_or_path": "tiny"}, "seed": 1}
    without = identity(settings)
    settings["backbone"]["trust_remote_code"] = False
    assert identity(settings) == without
    settings["backbone"]["trust_remote_code"] = True
    assert identity(settings) != without
    assert [schema().trust_remote_code for schema in (BackboneConfig, SameBackboneConfig)] == [False, False]
    assert not EvaluateConfig().backbone.trust_remote_code and not PredictConfig().backbone.trust_remote_code


def test_from_training_to_evaluation(bench: Bench, own_code: Make) -> None:
    folder, marker = own_code(AutoConfig="own.OwnConfig", AutoModel="own.OwnModel")
    own = BackboneConfig(str(folder), pooling="mean", trust_remote_code=True)
    bench.stage1("films", backbone=own)
    assert marker.exists()
    assert read_manifest("films", bench.folder / "store").backbone.trust_remote_code is True
    marker.unlink()
    with pytest.raises(UserError, match=r"films: the backbone .* set backbone\.trust_remote_code=true"):
        bench.evaluate("films")
    assert not marker.exists()
    bench.evaluate("films", backbone=SameBackboneConfig(trust_remote_code=True))
    bench.stage1("books")  # without it the manifest is unchanged
    assert "trust_remote_code" not in read_manifest("books", bench.folder / "store").content["backbone"]


def test_an_artifact_cannot_enable_custom_code(tmp_path: Path, tiny_backbone: Path) -> None:
    for trusted in (True, False):
        about = {"trust_remote_code": trusted, "name_or_path": str(tiny_backbone)}
        put(tmp_path / f"films-{trusted}", make_manifest("films", backbone=about))
    config = EvaluateConfig(artifact="films-True", store=str(tmp_path))
    with pytest.raises(UserError, match="trust_remote_code=true"):
        read_used(config)
    config.backbone.trust_remote_code = True
    read_used(config)
    read_used(EvaluateConfig(artifact="films-False", store=str(tmp_path)))


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("trust", [False, True])
def test_a_pickle_among_the_weights(tmp_path: Path, tiny_backbone: Path, trust: bool) -> None:
    folder, marker = tmp_path / "pickled", tmp_path / "ran"
    shutil.copytree(tiny_backbone, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Malicious(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"backbone .*pickled: cannot be loaded") as error:
        load_backbone(str(folder), trust_remote_code=trust)
    assert "backbone.name_or_path=" in str(error.value)
    assert not marker.exists()
    with pytest.raises(Exception, match="weights_only"):  # so that this test has something to refuse
        torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marker.exists()
