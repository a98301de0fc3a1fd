"""The frozen features of a task's rows: when they are kept, what they are, and that they change no result."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fusion.backbones.load import Backbone, load_backbone
from fusion.config.model import BackboneConfig
from fusion.data.encode import EncodedRows, encode
from fusion.data.loaders import training_loader
from fusion.data.rows import Rows
from fusion.errors import UserError
from fusion.hub.tokenizer import load_tokenizer
from fusion.layers.attention import AdapterFusion
from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.layers.slot_module import SlotModule
from fusion.model.adapted import AdaptedModel
from fusion.model.feature_cache import cache_features
from tests.tiny_backbone import WORDS

CPU = torch.device("cpu")


def some_rows(folder: Path, cache: Path, count: int = 70, choices: bool = False) -> EncodedRows:
    draw = np.random.RandomState(0)
    texts: list[tuple[str, ...]] = [(" ".join(draw.choice(WORDS, draw.randint(1, 9))),) for _ in range(count)]
    options = [list(draw.choice(WORDS, draw.randint(2, 5))) for _ in range(count)] if choices else None
    labels = [int(label) for label in draw.randint(0, 2, count)]
    return encode(Rows(texts, options, labels, 0, "some"), load_tokenizer(str(folder)), 16, cache)


def adapted(backbone: Backbone, layers: list[int], fusion: bool = False) -> AdaptedModel:
    torch.manual_seed(1)

    def slot_module() -> SlotModule:
        if not fusion:
            return BottleneckAdapter(32, 4)
        return AdapterFusion(AdapterBank([BottleneckAdapter(32, 4) for _ in range(3)], [0, 1, 2], 3))

    slot_modules = {f"{layer}.feedforward": slot_module() for layer in layers}
    return AdaptedModel(backbone, slot_modules, "normed", TaskHead(32, 2, pooling="mean"))


def kept(
    folder: Path, place: Path, layers: list[int], once: bool = False, left: bool = False, **settings: object
) -> tuple[str | None, EncodedRows]:
    rows = some_rows(folder, place)
    rows.pads_left = left
    config = BackboneConfig(name_or_path="x", **settings)  # type: ignore[arg-type]
    backbone = load_backbone(str(folder))
    model = adapted(backbone, layers)
    given = cache_features(model, [rows], config, backbone.fingerprint, CPU, str(place), once)
    return given, rows


@pytest.mark.parametrize(
    ("settings", "layers", "expected"),
    [
        ({}, [1, 2], "float32"),
        ({}, [], "float32"),  # a head alone: all is frozen
        ({}, [0, 1, 2], None),  # too little below the lowest slot
        ({"cache": "float32"}, [0, 1, 2], "float32"),
        ({"cache": "float16"}, [1, 2], "float16"),
        ({"cache": "off"}, [2], None),
        ({"dropout": True}, [2], None),
        ({"cache_gb": 1e-9}, [2], None),
        ({"once": True}, [2], None),  # its rows are seen only once
        ({"once": True, "cache": "float32"}, [2], "float32"),
    ],
)
def test_when_features_are_cached(
    tiny_backbone: Path, tmp_path: Path, settings: dict[str, object], layers: list[int], expected: str | None
) -> None:
    given, rows = kept(tiny_backbone, tmp_path, layers, **settings)  # type: ignore[arg-type]
    assert given == expected
    assert (rows.states is None) == (expected is None)
    if rows.states is not None:
        assert rows.states.dtype == expected and rows.states.shape == (rows.tokens, 32)


@pytest.mark.parametrize("choices", [False, True])
def test_a_batch_has_the_states_of_its_tokens(tiny_backbone: Path, tmp_path: Path, choices: bool) -> None:
    backbone, rows = load_backbone(str(tiny_backbone)), some_rows(tiny_backbone, tmp_path, choices=choices)
    model = adapted(backbone, [1, 2]).eval()
    cache_features(model, [rows], BackboneConfig(name_or_path="x"), backbone.fingerprint, CPU, str(tmp_path))
    batch = rows.batch([3, 50, 7])
    expected = model.frozen_features(batch.input_ids, batch.attention_mask, batch.token_type_ids)
    assert batch.features is not None and batch.features.dtype == torch.float32
    real = batch.attention_mask.bool()
    torch.testing.assert_close(batch.features[real], expected[real], rtol=0, atol=1e-5)
    assert not batch.features[~real].any()


def test_a_loader_worker_reopens_the_memory_map(tiny_backbone: Path, tmp_path: Path) -> None:
    rows = kept(tiny_backbone, tmp_path, [2])[1]
    content = pickle.dumps(rows)
    assert rows.states is not None and len(content) < rows.states.nbytes
    there = pickle.loads(content)
    assert isinstance(there.states, np.memmap) and np.array_equal(there.states, rows.states)
    first, second = rows.batch([1, 2]).features, there.batch([1, 2]).features
    assert first is not None and torch.equal(first, second)


def test_the_width_of_the_states_is_known_in_advance(tiny_backbone: Path) -> None:
    ids = torch.tensor([[2, 7, 3]])
    for reads in ("normed", "output"):
        for slots in ([], ["1.feedforward"], ["1.attention"]):
            slot_modules = {slot: BottleneckAdapter(32, 4) for slot in slots}
            model = AdaptedModel(load_backbone(str(tiny_backbone)), slot_modules, reads, TaskHead(32, 2))
            assert model.frozen_features(ids, ids).shape[-1] == model.hidden_size


def test_the_second_run_computes_nothing(tiny_backbone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = kept(tiny_backbone, tmp_path, [2])[1].states
    again = kept(tiny_backbone, tmp_path, [2])[1].states
    assert first is not None and again is not None and np.array_equal(first, again)
    assert caplog.text.count("computing the frozen features") == 1
    kept(tiny_backbone, tmp_path, [1, 2])  # from another slot it is another prefix
    kept(tiny_backbone, tmp_path, [2], cache="float16")
    assert caplog.text.count("computing the frozen features") == 3


def test_an_explicit_cache_is_kept_or_refused(tiny_backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"backbone\.cache_gb=1e-09\nIncrease backbone\.cache_gb"):
        kept(tiny_backbone, tmp_path, [2], cache="float32", cache_gb=1e-9)
    with pytest.raises(UserError, match=r"pads on the left.*\nSet backbone\.cache=off"):
        kept(tiny_backbone, tmp_path, [2], cache="float32", left=True)
    (tmp_path / "prefix").write_text("no folder")
    with pytest.raises(UserError, match=r"cannot be written .*\nSet a different folder with data\.cache_dir"):
        kept(tiny_backbone, tmp_path, [2], cache="float32")


def test_under_auto_an_unwritable_folder_only_disables_the_cache(
    tiny_backbone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "prefix").write_text("no folder")
    assert kept(tiny_backbone, tmp_path, [2])[0] is None
    assert "computed in each epoch" in caplog.text


def test_values_beyond_float16_are_refused(tiny_backbone: Path, tmp_path: Path) -> None:
    backbone, rows = load_backbone(str(tiny_backbone)), some_rows(tiny_backbone, tmp_path)
    with torch.no_grad():
        backbone.model.get_parameter("encoder.layer.1.output.LayerNorm.bias").add_(1e6)
    config = BackboneConfig(name_or_path="x", cache="float16")
    with pytest.raises(UserError, match="exceeds the range"):
        cache_features(adapted(backbone, [2]), [rows], config, "f", CPU, str(tmp_path))
    assert not list((tmp_path / "prefix").glob("*.states"))


@pytest.mark.parametrize("fusion", [False, True])
def test_fifty_steps_equal_those_without_the_cache(tiny_backbone: Path, tmp_path: Path, fusion: bool) -> None:
    curves, cached = [], []
    for cache in ("off", "float32"):
        backbone, rows = load_backbone(str(tiny_backbone)), some_rows(tiny_backbone, tmp_path)
        model = adapted(backbone, [1, 2], fusion)
        config = BackboneConfig(name_or_path="x", cache=cache)
        cached.append(cache_features(model, [rows], config, backbone.fingerprint, CPU, str(tmp_path)))
        model.train()
        optimizer = torch.optim.AdamW(model.trainable().values(), 1e-3)
        losses: list[float] = []
        for epoch in range(10):
            batches = training_loader([rows], 16, seed=0)
            batches.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            for batch in batches:
                scores = model(batch.input_ids, batch.attention_mask, batch.token_type_ids, features=batch.features)
                loss = F.cross_entropy(scores, batch.labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        curves.append(losses)
    assert cached == [None, "float32"] and len(curves[0]) == 50
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[0][-1] != pytest.approx(curves[0][0], rel=1e-2)  # the parameters were trained
