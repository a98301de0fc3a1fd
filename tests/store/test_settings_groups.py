"""Which artifacts differ by their seed alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusion.store.listing import list_store
from fusion.store.lookup import read_manifest
from fusion.store.manifest import Manifest
from fusion.store.settings_groups import Lookup, differing, group
from tests.store.test_program import put

Make = Callable[..., Manifest]


def made(
    make: Make, name: str, task: str, seed: int, kind: str = "adapter", rate: float = 1e-4, **settings: Any
) -> Manifest:
    config = {"seed": seed, "task.name": task, "optim.lr": rate, "data.dir": f"/tmp/{seed}"} | settings
    run = {"identity": "0123456789ab", "config": config, "overrides": [], "directory": "out"}
    sources = settings.get("sources") or []
    return make(
        name,
        kind,
        seed=seed,
        run=run,
        sources=[] if not sources else [{"name": n, "hash": settings["inputs.sources"][i]} for i, n in enumerate(sources)],
    )  # fmt: skip


@pytest.fixture
def filled(store: Path, make_manifest: Make) -> Path:
    """Two sources and a fusion of them, with three seeds each, under names that say the seed in ways of their own."""
    names = {1: ("films-s1", "books.one"), 2: ("films-s2", "second-books"), 3: ("third", "b3")}
    for seed, (films, books) in names.items():
        put(store, made(make_manifest, films, "films", seed), seed)
        # the third was trained with another rate
        put(store, made(make_manifest, books, "books", seed, rate=1e-2 if seed == 3 else 1e-4), -seed)
    for seed, sources in names.items():
        manifests = [read_manifest(name, store) for name in sources]
        inputs: dict[str, Any] = {"sources": list(sources), "inputs.sources": [one.hash for one in manifests]}
        put(store, made(make_manifest, f"f{seed}", "films", seed, "fusion", **inputs), 1.0, manifests)
    return store


def settings_of(store: Path, *names: str) -> list[dict[str, Any]]:
    lookup = Lookup()
    return [lookup.of_artifact(read_manifest(name, store), store) for name in names]


def test_seed_name_and_paths_are_not_settings(filled: Path) -> None:
    every = settings_of(filled, "films-s1", "books.one", "films-s2", "second-books", "third", "b3")
    assert group(every) == [[0, 2, 4], [1, 3], [5]]
    assert differing([every[1], every[5]]) == [{"optim.lr": 1e-4}, {"optim.lr": 1e-2}]


def test_a_source_is_identified_by_its_settings(filled: Path) -> None:
    every = settings_of(filled, "f1", "f2", "f3")
    assert group(every) == [[0, 1], [2]]
    assert differing(every) == [
        {"sources.1.optim.lr": 1e-4},
        {"sources.1.optim.lr": 1e-4},
        {"sources.1.optim.lr": 1e-2},
    ]


def test_a_replaced_source_keeps_its_old_settings(filled: Path, make_manifest: Make) -> None:
    put(filled, made(make_manifest, "films-s2", "films", 2, rate=5.0), 9.0, overwrite=True)
    assert group(settings_of(filled, "f1", "f2")) == [[0, 1]]


def test_other_sources_are_identified_by_their_tasks(filled: Path, make_manifest: Make) -> None:
    films = [read_manifest(name, filled) for name in ("films-s1", "films-s2")]
    inputs: dict[str, Any] = {"sources": ["films-s1", "films-s2"], "inputs.sources": [one.hash for one in films]}
    put(filled, made(make_manifest, "g", "films", 1, "fusion", **inputs), 1.0, films)
    every = settings_of(filled, "f1", "g")
    assert group(every) == [[0], [1]]
    assert differing(every) == [{"sources": "films+books"}, {"sources": "films+films"}]


def test_runs_without_artifacts(tmp_path: Path) -> None:
    """Sources that are gone are known by the runs that made them; else by their names, less the run's own seed."""
    gone = tmp_path / "store"
    known = {str(gone / f"a-s{seed}"): {"seed": seed, "name": f"a-s{seed}", "optim.lr": 1.0} for seed in (1, 2)}
    lookup = Lookup(known)
    runs = [{"seed": s, "name": f"f-s{s}", "sources": [f"a-s{s}", f"b-seed-{s}"]} for s in (1, 2)]
    runs.append({"seed": 2, "name": "f", "sources": ["a-s2", "b-seed-1"]})
    assert group(lookup.of_run(run, gone) for run in runs) == [[0, 1], [2]]
    assert group(lookup.of_run({**runs[0], "sources": "top:2"}, gone, names) for names in (["a-s1"], ["a-s2"])) == [[0, 1]]  # fmt: skip
    assert len(group(Lookup().of_run(run, None) for run in runs)) == 3


def test_a_feature_cache_is_a_setting_only_if_it_rounds() -> None:
    caches: list[dict[str, Any]] = [{"backbone.cache": cache} for cache in ("auto", "off", "float32", "float16")]
    runs = [{"optim.lr": 1.0}, {"backbone.cache_gb": 5.0}, *caches]
    settings = [Lookup().of_run(run | {"optim.lr": 1.0}, None) for run in runs]
    assert group(settings) == [[0, 1, 2, 3, 4], [5]]
    assert differing(settings)[-2:] == [{"backbone.cache": None}, {"backbone.cache": "float16"}]


def test_list_names_the_seeds_of_one_setting(filled: Path) -> None:
    rows, lines = list_store(filled)
    assert [row[rows[0].index("seed")] for row in rows[1:]] == ["3", "1", "1", "2", "3", "1", "2", "2", "3"]
    assert lines == [
        "2 seeds of one setting: books.one, second-books: accuracy mean 0.5, sd 0",
        "2 seeds of one setting: f1, f2: accuracy mean 0.5, sd 0",
        "3 seeds of one setting: films-s1, films-s2, third: accuracy mean 0.5, sd 0",
    ]
