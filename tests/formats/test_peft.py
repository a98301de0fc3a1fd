"""LoRAs in peft's format: imported and exported with the same outputs and bits, and what cannot be imported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification

from fusion.backbones.forward import last_hidden_states
from fusion.backbones.load import load_backbone
from fusion.config.compositions import CompositionConfig
from fusion.config.methods import MethodConfig
from fusion.errors import UserError
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel
from fusion.model.build import build_composition
from fusion.store.__main__ import main
from fusion.store.artifacts import load
from fusion.store.lookup import names, read_manifest
from tests.backbones import tiny_models
from tests.backbones.tiny_models import HIDDEN, IDS, MASK
from tests.bench import Bench, same

TARGETS = {
    "bert": ["query", "intermediate.dense"],
    "roberta": ["key", "output.dense"],
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "down_proj"],
    "qwen2": ["v_proj", "gate_proj"],
    "t5": ["q", "wo"],
    "gemma3_text": ["o_proj", "up_proj"],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "patterns": {"rank_pattern": {"1.*": 2}, "alpha_pattern": {".*0.*": 9}},
}


def saved_lora(backbone: Path, folder: Path, auto: Any = AutoModel, **options: Any) -> nn.Module:
    """Save a LoRA with random weights with peft. Returns peft's model in evaluation mode."""
    model = get_peft_model(auto.from_pretrained(backbone), LoraConfig(r=3, lora_alpha=5, **options))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return model.eval()


def hidden_of(model: Any, backbone: Path) -> Tensor:
    with torch.no_grad():
        return last_hidden_states(model, load_backbone(str(backbone)).family, IDS, MASK, None)


def imported_states(name: str, store: Path, backbone: Path) -> Tensor:
    """The hidden states of a composition that consists of one imported LoRA."""
    artifact, loaded = load(name, store), load_backbone(str(backbone))
    modules = build_composition(CompositionConfig("mean"), [artifact], loaded)
    model = AdaptedModel(loaded, modules, "input", TaskHead(HIDDEN, 2, dropout=0.0, pooling="mean")).eval()
    with torch.no_grad():
        states = model.hidden_states(IDS, MASK)
        torch.testing.assert_close(model.merged(fold=True).hidden_states(IDS, MASK), states, rtol=1e-4, atol=1e-5)
    assert model.slot_modules() == {}
    return states


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, "plain") for name in TARGETS), *((n, o) for n in ("bert", "gpt2") for o in [*OPTIONS][1:])],
)
def test_round_trip(name: str, options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone, store, folder = tiny_models.save(tmp_path / "backbone", name), tmp_path / "store", tmp_path / "the lora"
    theirs = saved_lora(backbone, folder, target_modules=TARGETS[name], **OPTIONS[options])
    words = ["import", str(folder), "--name", "mine", f"store={store}", f"backbone={backbone}"]
    assert main(words) == 0
    assert f"stored {store / 'mine'}: LoRA at" in capsys.readouterr().out
    expected = hidden_of(theirs.get_base_model(), backbone)  # type: ignore[operator]
    torch.testing.assert_close(imported_states("mine", store, backbone), expected, rtol=1e-4, atol=1e-5)
    assert main(["export", "mine", str(tmp_path / "back"), "--format", "peft", f"store={store}"]) == 0
    before, after = (load_file(one / "adapter_model.safetensors") for one in (folder, tmp_path / "back"))
    assert same(before, after) and len(before) > 0
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(backbone), str(tmp_path / "back")).eval()
    torch.testing.assert_close(hidden_of(loaded.get_base_model(), backbone), expected, rtol=1e-5, atol=1e-6)
    assert (
        main(["import", str(tmp_path / "back"), "name=again", f"store={store}"]) == 0
    )  # its backbone is in its config
    mine, again = (read_manifest(one, store).content["lora"] for one in ("mine", "again"))
    assert {slot: pytest.approx(one) for slot, one in mine.items()} == again


def test_of_a_model_with_a_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The names have the prefix of the backbone, and the head is not imported."""
    backbone, store, folder = tiny_models.save(tmp_path / "backbone", "bert"), tmp_path / "store", tmp_path / "lora"
    theirs: Any = saved_lora(backbone, folder, AutoModelForSequenceClassification, task_type="SEQ_CLS")
    assert main(["import", str(folder), "name=mine", f"store={store}"]) == 0
    shown = capsys.readouterr().out
    assert "not imported: classifier.bias, classifier.weight" in shown and "LoRA at 6 linear layers" in shown
    expected = hidden_of(theirs.get_base_model().bert, backbone)
    torch.testing.assert_close(imported_states("mine", store, backbone), expected, rtol=1e-4, atol=1e-5)
    assert main(["export", "mine", str(tmp_path / "back"), f"store={store}"]) == 0
    before, after = (load_file(one / "adapter_model.safetensors") for one in (folder, tmp_path / "back"))
    assert same({name: value for name, value in before.items() if "lora" in name}, after)
    assert main(["show", "mine", f"store={store}"]) == 0 and "lora" in capsys.readouterr().out
    assert main(["list", f"store={store}"]) == 0 and main(["verify", f"store={store}"]) == 0
    assert main(["import", str(folder), "name=mine", f"store={store}"]) == 2
    assert "mine" in capsys.readouterr().err
    assert main(["import", str(folder), "name=mine", f"store={store}", "overwrite=true"]) == 0


def test_imported_and_trained_loras_are_fused(bench: Bench, tmp_path: Path) -> None:
    saved_lora(bench.backbone, tmp_path / "lora", target_modules=["value", "output.dense"])
    store = bench.folder / "store"
    words = [f"store={store}", f"backbone={bench.backbone}"]
    assert main(["import", str(tmp_path / "lora"), "name=theirs", *words]) == 0
    bench.stage1("films", name="ours", method=MethodConfig("lora", rank=2))
    before = bench.weights("theirs")
    composition = CompositionConfig(rank=4, value_matrix=False, gate="layer")
    result = bench.stage2("plays", ["theirs", "ours"], composition=composition, name="fused")
    assert result["sources"] == ["theirs", "ours"] and same(bench.weights("theirs"), before)
    evaluated = bench.evaluate("fused", split="validation")
    assert evaluated["metrics"]["validation"] == pytest.approx(result["metrics"]["validation"], abs=1e-6)
    for use in (bench.evaluate, lambda name: bench.predict(name, [{"text": "a film"}])):
        with pytest.raises(UserError, match="theirs was imported without a task and a head: use it as a source of"):
            use("theirs")
    assert main(["export", "ours", str(tmp_path / "ours"), f"store={store}"]) == 0
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(bench.backbone), str(tmp_path / "ours")).eval()
    states = hidden_of(model.get_base_model(), bench.backbone)
    torch.testing.assert_close(imported_states("ours", store, bench.backbone), states, rtol=1e-4, atol=1e-5)


def test_pickled_weights_are_read_without_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone, store, folder = tiny_models.save(tmp_path / "backbone", "bert"), tmp_path / "store", tmp_path / "lora"
    saved_lora(backbone, folder, target_modules=["query"])
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    assert main(["import", str(folder), "name=mine", f"store={store}"]) == 0
    torch.save({"a": Evil(tmp_path / "ran")}, folder / "adapter_model.bin")
    assert main(["import", str(folder), "name=other", f"store={store}"]) == 2
    assert "adapter_model.bin cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and names(store) == ["mine"]


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


def setting(**values: Any) -> Change:
    return lambda config, tensors: config.update(values)


def without(part: str) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def replaced(part: str, value: Callable[[Tensor], Tensor], renamed: str = "") -> Change:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if part in name)
        tensors[renamed or name] = value(tensors.pop(name)).contiguous()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting(peft_type="IA3"), "peft_type is IA3; only LORA can be imported"),
        (setting(peft_type=None), "has no peft_type: not an adapter of peft"),
        (setting(init_lora_weights="pissa_niter_4"), "init_lora_weights is pissa_niter_4, which changes the frozen"),
        (setting(init_lora_weights="olora"), "init_lora_weights is olora, which changes the frozen weights"),
        (setting(use_dora=True), "use_dora is not supported, since the update is not a plain LoRA"),
        (setting(layer_replication=[[0, 2]]), "layer_replication is not supported"),
        (setting(bias="lora_only"), "bias is lora_only, so biases of the backbone were trained; expected none"),
        (setting(r=4), "rank 4 of encoder.layer.0.attention.self.query, but its tensors have the shapes (3, 32) and"),
        (setting(rank_pattern={"1.attention.self.query": 5}), "rank 5 of encoder.layer.1.attention.self.query, but"),
        (setting(lora_alpha=0), "lora_alpha is 0, expected a positive number"),
        (without("lora_B"), "encoder.layer.0.attention.self.query needs both lora_A.weight and lora_B.weight"),
        (without("lora"), "has no lora_A and lora_B"),
        (replaced("0.attention.self.query.lora_A", lambda t: t[:, :20]), "sizes 20 and 32, but that of"),
        (replaced("lora_A", lambda t: t * math.nan), "are not finite floating-point numbers"),
        (
            replaced("lora_A", lambda t: t, "base_model.model.encoder.layer.0.attention.self.query.lora_embedding_A"),
            "lora_embedding_A is not supported",
        ),
    ],
)
def test_what_cannot_be_imported(
    change: Change, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone, store, folder = tiny_models.save(tmp_path / "backbone", "bert"), tmp_path / "store", tmp_path / "lora"
    saved_lora(backbone, folder, target_modules=["query"])
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    capsys.readouterr()
    assert main(["import", str(folder), "name=mine", f"store={store}"]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert not store.exists()


def test_other_backbones_and_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone, other = tiny_models.save(tmp_path / "backbone", "bert"), tiny_models.save(tmp_path / "other", "llama")
    store, folder = tmp_path / "store", tmp_path / "lora"
    saved_lora(backbone, folder, target_modules=["query"])

    def error_of(*words: str) -> str:
        capsys.readouterr()
        assert main([*words, f"store={store}"]) == 2
        return capsys.readouterr().err

    lora = str(folder)
    assert f"{other} has no linear layer encoder.layer.0" in error_of("import", lora, "name=a", f"backbone={other}")
    assert "expected name=NAME" in error_of("import", lora)
    assert "name=" in error_of("import", lora, "name=a/b")
    assert "no adapter_config.json" in error_of("import", str(tmp_path), "name=a")
    assert "overwrite=yes: expected true or false" in error_of("import", lora, "name=a", "overwrite=yes")
    assert "expected backbone=NAME" in error_of("import", lora, "name=a", "accept_licence=true")
    assert "format=hub: expected peft" in error_of("export", "a", str(tmp_path / "x"), "format=hub")
    (folder / "adapter_config.json").write_text("{")
    assert "is not valid JSON" in error_of("import", lora, "name=a")
    (folder / "adapter_config.json").write_text(json.dumps({"config": {"architecture": "lora"}, "model_type": "bert"}))
    assert "is that of an adapter of AdapterHub" in error_of("import", lora, "name=a")
    assert not store.exists()
    saved_lora(backbone, tmp_path / "again", target_modules=["query"])
    (tmp_path / "again" / "adapter_model.safetensors").write_bytes(b"abc")
    assert "adapter_model.safetensors cannot be read" in error_of("import", str(tmp_path / "again"), "name=a")
    saved_lora(backbone, tmp_path / "third", target_modules=["query"])
    moved = tiny_models.save(tmp_path / "moved", "bert")
    capsys.readouterr()
    assert main(["import", str(tmp_path / "third"), "name=a", f"store={store}", f"backbone={moved}"]) == 0
    assert f"warning: the LoRA was trained on {backbone}, but is imported for {moved}" in capsys.readouterr().out
    assert "is not empty; expected a new directory" in error_of("export", "a", str(tmp_path / "third"))
