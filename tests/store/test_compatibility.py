"""Which sources can be fused, and on which backbone an artifact runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fusion.errors import UserError
from fusion.store.compatibility import check_backbone, check_sources
from fusion.store.manifest import Manifest

Make = Callable[..., Manifest]


def test_sources_may_differ_in_shape(make_manifest: Make) -> None:
    other = {"bottleneck_sizes": {"1.feedforward": 5}, "nonlinearity": "gelu", "scaling": 2.0, "layers": [1]}
    check_sources([make_manifest("mnli"), make_manifest("rte", adapter=other)])
    check_sources([make_manifest("mnli"), make_manifest("rte", backbone={"name_or_path": "/copies/tiny"})])
    check_sources([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": {"fingerprint": "e" * 64}}, "fingerprint eeeeeeee, expected ffffffff"),
        ({"backbone": {"hidden_size": 16}}, "hidden size 16, expected 8"),
        (
            {"adapter": {"sites": ["attention", "feedforward"]}},
            r"adapter.sites \[attention,feedforward\], expected \[feedforward\]",
        ),
        ({"adapter": {"reads": "output"}}, "adapter.reads output, expected normed"),
    ],
)
def test_sources_that_cannot_be_fused(make_manifest: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"rte cannot be fused with mnli: {message} \(backbone"):
        check_sources([make_manifest("mnli"), make_manifest("sst2"), make_manifest("rte", **changes)])


def test_sources_are_adapters_of_different_names(make_manifest: Make) -> None:
    fusion = make_manifest("rte-adapterfusion", "fusion", sources=[{"name": "a", "hash": "b"}])
    with pytest.raises(UserError, match="rte-adapterfusion is a stored fusion, expected an adapter"):
        check_sources([fusion])
    with pytest.raises(UserError, match="duplicate names mnli"):
        check_sources([make_manifest("mnli"), make_manifest("mnli", seed=4)])


def test_check_backbone(make_manifest: Make) -> None:
    manifest = make_manifest("mnli", backbone={"revision": "abc"})
    check_backbone(manifest, name_or_path="/elsewhere", fingerprint="f" * 64, hidden_size=8)
    with pytest.raises(UserError, match=r"mnli was trained on tiny revision abc.*big.*eeeeeeee.*ffffffff"):
        check_backbone(manifest, name_or_path="big", fingerprint="e" * 64, hidden_size=8)
    with pytest.raises(UserError, match=r"hidden size 16, expected 8"):
        check_backbone(manifest, name_or_path="big", fingerprint="e" * 64, hidden_size=16)
