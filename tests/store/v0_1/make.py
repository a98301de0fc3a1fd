"""Writes the artifacts in this folder, with the code of version 0.1 (commit b9a9942) and no other.

    git worktree add ../old b9a9942 && cp tests/store/v0_1/make.py ../old/
    cd ../old && PYTHONPATH=. python make.py FOLDER

A random backbone of 2 layers and hidden size 8, made-up sentences, one artifact of each kind, placement and
composition, and in evaluated.json what `evaluate` gave for each. All paths are relative to FOLDER. What FOLDER
already holds is kept, so a copy of this folder gets only the artifacts that it lacks.
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

from fusion import evaluate, stage1, stage2
from fusion.config.commands import EvaluateConfig
from fusion.config.compositions import CompositionConfig
from fusion.config.data import DataConfig
from fusion.config.methods import MethodConfig
from fusion.config.model import AdapterConfig, BackboneConfig, HeadConfig
from fusion.config.stages import Stage1Config, Stage2Config
from fusion.config.task import TaskConfig
from fusion.config.training import OptimConfig, TrainerConfig
from fusion.runs.run import Run
from fusion.training import stage
from tests.tiny_backbone import WORDS, save_tokenizer

LABELS = ["bad", "good"]
METRICS = ["matthews", "accuracy", "f1", "macro_f1"]
TASKS = {name: TaskConfig(name=name, text="text", labels=LABELS, metrics=METRICS) for name in ("films", "books")}
PAIRS = {  # tasks of the other kinds
    "similar": TaskConfig(
        name="similar", kind="regression", text=["first", "second"], label="score", metrics=["pearson", "spearman"]
    ),
    "ending": TaskConfig(
        name="ending",
        kind="choice",
        text="text",
        choices="options",
        label="right",
        label_values=["A", "B", "C"],
        columns={"options": "ends"},
        metrics=["accuracy"],
    ),
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


def write_pairs(folder: Path) -> None:
    """Rows of the regression task (how alike two texts are) and of the choice task (which end repeats the text)."""
    draw = random.Random(folder.name)
    folder.mkdir(parents=True)
    for split, count in (("train", 64), ("validation", 15)):
        lines = []
        for _ in range(count):
            words = draw.sample(WORDS[:8], 3)
            if folder.name == "similar":
                kept = draw.randrange(4)
                other = [*words[:kept], *draw.sample(WORDS[8:16], 3 - kept)]
                row: dict[str, Any] = {"first": " ".join(words), "second": " ".join(other), "score": kept / 2}
            else:
                ends = [" ".join(draw.sample(WORDS[8:], 2)) for _ in range(3)]
                right = draw.randrange(3)
                ends[right] = " ".join(words[:2])
                row = {"text": " ".join(words), "ends": ends, "right": "ABC"[right]}
            lines.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def run(command: str, config: Any, name: str) -> Run:
    directory = Path("runs") / f"{command}-{name}"
    if directory.exists():
        directory = directory.with_name(f"{directory.name}-again")
    directory.mkdir(parents=True)
    return Run(command, directory, (), dataclasses.asdict(config), command)


def train(command: Any, kind: type[Any], name: str, task: str | None = "films", **settings: Any) -> None:
    if (Path("store") / name).exists() and not settings.get("overwrite"):
        return
    config = kind(
        task=None if task is None else (TASKS | PAIRS)[task],
        name=name,
        data=DATA,
        backbone=BackboneConfig(name_or_path="backbone", pooling="mean", cache="off"),
        optim=settings.pop("optim", OptimConfig(lr=5e-2, patience=None)),
        trainer=TrainerConfig(accelerator="cpu", max_epochs=settings.pop("epochs", 12), enable_progress_bar=False),
        store="store",
        **settings,
    )
    command.main.__wrapped__(config, run(command.__name__.rsplit(".")[-1], config, name))


def train_placements() -> None:
    """Adapters of every placement and of every setting that a manifest has for them; tuning with other settings."""
    houlsby = AdapterConfig(
        name="houlsby",
        sites=["attention", "feedforward"],
        reads="output",
        bottleneck_size=2,
        nonlinearity="gelu",
        scaling="learned",
        init="houlsby",
    )
    train(stage1, Stage1Config, "houlsby", "similar", adapter=houlsby, head=HeadConfig(layers=2))
    one_size = dataclasses.replace(houlsby, shared=True, dropout=0.1, drop="robust")
    train(stage1, Stage1Config, "houlsby-shared", "ending", adapter=one_size, epochs=20)
    parallel = AdapterConfig(
        name="parallel", reads="input", reduction_factor=3.0, nonlinearity="silu", scaling=4, init="zero_up"
    )
    parallel = dataclasses.replace(parallel, drop="specialized:1")
    train(stage1, Stage1Config, "parallel", adapter=parallel, head=HeadConfig(pooling="cls", dropout=0.0))
    before = AdapterConfig(name="before_attention", sites=["before_attention"], reads="input", bottleneck_size=3)
    train(stage1, Stage1Config, "before-attention", "books", adapter=before, seed=7)
    last = AdapterConfig(bottleneck_size=2, nonlinearity="tanh", layers="last:1")
    train(stage1, Stage1Config, "last-layer", "books", adapter=last)
    train(stage1, Stage1Config, "shared", "books", adapter=AdapterConfig(bottleneck_size=2, shared=True))
    lora = MethodConfig("lora", rank=3, alpha=6, dropout=0.1, targets=["query", "key", "value"])
    train(stage1, Stage1Config, "lora-wide", "similar", method=lora)
    every = {"tasks": [TASKS["books"], *PAIRS.values()], "method": MethodConfig("multitask_full", temperature=1.0)}
    train(stage1, Stage1Config, "multitask-full", None, **every, optim=OptimConfig(lr=1e-2, patience=None))


def train_compositions() -> None:
    """Fusions of every composition, with every setting that a manifest has for them in one of them at least."""

    def fuse(name: str, sources: list[str], config: CompositionConfig, task: str = "films") -> None:
        train(stage2, Stage2Config, name, task, sources=sources, composition=config)

    settings: dict[str, Any] = {"rank": 3, "value_matrix": False, "temperature": 2.0, "dropout": 0.1}
    settings |= {"target_adapter": True, "layers": [1], "drop": "robust"}
    attention = CompositionConfig("adapterfusion", **settings)
    fuse("attention", ["films", "books", "last-layer"], attention)
    fuse("sequence", ["houlsby", "houlsby-shared"], CompositionConfig("sequence", value_penalty=0.5))
    fuse("static", ["parallel"], CompositionConfig("static", drop="specialized:1"), "books")
    fuse("mean", ["films", "books"], CompositionConfig("mean"), "similar")
    fuse("mean-target", ["films", "shared"], CompositionConfig("mean", target_adapter=True), "ending")
    fuse("scalearn", ["films", "last-layer"], CompositionConfig("scalearn"))
    fuse("scalearn-uniform", ["houlsby", "houlsby-shared"], CompositionConfig("scalearn_uniform"), "books")
    fuse("scalearn-pp", ["films", "last-layer", "shared"], CompositionConfig("scalearn_pp"))
    fuse("scalearn-uniform-pp", ["before-attention"], CompositionConfig("scalearn_uniform_pp", layers="last:1"))
    fuse("average", ["films", "shared"], CompositionConfig("average", train=True))
    fuse("average-frozen", ["shared"], CompositionConfig("average"), "books")
    fuse("pruned", [], CompositionConfig("pruned", fusion="fusion", keep=1))
    fuse("pruned-attention", [], CompositionConfig("pruned", fusion="attention", keep=2, train=True))
    fuse("continued", ["books", "films"], CompositionConfig("continued"))
    # A fusion whose source is replaced afterwards finds it in store/.replaced.
    small = AdapterConfig(bottleneck_size=1, layers=[0])
    if not (Path("store") / "replaced").exists():
        train(stage1, Stage1Config, "replaced", "books", adapter=small)
        fuse("of-replaced", ["replaced", "films"], CompositionConfig("static"))
        train(stage1, Stage1Config, "replaced", "books", adapter=small, seed=1, overwrite=True)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    circumstances = stage.circumstances
    stage.circumstances = lambda: circumstances() | {"folder": None}  # no path of the machine that made them
    if not Path("backbone").exists():
        write_backbone(Path("backbone"))
        for task in TASKS:
            write_rows(Path("data") / task)
    for task in PAIRS:
        if not (Path("data") / task).exists():
            write_pairs(Path("data") / task)
    small = AdapterConfig(bottleneck_size=2)
    train(stage1, Stage1Config, "films", adapter=small)
    train(stage1, Stage1Config, "books", "books", adapter=AdapterConfig(bottleneck_size=3, scaling=2.0))
    train(stage2, Stage2Config, "fusion", sources=["films", "books"])
    train(stage1, Stage1Config, "head", method=MethodConfig("head"), head=HeadConfig(layers=2))
    train(stage1, Stage1Config, "lora", method=MethodConfig("lora", rank=2))
    train(stage1, Stage1Config, "bitfit", method=MethodConfig("bitfit"))
    train(stage1, Stage1Config, "full", method=MethodConfig("full"), optim=OptimConfig(lr=1e-2, patience=None))
    several = {"tasks": list(TASKS.values()), "method": MethodConfig("multitask_adapter"), "adapter": small}
    train(stage1, Stage1Config, "multitask", None, **several)
    train_placements()
    train_compositions()
    evaluated = json.loads(Path("evaluated.json").read_text()) if Path("evaluated.json").exists() else {}
    for name in sorted(path.name for path in Path("store").iterdir() if not path.name.startswith(".")):
        config = EvaluateConfig(artifact=name, store="store", data=DATA, accelerator="cpu")
        one = run("evaluate", config, name)
        result = evaluate.main.__wrapped__(config, one)  # type: ignore[attr-defined]
        outcomes = json.loads((one.directory / "outcomes.json").read_text())
        predicted = {split: rows["predicted"] for split, rows in outcomes.items()}
        found = {"hash": result["hash"], "metrics": result["metrics"], "predicted": predicted}
        assert evaluated.setdefault(name, found) == found, f"{name}: its evaluation has changed"
    Path("evaluated.json").write_text(json.dumps(evaluated, indent=1) + "\n")
    for left in ("runs", "cache", "store/.runs", "store/.locks", "store/.staging"):
        shutil.rmtree(left, ignore_errors=True)


if __name__ == "__main__":
    main()
