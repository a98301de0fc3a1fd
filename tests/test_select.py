"""`fusion.select`: methods at equal budget, folds of the validation examples, and the artifact that is kept."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from fusion import evaluate, select
from fusion.analysis.evaluation import Evaluation
from fusion.cli.finished import end_of_run
from fusion.config.commands import EvaluateConfig
from fusion.config.data import Fold
from fusion.config.stages import SelectConfig
from fusion.data.rows import load_rows
from fusion.errors import TrainingError, UserError
from fusion.reporting.reading import RunFolder
from fusion.reporting.scores import all_scores
from fusion.runs.run import Run
from fusion.stages import search as searching
from fusion.stages import selection as selecting
from fusion.stages.selection import check_selection
from fusion.store.listing import rebuild_lines
from fusion.store.lookup import names, read_manifest
from tests.bench import Bench, same


def run_of(bench: Bench, task: str = "plays", **changes: Any) -> tuple[SelectConfig, Run]:
    settings = bench.settings(task, **{"sources": ["films"], **changes})
    settings["optim"] = dataclasses.replace(settings["optim"], lr=None)
    config = SelectConfig(**settings)
    config.name = config.name or config.default_name()
    return config, bench.run("select", config)


def selected(bench: Bench, task: str = "plays", **changes: Any) -> dict[str, Any]:
    return select.main.__wrapped__(*run_of(bench, task, **changes))  # type: ignore[attr-defined]


def test_the_best_method_on_the_second_fold_is_kept(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.stage1("films")
    config, run = run_of(bench)
    check_selection(config, run)
    result = select.main.__wrapped__(config, run)  # type: ignore[attr-defined]
    found = result["selection"]
    assert set(found) == {"chosen", "methods", "metric", "examples", "seconds", "runner_up"}
    assert [one["method"] for one in found["methods"]] == ["head", "adapter", "adapterfusion"]
    assert all(set(one) == {"method", "score", "metrics", "seconds", "trainable"} for one in found["methods"])
    # The test split has labels, so its examples are reported, and the 16 validation examples are two folds.
    assert found["examples"] == {"selection": 8, "report": 8} and found["metric"] == "accuracy"
    assert all(set(one["metrics"]) == {"test"} for one in found["methods"])
    scores = {one["method"]: one["score"] for one in found["methods"]}
    assert found["chosen"] == max(scores, key=lambda name: scores[name])
    second = found["runner_up"]
    assert scores[second["method"]] == max(score for name, score in scores.items() if name != found["chosen"])
    assert second["difference"] == pytest.approx(scores[found["chosen"]] - scores[second["method"]])
    assert second["interval"][0] <= second["difference"] <= second["interval"][1]
    assert found["seconds"] == pytest.approx(sum(one["seconds"] for one in found["methods"]))

    store = bench.folder / "store"
    assert set(names(store)) == {"films", "plays-selected"} and result["name"] == "plays-selected"
    unbiased = next(one["metrics"] for one in found["methods"] if one["method"] == found["chosen"])
    assert result["metrics"] == unbiased == read_manifest("plays-selected", store).metrics
    assert read_manifest("plays-selected", store).content["result"]["selection"] == found
    chosen = next(one for one in found["methods"] if one["method"] == found["chosen"])
    tested = bench.evaluate("plays-selected", split="test")["metrics"]
    assert tested["test"]["accuracy"] == pytest.approx(chosen["metrics"]["test"]["accuracy"])
    used = EvaluateConfig("plays-selected", str(store), dataclasses.replace(config.data, validation_fold="1/2"))
    again = evaluate.main.__wrapped__(used, bench.run("evaluate", used))  # type: ignore[attr-defined]
    assert again["metrics"]["validation"]["accuracy"] == pytest.approx(chosen["score"]) and again["rows"] == 8

    finished = [RunFolder(run.directory, "select", (), "2026", False, run.config, result)]
    (reported,) = all_scores(finished)
    named = {"head": "head", "adapter": "single adapter", "adapterfusion": "fusion of films"}
    assert reported.method == f"{named[found['chosen']]}, selected" and reported.split == "test"
    assert reported.trained is not None and reported.trained.has_default_rate
    (command,) = rebuild_lines(read_manifest("plays-selected", store), store, store)[-1:]
    assert command == "# plays-selected was not created by a command"

    capsys.readouterr()
    end_of_run(run, result)
    titles, *rows, evaluated, report = capsys.readouterr().out.splitlines()
    assert titles.split("  ")[0] == "method" and "accuracy for the selection (8)" in titles
    assert "accuracy, test (8)" in titles and len(rows) == 3
    assert [row.split()[0] for row in rows if row.endswith("selected")] == [found["chosen"]]
    assert "python -m fusion.evaluate artifact=plays-selected split=test" in evaluated and "fusion.report" in report

    assert selected(bench) == result
    with pytest.raises(UserError, match="the store already contains a different plays-selected"):
        selected(bench, methods=["adapter", "adapterfusion"])


def test_each_method_is_trained_as_by_its_command(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.stage1("films")
    kept: dict[str, Any] = {}
    monkeypatch.setattr(searching, "keep", lambda *args: kept.update(chosen=args[3], found=args[5]) or {})
    selected(bench, methods=["adapter", "adapterfusion"])
    data = dataclasses.replace(bench.settings("plays")["data"], validation_fold="0/2")
    optim = dataclasses.replace(bench.settings("plays")["optim"], lr=None)
    alone = bench.stage1("plays", data=data, optim=optim, name="alone")
    assert same(bench.weights("alone"), bench.weights("plays-selected-adapter"))
    fused = bench.stage2("plays", ["films"], data=data, optim=dataclasses.replace(optim, lr=None), name="fused")
    assert same(bench.weights("fused"), bench.weights("plays-selected-adapterfusion"))
    assert kept["chosen"].startswith("plays-selected-") and fused["metrics"] and alone["metrics"]


def test_a_third_fold_is_reported_without_labels_of_the_test_split(bench: Bench) -> None:
    bench.stage1("films")
    path = bench.folder / "data" / "plays" / "test.jsonl"
    rows = [{"text": json.loads(line)["text"]} for line in path.read_text().splitlines()]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = selected(bench, methods=["head", "adapter", "mean", "adapterfusion"])["selection"]
    assert found["examples"] == {"selection": 5, "report": 5}
    assert [one["method"] for one in found["methods"]] == ["head", "adapter", "mean", "adapterfusion"]
    assert all(set(one["metrics"]) == {"validation"} for one in found["methods"])
    data = bench.settings("plays")["data"]
    parts = [
        load_rows(bench.tasks["plays"], dataclasses.replace(data, validation_fold=str(fold)), "validation")
        for fold in Fold.each(3)
    ]
    whole = load_rows(bench.tasks["plays"], data, "validation")
    assert sorted(text for part in parts for text in part.texts) == sorted(whole.texts)
    assert [len(part) for part in parts] == [6, 5, 5]


def test_an_interrupted_selection_continues_and_failed_trainings_are_left_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    bench.stage1("films")
    record, trained = selecting.record, []

    def interrupt(run: Run, work: Any) -> dict[str, Any]:
        if run.command == "stage2":
            raise KeyboardInterrupt
        trained.append(run.config["name"])
        return record(run, work)

    monkeypatch.setattr(selecting, "record", interrupt)
    with pytest.raises(KeyboardInterrupt):
        selected(bench, methods=["adapter", "adapterfusion"])
    assert "plays-selected stopped; to continue, rerun the command: it continues after the finished" in caplog.text
    state = check_selection(*run_of(bench, methods=["adapter", "adapterfusion"]))
    assert state == ("interrupted", "after the finished trainings")
    store = bench.folder / "store"
    before = bench.weights("plays-selected-adapter")

    def fail(run: Run, work: Any) -> dict[str, Any]:
        if run.command == "stage2":
            raise TrainingError("diverged")
        return record(run, work)

    monkeypatch.setattr(selecting, "record", fail)
    result = selected(bench, methods=["adapter", "adapterfusion"])
    assert result["selection"]["chosen"] == "adapter"
    assert [one["method"] for one in result["selection"]["methods"]] == ["adapter"]
    assert same(bench.weights("plays-selected"), before) and set(names(store)) == {"films", "plays-selected"}
    monkeypatch.setattr(selecting, "record", lambda run, work: fail(dataclasses.replace(run, command="stage2"), work))
    with pytest.raises(TrainingError, match="none of the 2 trainings succeeded"):
        selected(bench, methods=["adapter", "adapterfusion"], name="other")


def test_a_different_kind_is_replaced_with_overwrite(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.stage1("films")
    scores = {"head": 1.0, "adapter": 0.0}

    def evaluated(config: SelectConfig, artifact: str, splits: Any) -> list[Evaluation]:
        metrics = {"test": {"accuracy": scores[artifact.rsplit("-", 1)[1]]}}
        return [Evaluation([], metrics, examples=8) for _ in splits]

    monkeypatch.setattr(selecting, "_evaluate", evaluated)
    methods = ["head", "adapter", "adapterfusion"]
    scores["adapterfusion"] = 0.0
    assert selected(bench, methods=methods)["selection"]["chosen"] == "head"
    scores |= {"head": 0.0, "adapterfusion": 1.0}
    assert selected(bench, overwrite=True, methods=methods)["selection"]["chosen"] == "adapterfusion"
    store = bench.folder / "store"
    assert read_manifest("plays-selected", store).kind == "fusion" and set(names(store)) == {"films", "plays-selected"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["adapter"]}, "methods=[adapter]: expected at least two distinct of adapter, head"),
        (
            {"methods": ["adapter", "pruned"]},
            "methods=[adapter,pruned]: unknown method pruned; expected some of adapter, head",
        ),
        ({"methods": ["adaptr", "adapterfusion"]}, "unknown method adaptr: did you mean adapter"),
        ({"methods": ["head", "adapter"]}, "methods=[head,adapter]: composition=adapterfusion is not among them; add"),
        ({"search": True, "search_rates": [1e-3]}, "search_rates: the methods have different learning rates"),
        ({"sources": []}, "sources is empty"),
        ({"init_from": "films"}, "init_from=films: the methods have different weights; leave it out"),
    ],
)
def test_invalid_settings(bench: Bench, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        run_of(bench, **changes)
    assert message in str(caught.value)


def test_invalid_inputs_are_found_before_training(bench: Bench) -> None:
    bench.stage1("films")
    with pytest.raises(UserError, match=r"optim\.lr: the methods have different learning rates"):
        SelectConfig(**bench.settings("plays"), sources=["films"])
    config, run = run_of(bench, sources=["flims"])
    with pytest.raises(UserError, match="flims"):
        check_selection(config, run)
    config, run = run_of(bench, name="films", overwrite=True)
    with pytest.raises(UserError, match="name=films: is one of the sources, which it would replace"):
        check_selection(config, run)
    config, run = run_of(bench, name="plays-selected-adapter-x/y")
    with pytest.raises(UserError, match="plays-selected-adapter-x/y"):
        check_selection(config, run)
