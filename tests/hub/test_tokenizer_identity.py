"""The tokenizer is part of what an artifact was trained with: another one is refused wherever both are used."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion.analysis.inspection import inspect
from fusion.config.model import BackboneConfig, SameBackboneConfig
from fusion.config.stages import Stage1Config
from fusion.errors import UserError
from fusion.runs.run import Run
from fusion.stages.stage1 import check_stage1
from fusion.store.lookup import read_manifest
from fusion.training.checkpoints import check_tokenizer
from tests.bench import Bench
from tests.tiny_backbone import save_backbone

ROWS = [{"text": "the Cat was good"}, {"text": "a Dog is bad"}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Two adapters and their fusion."""
    folder = tmp_path_factory.mktemp("identity")
    bench = Bench(folder / "bench", save_backbone(folder / "backbone"))
    bench.stage1("films")
    bench.stage1("books")
    bench.stage2("plays", ["films", "books"])
    return bench


def cased(folder: Path) -> None:
    """The same weights and words, and no lower case: `Cat` is an unknown token."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    assert values["normalizer"] == {"type": "Lowercase"}
    path.write_text(json.dumps(values | {"normalizer": None}))


@pytest.fixture
def other(trained: Bench, tmp_path: Path) -> Path:
    shutil.copytree(trained.backbone, tmp_path / "cased")
    cased(tmp_path / "cased")
    return tmp_path / "cased"


REFUSED = r"was trained on .*cased is a different backbone: tokenizer [0-9a-f]{8}, expected [0-9a-f]{8}"


def test_the_manifest_has_the_tokenizer_hash(trained: Bench) -> None:
    stored = [read_manifest(name, trained.folder / "store") for name in ("films", "plays-adapterfusion")]
    assert len(stored[0].backbone.tokenizer or "") == 64
    assert stored[0].backbone.tokenizer == stored[1].backbone.tokenizer


@pytest.mark.parametrize("name", ["films", "plays-adapterfusion"])
def test_another_tokenizer_is_refused(trained: Bench, other: Path, name: str) -> None:
    place = SameBackboneConfig(name_or_path=str(other))
    with pytest.raises(UserError, match=REFUSED):
        trained.predict(name, ROWS, backbone=place)
    with pytest.raises(UserError, match=REFUSED):
        trained.evaluate(name, backbone=place)


def test_stage_2_and_rank_refuse_it(trained: Bench, other: Path) -> None:
    backbone = BackboneConfig(name_or_path=str(other), pooling="mean")
    with pytest.raises(UserError, match=REFUSED):
        trained.stage2("plays", ["films", "books"], backbone=backbone, name="second")
    with pytest.raises(UserError, match=REFUSED):
        trained.rank("plays", sources=["films", "books"], backbone=backbone)


def test_inspect_refuses_it(trained: Bench, other: Path) -> None:
    from fusion.config.commands import InspectConfig

    config = InspectConfig(
        artifact="plays-adapterfusion",
        store=str(trained.folder / "store"),
        data=trained.data,
        accelerator="cpu",
        backbone=SameBackboneConfig(name_or_path=str(other)),
    )
    with pytest.raises(UserError, match=REFUSED):
        inspect(config)


def test_a_copy_with_other_bytes_is_the_same(trained: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained.backbone, folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    expected = trained.predict("films", ROWS)
    assert trained.predict("films", ROWS, backbone=SameBackboneConfig(name_or_path=str(folder))) == expected


def strip(store: Path, name: str, *keys: tuple[str, str]) -> None:
    path = store / name / "manifest.json"
    values = json.loads(path.read_text())
    for group, key in keys:
        del values[group][key]
    values.pop("checksum", None)
    path.write_text(json.dumps(values))


def test_an_artifact_of_0_1_is_used_with_any_tokenizer(trained: Bench, other: Path, tmp_path: Path) -> None:
    """Its manifest does not have the tokenizer hash."""
    store = tmp_path / "store"
    shutil.copytree(trained.folder / "store" / "films", store / "films")
    before = read_manifest("films", store).hash
    strip(store, "films", ("backbone", "tokenizer"), ("run", "backbone_stamp"))
    assert read_manifest("films", store).hash == before
    place = SameBackboneConfig(name_or_path=str(other))
    trained.predict(str(store / "films"), ROWS, backbone=place)


def test_sources_with_different_tokenizers_are_not_fused(trained: Bench, other: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for name in ("films", "books"):
        shutil.copytree(trained.folder / "store" / name, store / name)
    trained.stage1("plays", backbone=BackboneConfig(str(other), pooling="mean"), store=str(store))
    with pytest.raises(UserError, match=r"plays cannot be fused with films: tokenizer \w{8}, expected \w{8} "):
        trained.rank("films", sources=["films", "plays"], store=str(store))
    from fusion.analysis.ranking.selection import all_adapters

    found = all_adapters(store, str(trained.backbone))
    assert [manifest.name for manifest in found.sources] == ["books", "films"]
    assert found.left_out["plays"].startswith("tokenizer ")


# --- the same run again -----------------------------------------------------------------------------


@pytest.fixture
def again(trained: Bench, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The run `films` on a copy of its backbone: trained first, then the same command again."""
    bench = Bench(tmp_path / "again", tmp_path / "own backbone")
    shutil.copytree(trained.backbone, bench.backbone)

    def run() -> dict[str, Any]:
        return bench.stage1("films")

    run()
    return run


def test_a_finished_run_stays_done_while_its_backbone_is_the_same(
    again: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = tmp_path / "again" / "store" / "films" / "weights.safetensors"
    written = artifact.stat().st_mtime_ns
    with monkeypatch.context() as patch:  # nothing is loaded where no file was written
        patch.setattr("fusion.backbones.load.load_backbone", None)
        again()
    (tmp_path / "own backbone" / "tokenizer.json").touch()
    again()
    shutil.rmtree(tmp_path / "own backbone")
    again()
    assert artifact.stat().st_mtime_ns == written


def test_a_finished_run_is_refused_where_its_backbone_has_changed(
    again: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "own backbone"
    whole = (folder / "tokenizer.json").read_bytes()
    cased(folder)
    with pytest.raises(UserError, match=r"films was trained before .* changed: backbone tokenizer \w{8}, expected"):
        again()
    (folder / "tokenizer.json").write_bytes(whole)
    again()
    save_backbone(folder, seed=1)
    with pytest.raises(UserError, match=r"backbone fingerprint \w{8}, expected \w{8}; set name=NAME to keep both"):
        again()
    strip(tmp_path / "again" / "store", "films", ("backbone", "tokenizer"), ("run", "backbone_stamp"))
    again()  # a run of 0.1 is still done


def test_a_checkpoint_is_resumed_with_its_own_tokenizer() -> None:
    check_tokenizer({"tokenizer": "a" * 64}, "a" * 64)
    with pytest.raises(UserError, match=r"a different tokenizer \(hash aaaaaaaa, now bbbbbbbb\)\n.*resume=false"):
        check_tokenizer({"tokenizer": "a" * 64}, "b" * 64)


# --- before the rows are read -----------------------------------------------------------------------


def test_the_backbone_is_checked_before_the_data(
    trained: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*values: Any, **options: Any) -> None:
        raise AssertionError("rows were read")

    for function in (
        "fusion.training.task_rows.load_splits",
        "fusion.data.rows.load_splits",
        "fusion.data.rows.rows_of_file",
    ):
        monkeypatch.setattr(function, read)
    folder = tmp_path / "copy"
    shutil.copytree(trained.backbone, folder)
    long = dataclasses.replace(trained.data, max_length=65)
    backbone, place = BackboneConfig(str(folder), pooling="mean"), SameBackboneConfig(str(folder))
    with pytest.raises(UserError, match=r"data\.max_length=65"):
        trained.stage1("films", backbone=backbone, data=long, name="new")
    with pytest.raises(UserError, match=r"data\.max_length=65"):
        trained.stage2("plays", ["films"], backbone=backbone, data=long, name="new")
    (folder / "model.safetensors").write_bytes(b"damaged")
    for run in (
        lambda: trained.stage1("films", backbone=backbone, name="new"),
        lambda: trained.stage2("plays", ["films"], backbone=backbone, name="new"),
        lambda: trained.evaluate("films", backbone=place),
        lambda: trained.predict("films", ROWS, backbone=place),
    ):
        with pytest.raises(UserError, match=r"model\.safetensors: cannot be read"):
            run()


def test_the_first_check_needs_no_torch_and_writes_nothing(trained: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained.backbone, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    settings = trained.settings("films", backbone=BackboneConfig(str(folder)), store=str(tmp_path / "store"))
    typed = Stage1Config(**settings, name="new")
    run = Run("stage1", tmp_path, (), dataclasses.asdict(typed), "stage1")
    with pytest.raises(UserError, match=r"has model_type 'gpt_neox', which is not supported"):
        check_stage1(typed, run)
    assert not (tmp_path / "store").exists()


def test_valid_hashes_are_unchanged(trained: Bench) -> None:
    """The tokenizer's hash is in no artifact's hash: a fusion of 0.1 still finds its sources."""
    manifest = read_manifest("films", trained.folder / "store")
    without = {key: value for key, value in manifest.content["backbone"].items() if key != "tokenizer"}
    assert manifest.changed(backbone=without).hash == manifest.hash
    assert torch.isfinite(trained.weights("films")["0.feedforward.down.weight"]).all()
