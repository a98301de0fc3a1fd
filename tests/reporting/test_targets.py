"""Targets, methods and seeds of run folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusion.errors import UserError
from fusion.reporting.contents import costs
from fusion.reporting.reading import read_runs
from fusion.reporting.records import attention_of, curves_of
from fusion.reporting.statistics import Difference
from fusion.reporting.targets import Target, targets_of
from tests.reporting.conftest import Write


def targets(folder: Path, split: str | None = None) -> list[Target]:
    return targets_of(read_runs([folder / "runs"]), split)


def only(folder: Path, split: str | None = None) -> Target:
    (target,) = targets(folder, split)
    return target


def differences(target: Target) -> dict[str, Difference]:
    """By method, of its best group to the baseline."""
    return {method: group.difference for method, group in target.groups.items() if group.difference}


def adjusted(target: Target, method: str) -> float | None:
    return target.groups[method].adjusted


def test_methods_and_seeds(tmp_path: Path, write: Write) -> None:
    for seed, (head, adapter, fused) in enumerate([(0.6, 0.7, 0.9), (0.65, 0.8, 0.85)], start=1):
        write(seed=seed, score=head, method__name="head")
        write(seed=seed, score=adapter, wrong=round(20 * (1 - adapter)))
        write(seed=seed, score=fused, sources=["a", "b"], wrong=round(20 * (1 - fused)))
    target = only(tmp_path)
    assert (target.label, target.task, target.split, target.metric, target.rows) == (
        *("tweets", "tweets", "validation", "accuracy"),
        20,
    )
    assert list(target.groups) == ["head", "single adapter", "fusion of 2"]
    assert target.groups["head"].scores == [0.6, 0.65]
    assert target.groups["fusion of 2"].mean == pytest.approx(0.875)
    assert target.groups["fusion of 2"].deviation == pytest.approx(0.05 / 2**0.5)
    assert set(differences(target)) == {"head", "fusion of 2"}
    fused_by = differences(target)["fusion of 2"]
    assert fused_by.mean == pytest.approx(0.125) and fused_by.unit == "examples and seeds"
    assert (fused_by.wins, fused_by.ties, fused_by.losses) == (2, 0, 0)
    assert differences(target)["head"].unit == "seeds", "its predictions were not kept"
    assert all(adjusted(target, method) == one.p for method, one in differences(target).items()), "one target"


def test_holm_is_over_the_targets(tmp_path: Path, write: Write) -> None:
    for task in ("cb", "rte", "mrpc"):
        write(task, score=0.7, wrong=6)
        write(task, score=0.95, wrong=1, sources=["a", "b"])
    found = targets(tmp_path)
    assert [target.label for target in found] == ["cb", "mrpc", "rte"]
    raw = [differences(target)["fusion of 2"].p for target in found]
    assert len(set(raw)) == 1 and raw[0] is not None
    assert all(adjusted(t, "fusion of 2") == pytest.approx(min(1, 3 * raw[0])) for t in found)


def test_seeds_are_grouped_by_settings_not_names(tmp_path: Path, write: Write) -> None:
    """Arbitrary names, sources with their own seeds: one group of three seeds."""
    for seed, score in ((1, 0.75), (2, 0.7), (3, 0.6)):
        for name in ("a", "b"):
            write(name, seed=seed, artifact=f"{name}-s{seed}", name=f"{name}-s{seed}")
        write(seed=seed, score=0.7, artifact=f"x-s{seed}", name=f"x-s{seed}")
        sources = [f"a-s{seed}", f"b-s{seed}"]
        write(seed=seed, score=score, sources=sources, artifact=f"f{seed}", name=f"f{seed}")
    target = next(target for target in targets(tmp_path) if target.task == "tweets")
    group = target.groups["fusion of 2"]
    assert group.scores == [0.75, 0.7, 0.6] and group.others == 0 and group.differing == ""
    assert differences(target)["fusion of 2"].mean == pytest.approx(-0.05 / 3)


def test_settings_of_sources_are_settings(tmp_path: Path, write: Write) -> None:
    write("a", artifact="a-s1")
    write("a", artifact="a-s2", optim__lr=0.5)
    for seed in (1, 2):
        write(seed=seed, sources=[f"a-s{seed}", "b"])
    target = next(target for target in targets(tmp_path) if target.task == "tweets")
    variants = target.variants["fusion of 2"]
    assert sorted(one.differing for one in variants) == ["sources.0.optim.lr=0.001", "sources.0.optim.lr=0.5"]


def test_runs_with_other_seeds_of_the_sources_all_count(tmp_path: Path, write: Write) -> None:
    write(score=0.5, wrong=10)
    for seed, score in ((1, 0.6), (2, 0.8)):
        write("a", seed=seed, artifact=f"a-s{seed}")
        write(score=score, wrong=round(20 * (1 - score)), sources=[f"a-s{seed}", "b"])
    target = next(target for target in targets(tmp_path) if target.task == "tweets")
    group = target.groups["fusion of 2"]
    assert group.scores == [0.6, 0.8] and group.seeds == 1
    difference = differences(target)["fusion of 2"]
    assert difference.mean == pytest.approx(0.2) and difference.wins == 0, "no pairs"


def test_jointly_trained_tasks_are_settings(tmp_path: Path, write: Write) -> None:
    for other in ("rte", "mrpc"):
        tasks = [{"name": name, "metrics": ["accuracy"]} for name in ("cb", other)]
        result = {"metrics": {"cb/validation": {"accuracy": 0.6}}, "task": f"cb+{other}"}
        write(task=None, tasks=tasks, method__name="multitask_adapter", result=result)
    (target,) = targets(tmp_path)
    assert {one.differing for one in target.variants["multi-task adapter"]} == {"tasks=rte", "tasks=mrpc"}


def test_budget_differences_are_named(tmp_path: Path, write: Write) -> None:
    for seed in (1, 2):
        write(seed=seed, score=0.5, wrong=10, optim__lr=1e-4, optim__patience=3)
        fusion = {"optim__patience": None, "trainer": {"max_epochs": 20}, "data__batch_size": 8}
        write(seed=seed, score=0.9, wrong=2, sources=["a", "b"], optim__lr=1e-3, **fusion)
    group = only(tmp_path).groups["fusion of 2"]
    assert group.difference is not None and group.difference.p is not None and group.difference.p < 0.05
    assert sorted(group.unequal) == [
        "data.batch_size 8 vs. null",
        "optim.lr 0.001 vs. 0.0001",
        "optim.patience null vs. 3",
        "trainer.max_epochs 20 vs. null",
    ]


def test_default_learning_rates_are_no_budget_difference(tmp_path: Path, write: Write) -> None:
    write(score=0.5, wrong=10, optim__lr=5e-4)
    write(score=0.9, wrong=2, sources=["a", "b"], optim__lr=2e-4)
    assert only(tmp_path).groups["fusion of 2"].unequal == ()
    write(score=0.95, wrong=1, sources=["a", "b"], optim__lr=1e-3)
    best, default = only(tmp_path).variants["fusion of 2"]
    assert best.unequal == ("optim.lr 0.001 vs. 0.0005",) and default.unequal == ("optim.lr 0.0002 vs. 0.0005",)


def test_scores_of_other_examples_are_unequal(tmp_path: Path, write: Write) -> None:
    for seed in (1, 2):
        write(seed=seed, score=0.5, wrong=10)
        folder = write(seed=seed, score=0.9, wrong=2, sources=["a", "b"])
        outcomes = json.loads((folder / "outcomes.json").read_text())
        own = outcomes["validation"]
        few = {key: own[key][:10] for key in ("labels", "predicted")} | {"fingerprint": "of 10 rows"}
        (folder / "outcomes.json").write_text(json.dumps({"validation": few}))
    group = only(tmp_path).groups["fusion of 2"]
    count = len(own["labels"])
    assert group.unequal == (f"evaluated on 10 examples vs. {count}",)
    write(seed=3, score=0.9, wrong=2, sources=["a", "b"])  # one seed in common is enough to compare
    assert only(tmp_path).groups["fusion of 2"].unequal == ()


def test_equal_budgets_are_preferred(tmp_path: Path, write: Write) -> None:
    for rate, alone in ((1e-4, 0.6), (1e-3, 0.85)):
        write(score=alone, wrong=round(20 * (1 - alone)), optim__lr=rate)
    write(score=0.8, wrong=4, sources=["a", "b"], optim__lr=1e-4)
    group = only(tmp_path).groups["fusion of 2"]
    assert group.unequal == () and group.difference is not None
    assert group.difference.mean == pytest.approx(0.2), "to the adapter with its own rate"
    write(score=0.9, wrong=2, sources=["a", "b"], optim__lr=1e-3)
    best, other = only(tmp_path).variants["fusion of 2"]
    assert best.unequal == other.unequal == (), "both have tried the same rates"
    assert best.difference is not None and best.difference.mean == pytest.approx(0.05)
    write(score=0.95, wrong=1, sources=["a", "b"], optim__lr=1e-2)
    best, low, middle = only(tmp_path).variants["fusion of 2"]
    assert best.unequal == ("optim.lr 0.01 vs. 0.001",)
    assert low.unequal == (), "neither is the best of its method"
    assert middle.unequal == ("optim.lr: 3 values tried vs. 2",)


def test_each_setting_has_a_difference(tmp_path: Path, write: Write) -> None:
    for layers, wrong in (([0, 1], 8), ([2, 3], 6), ([4, 5], 2)):
        for seed in (1, 2):
            write(seed=seed, score=1 - wrong / 20, wrong=wrong, adapter__layers=layers)
    best, *others = only(tmp_path).variants["single adapter"]
    assert best.differing == "adapter.layers=4+5" and best.difference is None
    for group in others:
        assert group.difference is not None and group.difference.low is not None and group.unequal == ()
        assert group.adjusted is not None and group.difference.p is not None
        assert group.adjusted >= group.difference.p, "two tests, so Holm's correction counts both"


def test_majority_class(tmp_path: Path, write: Write) -> None:
    folder = write(score=0.9, wrong=2)
    kept = json.loads((folder / "outcomes.json").read_text())
    kept["validation"]["labels"][:5] = [1] * 5
    (folder / "outcomes.json").write_text(json.dumps(kept))
    ones = sum(kept["validation"]["labels"])
    target = only(tmp_path)
    assert (target.majority, target.constant) == ("majority class", {"accuracy": pytest.approx(ones / 20)})


def test_best_setting_represents_its_method(tmp_path: Path, write: Write) -> None:
    for rate, score in ((1e-4, 0.6), (1e-3, 0.8), (1e-2, 0.7)):
        for seed in (1, 2):
            write(seed=seed, score=score, optim__lr=rate)
    target = only(tmp_path)
    group = target.groups["single adapter"]
    assert group.scores == [0.8, 0.8] and group.others == 2
    assert group.differing == "optim.lr=0.001"
    assert sorted(one.differing for one in target.variants["single adapter"]) == [
        *("optim.lr=0.0001", "optim.lr=0.001", "optim.lr=0.01")
    ]


def test_settings_are_selected_on_validation_and_shown_on_test(tmp_path: Path, write: Write) -> None:
    for name, rate, validation, test in (("a", 1e-4, 0.9, 0.5), ("b", 1e-3, 0.8, 0.7)):
        write(score=validation, optim__lr=rate, artifact=name)
        result = {"hash": None, "name": name}
        write(command="evaluate", split="test", score=test, artifact=name, result=result)
    group = only(tmp_path).groups["single adapter"]
    assert only(tmp_path).split == "test"
    assert group.scores == [0.5] and group.differing == "optim.lr=0.0001"
    assert group.chosen_on == "validation" and only(tmp_path).selected_here == []
    assert only(tmp_path, "validation").groups["single adapter"].scores == [0.9]


def test_settings_without_validation_scores_are_selected_on_the_shown_split(tmp_path: Path, write: Write) -> None:
    for name, rate, test in (("a", 1e-4, 0.5), ("b", 1e-3, 0.7)):
        write(score=0.9 if name == "a" else None, optim__lr=rate, artifact=name)
        result = {"hash": None, "name": name}
        write(command="evaluate", split="test", score=test, artifact=name, result=result)
    target = only(tmp_path, "test")
    group = target.groups["single adapter"]
    assert (group.scores, group.chosen_on, target.selected_here) == (*([0.7], "test"), ["the best setting of a method"])


def test_a_fusion_evaluated_on_another_task(tmp_path: Path, write: Write) -> None:
    """It has its own name there, and neither attention, curves nor costs, which are those of its own target."""
    write("tweets", artifact="tweets", sources=["a", "b"])
    write(command="evaluate", artifact="tweets", split="test", result={"task": "mine", "name": "tweets", "hash": None})
    found = read_runs([tmp_path / "runs"])
    lines = [{"epoch": 2, "sources": ["a", "b"], "slots": {"0.feedforward": {"mean": [0.3, 0.7], "entropy": 0.5}}}]
    (tmp_path / "runs" / "001" / "attention.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mine, tweets = targets_of(found)
    assert list(mine.groups) == ["fusion of 2 on tweets alone"] and list(tweets.groups) == ["fusion of 2"]
    assert [one.title for one in attention_of([mine, tweets], found)] == ["tweets ← fusion of 2"]
    assert curves_of(mine, found) == {} and costs(mine) == [] and len(costs(tweets)) == 1


def test_a_setting_that_older_runs_do_not_have_is_shown_with_its_default(tmp_path: Path, write: Write) -> None:
    write(score=0.7)
    write(score=0.8, backbone__encoder_only=True)
    shown = [group.differing for group in only(tmp_path).variants["single adapter"]]
    assert shown == ["backbone.encoder_only=True", "backbone.encoder_only=False"]


def test_source_evaluated_on_the_target(tmp_path: Path, write: Write) -> None:
    write("movies", artifact="movies", score=0.9)
    write(score=0.7, artifact="own")
    for name, score in (("own", 0.72), ("movies", 0.6)):
        result = {"task": "tweets", "name": name, "hash": None}
        write(command="evaluate", artifact=name, split="test", score=score, result=result)
    by_task = {target.task: target for target in targets(tmp_path)}
    alone = differences(by_task["tweets"])["movies alone"]
    assert alone.mean == pytest.approx(-0.12) and alone.wins + alone.ties + alone.losses == 0
    assert {m: g.scores for m, g in by_task["tweets"].groups.items()} == {
        "single adapter": [0.72],
        "movies alone": [0.6],
    }
    assert list(by_task["movies"].groups) == ["single adapter"]


def test_the_last_evaluation_and_the_last_training_count(tmp_path: Path, write: Write) -> None:
    write(score=0.5, artifact="x")
    write(score=0.6, artifact="x", optim__lr=0.5)
    write(score=0.6, artifact="x", optim__lr=0.5, before="done")
    for score in (0.1, 0.2):
        write(command="evaluate", artifact="x", split="test", score=score, result={"hash": None, "name": "x"})
    assert only(tmp_path, "validation").groups["single adapter"].scores == [0.6]
    assert only(tmp_path, "test").groups["single adapter"].scores == [0.2]


def test_backbones_and_limits_are_separate_targets(tmp_path: Path, write: Write) -> None:
    write(data__limit__train=100)
    write(data__limit__train=None)
    write(data__limit__train=100, backbone__name_or_path="org/large")
    labels = [target.label for target in targets(tmp_path)]
    assert sorted(labels) == [
        f"tweets · {one}" for one in ("100 examples · large", "100 examples · tiny", "all examples · tiny")
    ]


def test_missing_sources_named_by_seed_are_one_setting(tmp_path: Path, write: Write) -> None:
    for seed in (1, 2):
        write(seed=seed, sources=[f"a-seed-{seed}", f"b-seed-{seed}"], score=0.8)
    assert only(tmp_path).groups["fusion of 2"].scores == [0.8, 0.8]


def test_names_of_methods(tmp_path: Path, write: Write) -> None:
    write(sources=["a"])
    write(sources=["a", "b"], composition={"name": "scalearn"})
    write(sources=["a", "b"], composition={"name": "adapterfusion", "target_adapter": True})
    write(method__name="lora")
    assert list(only(tmp_path).groups) == ["LoRA", "fusion of 2 + own adapter", "fusion of a", "scalearn of 2"]


def test_multi_task_training(tmp_path: Path, write: Write) -> None:
    tasks = [{"name": name, "metrics": ["accuracy"]} for name in ("cb", "rte")]
    metrics = {"cb/validation": {"accuracy": 0.6}, "rte/validation": {"accuracy": 0.5}}
    result = {"metrics": metrics, "task": "cb+rte"}
    write(task=None, tasks=tasks, method__name="multitask_adapter", result=result)
    assert {t.task: t.groups["multi-task adapter"].scores for t in targets(tmp_path)} == {"cb": [0.6], "rte": [0.5]}


def test_non_numeric_scores_are_omitted(tmp_path: Path, write: Write) -> None:
    write(score=None)
    write(result={"metrics": {"validation": {"accuracy": None}}})
    write(result={"metrics": {"validation": "high"}})
    write(result={"metrics": None})
    assert targets(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    [
        {"validation": {"labels": [0, 1], "predicted": [0]}},
        {"validation": {"labels": ["a"], "predicted": ["a"], "fingerprint": "f"}},
        {"validation": None},
        {"validation": {"labels": [[0]], "predicted": [[0]], "fingerprint": "f"}},
        [],
    ],
)
def test_damaged_predictions_are_ignored(tmp_path: Path, write: Write, content: object) -> None:
    folder = write()
    (folder / "outcomes.json").write_text(json.dumps(content))
    (sample,) = only(tmp_path).groups["single adapter"].entries
    assert sample.metrics == {"accuracy": 0.8} and sample.predictions is None


def test_unreadable_folders_are_named(tmp_path: Path, write: Write) -> None:
    write()
    for name, text in (("result.json", "{"), ("config.yaml", "a: [b"), ("config.yaml", "- 1"), ("status.json", "[]")):
        (write() / name).write_text(text)
    (write() / "result.json").unlink()
    write(status="failed")
    write(status="running")
    write(artifact="tweets-debug", result={"name": "tweets-debug"})
    found = read_runs([tmp_path / "runs"])
    assert len(found.done) == 1 and len(found.unread) == 5
    assert found.others == {"failed": 1, "running": 1}
    (failed,) = found.failed
    assert failed.endswith("007: None") and found.debug == 1
    assert all(any(f"{number:03d}" in line for line in found.unread) for number in range(2, 7))


def test_folders(tmp_path: Path, write: Write) -> None:
    folder = write()
    assert len(read_runs([tmp_path / "runs", folder, tmp_path]).done) == 1
    assert read_runs([folder]).done[0].folder == folder.resolve()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no runs found"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(UserError, match="no runs found"):
        read_runs([folder], without=folder)
