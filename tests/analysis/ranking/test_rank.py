"""The command fusion.rank, and sources=top:N of stage 2."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusion import rank
from fusion.analysis.ranking.rankings import rankings_of, read_ranking
from fusion.analysis.ranking.selection import _rank_command, resolve_sources
from fusion.config.commands import RankConfig
from fusion.config.compositions import CompositionConfig
from fusion.config.data import DataConfig, LimitConfig, SplitConfig
from fusion.config.stages import Stage2Config
from fusion.config.task import TaskConfig
from fusion.errors import UserError
from fusion.runs.identity import identity_config
from fusion.store.__main__ import main as store_program
from fusion.store.listing import rebuild_lines
from fusion.store.lookup import read_manifest
from tests.bench import Bench, write_manifest

ROOT = Path(__file__).resolve().parents[3]
METHODS = ["similarity", "logme", "probe", "attention"]
KEYS = {"task", "backbone", "methods", "made", "overrides", "sources", "agreement", "seconds", "fusion"}
KEYS |= {"left_out", "ranking"}


@pytest.fixture(scope="module")
def ranked(three: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A copy of the store with `plays` ranked once; `result` is that of the command."""
    bench = Bench.__new__(Bench)
    bench.__dict__.update(three.__dict__)
    bench.folder = tmp_path_factory.mktemp("ranked") / "a folder"
    shutil.copytree(three.folder / "store", bench.folder / "store")
    bench.stage1("plays")
    bench.result = bench.rank("plays", rows=24, epochs=10, lr=1e-2)
    return bench


@pytest.fixture
def copy(ranked: Bench, tmp_path: Path) -> Bench:
    """As `ranked`, for a test that changes the store."""
    bench = Bench.__new__(Bench)
    bench.__dict__.update(ranked.__dict__)
    bench.folder = tmp_path / "a folder"
    shutil.copytree(ranked.folder / "store", bench.folder / "store")
    return bench


def stage2_config(bench: Bench, sources: Any, **changes: Any) -> Stage2Config:
    config = Stage2Config(**bench.settings("plays", **changes), sources=sources)
    resolve_sources(config)
    return config


def test_every_method_ranks_the_similar_task_first(ranked: Bench) -> None:
    result = ranked.result
    assert set(result) == KEYS
    assert result["sources"][0]["name"] == "films"
    assert {source["name"] for source in result["sources"]} == {"films", "coins", "dice"}
    best = result["sources"][0]
    assert best["ranks"] == dict.fromkeys(METHODS, 1.0) and best["mean_rank"] == 1.0
    assert set(best) == {"name", "reference", "hash", "task", "mean_rank", "ranks", "scores"}
    assert set(result["seconds"]) == {"loading", "states", *METHODS}
    assert result["left_out"] == {"plays": "trained on the target plays; set include_target=true to include it"}
    assert len(result["agreement"]) == 6 and result["fusion"] is None
    shares = [source["scores"]["attention"] for source in result["sources"]]
    assert sum(shares) == pytest.approx(3, abs=1e-4)  # all have the same slots


def test_the_ranking_is_stored(ranked: Bench) -> None:
    path = Path(ranked.result["ranking"])
    assert path.parent == ranked.folder / "store" / ".rankings" and path.name.startswith("plays-")
    stored = json.loads(path.read_text())
    assert {key: stored[key] for key in KEYS - {"ranking"}} == {key: ranked.result[key] for key in KEYS - {"ranking"}}
    assert set(stored) == KEYS - {"ranking"} | {"format_version", "question"}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing half-written


def test_the_same_ranking_with_another_seed_overwrites_its_file(copy: Bench) -> None:
    folder = copy.folder / "store" / ".rankings"
    shutil.rmtree(folder)
    one = copy.rank("plays", methods=["probe"], seed=1)["ranking"]
    assert copy.rank("plays", methods=["probe"], seed=2)["ranking"] == one
    others = [
        copy.rank("plays", methods=["logme"])["ranking"],
        copy.rank("plays", methods=["probe"], include_target=True)["ranking"],
        copy.rank("plays", methods=["probe"], rows=20)["ranking"],
    ]
    assert len({one, *others}) == len(list(folder.iterdir())) == 4


def test_a_list_of_sources(copy: Bench) -> None:
    result = copy.rank("plays", sources=["dice", "plays"], methods=["similarity"])
    assert [source["name"] for source in result["sources"]] == ["plays", "dice"]
    assert result["left_out"] == {} and result["agreement"] == {}
    assert result["sources"][0]["scores"]["similarity"] == pytest.approx(1.0)


def test_a_source_without_examples_has_no_similarity(copy: Bench, caplog: pytest.LogCaptureFixture) -> None:
    path = copy.folder / "store" / "dice" / "manifest.json"
    values = json.loads(path.read_text())
    values["run"]["config"]["data.dir"] = "nowhere"
    values["task"]["name"] = "lost"
    write_manifest(path, values)
    with caplog.at_level("INFO"):
        result = copy.rank("plays", methods=["similarity", "logme"])
    (dice,) = (source for source in result["sources"] if source["name"] == "dice")
    assert dice["scores"]["similarity"] is None and dice["ranks"]["similarity"] is None
    assert dice["mean_rank"] == dice["ranks"]["logme"]
    (line,) = (r.getMessage() for r in caplog.records if "similarity" in r.getMessage())
    assert line.startswith("similarity: no score for dice; its examples cannot be read") and "\n" not in line
    with pytest.raises(UserError, match="has 2 sources with a score by similarity"):
        stage2_config(copy, "top:3", sources_by="similarity")


def test_the_cost_of_a_fusion_is_shown(copy: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    copy.stage2("plays", ["films", "dice"])
    capsys.readouterr()
    fusion = copy.rank("plays", methods=["probe"])["fusion"]
    assert fusion["name"] == "plays-adapterfusion" and fusion["sources"] == 2
    out = capsys.readouterr().out
    assert f"fusion plays-adapterfusion of 2 sources {fusion['seconds']:.1f} s" in out
    assert "excluded: plays (trained on the target plays" in out and "saved: " in out


# --- stage 2 ------------------------------------------------------------------------------------------------


def test_top_is_replaced_by_names(ranked: Bench) -> None:
    names = [source["name"] for source in ranked.result["sources"]]
    config = stage2_config(ranked, "top:2")
    assert config.sources == names[:2] and config.sources_by is None
    named = stage2_config(ranked, names[:2])
    assert dataclasses.asdict(config) == dataclasses.asdict(named)
    assert "sources_by" not in identity_config(dataclasses.asdict(config))


def test_sources_by_one_method(ranked: Bench) -> None:
    for method in METHODS:
        ranks = {source["name"]: source["ranks"][method] for source in ranked.result["sources"]}
        found = stage2_config(ranked, "top:3", sources_by=method).sources
        assert [ranks[name] for name in found] == sorted(ranks.values())


def test_all_includes_adapters_of_the_target(ranked: Bench) -> None:
    assert stage2_config(ranked, "all").sources == ["coins", "dice", "films", "plays"]


def test_the_newest_current_ranking_is_used(copy: Bench) -> None:
    copy.rank("plays", sources=["coins", "dice"], methods=["similarity"])
    assert set(stage2_config(copy, "top:2").sources) == {"coins", "dice"}
    # The newest ranking with this method is an older one.
    assert stage2_config(copy, "top:1", sources_by="probe").sources == ["films"]
    copy.stage1("coins", overwrite=True, seed=5)
    with pytest.raises(UserError, match="coins changed or was removed since the last ranking for plays"):
        stage2_config(copy, "top:2")
    copy.rank("plays", sources=["films", "dice"], methods=["similarity"])
    assert stage2_config(copy, "top:1").sources == ["films"]
    shutil.rmtree(copy.folder / "store" / "films")
    with pytest.raises(UserError, match="films changed or was removed") as error:
        stage2_config(copy, "top:1")
    assert "python -m fusion.rank +task=plays" in str(error.value)


def test_the_proposed_rank_command_has_the_data_settings(ranked: Bench) -> None:
    data = dataclasses.replace(
        ranked.settings("plays")["data"], quoting="csv", split=SplitConfig(validation=0.2, stratify=True)
    )
    config = Stage2Config(**ranked.settings("plays", data=data), sources="top:1")
    assert " data.quoting=csv data.split.validation=0.2 data.split.stratify=true" in _rank_command(config)


def test_a_missing_ranking_proposes_the_rank_command(ranked: Bench) -> None:
    backbone = dataclasses.replace(ranked.settings("plays")["backbone"], name_or_path="another")
    other_labels = dataclasses.replace(ranked.tasks["plays"], labels=["x", "y"])
    for config, missing in (
        (ranked.settings("films"), "films"),
        (ranked.settings("plays", backbone=backbone), "plays on another"),
        (ranked.settings("plays") | {"task": other_labels}, "plays"),
    ):
        with pytest.raises(UserError, match=f"no ranking for {missing}") as error:
            resolve_sources(Stage2Config(**config, sources="top:1"))
        words = shlex.split(str(error.value).splitlines()[1])  # as a shell reads it
        assert words[:4] == ["python", "-m", "fusion.rank", f"+task={missing.split()[0]}"]
        assert f'store="{ranked.folder / "store"}"' in words


def test_a_damaged_ranking_is_named_and_others_are_used(copy: Bench) -> None:
    folder = copy.folder / "store" / ".rankings"
    (file,) = folder.iterdir()
    task, backbone = json.loads(file.read_text())["task"], str(copy.backbone)
    whole = json.loads(file.read_text())
    broken = {
        "a": "{",
        "b": json.dumps(whole | {"format_version": 2}),
        "c": json.dumps(whole | {"sources": [{"name": "films"}]}),
        "d": json.dumps(whole | {"sources": []}),
        "e": json.dumps(whole | {"made": 5}),
        "f": json.dumps([1]),
        "g": json.dumps(whole | {"backbone": None}),
    }
    for name, text in broken.items():
        (folder / f"plays-{name}.json").write_text(text)
        with pytest.raises(UserError, match=f"plays-{name}.json is not a valid ranking"):
            read_ranking(folder / f"plays-{name}.json")
    found, damaged = rankings_of(copy.folder / "store", task, backbone)
    assert [ranking.path for ranking in found] == [file] and len(damaged) == len(broken)
    assert stage2_config(copy, "top:1").sources == ["films"]
    file.unlink()
    with pytest.raises(UserError, match=r"plays-a.json is not a valid ranking"):
        stage2_config(copy, "top:1")


# --- refused settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "at least two"),
        ({"sources": ["films"]}, "at least two"),
        ({"sources": ["films", "films"]}, r"sources=\[films,films\]: duplicate films"),
        ({"sources": "top:3"}, "or all"),
        ({"sources": [["films"], "dice"]}, "expected a list of names"),
        ({"sources": ["films", "dice"], "include_target": True}, "include_target"),
        ({"methods": ["guess"]}, r"methods=\[guess\]"),
        ({"methods": []}, "methods="),
        ({"methods": ["probe", "probe"]}, "each once"),
        ({"rows": 1}, "rows=1"),
        ({"epochs": 0}, "epochs=0"),
        ({"lr": 0.0}, "lr=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_settings_of_a_ranking(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RankConfig(**changes)


@pytest.mark.parametrize(
    ("sources", "changes", "message"),
    [
        ("top:0", {}, "sources=top:0: expected"),
        ("top:", {}, "expected"),
        ("films", {}, r"expected a list of names such as \[mnli,sst2\], all, or top:N"),
        (5, {}, "expected a list"),
        ([None], {}, "expected a list"),
        ([], {}, "sources is empty"),
        (["films"], {"sources_by": "probe"}, "only applies to sources=top:N"),
        ("top:1", {"sources_by": "guess"}, "sources_by=guess"),
        ("all", {"composition": CompositionConfig("pruned", fusion="x", keep=1)}, "leave them out"),
        ("top:9", {}, "expected top:3 or fewer; .*has 3 sources"),
    ],
)
def test_wrong_sources_of_stage_2(ranked: Bench, sources: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stage2_config(ranked, sources, **changes)


def test_checks_before_a_model_is_loaded(ranked: Bench, tmp_path: Path) -> None:
    settings = {key: ranked.settings("plays")[key] for key in ("task", "data", "backbone", "store")}
    run: Any = None

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=message):
            rank.check(RankConfig(**settings | changes), run)

    refused("no artifact 'nobody'", sources=["films", "nobody"])
    refused("has no adapters", store=str(tmp_path / "empty"))
    empty = TaskConfig(name="empty", text="text", labels=["x", "y"], metrics=["accuracy"])
    (tmp_path / "data" / "empty").mkdir(parents=True)
    (tmp_path / "data" / "empty" / "validation.jsonl").write_text('{"text": "a", "label": 0}\n')
    refused("has no train", task=empty, data=DataConfig(dir=str(tmp_path / "data")))
    other = dataclasses.replace(settings["backbone"], name_or_path="another")
    refused("trained on backbone", backbone=other)
    refused("was trained on", backbone=other, sources=["films", "dice"], store=str(_unnamed(ranked, tmp_path)))
    alone = tmp_path / "alone"
    for name in ("films", "plays"):
        shutil.copytree(ranked.folder / "store" / name, alone / name)
    refused("found only films in .*; excluded: plays", store=str(alone))
    shutil.rmtree(alone / "plays")
    refused("at least two sources to rank, found only films in .*alone$", store=str(alone))


def _unnamed(ranked: Bench, tmp_path: Path) -> Path:
    """The store with sources of a backbone whose name is no folder here."""
    store = tmp_path / "unnamed"
    shutil.copytree(ranked.folder / "store", store)
    for manifest in store.glob("*/manifest.json"):
        values = json.loads(manifest.read_text())
        values["backbone"]["name_or_path"] = "a hub id"
        write_manifest(manifest, values)
    return store


def test_limits_bound_the_number_of_examples(copy: Bench) -> None:
    data = dataclasses.replace(copy.data, limit=LimitConfig(train=10, validation=12))
    result = copy.rank("plays", data=data, methods=["logme"], rows=20)
    question = json.loads(Path(result["ranking"]).read_text())["question"]
    assert question["data"] == {"train": 10, "validation": 12, "test": None, "max_length": 16}


# --- the store and the programs -----------------------------------------------------------------------------


def test_store_commands_ignore_rankings(copy: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    store = f"store={copy.folder / 'store'}"
    assert store_program(["list", store]) == 0
    listed = capsys.readouterr().out
    assert "films" in listed and "rankings" not in listed and "left:" not in listed
    assert store_program(["verify", store]) == 0
    assert "4 of 4 artifacts are valid" in capsys.readouterr().out
    assert store_program(["remove", "dice", store]) == 0
    assert (copy.folder / "store" / ".rankings").is_dir()


@pytest.mark.usefixtures("warm")
def test_as_commands(copy: Bench, tmp_path: Path) -> None:
    """Rank, then fuse the best two; the names are stored."""
    (tmp_path / "conf" / "task").mkdir(parents=True)
    task = {"kind": "classification", "text": "text", "labels": ["bad", "good"], "metrics": ["accuracy"]}
    (tmp_path / "conf" / "task" / "plays.yaml").write_text(yaml.safe_dump(task))
    shared = ["+task=plays", f"store={copy.folder / 'store'}", f"backbone.name_or_path={copy.backbone}"]
    shared += [f"data.dir={copy.data.dir}", f"data.cache_dir={copy.data.cache_dir}", "data.max_length=16"]
    shared = [f'{key}="{value}"' for key, _, value in (word.partition("=") for word in shared)]

    def run(module: str, *more: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", f"fusion.{module}", *shared, *more]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    fuse = (
        "stage2",
        "sources=top:2",
        "sources_by=similarity",
        "logger=none",
        "trainer.accelerator=cpu",
        "trainer.max_epochs=1",
    )
    shutil.rmtree(copy.folder / "store" / ".rankings")
    ranking = run("rank", "methods=[similarity]", "hydra.run.dir=ranking")
    assert ranking.returncode == 0, ranking.stderr
    assert "3 sources for plays" in ranking.stdout
    result = json.loads((tmp_path / "ranking" / "result.json").read_text())
    assert set(result) == KEYS and json.loads((tmp_path / "ranking" / "status.json").read_text())["status"] == "done"
    fused = run(*fuse, "hydra.run.dir=fused")
    assert fused.returncode == 0, fused.stderr
    names = [source["name"] for source in result["sources"]][:2]
    assert f"sources=top:2: {', '.join(names)}, by similarity (" in fused.stdout
    assert yaml.safe_load((tmp_path / "fused" / "config.yaml").read_text())["sources"] == names
    manifest = json.loads((copy.folder / "store" / "plays-adapterfusion" / "manifest.json").read_text())
    assert [source["name"] for source in manifest["sources"]] == names
    assert manifest["run"]["config"]["sources"] == names
    rebuilt = rebuild_lines(read_manifest("plays-adapterfusion", copy.folder / "store"), tmp_path, tmp_path)
    assert f"sources=[{','.join(names)}]" in rebuilt[-1].replace("'", "")
    assert "top:2" not in rebuilt[-1] and "sources_by" not in rebuilt[-1]
