"""What a manifest may hold, and its hash."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusion.errors import UserError
from fusion.store.layout import HEAD, WEIGHTS
from fusion.store.manifest import FORMAT_VERSION, OPTIONAL, Manifest
from tests.store.conftest import FILES

Make = Callable[..., Manifest]


def values_of(manifest: Manifest) -> dict[str, Any]:
    """As a manifest of version 0.1 has them: without a checksum."""
    values = json.loads(manifest.changed(files=FILES).to_json())
    del values["checksum"]
    return values


def test_round_trip(make_manifest: Make) -> None:
    for kind, sources in (("adapter", []), ("fusion", [{"name": "a", "hash": "b"}]), ("head", [])):
        manifest = make_manifest("mnli", kind, sources=sources, files=FILES)
        assert Manifest.from_json(manifest.to_json(), Path("m")) == manifest


def test_non_finite_numbers_become_null(make_manifest: Make) -> None:
    manifest = make_manifest(
        files=FILES, metrics={"validation": {"pearson": float("nan"), "spearman": float("inf"), "other": 1}}
    )
    assert Manifest.from_json(manifest.to_json(), Path("m")).metrics == {
        "validation": {"pearson": None, "spearman": None, "other": 1}
    }


def change(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    *groups, last = key.split("/")
    inner = values
    for group in groups:
        inner = inner[group]
    inner[last] = value
    return values


WRONG: tuple[tuple[str, Any, str], ...] = (
    ("format_version", FORMAT_VERSION + 1, f"format_version is {FORMAT_VERSION + 1}"),
    ("format_version", True, "format_version is True"),
    ("format_version", None, "format_version is null"),
    ("name", "../mnli", "name: "),
    ("kind", "bank", "kind: Value error, expected one of adapter, fusion, head"),
    ("kind", "lora", "in an artifact of kind lora"),
    ("seed", "3", "seed: "),
    ("seed", True, "seed: "),
    ("seed", -1, "seed: Input should be greater than or equal to 0, got -1"),
    ("seed", 2**63, "seed: "),
    ("sources", {}, "sources: "),
    ("sources", [{"name": "a"}], "sources.0.hash: Field required"),
    ("sources", ["a"], "sources.0: "),
    ("sources", [{"name": "a", "hash": "b"}], "sources has 1 entries in an artifact of kind adapter"),
    ("backbone/hidden_size", 8.5, "backbone.hidden_size: "),
    ("backbone/hidden_size", 0, "backbone.hidden_size: "),
    ("backbone/layers", 10**6, "backbone.layers: "),
    ("backbone/revision", 1, "backbone.revision: "),
    ("backbone/more", 1, "backbone.more: "),
    ("data/max_length", 0, "data.max_length: "),
    ("data/labels", {"a": 1}, "data.labels.a: "),
    ("head/more", 1, "head.more: "),
    ("head/pooling", "max", "head.pooling: Value error, expected one of cls, last, mean"),
    ("head/layers", 3, "head.layers: Input should be 1 or 2, got 3"),
    ("head/dropout", None, "head.dropout: "),
    ("head/dropout", 1.0, "head.dropout: "),
    ("head/outputs", 0, "head.outputs: "),
    ("head/decision", {"threshold": None}, "head.decision.threshold: "),
    ("adapter", None, "adapter is null in an artifact of kind adapter"),
    ("adapter/more", 1, "adapter.more: "),
    ("adapter/sites", "feedforward", "adapter.sites: "),
    ("adapter/nonlinearity", "x", "adapter.nonlinearity=x: expected one of relu"),
    ("adapter/scaling", "x", "adapter.scaling=x"),
    ("adapter/shared", "yes", "adapter.shared: "),
    ("adapter/bottleneck_sizes", {}, "adapter.bottleneck_sizes has nothing"),
    (
        "adapter/bottleneck_sizes",
        {"2.feedforward": 2},
        "has 2.feedforward, expected slots of 2 layers with feedforward",
    ),
    ("adapter/bottleneck_sizes", {"0.attention": 2}, "has 0.attention, expected slots"),
    ("adapter/bottleneck_sizes", {"00.feedforward": 2}, "has 00.feedforward, expected slots"),
    ("adapter/bottleneck_sizes", {"0.feedforward": 0}, "adapter.bottleneck_sizes.0.feedforward: "),
    ("adapter/bottleneck_sizes", {"0.feedforward": True}, "adapter.bottleneck_sizes.0.feedforward: "),
    ("composition", {"name": "mean"}, "composition is set in an artifact of kind adapter"),
    ("task/more", 1, "task.more: "),
    ("task/name", None, "task.name: "),
    *(("task/name", name, "without ..") for name in ("../../x", "/etc", "a/../../x", "..", "")),
    (
        "multitask",
        {"a": {"task": {"name": "../../x"}, "head": {"pooling": "cls", "layers": 1, "outputs": 1, "dropout": 0.1}}},
        "multitask.a.task.name: Value error, expected a name",
    ),
    ("task/labels", "no", "task.labels: "),
    ("task/hub", {"path": 1}, "task.hub.path: "),
    ("task/columns", {"a": 1}, "task.columns.a: "),
    ("run/something", [1], "run.something: "),
    ("run/git", {"commit": 1}, "run.git.commit: "),
    ("metrics/validation", 1, "metrics.validation: "),
    ("metrics/validation/accuracy", "1", "metrics.validation.accuracy: "),
    ("versions/torch", 2, "versions.torch: "),
    ("files", {WEIGHTS: FILES[WEIGHTS]}, f"key files.{HEAD} is missing"),
    ("files", FILES | {"..": {}}, "files.."),
    ("files", FILES | {"more": {}}, "files.more"),
    (f"files/{WEIGHTS}/bytes", "10", f"files.{WEIGHTS}.bytes: "),
    ("extra", 1, "extra: "),
    ("multitask", [], "multitask: "),
    ("multitask", {}, "multitask: "),
    ("multitask", {"a": {"task": {"name": "a"}}}, "multitask.a.head: Field required"),
    ("multitask", {"a": {"task": {"name": "a"}, "head": {"layers": 1}}}, "multitask.a.head.pooling: "),
)


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_wrong_value_is_named(make_manifest: Make, key: str, value: Any, message: str) -> None:
    text = json.dumps(change(values_of(make_manifest()), key, value))
    with pytest.raises(UserError) as error:
        Manifest.from_json(text, Path("store/mnli/manifest.json"))
    assert str(error.value).startswith("store/mnli/manifest.json: ")
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "key", [field.alias or key for key, field in Manifest.model_fields.items() if key not in OPTIONAL]
)
def test_missing_key_is_named(make_manifest: Make, key: str) -> None:
    values = values_of(make_manifest())
    del values[key]
    with pytest.raises(UserError, match=key):
        Manifest.from_json(json.dumps(values), Path("m"))


SEVERAL = {
    name: {
        "task": {"name": name, "kind": "regression"},
        "head": {"pooling": "cls", "layers": 1, "outputs": outputs, "dropout": 0.1},
    }
    for name, outputs in (("ztask", 1), ("a.task", 3))
}


def test_multiple_tasks_keep_their_order(make_manifest: Make) -> None:
    manifest = make_manifest(files=FILES, multitask=SEVERAL)
    again = Manifest.from_json(manifest.to_json(), Path("m"))
    assert again == manifest and list(again.multitask or {}) == ["ztask", "a.task"]


def test_a_single_task_manifest_reads_and_hashes_as_in_version_0_1(make_manifest: Make) -> None:
    manifest = make_manifest(files=FILES)
    values = values_of(manifest)
    assert "multitask" not in values
    for content in (values, values | {"multitask": None}):
        again = Manifest.from_json(json.dumps(content), Path("m"))
        assert again == manifest and again.multitask is None
    # As the version computed it that knew one task only.
    assert manifest.hash == "148f42dcfbfb35ad02805453ef097ddb8508775b48331ad299edc68400ee272f"
    assert make_manifest(files=FILES, multitask=SEVERAL).hash == manifest.hash  # a fusion takes no head


@pytest.mark.parametrize("key", ["backbone/fingerprint", "head/pooling", "data/max_length", "run/identity"])
def test_missing_inner_key_is_named(make_manifest: Make, key: str) -> None:
    values = values_of(make_manifest())
    group, inner = key.split("/")
    del values[group][inner]
    with pytest.raises(UserError, match=rf"m: {group}\.{inner}: Field required"):
        Manifest.from_json(json.dumps(values), Path("m"))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": 1'])
def test_invalid_manifests(text: str) -> None:
    with pytest.raises(UserError, match=r"^m(: | is not valid JSON)"):
        Manifest.from_json(text, Path("m"))


def test_a_fusion_has_sources_and_a_composition(make_manifest: Make) -> None:
    values = values_of(make_manifest("f", "fusion"))
    with pytest.raises(UserError, match="sources has 0 entries"):
        Manifest.from_json(json.dumps(values | {"sources": []}), Path("m"))
    values["composition"] = None
    with pytest.raises(UserError, match="composition is null"):
        Manifest.from_json(json.dumps(values), Path("m"))


def test_hash_depends_on_what_the_weights_compute(make_manifest: Make) -> None:
    def hash_of(kind: str = "adapter", files: dict[str, Any] = FILES, **changes: Any) -> str:
        return make_manifest("any", kind, files=files, **changes).hash

    first = hash_of()
    assert len(first) == 64 and first == hash_of()
    same = [
        make_manifest("other", files=FILES).hash,
        hash_of(seed=4),
        hash_of(metrics={}),
        hash_of(files=FILES | {HEAD: {"sha256": "3" * 64, "bytes": 20}}),
        hash_of(adapter={"dropout": 0.2, "init": "houlsby", "reduction_factor": 2.0, "layers": [0, 1]}),
        hash_of(backbone={"name_or_path": "/a/copy/of/tiny"}),
    ]
    assert set(same) == {first}
    different = [
        hash_of(files=FILES | {WEIGHTS: {"sha256": "3" * 64, "bytes": 10}}),
        hash_of(adapter={"scaling": 2.0}),
        hash_of(adapter={"nonlinearity": "gelu"}),
        hash_of(adapter={"reads": "output"}),
        hash_of(adapter={"bottleneck_sizes": {"0.feedforward": 2}}),
        hash_of(backbone={"fingerprint": "e" * 64}),
        hash_of("head"),
        hash_of("head", files=FILES | {HEAD: {"sha256": "3" * 64, "bytes": 20}}),
        hash_of("fusion", sources=[{"name": "a", "hash": "a"}, {"name": "b", "hash": "b"}]),
        hash_of("fusion", sources=[{"name": "b", "hash": "b"}, {"name": "a", "hash": "a"}]),
        hash_of("fusion", sources=[{"name": "a", "hash": "a"}], composition={"temperature": 2.0}),
        hash_of("fusion", composition={"name": "pruned", "keep": 1, "kept": {"0.feedforward": [0]}}),
        hash_of("fusion", composition={"name": "pruned", "keep": 1, "kept": {"0.feedforward": [1]}}),
        hash_of("fusion", composition={"rank": 2}),
        hash_of("fusion", composition={"target_adapter": True}),
        hash_of("fusion", composition={"name": "continued", "continued": "a"}),
        hash_of("fusion", composition={"name": "continued", "continued": "b"}),
    ]
    assert len({first, *different}) == len(different) + 1
    assert hash_of("fusion") == hash_of("fusion", composition={"value_penalty": 0.5, "dropout": 0.5})
    pruned = {"name": "pruned", "keep": 1, "kept": {"0.feedforward": [0]}}
    assert hash_of("fusion", composition=pruned) == hash_of("fusion", composition=pruned | {"fusion": "x", "keep": 2})


def test_the_checks_need_no_torch() -> None:
    code = "import sys, fusion.store.manifest; print([m for m in ('torch', 'safetensors') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


ROOT = Path(__file__).parents[2]


def test_manifests_of_earlier_versions_are_read(make_manifest: Make) -> None:
    """As the first stores have them: without method, multitask, git and threads, and with a package."""
    values = values_of(make_manifest(backbone={"package": None}))
    assert not {"method", "multitask"} & values.keys() and not {"git", "threads", "folder"} & values["run"].keys()
    manifest = Manifest.from_json(json.dumps(values), Path("m"))
    assert manifest.method is None and manifest.backbone.package is None
    later = values | {"run": values["run"] | {"git": None, "threads": 2, "folder": "x"}}
    assert Manifest.from_json(json.dumps(later), Path("m")).hash == manifest.hash


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"seed": 3', '"seed": NaN'),
        ('"optim.lr": 0.0001', '"optim.lr": -Infinity'),
        ('"optim.lr": 0.0001', '"optim.lr": 1e999'),
        ('"seed": 3', f'"seed": {"9" * 5000}'),
        ('"seed": 3', '"seed": 3, "x": ' + "[" * 100_000),
        ('"tiny"', '"\\ud800"'),
    ],
)
def test_invalid_json(make_manifest: Make, old: str, new: str) -> None:
    text = json.dumps(values_of(make_manifest()))
    assert text.count(old) == 1
    with pytest.raises(UserError, match=r"^m is not valid JSON") as error:
        Manifest.from_json(text.replace(old, new), Path("m"))
    assert len(str(error.value)) < 700 and str(error.value).isprintable()
