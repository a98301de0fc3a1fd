"""attention.jsonl against sums over every token of every row, without the recorder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion.backbones.load import load_backbone
from fusion.config.compositions import CompositionConfig
from fusion.config.training import TrainerConfig
from fusion.data.batches import Batch
from fusion.data.encode import encode
from fusion.data.loaders import evaluation_loader
from fusion.data.rows import load_rows
from fusion.hub.tokenizer import load_tokenizer
from fusion.model.build import stored_model
from fusion.model.source_attention import AttentionSums, real_tokens
from fusion.store.artifacts import load
from tests.bench import Bench

ONCE = TrainerConfig(accelerator="cpu", max_epochs=1, enable_progress_bar=False, num_sanity_val_steps=2)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("attention") / "a folder", tiny_backbone)
    bench.add_quiz()
    for name in ("films", "books"):
        bench.stage1(name, trainer=ONCE)
    return bench


def lines(bench: Bench) -> list[dict[str, Any]] | None:
    """The lines of the last run; None if it has no file."""
    file = bench.folder / "runs" / str(bench.runs) / "attention.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else None


def slowly(bench: Bench, name: str, task: str) -> dict[str, dict[str, Any]]:
    """Mean weights and entropy over all tokens, one validation row at a time."""
    artifact = load(name, bench.folder / "store")
    model = stored_model(artifact, artifact.path.parent, load_backbone(str(bench.backbone))).eval()
    rows = load_rows(bench.tasks[task], bench.data, "validation")
    encoded = encode(rows, load_tokenizer(str(bench.backbone)), 16, bench.data.cache_dir)
    weights: dict[str, list[list[float]]] = {}
    for batch in evaluation_loader(encoded, 1):

        def record(slot: str, values: Tensor, batch: Batch = batch) -> None:
            for text, mask in zip(values, batch.attention_mask, strict=True):
                weights.setdefault(slot, []).extend(
                    token.tolist() for token, real in zip(text, mask, strict=True) if real
                )

        with torch.no_grad():
            model(batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.choice_counts, record=record)
    return {
        slot: {
            "mean": [math.fsum(token[n] for token in tokens) / len(tokens) for n in range(len(tokens[0]))],
            "entropy": math.fsum(-p * math.log(p) for token in tokens for p in token if p > 0) / len(tokens),
        }
        for slot, tokens in weights.items()
    }


@pytest.mark.parametrize(
    ("task", "composition"),
    [
        ("plays", CompositionConfig()),
        ("quiz", CompositionConfig(target_adapter=True)),
        ("plays", CompositionConfig(name="sequence", value_matrix=False)),
        ("plays", CompositionConfig(name="scalearn")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_it_is_the_mean_over_all_real_tokens(bench: Bench, task: str, composition: CompositionConfig) -> None:
    name = f"{task}-{composition.name}"
    bench.stage2(task, ["films", "books"], composition=composition, trainer=ONCE, name=name)
    (line,) = lines(bench) or []  # no lines of the sanity check
    assert set(line) == {"step", "epoch", "sources", "slots"}
    assert line["epoch"] == 1 and line["sources"] == ["films", "books"]
    history = (bench.folder / "runs" / str(bench.runs) / "history.jsonl").read_text().splitlines()
    assert line["step"] == json.loads(history[-1])["step"] and "validation/accuracy" in history[-1]
    expected = slowly(bench, name, task)
    assert list(line["slots"]) == list(expected) == [f"{layer}.feedforward" for layer in range(3)]
    weights = bench.weights(name)
    for slot, found in line["slots"].items():
        assert set(found) == {"mean", "entropy", "value_distance"}
        assert found["mean"] == pytest.approx(expected[slot]["mean"], abs=2e-6)
        if composition.name == "scalearn":  # factors, and no shares of 1
            assert found["entropy"] is None
        else:
            assert found["entropy"] == pytest.approx(expected[slot]["entropy"], abs=2e-6)
            assert 0 < found["entropy"] <= math.log(2) + 1e-6
        value = [tensor for key, tensor in weights.items() if key.startswith(slot) and "value" in key]
        if not value:
            assert found["value_distance"] is None
            continue
        squares = sum((v - (i == j)) ** 2 for i, row in enumerate(value[0].tolist()) for j, v in enumerate(row))
        assert found["value_distance"] == pytest.approx(math.sqrt(squares / 32), rel=1e-5)
    assert (composition.name == "adapterfusion") == (line["slots"]["0.feedforward"]["value_distance"] is not None)


def test_one_line_per_validation_also_if_nothing_trains(bench: Bench) -> None:
    often = TrainerConfig(
        accelerator="cpu", max_epochs=2, enable_progress_bar=False, val_check_interval=0.5, log_every_n_steps=1
    )
    bench.stage2("plays", ["films", "books"], trainer=often, name="often")
    assert [(line["step"], line["epoch"]) for line in lines(bench) or []] == [(3, 1), (7, 1), (11, 2), (15, 2)]
    pruned = CompositionConfig(name="pruned", fusion="often", keep=1)
    bench.stage2("plays", [], composition=pruned, name="pruned")
    (line,) = lines(bench) or []  # evaluated, once
    assert (line["step"], line["epoch"], line["sources"]) == (0, 1, ["films", "books"])
    assert all(sorted(slot["mean"]) == [0.0, 1.0] for slot in line["slots"].values())
    assert all(slot["entropy"] == 0.0 for slot in line["slots"].values())


def test_compositions_without_weights_have_no_file(bench: Bench) -> None:
    bench.stage2("plays", ["films", "books"], trainer=ONCE, name="attending")
    assert lines(bench) is not None
    bench.stage2("plays", ["films", "books"], composition=CompositionConfig(name="average"), trainer=ONCE)
    assert lines(bench) is None
    bench.stage1("plays", trainer=ONCE)
    assert lines(bench) is None


def test_fillers_and_padding_are_excluded() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
    plain = batch_of(mask, weights=[1.0, 0.0, 1.0, 1.0])
    assert real_tokens(plain).tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 1, 0]]
    choices = batch_of(mask, weights=[0.0, 1.0], choice_counts=[3, 1])
    assert real_tokens(choices).tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 1, 0]]
    sums = AttentionSums()
    weights = torch.rand(4, 3, 2).softmax(-1)
    sums.recorder(plain)("0.feedforward", weights)
    sums.recorder(choices)("0.feedforward", weights)
    tokens = [weights[s, t] for s, t in [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 0), (3, 1)]]
    mean = sums.by_slot({})["0.feedforward"].mean
    assert mean == pytest.approx(torch.stack(tokens).mean(0).tolist(), abs=1e-6)


def batch_of(mask: Tensor, weights: list[float], choice_counts: list[int] | None = None) -> Batch:
    rows = torch.arange(len(weights))
    return Batch(
        input_ids=mask,
        attention_mask=mask,
        token_type_ids=None,
        labels=torch.zeros(len(weights), dtype=torch.long),
        choice_counts=None if choice_counts is None else torch.tensor(choice_counts),
        rows=rows,
        weights=torch.tensor(weights),
        global_rows=len(weights),
    )


def test_the_sums_of_all_processes_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other processes are mocked."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.mul_(3))
    sums = AttentionSums()
    sums.add("0.feedforward", torch.tensor([[[0.25, 0.75], [1.0, 0.0]]]), torch.tensor([[1, 1]]))
    found = sums.by_slot({}, distributed=True)["0.feedforward"]
    assert found.mean == pytest.approx([0.625, 0.375])  # tokens are added as weights are
    assert found.entropy == pytest.approx((-0.25 * math.log(0.25) - 0.75 * math.log(0.75)) / 2, rel=1e-6)
