"""Relative attention of sources that have adapters in different layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion.analysis.ranking.scorers import relative_attention
from fusion.model.source_attention import SourceAttention
from fusion.store.lookup import read_manifest
from fusion.store.manifest import Manifest
from tests.bench import Bench


@pytest.fixture
def manifest(three: Bench) -> Manifest:
    return read_manifest("films", Path(three.folder / "store"))


def with_slots(manifest: Manifest, *slots: str) -> Manifest:
    adapter = manifest.content["adapter"] | {"bottleneck_sizes": dict.fromkeys(slots, 2)}
    return manifest.changed(adapter=adapter)


def test_attention_is_measured_in_the_layers_of_the_source(manifest: Manifest) -> None:
    wide, other = (with_slots(manifest, "0.feedforward", "1.feedforward") for _ in range(2))
    narrow = with_slots(manifest, "1.feedforward")
    attention = {
        "0.feedforward": SourceAttention([0.75, 0.25, 0.0], None),
        "1.feedforward": SourceAttention([0.5, 0.2, 0.3], None),
    }
    # 0.75 of two sources is 1.5 times uniform attention, as is 0.5 of three
    assert relative_attention(attention, [wide, other, narrow]) == pytest.approx([1.5, (0.5 + 0.6) / 2, 0.9])


def test_uniform_attention_is_one(manifest: Manifest) -> None:
    sources = [with_slots(manifest, "0.feedforward")] * 4
    assert relative_attention({"0.feedforward": SourceAttention([0.25] * 4, None)}, sources) == pytest.approx([1.0] * 4)
