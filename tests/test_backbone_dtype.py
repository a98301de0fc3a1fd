"""Both stages with a frozen backbone in bfloat16: what is stored, loaded, cached and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fusion.config.commands import EvaluateConfig
from fusion.config.methods import MethodConfig
from fusion.config.model import AdapterConfig, BackboneConfig, SameBackboneConfig
from fusion.config.stages import Stage1Config
from fusion.errors import UserError
from fusion.model.inference import load_model
from fusion.runs.identity import identity
from tests.bench import Bench, same


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("dtype") / "a folder", tiny_backbone)
    for task in ("films", "books"):
        bench.stage1(task, backbone=half(bench))
    bench.stage1("plays")
    bench.result = bench.stage2("films", ["films", "books", "plays"], backbone=half(bench))
    return bench


def half(bench: Bench, **settings: Any) -> BackboneConfig:
    return BackboneConfig(**({"name_or_path": str(bench.backbone), "pooling": "mean", "dtype": "bfloat16"} | settings))


def manifest(bench: Bench, name: str) -> Any:
    return json.loads((bench.folder / "store" / name / "manifest.json").read_text())


def test_the_manifest_has_the_dtype_and_stored_weights_are_float32(bench: Bench) -> None:
    for name, dtype in (("films", "bfloat16"), ("plays", "float32"), ("films-adapterfusion", "bfloat16")):
        assert manifest(bench, name)["backbone"]["dtype"] == dtype
        for file in ("weights", "head"):
            stored = load_file(bench.folder / "store" / name / f"{file}.safetensors")
            assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    fingerprints = {manifest(bench, name)["backbone"]["fingerprint"] for name in ("films", "plays")}
    assert len(fingerprints) == 1, "the same backbone in either type"


def used(bench: Bench, dtype: str | None) -> torch.dtype:
    config = EvaluateConfig(
        artifact="films-adapterfusion",
        store=str(bench.folder / "store"),
        data=bench.data,
        backbone=SameBackboneConfig(dtype=dtype),
    )
    return load_model(config).model.dtype


def test_evaluation_uses_the_dtype_of_the_training(bench: Bench) -> None:
    assert used(bench, None) == torch.bfloat16 and used(bench, "float32") == torch.float32
    evaluated = bench.evaluate("films-adapterfusion")
    assert evaluated["metrics"]["validation"] == bench.result["metrics"]["validation"]


def test_cached_features_have_the_dtype(bench: Bench) -> None:
    upper = AdapterConfig(layers="last:1")
    for name, cache in (("cached", "auto"), ("uncached", "off"), ("exact", "float32")):
        bench.stage1("films", name=name, adapter=upper, backbone=half(bench, cache=cache))
    weights = {
        name: load_file(bench.folder / "store" / name / "weights.safetensors")
        for name in ("cached", "uncached", "exact")
    }
    assert same(weights["cached"], weights["exact"]), "bfloat16 features lose nothing"
    for name, tensor in weights["uncached"].items():  # batches of other sizes, so rounded differently
        torch.testing.assert_close(weights["cached"][name], tensor, rtol=0, atol=5e-3)
    sizes = sorted({file.stat().st_size for file in (bench.folder / "cache" / "prefix").glob("*.states")})
    assert {2 * (size - 4) + 4 for size in sizes} & set(sizes), "half of the disk space"


def test_the_identity_of_float32_runs_is_that_of_earlier_versions() -> None:
    config = {"backbone": {"name_or_path": "x", "dtype": "float32"}, "seed": 1}
    earlier = {"backbone": {"name_or_path": "x"}, "seed": 1}
    assert identity(config) == identity(earlier)
    config["backbone"]["dtype"] = "bfloat16"  # type: ignore[index]
    assert identity(config) != identity(earlier)


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_trained_backbones_are_float32(bench: Bench, method: str) -> None:
    with pytest.raises(UserError, match=rf"backbone\.dtype=bfloat16: method={method} trains weights of the backbone"):
        Stage1Config(**bench.settings("films", method=MethodConfig(method), backbone=half(bench)))


def test_float16_requires_loss_scaling(bench: Bench) -> None:
    with pytest.raises(UserError, match=r"expected trainer\.precision=16-mixed"):
        Stage1Config(**bench.settings("films", backbone=half(bench, dtype="float16")))
    with pytest.raises(UserError, match=r"backbone\.dtype=bf16: expected one of float32, bfloat16, float16, auto"):
        half(bench, dtype="bf16")


def test_lora_is_trained_in_float32(bench: Bench) -> None:
    bench.stage1("films", name="lora", method=MethodConfig("lora", rank=2), backbone=half(bench))
    stored = load_file(bench.folder / "store" / "lora" / "weights.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    bench.evaluate("lora")
