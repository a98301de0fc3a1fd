"""Inspection of a fusion: attention, tokens, ablation and pruning against slow versions."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusion.analysis.inspection import Evaluation, ablate_each, prune, select_rows
from fusion.cli.finished import inspected
from fusion.config.commands import InspectConfig
from fusion.config.compositions import CompositionConfig
from fusion.errors import UserError
from fusion.model.source_attention import AttentionSums
from fusion.reporting.records import ablation, pack, unpack
from tests.bench import Bench

KEYS = {
    *("name", "artifact", "hash", "task", "split", "fingerprint", "rows", "backbone", "composition", "drop"),
    *("sources", "slots", "metrics", "labels", "predicted", "attention", "masked", "pruned", "words", "speed"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("inspected") / "a folder", tiny_backbone)
    for task in ("films", "books", "plays"):
        bench.stage1(task)
    bench.result = bench.stage2("plays", ["films", "books"], name="fused")
    return bench


def inspect(bench: Bench, artifact: str = "fused", **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return bench.inspect(artifact, **changes)


def test_inspection_and_result(trained: Bench) -> None:
    result, seen = inspect(trained, words=4)
    assert set(seen) == KEYS
    assert seen["sources"] == ["films", "books"] and seen["rows"] == 16
    assert seen["slots"] == [f"{layer}.feedforward" for layer in range(3)]
    assert seen["metrics"] == trained.result["metrics"]["validation"], "the data of the training"
    for slot in seen["slots"]:
        assert sum(seen["attention"][slot]["mean"]) == pytest.approx(1.0)
        assert 0 <= seen["attention"][slot]["entropy"] <= math.log(2) + 1e-6
    assert set(seen["masked"]) == {"films", "books"}
    for one in (seen, *seen["masked"].values()):
        assert np.mean(np.array(one["predicted"]) == seen["labels"]) == pytest.approx(one["metrics"]["accuracy"])
    assert seen["pruned"][0]["kept"] == ["films", "books"]
    assert [len(step["kept"]) for step in seen["pruned"]] == [2, 1]
    assert result["metrics"] == {"validation": seen["metrics"]}
    assert result["attention"] == {
        name: pytest.approx(np.mean([seen["attention"][slot]["mean"][n] for slot in seen["slots"]]))
        for n, name in enumerate(seen["sources"])
    }
    (titles, *rows) = inspected(result)
    assert titles == ("source", "attention", "accuracy without it", "change", "95% interval")
    assert [row[0] for row in rows] == ["films", "books"]
    without = seen["masked"]["films"]["metrics"]["accuracy"]
    assert rows[0][2:4] == (f"{without:.4f}", f"{without - seen['metrics']['accuracy']:+.4f}")
    for source, *_, change, interval in rows:
        page = ablation(seen, "accuracy")[source]  # what the report shows
        assert result["intervals"][source] == [page.low, page.high]
        assert float(change) == pytest.approx(page.mean, abs=5e-5) and page.low is not None
        assert interval.startswith(f"{page.low:+.4f} to {page.high:+.4f}")
        assert interval.endswith("inconclusive") is not page.conclusive


@pytest.mark.parametrize(
    ("interval", "shown"),
    [
        ([-0.3, -0.1], "-0.3000 to -0.1000"),
        ([0.01, 0.2], "+0.0100 to +0.2000"),
        ([-0.3, 0.1], "-0.3000 to +0.1000, inconclusive"),
        ([-0.3, 0.0], "-0.3000 to +0.0000, inconclusive"),
        ([None, None], "none, inconclusive"),
        (None, "-"),
    ],
)
def test_inconclusive_changes_are_marked(interval: list[float | None] | None, shown: str) -> None:
    result: dict[str, Any] = {"metrics": {"validation": {"f1": 0.8}}, "attention": {"films": 0.6}}
    result |= {"masked": {"films": 0.7}} | ({} if interval is None else {"intervals": {"films": interval}})
    assert inspected(result)[1] == ("films", "0.6000", "0.7000", "-0.1000", shown)
    assert inspected(result | {"masked": {}, "intervals": {}})[1][2:] == ("-", "-", "-")


def test_ablation_of_one_of_two_sources_is_the_fusion_of_the_other(trained: Bench) -> None:
    _, seen = inspect(trained, words=1)
    left = seen["pruned"][1]["kept"][0]
    (gone,) = set(seen["sources"]) - {left}
    assert seen["pruned"][1]["metrics"] == seen["masked"][gone]["metrics"]


def test_attention_equals_that_of_predict(trained: Bench) -> None:
    _, seen = inspect(trained, words=16)
    lines = [json.loads(line) for line in (trained.folder / "data/plays/validation.jsonl").read_text().splitlines()]
    predictions = trained.predict("fused", lines, attention=True)
    # Row means weighted by the rows' tokens are the mean over all tokens.
    counts = np.array([len(line["text"].split()) + 2 for line in lines])
    for layer, slot in enumerate(seen["slots"]):
        each = np.array([[line["attention"][str(layer)][name] for name in seen["sources"]] for line in predictions])
        np.testing.assert_allclose(
            (each * counts[:, None]).sum(0) / counts.sum(), seen["attention"][slot]["mean"], atol=1e-5
        )
    for word in seen["words"]:
        shape = (len(seen["slots"]), len(word["tokens"]), 2)
        weights = unpack(word["weights"], shape)
        line = predictions[word["row"]]
        for layer in range(3):
            expected = [line["attention"][str(layer)][name] for name in seen["sources"]]
            np.testing.assert_allclose(weights[layer].mean(0), expected, atol=1 / 255)
        assert word["predicted"].startswith(line["label"])
        assert word["truth"] == ["bad", "good"][lines[word["row"]]["label"]]
        assert word["right"] is (line["label"] == word["truth"])
        assert "".join(word["tokens"]).split()[1:-1] == lines[word["row"]]["text"].split()
        assert word["special"] == [0, len(word["tokens"]) - 1]


def test_given_examples_and_no_pruning(trained: Bench) -> None:
    _, seen = inspect(trained, words=[3, 0], prune=False)
    assert [word["row"] for word in seen["words"]] == [3, 0]
    assert seen["pruned"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"artifact": "films"}, "only a fusion has source attention"),
        ({"artifact": "nothing"}, "nothing"),
        ({"words": [99]}, "examples from 0 to 15"),
        ({"split": "tset"}, "tset"),
        ({"drop": 9}, "drop=9: the backbone of fused has 3 layers"),
    ],
)
def test_refused_inspections(trained: Bench, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inspect(trained, **changes)


@pytest.mark.parametrize("words", [-1, [], [-2], "many", True, 1.5])
def test_wrong_values_of_the_words_setting(words: Any) -> None:
    with pytest.raises(UserError, match="words="):
        InspectConfig(artifact="a", words=words)


def test_weights_that_do_not_sum_to_one_have_no_entropy_and_no_token_attention(trained: Bench) -> None:
    composition = CompositionConfig("scalearn_uniform")
    trained.stage2("plays", ["films", "books"], name="scaled", composition=composition)
    _, seen = inspect(trained, "scaled")
    assert seen["words"] == []
    assert all(slot["entropy"] is None for slot in seen["attention"].values())
    assert set(seen["masked"]) == {"films", "books"}


def test_other_kinds_of_tasks(trained: Bench) -> None:
    trained.add_rating()
    trained.add_quiz()
    for task in ("rating", "quiz"):
        trained.stage2(task, ["films", "books"], name=f"{task}-fused")
        _, seen = inspect(trained, f"{task}-fused", words=3)
        assert set(seen["masked"]) == {"films", "books"} and len(seen["words"]) == 3
        assert (seen["words"][0]["right"] is None) is (task == "rating")


def test_sums_against_a_loop() -> None:
    torch.manual_seed(0)
    sums, total, entropy, tokens = AttentionSums(), [0.0] * 3, 0.0, 0
    for rows, length in ((2, 5), (3, 4)):
        weights = torch.rand(rows, length, 3).softmax(-1)
        mask = (torch.rand(rows, length) > 0.3).long()
        sums.add("0.feedforward", weights, mask)
        for row in range(rows):
            for token in range(length):
                if mask[row, token]:
                    tokens += 1
                    for source in range(3):
                        share = float(weights[row, token, source])
                        total[source] += share
                        entropy -= share * math.log(share)
    found = sums.by_slot({})["0.feedforward"]
    assert found.mean == pytest.approx([value / tokens for value in total])
    assert found.entropy == pytest.approx(entropy / tokens)
    even = AttentionSums()
    even.add("0.feedforward", torch.eye(3)[None], torch.ones(1, 3))
    assert even.by_slot({})["0.feedforward"].entropy == 0.0


VALUES = {0: 0.1, 1: 0.4, 2: 0.0, 3: 0.2}


@pytest.mark.parametrize(
    ("greedy", "evaluated"), [(True, [(1, 3), (0, 3), (0, 1), (3,), (1,)]), (False, [(1, 3), (1,)])]
)
def test_pruning_removes_the_least_important_source_first(greedy: bool, evaluated: list[tuple[int, ...]]) -> None:
    asked: list[tuple[int, ...]] = []

    def evaluate(sources: Sequence[int]) -> Evaluation:
        asked.append(tuple(sources))
        return Evaluation({"accuracy": sum(VALUES[n] for n in sources)}, loss=float(len(sources)))

    full, ablated = evaluate(range(4)), ablate_each(4, evaluate)
    assert asked[1:] == [(1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)]
    asked.clear()
    steps = prune(full, ablated, evaluate, greedy)
    assert asked == evaluated
    assert [sources for sources, _ in steps] == [(0, 1, 2, 3), (0, 1, 3), (1, 3), (1,)]
    assert [found for _, found in steps] == [evaluate(sources) for sources, _ in steps]


def test_equal_metrics_are_decided_by_the_loss() -> None:
    ablated = [Evaluation({"f1": 1.0}, 0.5), Evaluation({"f1": 1.0}, 0.2)]
    steps = prune(Evaluation({"f1": 1.0}, 0.1), ablated, lambda sources: ablated[0], greedy=True)
    assert steps[1] == ((0,), ablated[1])


@pytest.mark.parametrize(
    ("wrong", "count", "expected"),
    [
        ([True, False] * 4, 4, [0, 1, 4, 5]),
        ([False] * 6, 3, [0, 2, 4]),
        ([True] * 6, 2, [0, 3]),
        ([True] + [False] * 9, 4, [0, 1, 4, 7]),
        ([False] * 3, 10, [0, 1, 2]),
        ([], 3, []),
        ([True, False], 0, []),
    ],
)
def test_selected_examples(wrong: list[bool], count: int, expected: list[int]) -> None:
    assert select_rows(wrong, count) == expected


def test_packed_weights() -> None:
    weights = np.random.RandomState(0).dirichlet(np.ones(5), (4, 7))
    np.testing.assert_allclose(unpack(pack(weights), (4, 7, 5)), weights, atol=0.5 / 255 + 1e-9)
    assert len(base64.b64decode(pack(weights))) == 4 * 7 * 5
