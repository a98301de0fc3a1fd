"""Every model family through the commands: both stages, two placements, LoRA and the other methods, and evaluation."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion.backbones.families import FAMILIES
from fusion.backbones.load import load_backbone
from fusion.config.data import LimitConfig
from fusion.config.methods import MethodConfig
from fusion.config.model import AdapterConfig, BackboneConfig
from fusion.config.stages import Stage1Config
from fusion.errors import UserError
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel
from fusion.model.build import stored_model
from fusion.store.artifacts import load
from tests.backbones import tiny_models
from tests.backbones.tiny_models import HIDDEN, IDS, LAYERS, MASK, SETTINGS
from tests.bench import Bench, add_callback, quiz_row, rating_row, rows_of, same, trainer_config, write_rows
from tests.tasks.test_multi_label_stages import moods_row, moods_task
from tests.tasks.test_tagging_stages import write as write_nouns
from tests.test_resume import Cut

PLACEMENTS = {
    "pfeiffer": AdapterConfig(),
    "houlsby": AdapterConfig("houlsby", sites=["attention", "feedforward"], reads="output", nonlinearity="silu"),
    "parallel": AdapterConfig("parallel", reads="input", scaling=4.0, init="zero_up", reduction_factor=2),
}
PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")
WITHOUT_BIASES = {"modernbert", "llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "t5", "mt5"}
# The linear layers that LoRA changes by default.
TARGETS = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "albert"), ("query", "value")),
    **dict.fromkeys(("mpnet", "t5", "mt5"), ("q", "v")),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "modernbert": ("Wqkv",),
    "gpt2": ("c_attn",),
    "phi3": ("qkv_proj",),
}


def family_name(name: str) -> str:
    return name.partition("/")[0]


def small(bench: Bench, **backbone: Any) -> dict[str, Any]:
    """Settings of a run of an epoch of 16 examples."""
    bench.data.limit = LimitConfig(train=16)
    return {
        "backbone": BackboneConfig(name_or_path=str(bench.backbone), **backbone),
        "trainer": trainer_config(max_epochs=1),
    }


def slots_of(name: str, sites: tuple[str, ...]) -> list[str]:
    stacks = FAMILIES[family_name(name)].stacks
    prefixes = [f"{stack}.{layer}" if stack else f"{layer}" for stack in stacks for layer in range(LAYERS)]
    return [f"{prefix}.{site}" for prefix in prefixes for site in sites]


@pytest.fixture
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Bench:
    """The commands on a tiny model of the family."""
    return Bench(tmp_path / "a folder", tiny_models.save(tmp_path / "backbone", request.getfixturevalue("name")))


@pytest.mark.parametrize("name", FAMILIES)
def test_both_stages(name: str, place: Bench) -> None:
    shared = small(place)
    for placement, reads in (("pfeiffer", "normed"), ("houlsby", "output")):
        adapter, source = PLACEMENTS[placement], f"films-{placement}"
        place.stage1("films", adapter=adapter, name=source, **shared)
        fused = place.stage2("plays", [source], name=placement, **shared)
        slots = slots_of(name, tuple(adapter.sites))
        assert set(place.weights(source)) == {f"{slot}.{part}" for slot in slots for part in PARTS}
        fusion = ("key.weight", "key.bias", "query.weight", "query.bias", "value.weight")
        assert set(place.weights(placement)) == {f"{slot}.{part}" for slot in slots for part in fusion}
        assert place.evaluate(placement, split="validation")["metrics"] == fused["metrics"]
        manifest = load(source, place.folder / "store").manifest
        assert manifest.placement["adapter.reads"] == reads and list(manifest.bottleneck_sizes) == slots
        assert manifest.backbone.family == name and manifest.backbone.layers == LAYERS


@pytest.mark.parametrize("name", FAMILIES)
def test_every_method(name: str, place: Bench) -> None:
    shared = small(place)
    trained = place.stage1("films", method=MethodConfig("lora", rank=2), name="lora", **shared)
    assert place.evaluate("lora", split="validation")["metrics"] == trained["metrics"]
    artifact = load("lora", place.folder / "store")
    targets = TARGETS.get(name, ("q_proj", "v_proj"))
    assert artifact.manifest.method is not None and tuple(artifact.manifest.method.targets) == targets
    modules = {key.rpartition(".lora_")[0].rpartition(".")[2] for key in artifact.weights}
    assert modules == set(targets)
    place.stage1("films", method=MethodConfig("full"), name="full", **shared)
    if name in WITHOUT_BIASES:
        with pytest.raises(UserError, match="the backbone has no bias terms"):
            place.stage1("films", method=MethodConfig("bitfit"), **shared)
    else:
        place.stage1("films", method=MethodConfig("bitfit"), name="bitfit", **shared)
        assert all(key.endswith(".bias") for key in place.weights("bitfit"))


def test_the_other_commands(tmp_path: Path) -> None:
    """Prediction, inspection and ranking, for a decoder and an encoder–decoder model."""
    rows = [{"text": "a good film"}, {"text": "a bad book"}]
    for name in ("llama", "t5"):
        bench = Bench(tmp_path / name, tiny_models.save(tmp_path / f"{name} backbone", name))
        shared, backbone = small(bench), BackboneConfig(name_or_path=str(bench.backbone))
        adapter = PLACEMENTS["houlsby"]
        for source in ("films", "books"):
            bench.stage1(source, adapter=adapter, **shared)
        bench.stage2("plays", ["films", "books"], **shared)
        slots = slots_of(name, ("attention", "feedforward"))
        (line, _) = bench.predict("plays-adapterfusion", rows, attention=True)
        assert list(line["attention"]) == slots and set(line["attention"][slots[0]]) == {"films", "books"}
        _, inspected = bench.inspect("plays-adapterfusion", data=bench.data, words=2)
        assert slots[-1] in str(inspected)
        ranked = bench.rank("plays", backbone=backbone)
        assert {row["name"] for row in ranked["sources"]} == {"films", "books"}


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_every_kind_of_task(name: str, place: Bench) -> None:
    """Regression, multiple choice, several labels and tags, on decoders and encoder–decoder models."""
    draw = random.Random(0)
    place.add_rating()
    place.add_quiz()
    write_rows(place.folder / "data" / "moods", rows_of(moods_row))
    place.tasks["moods"] = moods_task()
    place.tasks["nouns"] = write_nouns(place.folder / "data" / "nouns")
    shared = small(place)
    place.stage1("films", **shared)
    rows = {
        "rating": rating_row(draw),
        "quiz": quiz_row(draw),
        "moods": moods_row(draw),
        "nouns": {"tokens": ["The", "cat"]},
    }
    for task, row in rows.items():
        place.stage1(task, **shared)
        fused = place.stage2(task, [task, "films"], **shared)
        evaluated = place.evaluate(f"{task}-adapterfusion", split="validation")["metrics"]["validation"]
        assert evaluated == pytest.approx(fused["metrics"]["validation"], abs=1e-5)  # merged matrices: rounding
        (line,) = place.predict(f"{task}-adapterfusion", [row])
        assert set(line) == PREDICTED[task]
        pooling = load(task, place.folder / "store").manifest.head.pooling
        assert pooling == ("words" if task == "nouns" else "last")


PREDICTED = {  # the keys of a prediction
    "rating": {"score"},
    "quiz": {"label", "scores"},
    "moods": {"labels", "scores"},
    "nouns": {"labels", "scores"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_tensor_of_the_backbone_is_frozen(name: str) -> None:
    """Tied embeddings, shared layers and rotary tables as well, by all of their names."""
    backbone = tiny_models.tiny_backbone(name)
    slot = slots_of(name, ("feedforward",))[0]
    model = AdaptedModel(backbone, {slot: BottleneckAdapter(HIDDEN, 4).double()}, "output", TaskHead(HIDDEN, 2))
    expected = {f"backbone.{n}" for n, _ in backbone.model.named_parameters(remove_duplicate=False)}
    expected |= {f"backbone.{n}" for n, _ in backbone.model.named_buffers(remove_duplicate=False)}
    assert set(model.frozen()) == set(model.frozen_hashes()) == expected


@pytest.mark.parametrize("name", SETTINGS)
def test_the_fingerprint_depends_on_every_setting_that_changes_the_output(name: str) -> None:
    """A config value that changes the output of the same weights is in `Family.architecture`."""
    from transformers import AutoConfig, AutoModel

    family = FAMILIES[family_name(name)]
    backbone = tiny_models.made(name, separate=False)
    expected = tiny_models.run(backbone.model, name)
    config = backbone.model.config
    assert set(family.architecture) - OPTIONAL <= {*config.to_dict(), *dir(config)}

    def states_with(**changes: Any) -> Tensor:
        values = {key: value for key, value in (config.to_dict() | changes).items() if key != "model_type"}
        model = AutoModel.from_config(AutoConfig.for_model(family.name, **values), **family.model_options)
        model.double().eval().requires_grad_(False).load_state_dict(backbone.model.state_dict())
        return tiny_models.run(model, name)

    assert states_with().allclose(expected, rtol=0, atol=1e-12)
    missed = []
    for key, value in config.to_dict().items():
        if key in family.architecture or key in IRRELEVANT:
            continue
        for other in others_than(value):
            try:
                changed = not states_with(**{key: other}).allclose(expected, rtol=0, atol=1e-9)
            except Exception:  # not a valid config, or one with other tensors
                continue
            missed += [(key, other)] if changed else []
    assert missed == []


# Set in config.json of some models only.
OPTIONAL = {
    *("position_buckets", "share_att_key", "norm_rel_ebd", "attention_head_size", "embedding_size"),
    *("conv_kernel_size", "conv_groups", "conv_act", "type_vocab_size", "decoder_start_token_id"),
}
# Not of the backbone itself, or only one value is accepted when it is loaded.
IRRELEVANT = {*("output_hidden_states", "output_attentions", "return_dict", "use_cache", "dtype"), "is_decoder"}


def others_than(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [1, 2, value + 1, value * 2]
    if isinstance(value, float):
        return [value * 2 + 0.1]
    if isinstance(value, str):
        return ["relu", "gated-silu"]
    if isinstance(value, list):
        return [value[1:] + value[:1]]
    if isinstance(value, dict):
        return [value | {key: other} for key, inner in value.items() for other in others_than(inner)]
    return [True, 2, 0.3]


@pytest.mark.parametrize("name", ["t5", "bart", "mbart"])
def test_an_encoder_alone_and_adapters_in_one_stack(name: str, place: Bench) -> None:
    shared = small(place, encoder_only=True)
    place.stage1("films", **shared)
    assert {key.partition(".")[0] for key in place.weights("films")} == {"encoder"}
    place.stage1("books", **shared)
    fused = place.stage2("plays", ["films", "books"], **shared)
    assert place.evaluate("plays-adapterfusion", split="validation")["metrics"] == fused["metrics"]
    manifest = load("plays-adapterfusion", place.folder / "store").manifest
    assert manifest.backbone.stacks == {"encoder": LAYERS} and manifest.backbone.encoder_only
    assert manifest.head.pooling == ("mean" if name == "t5" else "cls")
    whole = small(place)
    decoder = AdapterConfig(sites=["cross_attention"], stacks=["decoder"], reads="output")
    result = place.stage1("films", adapter=decoder, name="decoder", **whole)
    assert {key.rpartition(".")[0].rpartition(".")[0] for key in place.weights("decoder")} == {
        f"decoder.{layer}.cross_attention" for layer in range(LAYERS)
    }
    assert place.evaluate("decoder", split="validation")["metrics"] == result["metrics"]
    assert load("decoder", place.folder / "store").manifest.head.pooling == "last"
    with pytest.raises(UserError, match=r"films was trained on .* fingerprint"):
        place.stage2("plays", ["films"], name="mixed", **whole)


@pytest.mark.parametrize("name", ["gpt2", "phi", "gemma3_text", "t5", "albert", "deberta-v2"])
def test_a_killed_run_is_resumed_with_the_same_bits(name: str, place: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each block layout, with dropout in adapter and head."""
    shared = small(place) | {"adapter": AdapterConfig(dropout=0.2), "trainer": trainer_config(max_epochs=2)}
    place.stage1("films", name="whole", **shared)
    with monkeypatch.context() as patch:
        add_callback(patch, Cut("end", 1, 0))
        with pytest.raises(RuntimeError, match="the power went"):
            place.stage1("films", name="killed", **shared)
    place.stage1("films", name="killed", **shared)
    assert same(place.weights("killed"), place.weights("whole"))


def test_the_attention_of_a_single_slot_of_a_decoder_has_its_address(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "work", tiny_models.save(tmp_path / "backbone", "t5"))
    shared = small(bench)
    for source in ("films", "books"):
        bench.stage1(source, adapter=AdapterConfig(stacks=["decoder"], layers=[2]), **shared)
    bench.stage2("plays", ["films", "books"], **shared)
    (line,) = bench.predict("plays-adapterfusion", [{"text": "a good film"}], attention=True)
    assert set(line["attention"]) == {"decoder.2.feedforward"}


def test_what_a_family_does_not_have_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "work", tiny_models.save(tmp_path / "backbone", "llama"))
    for settings, message in (
        ({"backbone": {"encoder_only": True}}, r"encoder_only=true: .* \(llama\) has a single stack"),
        ({"backbone": {"pooling": "cls"}}, r"backbone\.pooling=cls: the first token .* expected last or mean"),
        ({"adapter": AdapterConfig(sites=["cross_attention"], reads="output")}, "has no site cross_attention"),
        ({"adapter": AdapterConfig(stacks=["encoder"])}, r"adapter\.stacks=\['encoder'\]: .* but a single stack"),
        (
            {"method": MethodConfig("lora", targets=["Wqkv"])},
            r"no linear layer called Wqkv; expected some of down_proj",
        ),
    ):
        shared = small(bench, **settings.pop("backbone", {}))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            bench.stage1("films", **shared | settings)


def test_a_model_of_each_family_is_evaluated_as_it_was_trained(tmp_path: Path) -> None:
    """The logits of a loaded artifact, in inference form, are close to those with the stored weights in training form."""
    for name in ("gpt2", "gemma3_text", "phi", "t5", "modernbert", "albert"):
        bench = Bench(tmp_path / name, tiny_models.save(tmp_path / f"{name} backbone", name))
        bench.stage1("films", adapter=PLACEMENTS["houlsby"], **small(bench))
        artifact = load("films", bench.folder / "store")
        merged = stored_model(artifact, artifact.path.parent, load_backbone(str(bench.backbone)))
        backbone = load_backbone(str(bench.backbone))
        slots = {
            slot: BottleneckAdapter(HIDDEN, size, "silu") for slot, size in artifact.manifest.bottleneck_sizes.items()
        }
        plain = AdaptedModel(backbone, slots, "output", TaskHead(HIDDEN, 2, pooling=artifact.manifest.head.pooling))
        plain.load_state_dict({f"slots.{key}": value for key, value in artifact.weights.items()}, strict=False)
        plain.head.load_state_dict(artifact.head)
        with torch.no_grad():
            expected = plain.eval()(IDS % 29, MASK)
            torch.testing.assert_close(merged(IDS % 29, MASK), expected, rtol=0, atol=1e-4)


def test_null_pooling_keeps_the_identity_of_runs_with_cls() -> None:
    from dataclasses import asdict

    from fusion.runs.identity import identity

    one, two = (Stage1Config(backbone=BackboneConfig("b", pooling=pooling)) for pooling in (None, "cls"))
    assert identity(asdict(one)) == identity(asdict(two))
    assert identity(asdict(one)) != identity(asdict(Stage1Config(backbone=BackboneConfig("b", pooling="mean"))))
