"""Writes the artifacts in this folder, with the code of version 0.1 (commit b9a9942) and no other.

    git worktree add ../old b9a9942 && cp tests/store/v0_1/make.py ../old/
    cd ../old && PYTHONPATH=. python make.py FOLDER

A random backbone of 2 layers and hidden size 8, made-up sentences, one artifact of each kind, and in
evaluated.json what `evaluate` gave for each. All paths are relative to FOLDER.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from fusion import evaluate, provenance, stage1, stage2
from fusion.config import (
    AdapterConfig,
    BackboneConfig,
    DataConfig,
    EvaluateConfig,
    HeadConfig,
    MethodConfig,
    OptimConfig,
    Stage1Config,
    Stage2Config,
    TaskConfig,
    TrainerConfig,
)
from fusion.run import Run
from tests.conftest import WORDS, save_tokenizer

LABELS = ["bad", "good"]
METRICS = ["matthews", "accuracy", "f1", "macro_f1"]
TASKS = {
    name: TaskConfig(name=name, text="text", labels=LABELS, metrics=METRICS) for name in ("films", "books")
}
DATA = DataConfig(dir="data", batch_size=8, max_length=16, cache_dir="cache")


def write_backbone(folder: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=save_tokenizer(folder),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    model = BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)


def write_rows(folder: Path) -> None:
    draw = random.Random(folder.name)
    folder.mkdir(parents=True)
    for split, count in (("train", 96), ("validation", 21)):
        lines = []
        for _ in range(count):
            label = draw.randrange(2)
            words = [*draw.choices(WORDS[:8], k=draw.randrange(2, 9)), LABELS[label]]
            draw.shuffle(words)
            lines.append(json.dumps({"text": " ".join(words), "label": label}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def run(command: str, config: Any, name: str) -> Run:
    directory = Path("runs") / f"{command}-{name}"
    directory.mkdir(parents=True)
    return Run(command, directory, (), dataclasses.asdict(config), command)


def train(command: Any, kind: type[Any], name: str, task: str | None = "films", **settings: Any) -> None:
    config = kind(
        task=None if task is None else TASKS[task],
        name=name,
        data=DATA,
        backbone=BackboneConfig(name_or_path="backbone", pooling="mean", cache="off"),
        optim=settings.pop("optim", OptimConfig(lr=5e-2, patience=None)),
        trainer=TrainerConfig(accelerator="cpu", max_epochs=12, enable_progress_bar=False),
        store="store",
        **settings,
    )
    command.main.__wrapped__(config, run(command.__name__.rsplit(".")[-1], config, name))


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    provenance._folder = lambda: None  # no path of the machine that made them
    write_backbone(Path("backbone"))
    for task in TASKS:
        write_rows(Path("data") / task)
    small = AdapterConfig(bottleneck_size=2)
    train(stage1, Stage1Config, "films", adapter=small)
    train(stage1, Stage1Config, "books", "books", adapter=AdapterConfig(bottleneck_size=3, scaling=2.0))
    train(stage2, Stage2Config, "fusion", sources=["films", "books"])
    train(stage1, Stage1Config, "head", method=MethodConfig("head"), head=HeadConfig(layers=2))
    train(stage1, Stage1Config, "lora", method=MethodConfig("lora", rank=2))
    train(stage1, Stage1Config, "bitfit", method=MethodConfig("bitfit"))
    train(
        stage1, Stage1Config, "full", method=MethodConfig("full"), optim=OptimConfig(lr=1e-2, patience=None)
    )
    several = {"tasks": list(TASKS.values()), "method": MethodConfig("multitask_adapter"), "adapter": small}
    train(stage1, Stage1Config, "multitask", None, **several)
    evaluated = {}
    for name in sorted(path.name for path in Path("store").iterdir() if not path.name.startswith(".")):
        config = EvaluateConfig(artifact=name, store="store", data=DATA, accelerator="cpu")
        one = run("evaluate", config, name)
        result = evaluate.main.__wrapped__(config, one)  # type: ignore[attr-defined]
        outcomes = json.loads((one.directory / "outcomes.json").read_text())
        predicted = {split: rows["predicted"] for split, rows in outcomes.items()}
        evaluated[name] = {"hash": result["hash"], "metrics": result["metrics"], "predicted": predicted}
    Path("evaluated.json").write_text(json.dumps(evaluated, indent=1) + "\n")
    for left in ("runs", "cache", "store/.runs", "store/.locks", "store/.staging"):
        shutil.rmtree(left, ignore_errors=True)


if __name__ == "__main__":
    main()
