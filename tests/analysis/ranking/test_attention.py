"""A source's share of the attention, where sources differ in their layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion.analysis.ranking.attention import shares
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


def test_a_share_is_measured_where_the_source_has_adapters(manifest: Manifest) -> None:
    wide, other = (with_slots(manifest, "0.feedforward", "1.feedforward") for _ in range(2))
    narrow = with_slots(manifest, "1.feedforward")
    attention = {
        "0.feedforward": SourceAttention([0.75, 0.25, 0.0], None),
        "1.feedforward": SourceAttention([0.5, 0.2, 0.3], None),
    }
    # of two sources 0.75 is 1.5 equal shares, of three 0.5 is too
    assert shares(attention, [wide, other, narrow]) == pytest.approx([1.5, (0.5 + 0.6) / 2, 0.9])


def test_equal_shares_are_one(manifest: Manifest) -> None:
    sources = [with_slots(manifest, "0.feedforward")] * 4
    assert shares({"0.feedforward": SourceAttention([0.25] * 4, None)}, sources) == pytest.approx([1.0] * 4)
