"""Text embeddings against a loop over texts, and the rows of a source."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion.analysis.ranking.scorers import source_rows, text_embedding
from fusion.backbones.load import Backbone, load_backbone
from fusion.config.data import DataConfig, LimitConfig
from fusion.data.encode import EncodedRows, encode
from fusion.data.loaders import sampled_batches
from fusion.data.rows import load_rows
from fusion.errors import UserError
from fusion.hub.tokenizer import load_tokenizer
from fusion.store.lookup import read_manifest
from tests.bench import Bench

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Path) -> Backbone:
    return load_backbone(str(tiny_backbone))


def encoded(bench: Bench, task: str, split: str = "train") -> EncodedRows:
    tokenizer = load_tokenizer(str(bench.backbone))
    rows = load_rows(bench.tasks[task], bench.data, split)
    return encode(rows, tokenizer, 16, bench.data.cache_dir)


def slow_embedding(backbone: Backbone, bench: Bench, texts: list[str]) -> list[float]:
    """One text at a time, without padding; sums in Python."""
    tokenizer: Any = load_tokenizer(str(bench.backbone))
    total = [0.0] * backbone.hidden_size
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            hidden = backbone.model(**ids).last_hidden_state[0]
        for place in range(backbone.hidden_size):
            total[place] += sum(float(token[place]) for token in hidden) / len(hidden) / len(texts)
    return total


def test_an_embedding_is_the_mean_of_means(three: Bench, backbone: Backbone) -> None:
    texts = [text for (text,) in load_rows(three.tasks["coins"], three.data, "train").texts]
    found = text_embedding(backbone, sampled_batches(encoded(three, "coins"), None, 8), CPU)
    assert found.dtype == torch.float64 and found.shape == (32,)
    assert found.tolist() == pytest.approx(slow_embedding(backbone, three, texts), abs=1e-6)


def test_each_choice_is_a_text(bench: Bench, tiny_backbone: Path) -> None:
    bench.add_quiz()
    backbone = load_backbone(str(tiny_backbone))
    rows = load_rows(bench.tasks["quiz"], bench.data, "validation")
    assert rows.choices is not None
    batches = list(sampled_batches(encoded(bench, "quiz", "validation"), None, 4))
    found = text_embedding(backbone, batches, CPU)
    total, texts = torch.zeros(32, dtype=torch.float64), 0
    for batch in batches:
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            short = ids[: int(mask.sum())].unsqueeze(0)
            types = torch.zeros_like(short)
            first = (short[0] == 3).nonzero()[0]
            types[0, int(first) + 1 :] = 1
            with torch.no_grad():
                total += backbone.model(input_ids=short, token_type_ids=types).last_hidden_state[0].mean(0)
            texts += 1
    assert texts == sum(map(len, rows.choices))
    torch.testing.assert_close(found, total / texts, rtol=0, atol=1e-6)


def test_the_examples_of_a_source_are_those_of_its_training(three: Bench, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(three.backbone))
    manifest = read_manifest("films", three.folder / "store")

    def rows(data: DataConfig, at_most: int = 1000, config: dict[str, Any] | None = None) -> EncodedRows:
        changed = {**manifest.content["run"], "config": manifest.run.config | (config or {})}
        (found,) = source_rows(manifest.changed(run=changed), data, at_most, tokenizer)
        return found

    elsewhere = DataConfig(max_length=16, cache_dir=three.data.cache_dir)
    assert rows(elsewhere).fingerprint == encoded(three, "films").fingerprint
    assert len(rows(elsewhere, 10)) == 10
    assert len(rows(elsewhere, config={"data.limit.train": 7})) == 7
    limited = dataclasses.replace(three.data, limit=LimitConfig(train=10))
    assert rows(elsewhere, 10).fingerprint == load_rows(three.tasks["films"], limited, "train").fingerprint
    # If the source's folder is missing, that of this command is read.
    gone = {"data.dir": str(tmp_path / "another machine")}
    assert len(rows(three.data, config=gone)) == 256
    with pytest.raises(UserError, match="another machine"):
        rows(elsewhere, config=gone)
    here = Path(three.data.dir or "").parent
    moved = manifest.changed(run={**manifest.content["run"], "folder": str(here), "config": {"data.dir": "data"}})
    assert len(source_rows(moved, elsewhere, 1000, tokenizer)[0]) == 256  # relative to the folder of its command


def test_the_examples_of_a_multi_task_source(bench: Bench) -> None:
    bench.multitask("films", "books", trainer=bench.settings("films")["trainer"])
    manifest = read_manifest("films-books-multitask_adapter", bench.folder / "store")
    tokenizer = load_tokenizer(str(bench.backbone))
    assert [len(rows) for rows in source_rows(manifest, bench.data, 1000, tokenizer)] == [64, 64]
    assert [len(rows) for rows in source_rows(manifest, bench.data, 20, tokenizer)] == [10, 10]
